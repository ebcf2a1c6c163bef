"""Several training processes: whether they know of each other, waiting, leaving."""

import os
import sys

import torch

from ..modeling.errors import ExpertokenError


def check_world(world_size: int) -> None:
    """Refuse a launch whose processes do not know of each other.

    On CPU some launchers start two processes that each believe to be alone and write the same files, without an error.
    (`accelerate launch --cpu --num_processes 2` can't be told from one process: it starts just one.)

    Raises:
        ExpertokenError: launcher and library disagree.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ExpertokenError(
            f"{launched} processes were launched but {world_size} work together; on CPU launch with "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`"
        )


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Leave at once where several gloo processes worked together.

    At interpreter shutdown a gloo thread now and then aborts the process (`terminate called without an active
    exception`) after everything is on disk, and the launcher reports a failure. A barrier and
    `destroy_process_group()` do not cure it. On one process, and with other backends, the ordinary exit is used.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
