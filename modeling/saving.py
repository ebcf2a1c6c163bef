"""Saving of a composite folder: written to a temporary path, verified in a fresh process, renamed into place."""

import logging
import shutil
from pathlib import Path

import torch

from .composite import Composite, Trained, write_composite
from .errors import ExpertokenError
from .files import atomic_folder, check_product
from .memory import free_memory
from .meta import MetaLLM
from .sharding import full_shape
from .verify import verify_reload

logger = logging.getLogger(__name__)


def save_composite(
    composite: Composite, path: Path | str, *, verify: bool = True, trained: Trained | None = None
) -> None:
    """Write a composite folder, completely or not at all.

    Args:
        composite: Composite to write.
        path: Folder to write. An existing composite is replaced.
        verify: If true, a fresh process loads the new folder and compares logits before the old folder is replaced.
        trained: Trained tensors, if several processes gathered them before one of them saves.

    Raises:
        ExpertokenError: The folder could not be written, or the fresh process computed different logits.
    """
    path = Path(path)
    check_product(path, "composite")
    trained = trained or Trained.of(composite, probe=verify)
    with atomic_folder(path) as folder:
        write_composite(composite, folder, trained)
        if verify and (why := _no_room(composite.meta)):
            logger.warning("%s is saved without a check in a fresh process: %s", path, why)
        elif verify:
            assert trained.probes is not None, "expected probes for the verification"
            try:
                verify_reload(composite, folder, trained.probes)
            except ExpertokenError as error:
                # Training may have taken days, so its result is kept, under a name that does not suggest a sound one.
                rejected = path.with_name(f"{path.name}.unverified")
                shutil.rmtree(rejected, ignore_errors=True)
                shutil.copytree(folder, rejected)
                raise ExpertokenError(f"{error} (the rejected folder is kept in {rejected})") from error


def _no_room(meta: MetaLLM) -> str | None:
    """Return the reason why a second copy of the meta LLM can't be loaded beside this one, or None."""
    parameters = list(meta.plain.parameters())
    needed = 1.2 * sum(full_shape(p).numel() * p.element_size() for p in parameters) / 2**30
    if meta.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(meta.device)[0] / 2**30
    else:
        free = free_memory() / 2**30
    if free >= needed:
        return None
    return f"a second copy of its base needs {needed:.1f} GiB, but {free:.1f} GiB are free on {meta.device}"
