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
    """Return a file's key in the cache, from its resolved path, size and time of change.

    Its content is not hashed, because hashing gigabytes is slow.
    """
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]


def converted(path: Path) -> Path:
    """Return the folder of a GGUF file's model (de-quantised, float32) and tokenizer, and create it at the first use.

    Raises:
        ExpertokenError: The file is missing or holds no model that transformers can read.
        ImportError: The `gguf` extra is not installed.
    """
    if not path.is_file():
        raise ExpertokenError(f"{path}: expected a GGUF file, which does not exist")
    folder = cache_folder("gguf") / f"{path.stem}-{_key(path)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of several training processes that need the file, one converts it
        if not (folder / "config.json").exists():
            _convert(path, folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    gguf: Any = require_extra("gguf", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s once, and caching the result in %s", path, folder)
    # The reader parses the whole vocabulary in Python. transformers creates it three times, and builds the name map
    # once per submodule. Caching both halves the time.
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
        raise ExpertokenError(f"{path}: expected a GGUF model that transformers can read ({reason})") from error
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = original
    with atomic_folder(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
