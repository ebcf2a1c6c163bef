"""Checkpoints of method `lora`: composite folders that also hold the files the Trainer resumes from."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..modeling.composite import ADAPTER_WEIGHTS, ROWS_FILE, Composite, Trained, read_rows, write_composite
from ..modeling.errors import ExpertokenError, one_line
from ..modeling.files import atomic_file
from ..modeling.sharding import overwrite

logger = logging.getLogger(__name__)

START = "checkpoint-start"
"""Folder of the weights at the start of training. It has no number, so a run does not resume from it."""

_RUN_FILE = Path("runs") / "run.json"
_FINISHED = Path("runs") / "finished.json"
_NAMED = 5  # differences that an error names


def write_checkpoint(folder: Path, composite: Composite, trained: Trained, step: int) -> None:
    """Write a composite with the present weights.

    Args:
        folder: Folder of the checkpoint.
        composite: Composite in training.
        trained: Its weights, gathered from all processes.
        step: Training step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = replace(composite.manifest, training=composite.manifest.training | {"steps": step})
    write_composite(replace(composite, manifest=manifest), folder, trained)


def read_checkpoint(folder: Path, composite: Composite) -> None:
    """Put a checkpoint's adapter and rows into a composite, in place.

    Raises:
        ExpertokenError: Files of the checkpoint are missing, damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, meta = folder / ADAPTER_WEIGHTS, composite.meta
    try:
        meta.set_adapter_state(load_file(file))
    except (OSError, SafetensorError, ExpertokenError) as error:
        raise ExpertokenError(
            f"{file}: missing, damaged or of another model ({one_line(error)}). Remove {folder.name} to resume from "
            "the checkpoint before it"
        ) from error
    overwrite(meta.head.expert_rows, read_rows(folder / ROWS_FILE, composite.pool.names, meta.row_width))


def _numbered(folder: Path) -> list[Path]:
    """Return the Trainer's numbered checkpoints. A user's folder such as checkpoint-good must not be deleted."""
    return [entry for entry in folder.glob("checkpoint-*") if entry.name.removeprefix("checkpoint-").isdigit()]


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else 0


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint: its `trainer_state.json`, written last, and its weights can be read."""
    from safetensors import SafetensorError, safe_open

    for entry in sorted(_numbered(folder), key=_step, reverse=True):
        try:
            json.loads((entry / "trainer_state.json").read_text())
            for name in (ADAPTER_WEIGHTS, ROWS_FILE):
                with safe_open(entry / name, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s is incomplete and is skipped: %s", entry, one_line(error))
            continue
        return entry
    return None


def find_checkpoint(resume: str, output_dir: Path, run: dict[str, Any]) -> Path | None:
    """Find the checkpoint to resume from by the value of `--resume`, or None. `run` identifies this run.

    Raises:
        ExpertokenError: With `auto`, the checkpoints in `output_dir` belong to another run. With a path, the path holds
            no complete checkpoint, or `output_dir` holds later ones of another run.
    """
    record = output_dir / _RUN_FILE
    if resume == "auto":
        checkpoint = last_complete_checkpoint(output_dir)
        known = json.loads(record.read_text()) if checkpoint and record.exists() else run
        other = [key for key in run | known if known.get(key) != run.get(key)]
        if other:
            told = ", ".join(f"{key} {known.get(key)!r} then, {run.get(key)!r} now" for key in other[:_NAMED])
            raise ExpertokenError(
                f"{output_dir}: holds checkpoints of a run with other arguments or data ({told}). Choose another "
                "--out, or pass --resume never to start anew there"
            )
    elif resume == "never":
        checkpoint = None
    else:
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").exists():
            raise ExpertokenError(
                f"--resume {resume}: expected auto, never or the path of a complete checkpoint, found none there"
            )
        later = [entry.name for entry in _numbered(output_dir) if _step(entry) > _step(checkpoint)]
        if later and record.exists() and json.loads(record.read_text()) != run:
            # The next resume of this run would mistake them for its own.
            raise ExpertokenError(
                f"{output_dir}: holds later checkpoints of a run with other arguments ({', '.join(sorted(later))}). "
                "Choose another --out, or remove them"
            )
    return checkpoint


def record_finished(output_dir: Path, state: TrainerState) -> None:
    """Record that the run is finished. Its last checkpoint may be removed by then, since another one is the best."""
    try:
        with atomic_file(output_dir / _FINISHED) as aside:
            state.save_to_json(str(aside))
    except ExpertokenError as error:  # the same command trains again: no reason to lose the weights of this run
        logger.warning("%s", error)


def finished_run(resume: str, output_dir: Path, run: dict[str, Any]) -> Path | None:
    """Return the file of the Trainer's state if this same run is finished and its best checkpoint exists, else None.

    Args:
        resume: Value of `--resume`. Only `auto` refers to the same run.
        output_dir: Folder of the run.
        run: Settings that identify the run.
    """
    file, record = output_dir / _FINISHED, output_dir / _RUN_FILE
    try:
        if resume != "auto" or json.loads(record.read_text()) != run:
            return None
        state = TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError):
        return None
    best = output_dir / Path(state.best_model_checkpoint or "").name
    return file if best != output_dir and (best / ROWS_FILE).exists() else None


def best_checkpoint(state: TrainerState, checkpoint: Path) -> Path:
    """Return the best checkpoint of a finished run, searched first in the present folder of its last checkpoint."""
    recorded = Path(state.best_model_checkpoint or checkpoint)
    best = next((folder for folder in (checkpoint.parent / recorded.name, recorded) if folder.exists()), None)
    if best is None:
        logger.warning("the best checkpoint, %s, does not exist any more, so the last one is used", recorded.name)
    return best or checkpoint


def record_run(resume: str, output_dir: Path, run: dict[str, Any]) -> None:
    """Record the run that the checkpoints belong to. With `--resume never` delete the checkpoints of an earlier run.

    Otherwise an interrupted new run would resume from the old run's checkpoint, which has the higher number.
    """
    if resume == "never":
        for entry in _numbered(output_dir):
            shutil.rmtree(entry)
    (output_dir / _FINISHED).unlink(missing_ok=True)
    with atomic_file(output_dir / _RUN_FILE) as aside:
        aside.write_text(json.dumps(run, indent=2) + "\n")
