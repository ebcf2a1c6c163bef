"""Files and folders that are complete or absent: written aside, flushed to disk, renamed into place."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ExpertokenError, one_line
from .source import is_path

PRODUCTS = {"composite": "expertoken.json", "supervision": "supervision.json"}
"""The folders that people name, to the file that tells them."""

_TRIES = 100  # to exchange a folder, while others read it
_LOOKS = 5  # for a file, while others exchange its folder

_OURS = {
    *PRODUCTS.values(),
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "chat_template.jinja",
    "experts.yaml",
    "expert_tokens.safetensors",
    "merges.txt",
    "README.md",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
}
"""What a new version of such a folder replaces or drops; any other file in it is somebody else's and stays."""


def check_product(path: Path | str, product: str) -> None:
    """Refuse to write one product over another, or where a folder can't be replaced.

    Raises:
        ExpertokenError: `path` is a file or a mount point, or holds the other product.
    """
    path = Path(path)
    _check_no_mount(path)
    if path.exists() and not path.is_dir():
        raise ExpertokenError(f"{path}: is a file; expected a folder to write the {product} to")
    for other, marker in PRODUCTS.items():
        if other != product and (path / marker).exists():
            raise ExpertokenError(f"{path}: holds a {other}; choose another folder for the {product}")


def _check_no_mount(path: Path) -> None:
    if path.resolve().is_mount():  # a link to another disk is none
        raise ExpertokenError(
            f"{path}: is a mount point, which can't be replaced in one step; choose a folder in it, such as "
            f"{path / 'new'}"
        )


def local_folder(path: Path | str, revision: str | None = None) -> Path:
    """The folder of a composite: itself, or where the hub's copy of `owner/name` is kept.

    Raises:
        ExpertokenError: there is no such folder, and no such repository either.
    """
    folder = Path(path)
    name = str(path)
    if folder.exists() or "/" not in name or is_path(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # of HTTP, of the cache, of offline mode: the hub's client has many
        raise ExpertokenError(
            f"{name}: no such folder, and as a repository of the hub it can't be had ({one_line(error)})"
        ) from error


def cache_folder(kind: str) -> Path:
    """The folder for one kind of cache, under `$EXPERTOKEN_CACHE` or the user's cache directory."""
    root = os.environ.get("EXPERTOKEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "expertoken"
    return Path(root).expanduser() / kind


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk with everything in it: what a power cut must not take."""
    for entry in [*folder.rglob("*"), folder]:
        _sync(entry)


def _aside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a path to write; on success it takes the place of `path`, on failure `path` is as it was.

    Raises:
        ExpertokenError: the file could not be written (no space, no permission).
    """
    path = Path(path)
    aside = _aside(path, f"{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        aside.replace(path)
    except OSError as error:
        raise ExpertokenError(f"{path}: could not be written ({error.strerror or error}); it is as it was") from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `path`, on failure `path` is as it was.

    Our own files of the old folder are gone then; its subfolders (checkpoints, logs, reports) and what somebody else
    put there move over to the new one. POSIX has no portable exchange of two folders, so the old one is renamed aside
    first; `recover_folder` finishes or undoes what a crash between the renames left. Of a symbolic link the folder that
    it leads to is replaced.

    Raises:
        ExpertokenError: the folder could not be written (no space, no permission), or is a mount point.
    """
    path = Path(path).resolve()
    _check_no_mount(path)
    aside, old = _aside(path, f"{os.getpid()}.tmp"), _aside(path, "old")
    try:
        recover_folder(path)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        _exchange(aside, path, old)
        recover_folder(path)
        _sync(path.parent)
    except OSError as error:
        recover_folder(path)
        raise ExpertokenError(f"{path}: could not be written ({error.strerror or error}); it is as it was") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(aside: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another, which goes aside."""
    for _ in range(_TRIES):
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
            return
        except OSError:  # somebody who reads has put the old one back meanwhile, see `restore_folder`
            if not path.exists():
                raise
    raise OSError(errno.EBUSY, "others read it all the time")


def restore_folder(path: Path | str) -> None:
    """Put an old folder back whose exchange was cut short: for those who read, and may not know of a writer at work.

    Files of the old one that belong into the new one are moved by who writes next.
    """
    path = Path(path).resolve()
    if not path.exists():
        with suppress(OSError):  # there is none, it may not be moved, or somebody else was faster
            _aside(path, "old").rename(path)


def read_settled(file: Path) -> str:
    """Return the text of a file of such a folder; while that is exchanged there is none of its name for a moment.

    Raises:
        OSError: there is none for good, or it can't be read.
    """
    for _ in range(_LOOKS):
        restore_folder(file.parent)
        with suppress(FileNotFoundError):
            return file.read_text("utf-8")
        time.sleep(0.01)
    return file.read_text("utf-8")


def recover_folder(path: Path | str) -> None:
    """Finish or undo an exchange that a crash cut short (see `atomic_folder`): for those who write."""
    path = Path(path).resolve()
    old = _aside(path, "old")
    if not old.exists():
        return
    if not path.exists():
        old.rename(path)
        return
    # A checkpoint's weights go with it: in a new one that is split otherwise the old ones would be loaded.
    replaced = set(_OURS)
    if any(path.glob("model*.safetensors")):
        replaced |= {entry.name for entry in old.glob("model*.safetensors*")}
    for entry in old.iterdir():
        if (entry.is_dir() or entry.name not in replaced) and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)
