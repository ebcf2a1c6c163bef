import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.policy import Chooser, Policy, last_answerer
from expertoken.modeling.pool import ExpertPool

POOL = ExpertPool(
    [
        Expert("dear", "openai", "d", base_url="http://127.0.0.1/v1", cost={"input": 10.0, "output": 30.0}),
        Expert("cheap", "openai", "c", base_url="http://127.0.0.1/v1", cost={"input": 0.1, "output": 0.1}),
        Expert("self", "self"),
    ]
)
LOGITS = torch.tensor([3.0, 2.0, 1.0])
CHOOSER = Chooser(POOL, chances=True)


def choose(policy, logits=LOGITS, **more):
    return CHOOSER.choose(policy, logits, **more)


def test_a_policy_that_says_nothing_takes_the_most_probable():
    dispatch = choose(Policy())
    assert dispatch.ranking == ("dear", "cheap", "self")
    assert sum(dispatch.probabilities.values()) == pytest.approx(1)


@given(
    st.lists(st.floats(-20, 20), min_size=3, max_size=3),
    st.sets(st.sampled_from(POOL.names)),
    st.floats(0, 1000),
    st.one_of(st.none(), st.floats(0, 1)),
    st.floats(-5, 5),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_whatever_is_set_probabilities_stay_the_trained_ones_and_only_who_may_is_asked(
    logits, denied, weight, tolerance, sticky, threshold, fallbacks
):
    policy = Policy(threshold, None, weight, tolerance, sticky, None, tuple(denied), fallbacks)
    logits = torch.tensor(logits)
    if len(denied) == 3:
        with pytest.raises(ExpertokenError, match="allow and deny exclude all candidates"):
            choose(policy, logits)
        return
    dispatch = choose(policy, logits, prompt_tokens=100, last="cheap")
    assert list(dispatch.probabilities.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-6)
    assert not denied & set(dispatch.ranking)
    assert dispatch.expert == dispatch.ranking[0]
    assert len(dispatch.ranking) == min(3 - len(denied), math.inf if fallbacks is None else 1 + fallbacks)
    assert len(set(dispatch.ranking)) == len(dispatch.ranking)


def test_below_the_threshold_the_default_answers_and_the_best_is_next():
    dispatch = choose(Policy(threshold=0.9))
    assert dispatch.ranking == ("self", "dear", "cheap")
    assert "less than 0.9" in dispatch.reason
    assert choose(Policy(threshold=0.9, default="cheap")).expert == "cheap"
    assert choose(Policy(threshold=0.5)).expert == "dear"


def test_a_usd_is_worth_as_much_chance_as_its_weight():
    dear, cheap, own = CHOOSER.usd(1000)
    assert dear == pytest.approx((1000 * 10 + 300 * 30) / 1e6)
    assert own == 0
    chances = LOGITS.sigmoid().tolist()
    even = (chances[0] - chances[1]) / (dear - cheap)
    denied = {"deny": ("self",)}
    assert choose(Policy(cost_weight=0.99 * even, **denied), prompt_tokens=1000).expert == "dear"
    other = choose(Policy(cost_weight=1.01 * even, **denied), prompt_tokens=1000)
    assert other.expert == "cheap"
    assert "dear would have been chosen" in other.reason
    assert other.chances == pytest.approx(dict(zip(POOL.names, chances, strict=True)))


def test_within_the_tolerance_the_cheapest_answers():
    chances = LOGITS.sigmoid().tolist()
    assert choose(Policy(tolerance=chances[0] - chances[1] - 0.01), prompt_tokens=1000).expert == "dear"
    near = choose(Policy(tolerance=chances[0] - chances[1] + 0.01), prompt_tokens=1000)
    assert near.ranking == ("cheap", "dear", "self")
    assert choose(Policy(tolerance=1.0, cost_weight=1e-9), prompt_tokens=1000).expert == "self"
    assert choose(Policy(tolerance=0.0, cost_weight=1e9), prompt_tokens=1000).expert == "dear"


@pytest.mark.parametrize("weighed", [{"cost_weight": 1.0}, {"tolerance": 0.1}])
def test_costs_are_weighed_against_chances_or_not_at_all(weighed):
    with pytest.raises(ExpertokenError, match="expected a composite trained with `--objective correctness`"):
        Chooser(POOL).choose(Policy(**weighed), LOGITS)


def test_an_expert_of_unknown_cost_counts_as_the_dearest_and_stops_nobody():
    unpriced = Expert("unpriced", "openai", "u", base_url="http://127.0.0.1/v1")
    pool = ExpertPool([POOL["dear"], POOL["cheap"], unpriced])
    chooser = Chooser(pool, chances=True)
    assert chooser.usd(1000)[2] == chooser.usd(1000)[0]
    assert chooser.choose(Policy(cost_weight=100.0), torch.tensor([1.0, 1.0, 1.1])).expert == "cheap"
    measured = Chooser(pool, chances=True, usd_per_query={"unpriced": 1e-6})
    assert measured.choose(Policy(cost_weight=100.0), torch.tensor([1.0, 1.0, 1.1])).expert == "unpriced"


def test_where_no_cost_is_known_none_is_weighed():
    unpriced = Expert("a", "openai", "a", base_url="http://127.0.0.1/v1")
    for pool in (ExpertPool([unpriced]), ExpertPool([unpriced, Expert("self", "self")])):
        with pytest.raises(ExpertokenError, match="no candidate's cost is known"):
            Chooser(pool, chances=True).choose(Policy(cost_weight=1.0), torch.zeros(len(pool.names)))


def test_a_chat_stays_with_its_expert_where_the_others_are_not_much_better():
    assert choose(Policy(sticky=1.5), last="cheap").expert == "cheap"
    assert choose(Policy(sticky=0.5), last="cheap").expert == "dear"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "cheap"}]
    assert last_answerer(chat, POOL) == "cheap"
    assert last_answerer([*chat, {"role": "assistant", "content": "c", "name": "stranger"}], POOL) is None


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"treshold": 0.5}, "policy.treshold: unknown key, did you mean 'threshold'?"),
        ({"threshold": 2}, "policy.threshold: expected a probability or null, got 2"),
        ({"cost_weight": float("nan")}, "policy.cost_weight: expected a number of at least 0"),
        ({"tolerance": 2}, "policy.tolerance: expected a chance to give up, 0 to 1, or null, got 2"),
        ({"allow": "math"}, "policy.allow: expected a list of names or null, got 'math'"),
        ({"fallbacks": True}, "policy.fallbacks: expected a whole number"),
        (["threshold"], "policy: expected a mapping, got list"),
    ],
)
def test_a_policy_that_is_not_well_formed_is_one_line(document, told):
    with pytest.raises(ExpertokenError) as error:
        Policy.parse(document)
    assert str(error.value).startswith(told)


def test_names_that_are_nobodys_are_told():
    with pytest.raises(ExpertokenError, match=r"policy.deny: no candidate 'chep', did you mean 'cheap'\?"):
        choose(Policy(deny=("chep",)))


def test_a_policy_survives_its_document():
    policy = Policy(threshold=0.4, allow=("dear", "self"), sticky=1.0)
    assert Policy.parse(policy.document()) == policy
    assert Policy.parse({"sticky": 0}, policy) == Policy(threshold=0.4, allow=("dear", "self"), sticky=0)


def test_a_request_that_allows_nobody_is_not_given_what_the_operator_allows():
    operator = Policy(allow=("math", "law"), deny=("law",))
    assert Policy(allow=()).within(operator).allow == ()
    assert Policy(allow=None).within(operator).allow == ("math", "law")
    assert Policy(allow=("law", "self"), deny=()).within(operator) == Policy(allow=("law",), deny=("law",))
