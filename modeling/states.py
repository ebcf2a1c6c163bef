"""Cached states: the hidden state h and the log-mass Z at each query's dispatch position.

With a frozen meta LLM they do not depend on the expert rows, so one forward pass over the data is the whole price of
training, evaluating, calibrating, and adding an expert later.

The cache is a folder per model (weights, dtype) of blocks; a block is a set of memory-mapped arrays for the queries
that were new when it was made. Queries are known by `Query.key`, so data, template and tokenizer all count, and a set
that grows by some queries costs only those.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from .batching import MAX_TOKENS, run_batches, token_batches
from .chat import Message, Query
from .distributed import ALONE, Team
from .errors import ExpertokenError
from .files import atomic_folder, cache_folder
from .fingerprint import describe_dtype, fingerprint
from .logits import LogitTransform
from .meta import MetaLLM
from .sharding import is_split

logger = logging.getLogger(__name__)

CHUNK = 16384
"""States of one step over cached ones: 16384 x 4096 float32 are 256 MiB."""

_FORMAT = 1
_BLOCK = 4096  # bytes, no larger than any file system's
_MARK_SECONDS = 5.0  # so much work at most is done twice after a SIGKILL
_IN_MEMORY = 2**30  # bytes of gathered states that are kept in memory; larger ones go to a temporary file


@dataclass(frozen=True)
class States:
    """States of N queries.

    Attributes:
        hidden: h, `[N, d]` float32, memory-mapped where it can be.
        log_mass: Z, `[N]` float32.
        computed: how many of the N were computed just now (the others came from the cache).
        seconds: that took.
    """

    hidden: np.ndarray
    log_mass: np.ndarray
    computed: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.log_mass)


class _Block:
    """The arrays of one block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashes, self.hidden, self.log_mass, self.done = (
            np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("hashes", "hidden", "log_mass", "done")
        )

    @staticmethod
    def create(folder: Path, hashes: list[bytes], width: int) -> None:
        count = len(hashes)
        with atomic_folder(folder) as aside:
            np.save(aside / "hashes.npy", np.array(hashes, dtype="V16"))
            np.lib.format.open_memmap(aside / "hidden.npy", mode="w+", dtype=np.float32, shape=(count, width)).flush()
            _allocate(aside / "hidden.npy")
            np.save(aside / "log_mass.npy", np.zeros(count, dtype=np.float32))
            np.save(aside / "done.npy", np.zeros(count, dtype=np.uint8))

    def mark_done(self, rows: list[int]) -> None:
        """Values first, then the marks: after a power loss no mark may stand over values that were lost."""
        for array in (self.hidden, self.log_mass):
            array.flush()
        self.done[rows] = 1
        self.done.flush()


