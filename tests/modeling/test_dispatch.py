import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertoken.modeling.dispatch import Dispatch, dispatch_distribution, last_positions
from expertoken.train.objectives import OBJECTIVES, contrastive, correctness, cross_entropy


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_the_distribution_is_the_formula_of_the_design(experts, seed):
    logits = 5 * torch.randn(4, 50 + experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exponentials = logits.exp()
    ordinary, rows = exponentials[:, :50].sum(1, keepdim=True), exponentials[:, 50:]
    expected = torch.cat([rows, ordinary], 1) / (rows.sum(1, keepdim=True) + ordinary)
    torch.testing.assert_close(
        dispatch_distribution(logits, 50, with_self=True).double(), expected, rtol=1e-4, atol=1e-6
    )
    alone = rows / rows.sum(1, keepdim=True)
    torch.testing.assert_close(dispatch_distribution(logits, 50, with_self=False).double(), alone, rtol=1e-4, atol=1e-6)


def test_an_eleventh_expert_leaves_the_ratios_of_the_ten():
    logits = torch.randn(3, 61)
    before = dispatch_distribution(logits[:, :60], 50, with_self=True)
    after = dispatch_distribution(logits, 50, with_self=True)
    kept = torch.cat([after[:, :10], after[:, 11:]], 1)
    torch.testing.assert_close(kept / kept.sum(1, keepdim=True), before, rtol=1e-5, atol=1e-7)


def test_the_last_real_token_is_found_on_either_side():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert last_positions(mask).tolist() == [3, 2, 3]


def test_a_dispatch_ranks_and_explains():
    dispatch = Dispatch.from_probabilities(["a", "b", "self"], torch.tensor([0.2, 0.7, 0.1]))
    assert dispatch.expert == "b"
    assert dispatch.ranking == ("b", "a", "self")
    assert dispatch.reason == "b has probability 0.70, next is a with 0.20"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_data_set_add_up_to_the_whole(name):
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(10, 4, generator=generator), torch.randn(10, generator=generator)
    targets, scores = torch.rand(10, 4, generator=generator), torch.rand(10, 4, generator=generator).round()
    scores[2, 1] = float("nan")
    weights = torch.rand(10, generator=generator)
    whole = OBJECTIVES[name](logits, targets, scores, reference, weights)
    parts = [OBJECTIVES[name](*(x[part] for x in (logits, targets, scores, reference, weights)))
             for part in (slice(0, 3), slice(3, 10))]  # fmt: skip
    for index in range(2):
        torch.testing.assert_close(parts[0][index] + parts[1][index], whole[index])


def test_cross_entropy_of_a_one_hot_target_is_torchs():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    targets = torch.nn.functional.one_hot(labels, 3).float()
    total, mass = cross_entropy(logits, targets, targets, torch.zeros(6), torch.ones(6))
    torch.testing.assert_close(total / mass, torch.nn.functional.cross_entropy(logits, labels))


def test_in_correctness_the_rows_do_not_know_of_each_other():
    logits = torch.randn(5, 3, requires_grad=True)
    scores = torch.tensor([[1.0, 0.0, float("nan")]] * 5)
    total, mass = correctness(logits, scores, scores, torch.zeros(5), torch.ones(5))
    (total / mass).backward()
    assert logits.grad[:, 2].abs().sum() == 0
    alone = logits.detach()[:, :1].requires_grad_()
    single, _ = correctness(alone, scores[:, :1], scores[:, :1], torch.zeros(5), torch.ones(5))
    single.backward()
    torch.testing.assert_close(logits.grad[:, 0] * mass, alone.grad[:, 0])


def test_the_contrastive_loss_is_that_of_its_definition():
    """RouterDC's (arXiv 2409.19886), query by query, candidate by candidate."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 7, generator=rng, requires_grad=True)
    scores = torch.rand(40, 7, generator=rng)
    scores[torch.rand(40, 7, generator=rng) < 0.2] = torch.nan
    scores[0], scores[1] = 1.0, 0.0  # nobody to oppose, nobody to favour
    weights = torch.rand(40, generator=rng)
    plain = 0.0
    for row, known, weight in zip(logits.tolist(), scores.tolist(), weights.tolist(), strict=True):
        ranked = sorted((s, i) for i, s in enumerate(known) if s == s)
        best = [i for s, i in ranked[::-1][:3] if s >= 0.5]
        worst = [i for s, i in ranked[:3] if s < 0.5]
        for i in best if worst else []:
            plain -= weight * math.log(math.exp(row[i]) / (math.exp(row[i]) + sum(math.exp(row[j]) for j in worst)))
    total, mass = contrastive(logits, scores, scores, scores[:, 0], weights)
    assert float(total) == pytest.approx(plain, rel=1e-5)
    assert float(mass) == pytest.approx(float(weights.sum()))
    total.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:2] == 0).all()
