"""Main memory that is available to this process."""

from contextlib import suppress
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# Files with the limit, the use, and the reclaimable part of the use: of cgroups v2, then of v1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Return the bytes that this process can still allocate, within the limits of the machine and of containers."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> list[int]:
    """Return the bytes left by each limit, from this process's control group up to the root."""
    left = []
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers in ("", "memory"):
                root = _CGROUPS / controllers
                own = root / name.lstrip("/")
                for folder in (own, *own.parents):
                    left += _left_in(folder)
                    if folder == root:
                        break
    return left


def _left_in(folder: Path) -> list[int]:
    for limit, used, reclaimable in _FILES:
        with suppress(OSError, ValueError):  # the file does not exist, or the limit is "max"
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return [max(0, most - now + int(counts.get(reclaimable, 0)))]
    return []
