"""Cached states: the hidden state h and the log-mass Z at each query's dispatch position.

With a frozen meta LLM they do not depend on the expert rows. So training, evaluation, calibration and adding an expert
later cost one forward pass over the data.

`Query.key` identifies a query, so data, template and tokenizer all count. A data set that grows costs only its new
queries. `state_cache` keeps the states on disk.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from .batching import MAX_TOKENS, token_batches
from .chat import Message, Query
from .distributed import ALONE, Team
from .errors import ExpertokenError, one_line
from .fingerprint import describe_dtype, fingerprint
from .logits import LogitTransform
from .meta import MetaLLM
from .sharding import is_split
from .state_cache import Block, Place, StateCache, gather, room_for, tensor_of
from .state_workers import StateWorkers, state_batches

logger = logging.getLogger(__name__)

CHUNK = 16384
"""Number of cached states in one step: 16384 x 4096 float32 values take 256 MiB."""

_FORMAT = 2

T = TypeVar("T")


@dataclass(frozen=True)
class States:
    """States of N queries.

    Attributes:
        hidden: States h, `[N, P d]` float32 (P as in `state.StateSpec`), memory-mapped if possible.
        log_mass: Log-masses Z, `[N]` float32. Zeros for a cut model.
        computed: Number of newly computed states. The others come from the cache.
        seconds: Seconds of this computation.
    """

    hidden: np.ndarray
    log_mass: np.ndarray
    computed: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.log_mass)


def encode_all(
    meta: MetaLLM, conversations: Sequence[str | Sequence[Message]], label: str = "queries", *, quiet: bool = False
) -> list[Query]:
    """Return the query of each conversation.

    Args:
        meta: Meta LLM.
        conversations: Conversations to encode.
        label: Name of the work in the progress bar.
        quiet: If true, no progress bar is shown.
    """
    bar = tqdm(conversations, desc=f"{label}, encoding", unit="query", leave=False, delay=2, disable=quiet)
    queries = [meta.encode(conversation) for conversation in bar]
    if cut := sum(query.cut > 0 for query in queries):
        logger.warning(
            "%s: %d of %d conversations exceed the length that a decision reads, so they are cut", label, cut, len(bar)
        )
    return queries


def states_of(
    meta: MetaLLM,
    conversations: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int | None = None,
    label: str = "states",
) -> States:
    """Return the states at the dispatch positions of `conversations`. See `cached_states`."""
    return cached_states(meta, encode_all(meta, conversations, label), max_tokens=max_tokens, label=label)


def cached_states(
    meta: MetaLLM,
    queries: Sequence[Query],
    *,
    max_tokens: int | None = None,
    team: Team = ALONE,
    workers: StateWorkers | None = None,
    label: str = "states",
) -> States:
    """Return the states that decide `queries` (see `state.StateSpec`), from the cache or from a forward pass.

    Rows are marked as done after their values are written, so an interrupted pass resumes at its last mark. Of several
    processes each computes every n-th batch into its own block, in a folder that all of them share. One file mapped by
    two machines would lose rows.

    Args:
        meta: Meta LLM.
        queries: N queries.
        max_tokens: Limit on the padded tokens of one batch, if an option sets it. See `batching.run_batches`.
        team: Processes that share the work.
        workers: Workers on a cluster that run the forward passes. None to run them in this process.
        label: Name of the work in the progress bar and in errors.

    Raises:
        ExpertokenError: The meta LLM gives no finite logits for a query, memory ran out, or the cache is not shared.
    """
    found = _cached(meta, queries, max_tokens, team, workers, label)
    if meta.state.layer is None:
        return found
    return replace(found, hidden=found.hidden[:, meta.state.columns(meta.head.in_features)])


def _cache_of(meta: MetaLLM, layer: int | None) -> StateCache:
    """Return the cache of the states behind a layer, with both poolings side by side, or of the head's states."""
    dtype, width = describe_dtype(meta.model), meta.head.in_features
    if meta.sight is not None:
        dtype += f"-{meta.sight.name}"
    if layer is None:
        return StateCache(f"{_FORMAT}-{fingerprint(meta.model)}-{dtype}", width)
    model = fingerprint(meta.model) if meta.adapted else meta.base_fingerprint
    return StateCache(f"{_FORMAT}-{model}-{dtype}-layer{layer}", 2 * width)


