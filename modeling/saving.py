"""Saving a composite folder: written aside, verified in a fresh process, renamed into place."""

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
        composite: what to write.
        path: the folder; one that is there is replaced.
        verify: load it in a fresh process and compare logits before it takes the place of the old one.
        trained: what training changed, where several processes had to bring it together before one of them saves.

    Raises:
        ExpertokenError: it could not be written, or the fresh process came to other logits.
    """
    path = Path(path)
    check_product(path, "composite")
    trained = trained or Trained.of(composite, probe=verify)
    with atomic_folder(path) as folder:
        write_composite(composite, folder, trained)
        if verify and (why := _no_room(composite.meta)):
            logger.warning("%s is not checked in a fresh process: %s", path, why)
        elif verify:
            assert trained.probes is not None, "probes are taken where a composite is to be verified"
            try:
                verify_reload(composite, folder, trained.probes)
            except ExpertokenError as error:
                # Training may have taken days: what it made is kept aside, under a name that nobody takes for good.
                rejected = path.with_name(f"{path.name}.unverified")
                shutil.rmtree(rejected, ignore_errors=True)
                shutil.copytree(folder, rejected)
                raise ExpertokenError(f"{error}; what was written is kept in {rejected}") from error


def _no_room(meta: MetaLLM) -> str | None:
    """Why a second copy of the meta LLM can't be loaded beside this one, or None."""
    parameters = list(meta.plain.parameters())
    needed = 1.2 * sum(full_shape(p).numel() * p.element_size() for p in parameters) / 2**30
    if meta.device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(meta.device)[0] / 2**30
    else:
        free = free_memory() / 2**30
    if free >= needed:
        return None
    return f"a second copy of its base needs {needed:.1f} GiB, {free:.1f} GiB are free on {meta.device}"
