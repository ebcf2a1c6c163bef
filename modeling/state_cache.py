"""The cache of states on disk: one folder per model, with a block of arrays for each set of new queries.

A block is written to a temporary path and renamed. Rows are marked as done after their values are written. A folder
that is no whole block is skipped: a block of an older version, a damaged one, or one that another job is writing.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from filelock import FileLock

from .errors import ExpertokenError
from .files import atomic_folder, cache_folder

logger = logging.getLogger(__name__)

_BLOCK = 4096  # bytes, at most the block size of any file system
_MARK_SECONDS = 5.0  # at most this much work is repeated after a SIGKILL
_IN_MEMORY = 2**30  # bytes of gathered states that are kept in memory. Larger arrays go to a temporary file
_PART = 65536  # rows copied at a time
_NOT_WHOLE = (OSError, ValueError, EOFError)
_HIDDEN, _MASS, _HASHES, _DONE = "hidden.npy", "log_mass.npy", "hashes.npy", "done.npy"


class Block:
    """A block with its marks at the time of reading. Its states stay on disk, and the rest is small.

    Raises:
        ValueError: The block is not whole.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.hashes, self.done = (np.load(folder / name) for name in (_HASHES, _DONE))
        hidden = np.load(folder / _HIDDEN, mmap_mode="r")
        shapes = (len(self.hashes), len(self.done), np.load(folder / _MASS, mmap_mode="r").shape, hidden.shape)
        if shapes != (len(self.hashes), len(self.hashes), (len(self.hashes),), (len(self.hashes), width)):
            raise ValueError(f"arrays of shapes {shapes}")

    @property
    def hidden(self) -> np.ndarray:
        """States `[N, d]`, mapped at each access, because mappings kept for many blocks would exhaust descriptors."""
        return np.load(self.folder / _HIDDEN, mmap_mode="r")

    @property
    def log_mass(self) -> np.ndarray:
        """Z `[N]`."""
        return np.load(self.folder / _MASS)

    @contextmanager
    def writing(self) -> Iterator[Callable[[Sequence[int], np.ndarray, np.ndarray], None]]:
        """Yield a function that writes rows, and mark them as done every few seconds and at the end.

        Rows are marked after an interruption too. Values are flushed before the marks, so that a power loss can't leave
        a mark without its values.
        """
        hidden, mass, done = (np.load(self.folder / name, mmap_mode="r+") for name in (_HIDDEN, _MASS, _DONE))
        rows: list[int] = []
        last = time.monotonic()

        def mark() -> None:
            nonlocal last
            hidden.flush()
            mass.flush()
            done[rows] = 1
            done.flush()
            rows.clear()
            last = time.monotonic()

        def write(places: Sequence[int], states: np.ndarray, masses: np.ndarray) -> None:
            hidden[places], mass[places] = states, masses
            rows.extend(places)
            if time.monotonic() - last > _MARK_SECONDS:
                mark()

        try:
            yield write
        finally:
            mark()


Place = tuple[Block, int]


class StateCache:
    """Cached states of one model.

    Args:
        key: Key that identifies the model.
        width: Width of a state, d.
    """

    def __init__(self, key: str, width: int) -> None:
        self.root, self.width = cache_folder("states") / key, width

    def places(self) -> tuple[dict[bytes, Place], dict[bytes, Place]]:
        """Return the places of finished states, and the places that an interrupted pass left empty, by query."""
        found: dict[bytes, Place] = {}
        room: dict[bytes, Place] = {}
        for folder in sorted(self.root.glob("*")) if self.root.exists() else ():
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                block = Block(folder, self.width)
            except _NOT_WHOLE as error:
                logger.debug("%s is no whole block: %s", folder, error)
                continue
            for row, key in enumerate(block.hashes):
                (found if block.done[row] else room)[key.tobytes()] = (block, row)
        return found, {key: place for key, place in room.items() if key not in found}

    def create(self, keys: Sequence[bytes]) -> Block:
        """Return a new block with room for the states of these queries.

        Raises:
            OSError: The cache can't be written.
        """
        folder = self.root / hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / ".lock"):  # two runs that begin together fill one block
            try:
                return Block(folder, self.width)
            except _NOT_WHOLE:  # most often the block does not exist yet
                try:
                    _create(folder, keys, self.width)
                except ExpertokenError as error:  # for example a full disk
                    raise OSError(str(error)) from error
        return Block(folder, self.width)


