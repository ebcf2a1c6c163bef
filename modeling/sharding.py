"""Weights that a launcher has split over processes (DeepSpeed ZeRO-3, FSDP2), seen or written whole.

Everything here but `full_shape` is collective: every process has to call it, in the same order.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole; ZeRO-3 leaves an empty tensor where the weights were."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_split(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split the weights, so that a forward pass needs its engine and every process."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(tensors: Iterable[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Have ZeRO-3's tensors whole inside the block.

    Args:
        tensors: parameters; those that are not split are as they are.
        write: whether the block changes them; what the first process makes of them is what all get.
    """
    split = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole on the CPU."""
    if _is_distributed(tensor):
        detached: Any = tensor.detach()
        return detached.full_tensor().cpu().clone()
    if _has_master(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).detach().cpu().clone()
    with gathered([tensor]):
        return tensor.detach().cpu().clone()


def _is_distributed(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Return whether FSDP2 has split a tensor."""
    return hasattr(tensor, "full_tensor")


def _has_master(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed trains a float32 master of a bfloat16 or float16 tensor: that is the exact one."""
    return tensor.dtype != torch.float32 and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


@torch.no_grad()
def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Put values into a tensor in place, so that an optimizer keeps its parameter."""
    if _has_master(tensor):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, values.to(tensor.device, torch.float32))
    if _is_distributed(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements)
        tensor.copy_(values)
        return
    with gathered([tensor], write=True):
        tensor.copy_(values)
