"""Fingerprints and descriptions by which results and caches know the model and libraries that made them."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .head import output_head
from .sharding import full_shape, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_SAMPLES = 4096  # values of a parameter, at least one of each row of a matrix
_STRIDE = 7919  # a prime: the columns of a matrix come in turn, whatever its width
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_CONFIG = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "quantization_config",
              "bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "auto_map",
              "attn_implementation")  # fmt: skip
"""Entries of a configuration that change no state."""


def fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a hash that tells models apart by content: configuration, and every parameter's name, shape and values.

    Of large parameters a sample counts, at least one value of each row. Of the configuration what differs from its
    class's defaults counts: another `rope_theta`, norm epsilon or activation is another model with the same weights.
    Rows of candidates don't count: they are what changes while the model stays.

    Args:
        model: the model.
        dtype: type that values are rounded to first; as they are where None.
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
    """Return some of a parameter's values, `[S]`: every row of a matrix is among them."""
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
    """Return the fingerprints by which a model is known again when it is loaded in another type of weights.

    One for its own type and one for each narrower one: what was rounded can't be compared with what was not.
    """
    names = list(_DTYPES)
    own = describe_dtype(model)
    kept = names[names.index(own) :] if own in names else [own]
    if own == "float16":  # bfloat16 is not narrower: it rounds twice what it would have rounded once
        kept = [own]
    return {name: fingerprint(model, _DTYPES.get(name)) for name in kept}


def same_model(model: "PreTrainedModel", known: dict[str, str]) -> bool:
    """Return whether a model is the one that fingerprints are of, whatever type its weights are in now.

    Args:
        model: the model.
        known: what `fingerprints` gave then.
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
