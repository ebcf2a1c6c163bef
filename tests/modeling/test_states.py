import numpy as np
import pytest
import torch

from expertoken.modeling import states as module
from expertoken.modeling.batching import token_batches
from expertoken.modeling.errors import ExpertokenError
from expertoken.modeling.states import states_of

TEXTS = [f"question number {i} " + "word " * (i % 5) for i in range(20)]


def count_states(meta, monkeypatch):
    calls = []
    states = type(meta).states

    def counted(self, sequences):
        calls.append(len(sequences))
        return states(self, sequences)

    monkeypatch.setattr(type(meta), "states", counted)
    return calls


def test_states_are_computed_once_and_a_grown_set_costs_its_new_queries_only(meta, monkeypatch):
    calls = count_states(meta, monkeypatch)
    first = states_of(meta, TEXTS[:15])
    assert sum(calls) == first.computed == 15
    again = states_of(meta, TEXTS[:15])
    assert again.computed == 0
    np.testing.assert_array_equal(first.hidden, again.hidden)
    grown = states_of(meta, TEXTS[::-1])
    assert grown.computed == 5
    np.testing.assert_array_equal(grown.hidden[::-1][:15], first.hidden)


def test_batches_do_not_change_states(meta):
    one = states_of(meta, TEXTS, max_tokens=1)
    expected = one.hidden.copy()
    module_root = module.cache_folder("states")
    for file in module_root.rglob("done.npy"):
        np.save(file, np.zeros_like(np.load(file)))
    many = states_of(meta, TEXTS, max_tokens=4096)
    assert many.computed == len(TEXTS)
    np.testing.assert_allclose(many.hidden, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_pass_goes_on_where_it_stopped(meta, monkeypatch):
    states, calls = type(meta).states, []

    def dies(self, sequences):
        calls.append(sequences)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return states(self, sequences)

    monkeypatch.setattr(type(meta), "states", dies)
    with pytest.raises(KeyboardInterrupt):
        states_of(meta, TEXTS, max_tokens=100)
    finished = sum(map(len, calls[:2]))
    monkeypatch.setattr(type(meta), "states", states)
    rest = states_of(meta, TEXTS, max_tokens=100)
    assert rest.computed == len(TEXTS) - finished
    expected, _ = meta.states([meta.encode(text) for text in TEXTS])
    np.testing.assert_allclose(rest.hidden, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_repeated_queries_are_computed_once(meta):
    twice = states_of(meta, ["same"] * 3 + ["other"])
    assert twice.computed == 4 - 2
    np.testing.assert_array_equal(twice.hidden[0], twice.hidden[2])


def test_another_model_has_states_of_its_own(meta):
    states_of(meta, TEXTS[:3])
    with torch.no_grad():
        meta.model.get_input_embeddings().weight.mul_(1.5)
    assert states_of(meta, TEXTS[:3]).computed == 3


def test_logits_that_are_not_finite_name_the_query(meta, monkeypatch):
    monkeypatch.setattr(
        type(meta), "states", lambda self, s: (torch.zeros(len(s), 32), torch.full((len(s),), torch.nan))
    )
    with pytest.raises(ExpertokenError, match="no finite logits for the query ending in"):
        states_of(meta, ["a question"])


def test_batches_hold_at_most_so_many_tokens_and_every_query_once():
    lengths = [3, 50, 7, 7, 20, 1, 120]
    batches = list(token_batches(lengths, 60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) * max(lengths[i] for i in b) <= 60 or len(b) == 1 for b in batches)
    assert batches[0] == [6]


def test_two_runs_that_begin_together_fill_one_block(meta, monkeypatch):
    """The second run finds the first one's block made between its look and its own turn."""
    create, made = module._Block.create, []
    monkeypatch.setattr(module._Block, "create", staticmethod(lambda *a: made.append(a[0]) or create(*a)))
    compute = module._compute

    def together(*arguments, **options):
        if len(made) == 1 and not together.nested:
            together.nested = True
            monkeypatch.setattr(module, "_lookup", lambda root: {})
            with pytest.raises(ExpertokenError, match="states that other processes computed are not there"):
                states_of(meta, TEXTS)  # looks before anything is done; its gathering is not the point here
            monkeypatch.undo()
        return compute(*arguments, **options)

    together.nested = False
    monkeypatch.setattr(module, "_compute", together)
    found = states_of(meta, TEXTS)
    assert len(found) == len(TEXTS)
    assert len(made) == 1


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", FULL)
def test_out_of_memory_says_what_to_change_and_keeps_what_was_computed(meta, monkeypatch, error):
    texts = [f"question {i} and more of the same" for i in range(24)]
    states, calls = meta.states, []

    def full(sequences):
        calls.append(sequences)
        if len(calls) > 1:
            raise error
        return states(sequences)

    monkeypatch.setattr(meta, "states", full)
    with pytest.raises(ExpertokenError, match=r"out of memory in a batch of \d+ x \d+ tokens; try --max_tokens \d+"):
        states_of(meta, texts, max_tokens=200)
    monkeypatch.setattr(meta, "states", states)
    assert 0 < states_of(meta, texts, max_tokens=200).computed < len(texts)