def _cached(
    meta: MetaLLM,
    queries: Sequence[Query],
    max_tokens: int | None,
    team: Team,
    workers: StateWorkers | None,
    label: str,
) -> States:
    hashes = [query.key for query in queries]
    cache = _cache_of(meta, meta.state.layer)
    place, room = cache.places()
    if team.world > 1:
        room = {}  # rows of a block share pages, so two machines that fill one block would lose each other's rows
    first = {key: index for index, key in reversed(list(enumerate(hashes))) if key not in place}
    missing = team.agree(lambda: sorted(first.values()))
    started = time.perf_counter()
    if missing and is_split(meta.model):
        raise ExpertokenError(
            f"{label}: expected all states in the cache, but {len(missing)} are missing, and a model that ZeRO-3 has "
            "split can't compute them. Run method tokens on the same data first (its states are kept in "
            "$EXPERTOKEN_CACHE), load the model whole (zero3_init_flag: false), or start cold with --warm_start false"
        )
    if missing:
        batches = list(token_batches([len(queries[index]) for index in missing], max_tokens or MAX_TOKENS))
        mine = sorted(missing[row] for batch in batches[team.rank :: team.world] for row in batch)
        compute = partial(_compute, meta, max_tokens=max_tokens, workers=workers, label=label, quiet=team.rank > 0)
        try:
            for block, rows, indices in _parts(cache, room, hashes, mine):
                with block.writing() as write:
                    compute([queries[index] for index in indices], _into(write, rows))
        except OSError as error:
            if team.world > 1:
                raise ExpertokenError(f"{cache.root}: can't be written ({one_line(error)})") from error
            logger.warning(
                "%s can't be written (%s), so the states are computed but not cached", cache.root, one_line(error)
            )
            return _uncached(cache, hashes, place, [(index, queries[index]) for index in mine], compute, started)
        team.barrier()
    if any(key not in place for key in hashes):  # another job or another process may have computed them
        place, _ = cache.places()
        if any(key not in place for key in hashes):
            raise ExpertokenError(
                f"{cache.root}: expected the states that other processes computed, but some are missing. Set "
                "$EXPERTOKEN_CACHE to a folder that all machines share"
            )
    seconds = time.perf_counter() - started if missing else 0.0
    logger.info("%s: computed states of %d of %d queries, the others are cached", label, len(missing), len(hashes))
    hidden, log_mass = gather([place[key] for key in hashes])
    return States(hidden, log_mass, len(missing), seconds)


_Write = Callable[[Sequence[int], np.ndarray, np.ndarray], None]


def _into(write: _Write, rows: Sequence[int]) -> _Write:
    """Return a function that writes the k-th query's states to the k-th of the given rows."""
    return lambda batch, states, masses: write([rows[place] for place in batch], states, masses)


def _parts(
    cache: StateCache, room: dict[bytes, Place], hashes: Sequence[bytes], mine: Sequence[int]
) -> Iterator[tuple[Block, list[int], list[int]]]:
    """Yield blocks with the rows to fill and their queries. Rows that an interrupted pass left empty come first."""
    opened: dict[int, tuple[Block, list[int], list[int]]] = {}
    new = []
    for index in mine:
        if hashes[index] not in room:
            new.append(index)
            continue
        block, row = room[hashes[index]]
        _, rows, indices = opened.setdefault(id(block), (block, [], []))
        rows.append(row)
        indices.append(index)
    yield from opened.values()
    if new:
        yield cache.create([hashes[index] for index in new]), list(range(len(new))), new


def _uncached(
    cache: StateCache,
    hashes: Sequence[bytes],
    place: dict[bytes, Place],
    missing: Sequence[tuple[int, Query]],
    compute: Callable[[list[Query], _Write], None],
    started: float,
) -> States:
    """Return the states of all queries, computing the missing ones without caching them."""
    new, masses = room_for(len(missing), cache.width)

    def write(rows: Sequence[int], states: np.ndarray, found: np.ndarray) -> None:
        new[rows], masses[rows] = states, found

    compute([query for _, query in missing], write)
    row_of = {hashes[index]: row for row, (index, _) in enumerate(missing)}
    hidden, log_mass = room_for(len(hashes), cache.width)
    known = [index for index, key in enumerate(hashes) if key not in row_of]
    if known:
        hidden[known], log_mass[known] = gather([place[hashes[index]] for index in known])
    for index, key in enumerate(hashes):
        if key in row_of:
            hidden[index], log_mass[index] = new[row_of[key]], masses[row_of[key]]
    return States(hidden, log_mass, len(missing), time.perf_counter() - started)


