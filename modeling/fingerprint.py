"""Fingerprints and descriptions by which results and caches know the model and libraries that made them."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .head import output_head
from .sharding import full_shape, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fingerprint(model: nn.Module) -> str:
    """Return a hash that tells models apart by content: every parameter's name, shape and 64 spread-out values.

    Values are compared in bfloat16, so that a model keeps its fingerprint when it is loaded wider than it was saved.
    Expert rows don't count: they are what changes while the model stays.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("expert_rows"):
            continue
        digest.update(f"{name}{tuple(full_shape(parameter))}".encode())
        with gathered([parameter]):
            flat = parameter.detach().flatten()
            count = min(64, flat.numel())
            places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
            digest.update(flat[places].to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_dtype(model: "PreTrainedModel") -> str:
    """Return the dtype of a model's head, as composites record it."""
    return str(output_head(model).weight.dtype).removeprefix("torch.")


def library_versions() -> dict[str, Any]:
    """Return the versions of the libraries that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("expertoken", "torch", "transformers", "peft", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
