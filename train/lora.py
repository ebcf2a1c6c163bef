"""Method `lora`: LoRA on the backbone together with the expert rows, through `transformers.Trainer`.

Loss and logits exist at the dispatch position only; the rows keep no weight decay (AdamW would shrink rows that get no
gradient), and a checkpoint holds the plain PEFT adapter with the rows beside it.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from ..data_prep.supervision import Supervision
from ..modeling.composite import ROWS_FILE, read_rows, write_rows
from ..modeling.dispatch import candidate_logits, dispatch_forward
from ..modeling.errors import ExpertokenError, one_line
from ..modeling.files import atomic_file
from ..modeling.meta import MetaLLM
from ..modeling.objectives import OBJECTIVES
from .arguments import ExpertokenArguments
from .processes import barrier
from .tokens import mean_score

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TORCH_ARCHIVE = ("PytorchStreamWriter", "inline_container")
_RUN_FILE = Path("runs") / "run.json"
_FIELDS = ("target", "scores", "weight", "benchmark")


class DispatchTrainer(Trainer):
    """A `Trainer` for expert tokens.

    Args:
        meta: the meta LLM, its model already wrapped by PEFT.
        objective: a key of `OBJECTIVES`.
        names: of the experts, in row order.
        with_self: whether self is a candidate.
        rows_learning_rate: of the rows; the adapters' where None.
        **options: of `Trainer`.
    """

    def __init__(
        self,
        meta: MetaLLM,
        objective: str,
        names: list[str],
        *,
        with_self: bool,
        rows_learning_rate: float | None,
        **options: Any,
    ) -> None:
        self.meta, self.objective, self.names = meta, OBJECTIVES[objective], names
        self.with_self, self.rows_learning_rate = with_self, rows_learning_rate
        super().__init__(model=meta.model, data_collator=self._collate, **options)
        self.label_names = list(_FIELDS)

    def _collate(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        # On the CPU: data loader workers must not touch the accelerator, and the Trainer moves batches itself.
        batch = self.meta.pad([e["input_ids"] for e in examples], "cpu")
        return batch | {key: torch.tensor(np.array([e[key] for e in examples]), dtype=torch.float32) for key in _FIELDS}

    def compute_loss(self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, **_: Any) -> Any:
        """The objective at the dispatch positions; with `return_outputs` also the candidates' logits `[N, C]`."""
        logits, _output = dispatch_forward(model, inputs["input_ids"], inputs["attention_mask"])
        candidates = candidate_logits(logits, self.meta.vocab_size, with_self=self.with_self)
        reference = candidates[:, -1] if self.with_self else torch.zeros_like(candidates[:, 0])
        total, _mass = self.objective(candidates, inputs["target"], inputs["scores"], reference, inputs["weight"])
        # Divided by the number of queries and not by this batch's mass (weights have mean 1 over the train side): so
        # the mean over processes and accumulated batches is the gradient of the large batch.
        loss = total / len(candidates)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.state.global_step}; lower the learning rate")
        return (loss, {"logits": candidates}) if return_outputs else loss

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple:
        """Loss, candidates' logits and scores of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"], torch.cat([inputs["scores"], inputs["benchmark"][:, None]], 1)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """The configured optimizer over two groups: adapters, and rows without weight decay."""
        if self.optimizer is None:
            rows, adapters = [], []
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    (rows if name.endswith("expert_rows") else adapters).append(parameter)
            rate = self.rows_learning_rate or self.args.learning_rate
            groups = [
                {"params": adapters, "weight_decay": self.args.weight_decay},
                {"params": rows, "weight_decay": 0.0, "lr": rate},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # the Trainer calls this on every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.meta.model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        write_rows(self.meta.rows, self.names, folder / ROWS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        logger.info("best checkpoint: %s (score %s)", self.state.best_model_checkpoint, self.state.best_metric)
        self._restore(Path(self.state.best_model_checkpoint))

    def _restore(self, folder: Path) -> None:
        """Put a checkpoint's adapter and rows into the model, in place, so that the optimizer keeps its parameters."""
        from peft import set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = folder / ADAPTER_WEIGHTS
        try:
            set_peft_model_state_dict(self.meta.model, load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ExpertokenError(
                f"{file}: missing, damaged or of another model ({one_line(error)}); remove {folder.name}, and the "
                "run goes on from the checkpoint before it"
            ) from error
        rows = read_rows(folder / ROWS_FILE, self.names, self.meta.head.in_features)
        with torch.no_grad():
            self.meta.head.expert_rows.copy_(rows)


def encode_side(meta: MetaLLM, supervision: Supervision, name: str, *, learn: bool) -> list[dict[str, Any]]:
    """A supervision side as examples.

    Args:
        meta: the meta LLM.
        supervision: what is learnt from.
        name: of the side.
        learn: leave out queries of weight 0, which teach nothing, and scale the other weights to mean 1.
    """
    side = supervision.side(name)
    columns = dict(zip(("target", "scores", "weight"), supervision.arrays(name), strict=True))
    # A number per benchmark travels with each query: the Trainer may evaluate in an order of its own.
    columns["benchmark"] = np.unique(np.asarray(side["benchmark"], dtype=str), return_inverse=True)[1]
    rows = range(len(side))
    if learn:
        rows = np.flatnonzero(columns["weight"])
        columns["weight"] /= columns["weight"][rows].mean()
    conversations = side["messages"]
    return [
        {"input_ids": meta.encode(conversations[int(row)]), **{key: columns[key][row] for key in _FIELDS}}
        for row in rows
    ]


def wrap_with_lora(meta: MetaLLM, options: ExpertokenArguments) -> None:
    """Put fresh LoRA adapters on the meta LLM's backbone; the rows stay trainable."""
    from peft import LoraConfig, get_peft_model

    targets = options.lora_target_modules
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        meta.model = get_peft_model(meta.model, config)
    except ValueError as error:
        raise ExpertokenError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from None
    meta.head.expert_rows.requires_grad_(True)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole: `trainer_state.json`, written last, can be read, and so can the weights."""
    from safetensors import SafetensorError, safe_open

    numbered = [entry for entry in folder.glob("checkpoint-*") if entry.name.removeprefix("checkpoint-").isdigit()]
    for entry in sorted(numbered, key=lambda entry: int(entry.name.removeprefix("checkpoint-")), reverse=True):
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
        ExpertokenError: with `auto`, the checkpoints in `output_dir` belong to another run.
    """
    record = output_dir / _RUN_FILE
    if resume == "auto":
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint and record.exists() and json.loads(record.read_text()) != run:
            raise ExpertokenError(
                f"{output_dir}: holds checkpoints of a run with other arguments or data; choose another --output_dir, "
                "or say --resume never to start anew there"
            )
    elif resume == "never":
        checkpoint = None
    else:
        checkpoint = Path(resume)
        if not (checkpoint / "trainer_state.json").exists():
            raise ExpertokenError(f"--resume {resume}: no complete checkpoint there; expected auto, never or its path")
    return checkpoint


def record_run(resume: str, output_dir: Path, run: dict[str, Any]) -> None:
    """Note which run the checkpoints belong to; with `--resume never` those of an earlier run go.

    Otherwise an interrupted new run would be continued from the old one's checkpoint, which has the higher number.
    """
    if resume == "never":
        for entry in output_dir.glob("checkpoint-*"):
            shutil.rmtree(entry)
    with atomic_file(output_dir / _RUN_FILE) as aside:
        aside.write_text(json.dumps(run, indent=2) + "\n")


def train_lora(
    meta: MetaLLM,
    supervision: Supervision,
    names: list[str],
    *,
    with_self: bool,
    options: ExpertokenArguments,
    arguments: TrainingArguments,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Train; the meta LLM ends with the best checkpoint's adapter and rows.

    Returns:
        what the manifest records: steps, best score, seconds.
    """
    set_seed(arguments.seed)  # the Trainer does so too, but after the adapters have drawn their start
    wrap_with_lora(meta, options)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        chosen, found = prediction.predictions.argmax(-1), prediction.label_ids
        return {"score": mean_score(chosen, found[:, :-1], found[:, -1])}

    arguments.remove_unused_columns = False
    arguments.load_best_model_at_end = True
    arguments.metric_for_best_model = "score"
    arguments.greater_is_better = True
    # The best of the checkpoints is kept, so every checkpoint is evaluated, and nothing else is.
    if arguments.save_strategy not in ("steps", "epoch"):
        given = getattr(arguments.save_strategy, "value", arguments.save_strategy)
        raise ExpertokenError(
            f"--save_strategy {given}: method lora evaluates each checkpoint; expected steps or epoch"
        )
    arguments.eval_strategy = IntervalStrategy(arguments.save_strategy)
    arguments.eval_steps = arguments.save_steps
    arguments.ddp_find_unused_parameters = False
    trainer = DispatchTrainer(
        meta,
        options.objective,
        names,
        with_self=with_self,
        rows_learning_rate=options.rows_learning_rate,
        args=arguments,
        train_dataset=encode_side(meta, supervision, "train", learn=True),
        eval_dataset=encode_side(meta, supervision, "validation", learn=False),
        compute_metrics=score,
    )
    checkpoint = find_checkpoint(options.resume, Path(arguments.output_dir), run)
    barrier()  # every process has looked before the main one records this run
    if arguments.process_index == 0:
        record_run(options.resume, Path(arguments.output_dir), run)
    barrier()
    if checkpoint:
        logger.info("continuing %s", checkpoint)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError) as error:
        # torch reports a file that it could not finish as a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_ARCHIVE):
            raise
        raise ExpertokenError(
            f"{arguments.output_dir}: a checkpoint could not be written or read ({one_line(error)}); checkpoints "
            "before it are whole, the same command goes on from there"
        ) from error
    meta.model.eval()
    return {
        "steps": trainer.state.global_step,
        "validation_score": trainer.state.best_metric,
        "seconds": round(outcome.metrics["train_runtime"], 1),
    }