def _compute(
    meta: MetaLLM,
    queries: list[Query],
    write: _Write,
    *,
    max_tokens: int | None,
    workers: StateWorkers | None,
    label: str,
    quiet: bool,
) -> None:
    lengths = list(map(len, queries))
    batches = _batches(meta, queries, workers, max_tokens=max_tokens, label=label)
    for batch, (states, mass) in _with_bar(batches, lengths, label, quiet=quiet):
        _check_finite(meta, [queries[row] for row in batch], torch.cat([states, mass[:, None]], 1), label)
        write(batch, states.numpy(), mass.numpy())


def _batches(
    meta: MetaLLM,
    queries: Sequence[Query],
    workers: StateWorkers | None,
    layers: Sequence[int] = (),
    *,
    max_tokens: int | None,
    label: str,
) -> Iterator[tuple[list[int], Any]]:
    """Yield batches of queries, by their indices, with their states: at the meta LLM's state, or behind layers."""
    if workers is not None:
        return workers.states(queries, layers=layers, max_tokens=max_tokens, label=label)
    return state_batches(meta, queries, layers, max_tokens=max_tokens, label=label)


def _check_finite(meta: MetaLLM, queries: Sequence[Query], values: torch.Tensor, label: str) -> None:
    """Raise ExpertokenError if a query's row of values `[N, K]` is not finite."""
    finite = torch.isfinite(values).all(1)
    if not finite.all():
        text = meta.tokenizer.decode(queries[int((~finite).nonzero()[0, 0])].ids)[-80:]
        raise ExpertokenError(f"{label}: the meta LLM gives no finite logits for the query ending in {text!r}")


def _with_bar(
    batches: Iterable[tuple[Sequence[int], T]], lengths: Sequence[int], label: str, *, quiet: bool = False
) -> Iterator[tuple[Sequence[int], T]]:
    """Yield batches while a progress bar counts their tokens."""
    with tqdm(total=sum(lengths), unit="tok", unit_scale=True, desc=label, disable=quiet) as bar:
        for batch, found in batches:
            yield batch, found
            bar.update(sum(lengths[row] for row in batch))


def cache_layers(
    meta: MetaLLM,
    queries: Sequence[Query],
    layers: Sequence[int],
    *,
    max_tokens: int | None,
    workers: StateWorkers | None = None,
    label: str,
) -> None:
    """Compute the states behind several layers in one pass into the cache.

    Args:
        meta: Meta LLM without an adapter.
        queries: N queries.
        layers: Numbers of the layers.
        max_tokens: Limit on the padded tokens of one batch. See `cached_states`.
        workers: Workers on a cluster that run the forward passes. None to run them in this process.
        label: Name of the work.
    """
    hashes = [query.key for query in queries]
    first = {key: index for index, key in reversed(list(enumerate(hashes)))}
    known = {layer: (cache := _cache_of(meta, layer), *cache.places()) for layer in layers}
    missing = {
        layer: sorted(i for key, i in first.items() if key not in place) for layer, (_, place, _) in known.items()
    }
    new = sorted({index for indices in missing.values() for index in indices})
    if not new:
        return
    lengths = [len(queries[index]) for index in new]
    try:
        with ExitStack() as stack:
            # Target of each query's states, by layer. Rows that an interrupted pass left empty are filled first.
            targets: dict[int, dict[int, tuple[_Write, int]]] = {layer: {} for layer in layers}
            for layer, (cache, _, room) in known.items():
                for block, rows, indices in _parts(cache, room, hashes, missing[layer]):
                    write = stack.enter_context(block.writing())
                    targets[layer] |= {index: (write, row) for index, row in zip(indices, rows, strict=True)}
            asked = [queries[index] for index in new]
            batches = _batches(meta, asked, workers, layers, max_tokens=max_tokens, label=label)
            for batch, found in _with_bar(batches, lengths, label):
                for layer, states in found.items():
                    _check_finite(meta, [queries[new[row]] for row in batch], states, label)
                    for row, state in zip(batch, states.numpy(), strict=True):
                        if new[row] in targets[layer]:
                            write, place = targets[layer][new[row]]
                            write([place], state[None], np.zeros(1, dtype=np.float32))
    except OSError as error:
        logger.warning("the cache can't be written (%s), so states are computed layer by layer", one_line(error))


@torch.no_grad()
def state_logits(rows: torch.Tensor, states: States, transform: LogitTransform) -> torch.Tensor:
    """Return the candidates' logits on cached states, `[N, C]` float32, computed in chunks."""
    chunks = (tensor_of(states.hidden[start : start + CHUNK]) for start in range(0, len(states), CHUNK))
    return torch.cat([transform(hidden @ rows.T) for hidden in chunks])
