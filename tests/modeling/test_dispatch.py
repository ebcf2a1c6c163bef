import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertoken.modeling.dispatch import Dispatch, candidate_logits, last_positions
from expertoken.train.objectives import OBJECTIVES, contrastive, correctness, cross_entropy


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_the_distribution_is_the_formula_of_the_design(candidates, seed):
    """In the vocabulary's terms expert k's token has the logit `Z + l_k - l_self`, and self the mass of the others."""
    logits = 5 * torch.randn(50 + candidates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mass, found = logits[:50].logsumexp(0), candidate_logits(logits, 50).double()
    tokens = (mass + found[:-1] - found[-1]).exp()
    expected = torch.cat([tokens, mass.exp()[None]]) / (tokens.sum() + mass.exp())
    names = [f"e{index}" for index in range(candidates)]
    dispatch = Dispatch.from_logits(names, found)
    assert list(dispatch.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_an_eleventh_expert_leaves_the_ratios_of_the_ten():
    logits = torch.randn(12)
    names = [f"e{index}" for index in range(12)]
    before, after = (Dispatch.from_logits(names[:count], logits[:count]).probabilities for count in (11, 12))
    kept = {name: after[name] / (1 - after["e11"]) for name in names[:11]}
    assert kept == pytest.approx(before)


def test_chances_are_of_each_candidate_and_the_most_probable_has_the_best():
    dispatch = Dispatch.from_logits(["a", "self"], torch.tensor([0.0, 2.0]), chances=True)
    assert dispatch.chances == pytest.approx({"a": 0.5, "self": 1 / (1 + math.exp(-2))})
    assert dispatch.expert == "self"
    assert Dispatch.from_logits(["a", "self"], torch.tensor([0.0, 2.0])).chances is None


def test_the_last_real_token_is_found_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert last_positions(mask).tolist() == [3, 2, 3]


def test_a_dispatch_ranks_and_explains():
    dispatch = Dispatch.from_logits(["a", "b", "self"], torch.tensor([0.2, 0.7, 0.1]).log())
    assert dispatch.expert == "b"
    assert dispatch.ranking == ("b", "a", "self")
    assert dispatch.reason == "b has probability 0.70, next is a with 0.20"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_data_set_add_up_to_the_whole(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 4, generator=generator)
    targets, scores = torch.rand(10, 4, generator=generator), torch.rand(10, 4, generator=generator).round()
    scores[2, 1] = float("nan")
    weights = torch.rand(10, generator=generator)
    whole = OBJECTIVES[name](logits, targets, scores, weights)
    parts = [OBJECTIVES[name](*(x[part] for x in (logits, targets, scores, weights)))
             for part in (slice(0, 3), slice(3, 10))]  # fmt: skip
    for index in range(2):
        torch.testing.assert_close(parts[0][index] + parts[1][index], whole[index])


def test_cross_entropy_of_a_one_hot_target_is_torchs():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    targets = torch.nn.functional.one_hot(labels, 3).float()
    total, mass = cross_entropy(logits, targets, targets, torch.ones(6))
    torch.testing.assert_close(total / mass, torch.nn.functional.cross_entropy(logits, labels))


def test_a_candidate_whose_score_is_unknown_is_left_out_of_the_query():
    """Its logit changes neither loss nor gradient under any objective."""
    scores = torch.tensor([[1.0, 0.0, float("nan")]] * 5)
    targets = torch.tensor([[1.0, 0.0, 0.0]] * 5)
    for name, objective in OBJECTIVES.items():
        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        found = []
        for value in (-50.0, 0.0, 50.0):
            leaf = torch.cat([logits[:, :2], torch.full((5, 1), value)], 1).requires_grad_()
            total, _ = objective(leaf, targets, scores, torch.ones(5))
            total.backward()
            assert leaf.grad[:, 2].abs().sum() == 0, name
            found.append(float(total))
        assert found == pytest.approx([found[0]] * 3), name


def test_in_correctness_the_rows_do_not_know_of_each_other():
    logits = torch.randn(5, 3, requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, float("nan")]] * 5)
    total, mass = correctness(logits, scores, scores, torch.ones(5))
    (total / mass).backward()
    assert logits.grad[:, 2].abs().sum() == 0
    alone = logits.detach()[:, :1].requires_grad_()
    single, _ = correctness(alone, scores[:, :1], scores[:, :1], torch.ones(5))
    single.backward()
    torch.testing.assert_close(logits.grad[:, 0] * mass, alone.grad[:, 0])


def test_the_contrastive_loss_is_that_of_its_definition():
    """The reference is RouterDC's definition (arXiv 2409.19886), computed query by query and candidate by candidate."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=rng, requires_grad=True)
    scores = torch.rand(40, 7, generator=rng)
    scores[torch.rand(40, 7, generator=rng) < 0.2] = torch.nan
    scores[0], scores[1] = 1.0, 0.0  # one query without a negative, one without a positive
    weights = torch.rand(40, generator=rng)
    plain = 0.0
    for row, known, weight in zip(logits.tolist(), scores.tolist(), weights.tolist(), strict=True):
        ranked = sorted((s, i) for i, s in enumerate(known) if s == s)
        best = [i for s, i in ranked[::-1][:3] if s >= 0.5]
        worst = [i for s, i in ranked[:3] if s < 0.5]
        for i in best if worst else []:
            plain -= weight * math.log(math.exp(row[i]) / (math.exp(row[i]) + sum(math.exp(row[j]) for j in worst)))
    total, mass = contrastive(logits, scores, scores, weights)
    assert float(total) == pytest.approx(plain, rel=1e-5)
    assert float(mass) == pytest.approx(float(weights.sum()))
    total.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:2] == 0).all()
