import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertoken.inference.policy import Policy, last_answerer, request_cost
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.experts import Expert
from expertoken.modeling.pool import ExpertPool

POOL = ExpertPool(
    [
        Expert("dear", "openai", "d", base_url="http://127.0.0.1/v1", cost={"input": 10.0, "output": 30.0}),
        Expert("cheap", "openai", "c", base_url="http://127.0.0.1/v1", cost={"input": 0.1, "output": 0.1}),
        Expert("self", "self"),
    ]
)
LOGITS = torch.tensor([3.0, 2.0, 1.0])


def test_a_policy_that_says_nothing_takes_the_most_probable():
    dispatch = Policy().choose(POOL, LOGITS)
    assert dispatch.ranking == ("dear", "cheap", "self")
    assert sum(dispatch.probabilities.values()) == pytest.approx(1)


@given(
    st.lists(st.floats(-20, 20), min_size=3, max_size=3),
    st.sets(st.sampled_from(POOL.names)),
    st.floats(0, 1000),
    st.floats(-5, 5),
    st.one_of(st.none(), st.floats(0, 1)),
    st.one_of(st.none(), st.integers(0, 3)),
)
def test_whatever_is_set_probabilities_stay_the_trained_ones_and_only_who_may_is_asked(
    logits, denied, weight, sticky, threshold, fallbacks
):
    policy = Policy(threshold, None, weight, sticky, None, tuple(denied), fallbacks)
    logits = torch.tensor(logits)
    if len(denied) == 3:
        with pytest.raises(ExpertokenError, match="nobody is left"):
            policy.choose(POOL, logits)
        return
    dispatch = policy.choose(POOL, logits, prompt_tokens=100, last="cheap")
    assert list(dispatch.probabilities.values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-6)
    assert not denied & set(dispatch.ranking)
    assert dispatch.expert == dispatch.ranking[0]
    assert len(dispatch.ranking) == min(3 - len(denied), math.inf if fallbacks is None else 1 + fallbacks)
    assert len(set(dispatch.ranking)) == len(dispatch.ranking)


def test_below_the_threshold_the_default_answers_and_the_best_is_next():
    dispatch = Policy(threshold=0.9).choose(POOL, LOGITS)
    assert dispatch.ranking == ("self", "dear", "cheap")
    assert "less than 0.9" in dispatch.reason
    assert Policy(threshold=0.9, default="cheap").choose(POOL, LOGITS).expert == "cheap"
    assert Policy(threshold=0.5).choose(POOL, LOGITS).expert == "dear"


def test_costs_weigh_as_many_logits_as_they_are_worth():
    dear = request_cost(POOL["dear"], 1000, 300)
    assert dear == pytest.approx((1000 * 10 + 300 * 30) / 1e6)
    cheap = request_cost(POOL["cheap"], 1000, 300)
    even = 1 / (dear - cheap)  # where the two are equal: their logits differ by 1
    assert Policy(cost_weight=0.99 * even).choose(POOL, LOGITS, prompt_tokens=1000).expert == "dear"
    other = Policy(cost_weight=1.01 * even).choose(POOL, LOGITS, prompt_tokens=1000)
    assert other.expert == "cheap"
    assert "dear would have been chosen" in other.reason


def test_a_cost_that_is_not_known_is_not_taken_for_nothing():
    pool = ExpertPool([Expert("a", "openai", "a", base_url="http://127.0.0.1/v1"), Expert("self", "self")])
    with pytest.raises(ExpertokenError, match="'a' has no `cost`"):
        Policy(cost_weight=1.0).choose(pool, torch.tensor([1.0, 0.0]))


def test_a_chat_stays_with_its_expert_where_the_others_are_not_much_better():
    assert Policy(sticky=1.5).choose(POOL, LOGITS, last="cheap").expert == "cheap"
    assert Policy(sticky=0.5).choose(POOL, LOGITS, last="cheap").expert == "dear"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "cheap"}]
    assert last_answerer(chat, POOL) == "cheap"
    assert last_answerer([*chat, {"role": "assistant", "content": "c", "name": "stranger"}], POOL) is None


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"treshold": 0.5}, "policy.treshold: unknown key, did you mean 'threshold'?"),
        ({"threshold": 2}, "policy.threshold: expected a probability or null, got 2"),
        ({"cost_weight": float("nan")}, "policy.cost_weight: expected a number of at least 0"),
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
        Policy(deny=("chep",)).choose(POOL, LOGITS)


def test_a_policy_survives_its_document():
    policy = Policy(threshold=0.4, allow=("dear", "self"), sticky=1.0)
    assert Policy.parse(policy.document()) == policy
    assert Policy.parse({"sticky": 0}, policy) == Policy(threshold=0.4, allow=("dear", "self"), sticky=0)
