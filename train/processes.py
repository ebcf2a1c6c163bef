"""Several training processes: checks of the launch, loading, the lock of a folder, and exit."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from ..modeling.distributed import Team, barrier
from ..modeling.errors import ExpertokenError, require_extra

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .arguments import ExpertokenArguments

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_hf")


def check_world(world_size: int) -> None:
    """Refuse a launch whose processes do not form one group.

    On CPU some launchers start two processes that each run as the only one. They write the same files without an error.
    The command `accelerate launch --cpu --num_processes 2` can't be detected: it starts just one process.

    Raises:
        ExpertokenError: Launcher and library disagree on the number of processes.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ExpertokenError(
            f"expected {launched} processes in one group, as launched, found {world_size}. On CPU launch with "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`"
        )


def check_offload(arguments: "TrainingArguments") -> None:
    """Refuse an optimizer other than AdamW if DeepSpeed keeps its states on the CPU.

    accelerate then silently replaces any optimizer by DeepSpeed's Adam. With the learning rate of `--optim sgd` this
    ruins the rows.

    Raises:
        ExpertokenError: The optimizer is not AdamW and its states are on the CPU.
    """
    plugin = arguments.deepspeed_plugin
    offloaded = plugin and plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {})
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if offloaded and offloaded.get("device", "none") != "none" and optimizer not in _ADAM:
        raise ExpertokenError(
            f"--optim {optimizer}: with optimizer states on the CPU DeepSpeed replaces any optimizer by its own "
            "Adam. Use adamw_torch, or a configuration without offload"
        )


def check_workers(options: "ExpertokenArguments", processes: int) -> None:
    """Refuse options of a Ray cluster that can't be followed.

    Raises:
        ExpertokenError: Options contradict each other.
        ImportError: The extra `ray` is not installed.
    """
    if not options.ray_workers:
        if options.ray_address is not None or options.ray_gpus:
            raise ExpertokenError("--ray_address and --ray_gpus need --ray_workers, the number of workers")
        return
    require_extra("ray", "ray")
    if processes > 1:
        raise ExpertokenError(
            f"--ray_workers {options.ray_workers}: expected one training process, got {processes}. Launch without "
            "accelerate, or drop --ray_workers"
        )


@contextmanager
def loading(arguments: "TrainingArguments") -> Iterator[None]:
    """Load a model inside the block as the launch configuration requires: under ZeRO-3 split at once, or whole first.

    Transformers splits weights while it loads them whenever ZeRO-3 is on. Then only the engine can run the model, and
    states for a warm start of the rows can't be computed. So weights are split at once only if `zero3_init_flag` is
    set. (For a DeepSpeed file passed as `--deepspeed` accelerate always assumes the flag. There the launcher's
    environment variable decides.)
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return
    at_once = plugin.zero3_init_flag
    if arguments.deepspeed:
        at_once = os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "false").lower() == "true"
    import deepspeed
    from transformers.integrations import deepspeed as integration

    if not deepspeed.comm.is_initialized():  # otherwise every process loads as if it were the only one
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else None
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    if at_once:
        yield
        return
    config = integration.deepspeed_config()
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.dschf = integration.HfDeepSpeedConfig(config)  # registers itself, as a weak reference in transformers


@contextmanager
def exclusive(folder: Path, team: Team) -> Iterator[None]:
    """Lock a folder against all other runs. The system releases the lock at the end of the process, however it ends.

    Two runs in one folder are likely. After a SIGKILL of the launcher its processes keep running, and their files mix
    with the files of the restarted run.

    Raises:
        ExpertokenError: Another run writes to the folder, or the lock can't be written.
    """
    # The lock is beside the folder, where every process that could write the folder sees it. It is not inside, because
    # the folder is replaced as a whole in the end.
    file = folder.absolute().with_name(f".{folder.name}.lock")
    lock = FileLock(file, timeout=0)

    def take() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ExpertokenError(
                f"{folder}: another run writes there, maybe a process that outlived its launcher. End it, wait for "
                "its end, or choose another folder"
            ) from None
        except OSError as error:
            raise ExpertokenError(f"{file}: can't be written ({error.strerror or error})") from None

    team.agree(take)
    try:
        yield
    finally:
        lock.release()


def leave() -> None:
    """Exit at once if several gloo processes worked together.

    At interpreter shutdown a gloo thread sometimes aborts the process (`terminate called without an active
    exception`) after everything is on disk, and the launcher reports a failure. A barrier and
    `destroy_process_group()` do not prevent it. On one process, and with other backends, the ordinary exit is used.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