def _create(folder: Path, keys: Sequence[bytes], width: int) -> None:
    with atomic_folder(folder) as aside:
        np.save(aside / _HASHES, np.array(keys, dtype="V16"))
        np.lib.format.open_memmap(aside / _HIDDEN, mode="w+", dtype=np.float32, shape=(len(keys), width)).flush()
        with (aside / _HIDDEN).open("r+b") as stream:
            _allocate(stream, stream.seek(0, os.SEEK_END))
        np.save(aside / _MASS, np.zeros(len(keys), dtype=np.float32))
        np.save(aside / _DONE, np.zeros(len(keys), dtype=np.uint8))


def _allocate(stream: IO[bytes], size: int) -> None:
    """Allocate all blocks of a file.

    On a full disk a sparse file would kill the process (SIGBUS) amid the forward pass.

    Raises:
        OSError: The disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
        return
    # macOS has no such call. A write allocates a block, so each block's first byte is rewritten.
    stream.truncate(size)
    for start in range(0, size, _BLOCK):
        stream.seek(start)
        byte = stream.read(1)
        stream.seek(start)
        stream.write(byte)
    stream.flush()


def gather(places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray]:
    """Return states `[N, d]` and Z `[N]` at places: a block's own arrays if the order is the same, else copies."""
    blocks = {id(block): block for block, _ in places}
    rows = np.array([row for _, row in places])
    if len(blocks) == 1:
        block = places[0][0]
        if len(rows) == len(block.hashes) and (rows == np.arange(len(rows))).all():
            return block.hidden, block.log_mass
    hidden, log_mass = room_for(len(places), places[0][0].hidden.shape[1])
    owners = np.array([id(block) for block, _ in places])
    for key, block in blocks.items():
        chosen = np.flatnonzero(owners == key)
        mapped = block.hidden
        for part in np.array_split(chosen, max(1, len(chosen) // _PART)):
            hidden[part] = mapped[rows[part]]
        log_mass[chosen] = block.log_mass[rows[chosen]]
    return hidden, log_mass


def room_for(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return empty arrays for `count` states and their Z, in memory or in a temporary file.

    Raises:
        ExpertokenError: The disk of temporary files is full.
    """
    if count * width * 4 <= _IN_MEMORY:
        hidden = np.empty((count, width), dtype=np.float32)
    else:
        with tempfile.TemporaryFile() as file:  # the mapping keeps it open, and it is deleted with the mapping
            try:
                _allocate(file, count * width * 4)
            except OSError as error:
                raise ExpertokenError(
                    f"{tempfile.gettempdir()}: no room for {count * width * 4 / 2**30:.1f} GiB of states "
                    f"({error.strerror}). Free some space, or set $TMPDIR to another folder"
                ) from error
            hidden = np.memmap(file, dtype=np.float32, mode="r+", shape=(count, width))
    return hidden, np.empty(count, dtype=np.float32)


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over an array's own memory, so that a pass over mapped states copies nothing.

    The caller must not write to the tensor.
    """
    array = np.ascontiguousarray(array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@dataclass(frozen=True)
class CachedModel:
    """Summary of one model's states in the cache.

    Attributes:
        folder: Folder of the model's states.
        queries: Number of finished states.
        size: Size in bytes.
        used: Time of the last write, in seconds since the epoch.
    """

    folder: Path
    queries: int
    size: int
    used: float


def cached_models() -> list[CachedModel]:
    """Return a summary of each model in the cache, with the longest unused first."""
    found = []
    root = cache_folder("states")
    for folder in sorted(entry for entry in root.glob("*") if entry.is_dir()) if root.exists() else ():
        files = [file for file in folder.rglob("*") if file.is_file()]
        done = 0
        for file in folder.glob(f"*/{_DONE}"):
            try:
                done += int(np.load(file).sum())
            except _NOT_WHOLE:
                continue
        size, used = sum(file.stat().st_size for file in files), max((f.stat().st_mtime for f in files), default=0.0)
        found.append(CachedModel(folder, done, size, used))
    return sorted(found, key=lambda model: model.used)


def prune(older_than: float) -> list[CachedModel]:
    """Remove the states of models without a write for `older_than` seconds, and return their summaries."""
    gone = [model for model in cached_models() if time.time() - model.used >= older_than]
    for model in gone:
        shutil.rmtree(model.folder)
    return gone
