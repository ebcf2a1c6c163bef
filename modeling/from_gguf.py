"""GGUF files as Hugging Face folders: converted once, then read from the cache."""

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .errors import ExpertokenError, require_extra
from .files import atomic_folder, cache_folder

logger = logging.getLogger(__name__)


def _key(path: Path) -> str:
    """Which conversion a file belongs to: its resolved path, size and time of change (hashing gigabytes is slow)."""
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]


def converted(path: Path) -> Path:
    """The folder that holds a GGUF file's model (de-quantised, float32) and tokenizer; made where it is not there yet.

    Raises:
        ExpertokenError: the file is missing or holds no model that transformers can read.
        ImportError: the `gguf` extra is not installed.
    """
    if not path.is_file():
        raise ExpertokenError(f"{path}: no such GGUF file")
    folder = cache_folder("gguf") / f"{path.stem}-{_key(path)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # several training processes ask at once; one converts
        if not (folder / "config.json").exists():
            _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    gguf: Any = require_extra("gguf", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s (once; kept in %s)", path, folder)
    # The reader parses the whole vocabulary in Python, and transformers asks for it three times, and builds the name
    # map once per submodule: keeping both halves the time.
    original = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = (functools.lru_cache(None)(function) for function in original)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ExpertokenError(f"{path}: not a GGUF model that transformers can read ({reason})") from error
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
