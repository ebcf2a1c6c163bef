"""Cached features: the hidden state h and the log-mass Z at each query's dispatch position.

With a frozen meta LLM they do not depend on what is trained, so one forward pass over the data is the whole price of
training, of evaluating and of adding an expert later.

The cache is a folder per model (weights, dtype) of blocks; a block is a set of memory-mapped arrays for the queries
that were new when it was made. Queries are known by a hash of their token ids, so data, template and tokenizer all
count, and a set that grows by some queries costs those alone.
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

from ..modeling.chat import Message
from ..modeling.errors import ExpertokenError, is_out_of_memory
from ..modeling.files import atomic_folder, cache_folder
from ..modeling.meta import MetaLLM, describe_dtype, fingerprint, token_batches
from ..modeling.sharding import is_split
from .processes import Team

logger = logging.getLogger(__name__)

ALONE = Team()

_FORMAT = 1
_BLOCK = 4096  # bytes, no larger than any file system's
_MARK_SECONDS = 5.0  # so much work at most is done twice after a SIGKILL
_IN_MEMORY = 2**30  # bytes of gathered states that are kept in memory; larger ones go to a temporary file


@dataclass(frozen=True)
class Features:
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


def _hash(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=16).digest()


def encode_all(
    meta: MetaLLM, conversations: Sequence[str | Sequence[Message]], label: str, *, quiet: bool = False
) -> list[np.ndarray]:
    """Token ids up to each dispatch position, as arrays: Python's integers take nine times the memory."""
    bar = tqdm(conversations, desc=label, unit="query", leave=False, delay=2, disable=quiet)
    return [np.asarray(meta.encode(conversation), dtype=np.int32) for conversation in bar]


def cached_features(
    meta: MetaLLM,
    conversations: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int = 4096,
    label: str = "features",
) -> Features:
    """The features at the dispatch positions of `conversations`; see `cached_states`."""
    sequences = encode_all(meta, conversations, f"{label}, encoding")
    return cached_states(meta, sequences, max_tokens=max_tokens, label=label)


def cached_states(
    meta: MetaLLM,
    sequences: Sequence[np.ndarray],
    *,
    max_tokens: int = 4096,
    team: Team = ALONE,
    label: str = "features",
) -> Features:
    """The features at the ends of `sequences` of token ids, from the cache where they are there.

    Rows are marked as done behind their values, so an interrupted pass goes on where it stopped. With several
    processes each computes every so-manieth batch into a block of its own, in a folder that all of them see: one file
    mapped by two machines would lose rows.

    Args:
        meta: the meta LLM.
        sequences: N arrays of ids.
        max_tokens: padded tokens of one batch.
        team: the processes that share the work.
        label: what the progress bar calls it.

    Raises:
        ExpertokenError: the meta LLM gives no finite logits for a query, memory ran out, or the cache is not shared.
    """
    hashes = [_hash(ids) for ids in sequences]
    model_key = f"{_FORMAT}-{fingerprint(meta.model)}-{describe_dtype(meta.model)}"
    root = cache_folder("features") / model_key
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
        batches = list(token_batches([len(sequences[index]) for index in missing], max_tokens))
        mine = sorted(missing[row] for batch in batches[team.rank :: team.world] for row in batch)
        if mine:
            new = [hashes[index] for index in mine]
            folder = root / hashlib.sha256(b"".join(new)).hexdigest()[:16]
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # two runs that begin together fill one block
                if not folder.exists():
                    _Block.create(folder, new, meta.head.in_features)
            _compute(meta, _Block(folder), [sequences[index] for index in mine], max_tokens, label, quiet=team.rank > 0)
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
    return Features(hidden, log_mass, len(missing), seconds)


def _lookup(root: Path) -> dict[bytes, tuple[_Block, int]]:
    """Where each query's finished states are."""
    place = {}
    for file in sorted(root.glob("*/done.npy")):
        block = _Block(file.parent)
        for row in np.flatnonzero(block.done):
            place[block.hashes[row].tobytes()] = (block, int(row))
    return place


def _compute(
    meta: MetaLLM,
    block: _Block,
    sequences: list[np.ndarray],
    max_tokens: int,
    label: str,
    *,
    quiet: bool,
) -> None:
    lengths = [len(ids) for ids in sequences]
    batches = list(token_batches(lengths, max_tokens))
    total = sum(lengths[row] for batch in batches for row in batch)
    with tqdm(total=total, unit="tok", unit_scale=True, desc=label, disable=quiet) as bar, _marking(block) as mark:
        for batch in batches:
            try:
                states, mass = meta.states([sequences[row] for row in batch])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                longest = lengths[batch[0]]
                fewer = f"--max_tokens {len(batch) // 2 * longest}, " if len(batch) > 1 else ""
                raise ExpertokenError(
                    f"{label}: out of memory in a batch of {len(batch)} x {longest} tokens; try {fewer}--dtype "
                    "bfloat16 or a smaller meta LLM. States computed so far are kept"
                ) from error
            if not torch.isfinite(mass).all():
                bad = sequences[batch[int((~torch.isfinite(mass)).nonzero()[0, 0])]]
                text = meta.tokenizer.decode(bad)[-80:]
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