def _allocate(file: Path) -> None:
    """Give a sparse file its blocks: on a full disk it would kill the process (SIGBUS) amid the forward pass."""
    with file.open("r+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
            return
        # macOS has no such call. A block is allocated when something is written into it: its own first byte.
        for start in range(0, size, _BLOCK):
            stream.seek(start)
            byte = stream.read(1)
            stream.seek(start)
            stream.write(byte)


def encode_all(
    meta: MetaLLM, conversations: Sequence[str | Sequence[Message]], label: str = "queries", *, quiet: bool = False
) -> list[Query]:
    """Return the query of each conversation.

    Args:
        meta: the meta LLM.
        conversations: the conversations.
        label: name of the work in the progress bar.
        quiet: whether to show no progress bar.
    """
    bar = tqdm(conversations, desc=f"{label}, encoding", unit="query", leave=False, delay=2, disable=quiet)
    return [meta.encode(conversation) for conversation in bar]


def states_of(
    meta: MetaLLM,
    conversations: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int | None = None,
    label: str = "states",
) -> States:
    """Return the states at the dispatch positions of `conversations`; see `cached_states`."""
    return cached_states(meta, encode_all(meta, conversations, label), max_tokens=max_tokens, label=label)


def cached_states(
    meta: MetaLLM,
    queries: Sequence[Query],
    *,
    max_tokens: int | None = None,
    team: Team = ALONE,
    label: str = "states",
) -> States:
    """Return the states at the dispatch positions of `queries`, from the cache as far as it has them.

    Rows are marked as done behind their values, so an interrupted pass goes on where it stopped. With several
    processes each computes every n-th batch into a block of its own, in a folder that all of them see: one file
    mapped by two machines would lose rows.

    Args:
        meta: the meta LLM.
        queries: N queries.
        max_tokens: padded tokens of one batch, where an option sets them; see `batching.run_batches`.
        team: processes that share the work.
        label: name of the work in the progress bar and in errors.

    Raises:
        ExpertokenError: the meta LLM gives no finite logits for a query, memory ran out, or the cache is not shared.
    """
    hashes = [query.key for query in queries]
    model_key = f"{_FORMAT}-{fingerprint(meta.model)}-{describe_dtype(meta.model)}"
    root = cache_folder("states") / model_key
    place = _lookup(root)
    first = {key: index for index, key in reversed(list(enumerate(hashes))) if key not in place}
    missing = team.agree(lambda: sorted(first.values()))
    started = time.perf_counter()
    if missing and is_split(meta.model):
        raise ExpertokenError(
            f"{label}: {len(missing)} queries are not in the cache, and a model that ZeRO-3 has split can't compute "
            "them here; run method tokens on the same data before (its states are kept in $EXPERTOKEN_CACHE), load "
            "whole (zero3_init_flag: false), or start cold with --warm_start false"
        )
    if missing:
        batches = list(token_batches([len(queries[index]) for index in missing], max_tokens or MAX_TOKENS))
        mine = sorted(missing[row] for batch in batches[team.rank :: team.world] for row in batch)
        if mine:
            new = [hashes[index] for index in mine]
            folder = root / hashlib.sha256(b"".join(new)).hexdigest()[:16]
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # two runs that begin together fill one block
                if not folder.exists():
                    _Block.create(folder, new, meta.head.in_features)
            _compute(meta, _Block(folder), [queries[index] for index in mine], max_tokens, label, quiet=team.rank > 0)
        team.barrier()
    if any(key not in place for key in hashes):  # also where another job, or another process, was quicker
        place = _lookup(root)
        if any(key not in place for key in hashes):
            raise ExpertokenError(
                f"{root}: states that other processes computed are not there; all machines have to see one "
                "$EXPERTOKEN_CACHE"
            )
    seconds = time.perf_counter() - started if missing else 0.0
    logger.info("%s: %d of %d queries computed, the others were cached", label, len(missing), len(hashes))
    hidden, log_mass = _gather([place[key] for key in hashes])
    return States(hidden, log_mass, len(missing), seconds)


def _lookup(root: Path) -> dict[bytes, tuple[_Block, int]]:
    """Where each query's finished states are."""
    place = {}
    for file in sorted(root.glob("*/done.npy")):
        block = _Block(file.parent)
        for row in np.flatnonzero(block.done):
            place[block.hashes[row].tobytes()] = (block, int(row))
    return place


def _compute(
    meta: MetaLLM, block: _Block, queries: list[Query], max_tokens: int | None, label: str, *, quiet: bool
) -> None:
    lengths = list(map(len, queries))
    batches = run_batches(
        lengths,
        lambda batch: meta.states([queries[row] for row in batch]),
        label=label,
        max_tokens=max_tokens,
        kept="States computed so far are kept",
    )
    bar = tqdm(total=sum(lengths), unit="tok", unit_scale=True, desc=label, disable=quiet)
    with bar, _marking(block) as mark:
        for batch, (states, mass) in batches:
            if not torch.isfinite(mass).all():
                bad = queries[batch[int((~torch.isfinite(mass)).nonzero()[0, 0])]]
                text = meta.tokenizer.decode(bad.ids)[-80:]
                raise ExpertokenError(f"{label}: the meta LLM gives no finite logits for the query ending in {text!r}")
            block.hidden[batch], block.log_mass[batch] = states.numpy(), mass.numpy()
            mark(batch)
            bar.update(sum(lengths[row] for row in batch))


@contextmanager
def _marking(block: _Block) -> Iterator[Callable[[list[int]], None]]:
    """Mark rows as done every few seconds and at the end, also where the end is an interruption."""
    rows: list[int] = []
    last = time.monotonic()

    def mark(batch: list[int]) -> None:
        nonlocal last
        rows.extend(batch)
        if time.monotonic() - last > _MARK_SECONDS:
            block.mark_done(rows)
            rows.clear()
            last = time.monotonic()

    try:
        yield mark
    finally:
        block.mark_done(rows)


def _gather(places: list[tuple[_Block, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays in the order of the queries: the block's own where it has just that order, else a copy."""
    blocks = {id(block): block for block, _ in places}
    rows = np.array([row for _, row in places])
    if len(blocks) == 1:
        block = places[0][0]
        if len(rows) == len(block.done) and (rows == np.arange(len(rows))).all():
            return block.hidden, block.log_mass
    shape = (len(places), places[0][0].hidden.shape[1])
    if shape[0] * shape[1] * 4 <= _IN_MEMORY:
        hidden = np.empty(shape, dtype=np.float32)
    else:
        with tempfile.TemporaryFile() as file:  # stays open through the mapping, gone with it
            hidden = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    log_mass = np.empty(len(places), dtype=np.float32)
    owners = np.array([id(block) for block, _ in places])
    for key, block in blocks.items():
        chosen = np.flatnonzero(owners == key)
        for part in np.array_split(chosen, max(1, len(chosen) // 65536)):
            hidden[part] = block.hidden[rows[part]]
        log_mass[chosen] = block.log_mass[rows[chosen]]
    return hidden, log_mass


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over an array's own memory, so that a pass over mapped states copies nothing; do not write."""
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def join_logits(
    rows: torch.Tensor,
    hidden: torch.Tensor,
    log_mass: torch.Tensor,
    fixed: torch.Tensor | None,
    transform: LogitTransform,
    *,
    with_self: bool,
) -> torch.Tensor:
    """Return the candidates' logits, `[N, C]`: fixed experts, the rows' experts, self.

    Args:
        rows: `[K, d]`.
        hidden: h, `[N, d]`.
        log_mass: Z, `[N]`.
        fixed: logits of experts whose rows are fixed, `[N, F]`, or None.
        transform: what the model does to logits.
        with_self: whether self is a candidate.
    """
    parts = [] if fixed is None else [fixed]
    parts.append(transform(hidden @ rows.T))
    if with_self:
        parts.append(log_mass[:, None])
    return torch.cat(parts, 1)


@torch.no_grad()
def state_logits(rows: torch.Tensor, states: States, transform: LogitTransform, *, with_self: bool) -> torch.Tensor:
    """Return the candidates' logits on cached states, `[N, C]` float32, computed in chunks."""
    parts = []
    for start in range(0, len(states), CHUNK):
        hidden, log_mass = (tensor_of(array[start : start + CHUNK]) for array in (states.hidden, states.log_mass))
        parts.append(join_logits(rows, hidden, log_mass, None, transform, with_self=with_self))
    return torch.cat(parts)
