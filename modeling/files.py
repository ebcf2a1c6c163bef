"""Files and folders that are complete or absent: written to a temporary path, flushed to disk, renamed into place."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ExpertokenError, one_line
from .source import is_path, local_path

PRODUCTS = {"composite": "expertoken.json", "supervision": "supervision.json"}
"""Kinds of folders that users name, with the file that identifies each."""

_TRIES = 100  # attempts to exchange a folder while other processes read it
_LOOKS = 5  # attempts to read a file while other processes exchange its folder

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
"""Files that a new version of such a folder replaces or drops. Any other file in it belongs to the user and stays."""


def check_product(path: Path | str, product: str) -> None:
    """Check that a product can be written to a folder and overwrites no product of another kind.

    Raises:
        ExpertokenError: `path` is a file or a mount point, or holds a product of another kind.
    """
    path = Path(path)
    _check_no_mount(path)
    if path.exists() and not path.is_dir():
        raise ExpertokenError(f"{path}: expected a folder to write the {product} to, got a file. Choose another path")
    for other, marker in PRODUCTS.items():
        if other != product and (path / marker).exists():
            raise ExpertokenError(f"{path}: holds a {other}. Choose another folder for the {product}")


def _check_no_mount(path: Path) -> None:
    if path.resolve().is_mount():  # a link to another disk is no mount point
        raise ExpertokenError(
            f"{path}: expected a folder that can be replaced in one step, got a mount point. Choose a folder in it, "
            f"such as {path / 'new'}"
        )


def local_folder(path: Path | str, revision: str | None = None) -> Path:
    """Return the local folder of a composite: the path itself, or the local copy of `owner/name` on the hub.

    Raises:
        ExpertokenError: The folder does not exist, and the hub gives no such repository.
    """
    folder = local_path(path)
    name = str(path)
    if folder.exists() or "/" not in name or is_path(name):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as error:  # the hub's client has many errors: of HTTP, of the cache, of offline mode
        raise ExpertokenError(
            f"{name}: expected a folder or a repository on the hub. The folder does not exist, and the download failed "
            f"({one_line(error)})"
        ) from error


def cache_folder(kind: str) -> Path:
    """Return the folder for one kind of cache, under `$EXPERTOKEN_CACHE` or the user's cache directory."""
    root = os.environ.get("EXPERTOKEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "expertoken"
    return local_path(root) / kind


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder and everything in it to disk, so that a power cut loses nothing."""
    for entry in [*folder.rglob("*"), folder]:
        _sync(entry)


def _aside(path: Path, word: str) -> Path:
    return path.with_name(f".{path.name}.{word}")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write. On success it replaces `path`, on failure `path` is unchanged.

    Raises:
        ExpertokenError: The file could not be written (no space, no permission).
    """
    path = Path(path)
    aside = _aside(path, f"{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        _sync(aside)
        aside.replace(path)
    except OSError as error:
        raise ExpertokenError(
            f"{path}: could not be written ({error.strerror or error}). Nothing was changed"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder to fill. On success it replaces `path`, on failure `path` is unchanged.

    The replaced folder's files of the project are deleted. Its subfolders (checkpoints, logs, reports) and other files
    move to the new folder. POSIX has no portable exchange of two folders, so the old folder is renamed first. After a
    crash between the renames, `recover_folder` finishes or undoes the exchange. For a symbolic link, its target folder
    is replaced.

    Raises:
        ExpertokenError: The folder could not be written (no space, no permission), or is a mount point.
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
        raise ExpertokenError(
            f"{path}: could not be written ({error.strerror or error}). Nothing was changed"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(aside: Path, path: Path, old: Path) -> None:
    """Rename a folder to the path of another, which is renamed to `old`."""
    for _ in range(_TRIES):
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
            return
        except OSError:  # a reading process has restored the old folder meanwhile, see `restore_folder`
            if not path.exists():
                raise
    raise OSError(errno.EBUSY, "other processes read it all the time")


def restore_folder(path: Path | str) -> None:
    """Restore an old folder after an interrupted exchange.

    Reading processes call this, because they may not know of an active writer. The next writer moves files of the old
    folder that belong into the new one.
    """
    path = Path(path).resolve()
    if not path.exists():
        with suppress(OSError):  # no old folder exists, it may not be moved, or another process was faster
            _aside(path, "old").rename(path)


def read_settled(file: Path) -> str:
    """Return the text of a file in a replaceable folder, with retries.

    During an exchange the folder does not exist for a moment.

    Raises:
        OSError: The file does not exist after all retries, or can't be read.
    """
    for _ in range(_LOOKS):
        restore_folder(file.parent)
        with suppress(FileNotFoundError):
            return file.read_text("utf-8")
        time.sleep(0.01)
    return file.read_text("utf-8")


def recover_folder(path: Path | str) -> None:
    """Finish or undo an exchange that a crash interrupted. Writing processes call this (see `atomic_folder`)."""
    path = Path(path).resolve()
    old = _aside(path, "old")
    if not old.exists():
        return
    if not path.exists():
        old.rename(path)
        return
    # A checkpoint's old weights are dropped too. In a new checkpoint that is split differently they would be loaded.
    replaced = set(_OURS)
    if any(path.glob("model*.safetensors")):
        replaced |= {entry.name for entry in old.glob("model*.safetensors*")}
    for entry in old.iterdir():
        if (entry.is_dir() or entry.name not in replaced) and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)
