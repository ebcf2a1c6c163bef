"""Access to whole weights that a launcher has split over processes (DeepSpeed ZeRO-3, FSDP2).

All functions except `full_shape` and the checks are collective: every process must call them, in the same order.
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
    """Return the shape of the whole tensor. ZeRO-3 leaves an empty tensor in its place."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def is_split(model: nn.Module) -> bool:
    """Check whether ZeRO-3 has split the weights, so that a forward pass needs its engine and every process."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(tensors: Iterable[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Gather tensors that ZeRO-3 has split, within the block.

    Args:
        tensors: Parameters. Unsplit ones are not changed.
        write: If true, the block changes the tensors, and all processes receive the first process's values.
    """
    split = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None):
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the whole tensor on the CPU."""
    if _is_distributed(tensor):
        detached: Any = tensor.detach()
        return detached.full_tensor().cpu().clone()
    if _has_master(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor).detach().cpu().clone()
    with gathered([tensor]):
        return tensor.detach().cpu().clone()


def _is_distributed(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Check whether FSDP2 has split a tensor."""
    return hasattr(tensor, "full_tensor")


def _has_master(tensor: torch.Tensor) -> bool:
    """Check whether DeepSpeed trains a float32 master of a bfloat16 or float16 tensor. The master is exact."""
    return tensor.dtype != torch.float32 and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"))


@torch.no_grad()
def overwrite(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a tensor in place, so that an optimizer keeps its parameter."""
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
