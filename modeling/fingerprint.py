"""Fingerprints and descriptions of the model and the libraries behind a result or a cache."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .head import output_head
from .sharding import full_shape, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAMPLES = 4096  # sampled values of a parameter, at least one of each row of a matrix
_STRIDE = 7919  # a prime, so that the sample covers all columns of a matrix in turn, whatever its width
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_CONFIG = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "quantization_config",
              "bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "auto_map",
              "attn_implementation")  # fmt: skip
"""Entries of a configuration that change no hidden state."""


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a hash of a model's content: its configuration, and every parameter's name, shape and values.

    Large parameters contribute a sample, with at least one value of each row. The configuration contributes its
    differences from its class's defaults, because another `rope_theta`, norm epsilon or activation makes another model
    with the same weights. Expert rows are excluded, because training changes them while the model stays the same.

    Args:
        model: Model to hash.
        dtype: Type to round values to first. None to keep their own type.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):
        described = config.to_diff_dict()
        kept = {key: described[key] for key in described if key not in _NO_CONFIG and not key.startswith("_")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("expert_rows"):
            continue
        digest.update(f"{name}{tuple(full_shape(parameter))}".encode())
        with gathered([parameter]):
            values = _sample(parameter.detach())
            if dtype is not None and values.is_floating_point():
                values = values.to(dtype)
            digest.update(values.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(values: torch.Tensor) -> torch.Tensor:
    """Return a sample `[S]` of a parameter's values, with at least one value of every row of a matrix."""
    flat = values.flatten()
    if flat.numel() <= _SAMPLES:
        return flat
    rows = values.shape[0] if values.dim() > 1 else 1
    width = flat.numel() // rows
    each = -(-_SAMPLES // rows)
    row = torch.arange(rows, device=flat.device).repeat_interleave(each)
    column = (torch.arange(rows * each, device=flat.device) * _STRIDE) % width
    return flat[row * width + column]


def fingerprints(model: "PreTrainedModel") -> dict[str, str]:
    """Return the fingerprints that identify a model, also when it is loaded in a narrower type of weights.

    There is one for its own type and one for each narrower type, because rounded values can't be compared with exact
    ones.
    """
    names = list(_DTYPES)
    own = describe_dtype(model)
    kept = names[names.index(own) :] if own in names else [own]
    if own == "float16":  # bfloat16 is not narrower: float16 weights would be rounded twice instead of once
        kept = [own]
    return {name: fingerprint(model, _DTYPES.get(name)) for name in kept}


def same_model(model: "PreTrainedModel", known: dict[str, str]) -> bool:
    """Check whether a model has the given fingerprints, whatever type its weights have now.

    Args:
        model: Model to check.
        known: Earlier result of `fingerprints`.
    """
    own = describe_dtype(model)
    name = own if own in known else next(iter(known))
    return fingerprint(model, _DTYPES.get(name)) == known[name]


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
