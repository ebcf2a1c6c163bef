"""Several training processes: whether they know of each other, how they load, waiting, leaving."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout

from ..modeling.distributed import Team, barrier
from ..modeling.errors import ExpertokenError

if TYPE_CHECKING:
    from transformers import TrainingArguments

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_hf")


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


def check_offload(arguments: "TrainingArguments") -> None:
    """Refuse another optimizer than AdamW where DeepSpeed keeps its states on the CPU.

    accelerate puts DeepSpeed's Adam in the place of any optimizer then, without a word: `--optim sgd` at its learning
    rate wrecks the rows.

    Raises:
        ExpertokenError: such an optimizer was asked for.
    """
    plugin = arguments.deepspeed_plugin
    offloaded = plugin and plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {})
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if offloaded and offloaded.get("device", "none") != "none" and optimizer not in _ADAM:
        raise ExpertokenError(
            f"--optim {optimizer}: with optimizer states on the CPU DeepSpeed's own Adam runs, whatever is "
            "asked for; take adamw_torch, or a configuration without offload"
        )


@contextmanager
def loading(arguments: "TrainingArguments") -> Iterator[None]:
    """Load a model inside the block as the launch configuration says: under ZeRO-3 split at once, or whole first.

    Transformers splits weights while it loads them whenever ZeRO-3 is on. Then only the engine can run the model, and
    states for a start of the tokens can't be computed; so that is done where `zero3_init_flag` asks for it. (Of a
    DeepSpeed file given as `--deepspeed` accelerate takes it for granted; there the launcher's variable has to say so.)
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

    if not deepspeed.comm.is_initialized():  # without it every process counts itself alone while it loads
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
        plugin.dschf = integration.HfDeepSpeedConfig(config)  # registers itself; transformers keeps a weak reference


@contextmanager
def exclusive(folder: Path, team: Team) -> Iterator[None]:
    """Keep every other run out of a folder. The system ends the hold with the process, however that ends.

    Two runs come together more easily than one thinks: whoever kills a launcher with SIGKILL leaves its processes at
    work, and what they write mixes with what the restarted run writes.

    Raises:
        ExpertokenError: another run is at work there.
    """
    # Beside the folder, which all see who could write there, and not in it: it is replaced as a whole in the end.
    file = folder.absolute().with_name(f".{folder.name}.lock")
    lock = FileLock(file, timeout=0)

    def take() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ExpertokenError(
                f"{folder}: another run writes there, maybe a process that has outlived its launcher; end it or wait "
                "for it, or choose another folder"
            ) from None
        except OSError as error:
            raise ExpertokenError(f"{file}: can't be written ({error.strerror or error})") from None

    team.agree(take)
    try:
        yield
    finally:
        lock.release()


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
