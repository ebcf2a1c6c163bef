import pytest

from expertoken.modeling.batching import run_batches
from expertoken.modeling.errors import OutOfMemoryError

FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")


def test_every_sequence_is_run_once_within_the_limit():
    lengths = [5, 50, 7, 7, 20]
    found = list(run_batches(lengths, lambda batch: [lengths[i] for i in batch], label="x", max_tokens=60, generated=3))
    assert sorted(i for batch, _ in found for i in batch) == list(range(5))
    for batch, result in found:
        assert result == [lengths[i] for i in batch]
        assert len(batch) * (max(result) + 3) <= 60 or len(batch) == 1


def test_out_of_memory_names_a_smaller_batch_and_what_is_kept():
    def run(batch):
        raise FULL

    batches = run_batches([10, 10, 10, 10], run, label="states", max_tokens=60, generated=5, kept="The rest is kept")
    with pytest.raises(OutOfMemoryError) as error:
        list(batches)
    assert str(error.value) == (
        "states: out of memory in a batch of 4 x 10 + 5 tokens. Try --max_tokens 30, --dtype bfloat16 or a smaller "
        "meta LLM. The rest is kept"
    )


def test_with_a_listener_a_sequence_that_fails_takes_no_other_along():
    failed = []

    def run(batch):
        if 2 in batch:
            raise ValueError("the third")
        return batch

    done = [
        i
        for batch, _ in run_batches([9] * 5, run, label="x", on_error=lambda *told: failed.append(told))
        for i in batch
    ]
    assert sorted(done) == [0, 1, 3, 4]
    [(index, error)] = failed
    assert (index, str(error)) == (2, "the third")


def test_a_listener_hears_of_memory_in_the_same_words():
    failed = []

    def run(batch):
        raise FULL

    assert not list(run_batches([9, 9], run, label="decision", on_error=lambda *t: failed.append(t)))
    assert [index for index, _ in failed] == [0, 1]
    assert all(isinstance(error, OutOfMemoryError) for _, error in failed)
    assert str(failed[0][1]) == "decision: out of memory in a batch of 1 x 9 tokens. Try a smaller meta LLM"


def test_another_error_is_raised_as_it_is():
    def run(batch):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        list(run_batches([1], run, label="x"))


def test_an_error_is_not_its_own_cause():
    def run(batch):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else") as error:
        list(run_batches([1], run, label="x"))
    assert error.value.__cause__ is None
