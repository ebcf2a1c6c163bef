"""Checkpoints of method `lora`: each is a composite folder beside what the Trainer resumes from."""

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
"""Folder of the weights that training began with. It has no number, so a run does not resume from it."""

_RUN_FILE = Path("runs") / "run.json"
_FINISHED = Path("runs") / "finished.json"
_NAMED = 5  # differences that an error names


def write_checkpoint(folder: Path, composite: Composite, trained: Trained, step: int) -> None:
    """Write a composite of what is trained so far.

    Args:
        folder: folder of the checkpoint.
        composite: what is trained.
        trained: its weights, brought together from all processes.
        step: step of the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = replace(composite.manifest, training=composite.manifest.training | {"steps": step})
    write_composite(replace(composite, manifest=manifest), folder, trained)


def read_checkpoint(folder: Path, composite: Composite) -> None:
    """Put a checkpoint's adapter and rows into a composite, in place.

    Raises:
        ExpertokenError: its files are missing, damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, meta = folder / ADAPTER_WEIGHTS, composite.meta
    try:
        meta.set_adapter_state(load_file(file))
    except (OSError, SafetensorError, ExpertokenError) as error:
        raise ExpertokenError(
            f"{file}: missing, damaged or of another model ({one_line(error)}); remove {folder.name}, and the run goes "
            "on from the checkpoint before it"
        ) from error
    overwrite(meta.head.expert_rows, read_rows(folder / ROWS_FILE, composite.pool.names, meta.row_width))


def _numbered(folder: Path) -> list[Path]:
    """The Trainer's checkpoints; a folder that somebody named checkpoint-good is nobody's to delete."""
    return [entry for entry in folder.glob("checkpoint-*") if entry.name.removeprefix("checkpoint-").isdigit()]


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else 0


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `trainer_state.json`, written last, can be read, and so can the weights."""
    from safetensors import SafetensorError, safe_open

    for entry in sorted(_numbered(folder), key=_step, reverse=True):
        try:
            json.loads((entry / "trainer_state.json").read_text())
            for name in (ADAPTER_WEIGHTS, ROWS_FILE):
                with safe_open(entry / name, "pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s is passed over: %s", entry, one_line(error))
            continue
        return entry
    return None


def find_checkpoint(resume: str, output_dir: Path, run: dict[str, Any]) -> Path | None:
    """Which checkpoint to go on from, as `--resume` says; `run` identifies this run.

    Raises:
        ExpertokenError: with `auto`, the checkpoints in `output_dir` belong to another run; with a path, it holds no
            whole checkpoint, or `output_dir` holds later ones of another run.
    """
    record = output_dir / _RUN_FILE
    if resume == "auto":
        checkpoint = last_complete_checkpoint(output_dir)
        known = json.loads(record.read_text()) if checkpoint and record.exists() else run
        other = [key for key in run | known if known.get(key) != run.get(key)]
        if other:
            told = ", ".join(f"{key} {known.get(key)!r} then, {run.get(key)!r} now" for key in other[:_NAMED])
            raise ExpertokenError(
                f"{output_dir}: holds checkpoints of a run with other arguments or data ({told}); choose another "
                "--out, or say --resume never to start anew there"
            )
    elif resume == "never":
        checkpoint = None
    else:
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").exists():
            raise ExpertokenError(f"--resume {resume}: no complete checkpoint there; expected auto, never or its path")
        later = [entry.name for entry in _numbered(output_dir) if _step(entry) > _step(checkpoint)]
        if later and record.exists() and json.loads(record.read_text()) != run:
            # They would be taken for this run's when it is resumed again.
            raise ExpertokenError(
                f"{output_dir}: holds later checkpoints of a run with other arguments ({', '.join(sorted(later))}); "
                "choose another --out, or remove them"
            )
    return checkpoint


def record_finished(output_dir: Path, state: TrainerState) -> None:
    """Note that the run came to its end: its last checkpoint may be removed by then, since another one is the best."""
    try:
        with atomic_file(output_dir / _FINISHED) as aside:
            state.save_to_json(str(aside))
    except ExpertokenError as error:  # the same command will train again: no reason to lose what is trained now
        logger.warning("%s", error)


def finished_run(resume: str, output_dir: Path, run: dict[str, Any]) -> Path | None:
    """Return the file of the Trainer's state where this very run has come to its end and its best checkpoint is there.

    Args:
        resume: `--resume`; only by `auto` it is this very run.
        output_dir: folder of the run.
        run: identifies the run.
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
    """The best checkpoint of a finished run, in the folder that its last one is in now."""
    recorded = Path(state.best_model_checkpoint or checkpoint)
    best = next((folder for folder in (checkpoint.parent / recorded.name, recorded) if folder.exists()), None)
    if best is None:
        logger.warning("the best checkpoint, %s, is not there any more; the last one is taken", recorded.name)
    return best or checkpoint


def record_run(resume: str, output_dir: Path, run: dict[str, Any]) -> None:
    """Note which run the checkpoints belong to; with `--resume never` those of an earlier run go.

    Otherwise an interrupted new run would be continued from the old one's checkpoint, which has the higher number.
    """
    if resume == "never":
        for entry in _numbered(output_dir):
            shutil.rmtree(entry)
    (output_dir / _FINISHED).unlink(missing_ok=True)
    with atomic_file(output_dir / _RUN_FILE) as aside:
        aside.write_text(json.dumps(run, indent=2) + "\n")
