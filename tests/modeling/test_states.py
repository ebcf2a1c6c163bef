import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from expertoken.modeling import state_cache as cache_module
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
    for file in cache_module.cache_folder("states").rglob("done.npy"):
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
    """The other run creates the block after this run's lookup and before its own creation."""
    create, made = cache_module._create, []
    monkeypatch.setattr(cache_module, "_create", lambda *a: made.append(a[0]) or create(*a))
    places = cache_module.StateCache.places
    looked = []

    def too_early(cache):
        looked.append(None)
        if len(looked) == 1:
            states_of(meta, TEXTS)  # the other run, between lookup and creation
            return {}, {}
        return places(cache)

    monkeypatch.setattr(cache_module.StateCache, "places", too_early)
    found = states_of(meta, TEXTS)
    assert len(found) == len(TEXTS)
    assert len(made) == 1


def blocks():
    return sorted(file.parent for file in cache_module.cache_folder("states").rglob("done.npy"))


def test_what_an_interrupted_pass_left_open_is_filled_and_not_made_again(meta, monkeypatch):
    states_of(meta, TEXTS)
    [block] = blocks()
    done = np.load(block / "done.npy")
    done[5:] = 0
    np.save(block / "done.npy", done)
    calls = count_states(meta, monkeypatch)
    found = states_of(meta, TEXTS)
    assert sum(calls) == found.computed == len(TEXTS) - 5
    assert blocks() == [block]
    assert np.load(block / "done.npy").all()


def halved(block):
    """Truncate the file of the states, like an interrupted copy."""
    file = block / "hidden.npy"
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(
    "spoil",
    [
        halved,
        lambda block: (block / "log_mass.npy").unlink(),
        lambda block: (block / "hashes.npy").write_bytes(b""),
        lambda block: np.save(block / "done.npy", np.ones(3, np.uint8)),
        lambda block: block.rename(block.with_name(".other-job-writes-this")),
    ],
)
def test_what_is_no_whole_block_ends_nobodys_run(meta, spoil):
    first = np.array(states_of(meta, TEXTS[:10]).hidden)
    states_of(meta, TEXTS[10:])
    (block,) = [folder for folder in blocks() if len(np.load(folder / "hashes.npy")) == 10][:1]
    spoil(block)
    found = states_of(meta, TEXTS)
    np.testing.assert_allclose(found.hidden[:10], first, rtol=1e-4, atol=1e-5)
    assert states_of(meta, TEXTS).computed == 0


def test_many_blocks_need_few_descriptors(meta):
    resource = pytest.importorskip("resource")
    for number in range(80):
        states_of(meta, [f"question {number}"])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, before[1]))
    try:
        assert states_of(meta, [f"question {number}" for number in range(80)]).computed == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_cache_that_can_only_be_read_serves_and_what_is_missing_is_computed_all_the_same(meta, monkeypatch, caplog):
    expected = np.array(states_of(meta, TEXTS[:10]).hidden)
    load = np.load

    def reading(file, mmap_mode=None, **options):
        assert mmap_mode in (None, "r")
        return load(file, mmap_mode=mmap_mode, **options)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "load", reading)
    monkeypatch.setattr(cache_module, "_create", refused)
    np.testing.assert_array_equal(states_of(meta, TEXTS[:10]).hidden, expected)
    found = states_of(meta, TEXTS)
    assert found.computed == 10
    np.testing.assert_array_equal(found.hidden[:10], expected)
    np.testing.assert_allclose(found.hidden[10:], meta.states([meta.encode(t) for t in TEXTS[10:]])[0], atol=1e-5)
    assert "so the states are computed but not cached" in caplog.text


def test_what_the_cache_holds_is_listed_and_what_nobody_used_is_removed(meta):
    states_of(meta, TEXTS)
    [model] = cache_module.cached_models()
    assert model.queries == len(TEXTS)
    assert model.size > len(TEXTS) * 32 * 4
    assert cache_module.prune(older_than=3600) == []
    assert cache_module.prune(older_than=0) == [model]
    assert cache_module.cached_models() == []
    assert states_of(meta, TEXTS).computed == len(TEXTS)


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
    with pytest.raises(ExpertokenError, match=r"out of memory in a batch of \d+ x \d+ tokens\. Try --max_tokens \d+"):
        states_of(meta, texts, max_tokens=200)
    monkeypatch.setattr(meta, "states", states)
    assert 0 < states_of(meta, texts, max_tokens=200).computed < len(texts)


def test_states_for_which_temporary_files_have_no_room_are_one_clear_line(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "_IN_MEMORY", 1000)
    hidden, _ = cache_module.room_for(100, 8)
    hidden[:] = 1
    assert hidden.shape == (100, 8)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExpertokenError, match=r"no room for 0\.0 GiB of states \(No space left on device\).*\$TMPDIR"):
        cache_module.room_for(100, 8)
