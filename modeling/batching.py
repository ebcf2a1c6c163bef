"""Batches of sequences for a model, grouped by length, with advice in the error when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from .errors import OutOfMemoryError, is_out_of_memory

T = TypeVar("T")

MAX_TOKENS = 4096
"""Default limit on the padded tokens of one batch."""


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of sequences of similar length, longest first, of at most `max_tokens` padded tokens each.

    With the longest first, a batch that does not fit into memory fails at once and not after an hour. A sequence longer
    than `max_tokens` makes a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def run_batches(
    lengths: Sequence[int],
    run: Callable[[list[int]], T],
    *,
    label: str,
    max_tokens: int | None = None,
    generated: int = 0,
    kept: str = "",
    on_error: Callable[[int, Exception], None] | None = None,
) -> Iterator[tuple[list[int], T]]:
    """Run a model over sequences in batches of similar length, and yield each batch's indices and its result.

    Args:
        lengths: Tokens of each sequence.
        run: Function that runs the model on the sequences with the given indices.
        label: Name of the work in errors.
        max_tokens: Limit on the padded tokens of one batch, including generated tokens. If set, it comes from an option
            of the caller, and the error names `--max_tokens` and `--dtype`.
        generated: Number of tokens that are generated behind each sequence.
        kept: Sentence for the error about the work that is not lost.
        on_error: Function that receives the index and the error of a sequence that fails. A failed batch of several
            sequences is then run again one by one, so that one sequence does not fail the others. Without this function
            the first error is raised.

    Raises:
        OutOfMemoryError: Memory ran out. The message names settings that need less memory.
    """
    waiting = [*token_batches([length + generated for length in lengths], max_tokens or MAX_TOKENS)][::-1]
    while waiting:
        batch = waiting.pop()
        try:
            result = run(batch)
        except Exception as error:
            if on_error is not None and len(batch) > 1:
                waiting += [[index] for index in reversed(batch)]
                continue
            told = error
            if is_out_of_memory(error):
                advice = _advice(len(batch), lengths[batch[0]] + generated, with_options=max_tokens is not None)
                size = f"{len(batch)} x {lengths[batch[0]]}{f' + {generated}' if generated else ''}"
                told = OutOfMemoryError(
                    f"{label}: out of memory in a batch of {size} tokens. Try {advice}{kept and f'. {kept}'}"
                )
            if on_error is not None:
                on_error(batch[0], told)
                continue
            if told is error:
                raise
            raise told from error
        yield batch, result


def _advice(size: int, longest: int, *, with_options: bool) -> str:
    """Return settings that need less memory than a batch of `size` sequences of `longest` tokens."""
    if not with_options:
        return "a smaller meta LLM"
    fewer = f"--max_tokens {size // 2 * longest}, " if size > 1 else ""
    return f"{fewer}--dtype bfloat16 or a smaller meta LLM"
