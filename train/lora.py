"""Methods `lora` and `qlora`: LoRA on the backbone together with the expert rows, through `transformers.Trainer`.

Loss and logits exist at the dispatch position only. The rows have no weight decay (AdamW would shrink rows without a
gradient). A checkpoint holds the plain PEFT adapter and the rows.
"""

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import IntervalStrategy

from ..data_prep.supervision import Supervision
from ..modeling.chat import Query
from ..modeling.composite import Composite, Trained
from ..modeling.dispatch import candidate_logits, dispatch_forward
from ..modeling.distributed import Team, barrier
from ..modeling.errors import ExpertokenError, is_out_of_memory, one_line
from ..modeling.files import sync_folder
from ..modeling.meta import MetaLLM
from ..modeling.state import layer_stack
from .arguments import ExpertokenArguments
from .checkpoints import (
    START,
    best_checkpoint,
    find_checkpoint,
    finished_run,
    read_checkpoint,
    record_finished,
    record_run,
    write_checkpoint,
)
from .objectives import OBJECTIVES, Objective
from .positions import Positions
from .tokens import mean_score

logger = logging.getLogger(__name__)

_TORCH_ARCHIVE = ("PytorchStreamWriter", "inline_container")
_FIELDS = ("target", "scores", "weight", "benchmark")
_NAMED = 5  # queries that an error names


class DispatchTrainer(Trainer):
    """A `Trainer` for expert tokens.

    Every checkpoint is a composite folder that also holds the files the Trainer resumes from.

    Args:
        composite: Composite with a model already wrapped by PEFT.
        objective: Key of `OBJECTIVES`.
        rows_learning_rate: Learning rate of the rows. Defaults to the adapters' rate.
        **options: Options of `Trainer`.
    """

    def __init__(
        self, composite: Composite, objective: str, *, rows_learning_rate: float | None, **options: Any
    ) -> None:
        self.composite, self.meta = composite, composite.meta
        self.objective: Objective = OBJECTIVES[objective]
        self.rows_learning_rate = rows_learning_rate
        self._logged = (time.perf_counter(), 0)
        self._order = _Order()  # before the Trainer, whose constructor may already request the sampler
        super().__init__(model=self.meta.model, data_collator=self._collate, **options)
        self.add_callback(self._order)
        self.label_names = list(_FIELDS)

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset | None = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self._order.generator
        return sampler

    def _collate(self, examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        # On the CPU: data loader workers must not use the accelerator, and the Trainer moves batches itself.
        batch = self.meta.pad([example["query"] for example in examples], "cpu")
        batch |= {key: torch.tensor(np.array([e[key] for e in examples]), dtype=torch.float32) for key in _FIELDS}
        return batch | {"row": torch.tensor([e["row"] for e in examples])}

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *_: Any, **__: Any
    ) -> Any:
        """Return the objective at the dispatch positions, and the logits `[N, C]` too if `return_outputs` is set."""
        pooling = self.meta.state.pooling
        read = {key: value for key, value in inputs.items() if key not in (*_FIELDS, "row")}
        logits, _output = dispatch_forward(model, **read, pooling=pooling)
        candidates = candidate_logits(logits, self.meta.first_candidate)
        total, _mass = self.objective(candidates, inputs["target"], inputs["scores"], inputs["weight"])
        # Divided by the number of queries, not by the mass of this batch (weights have mean 1 over the train split). So
        # the mean over processes and accumulated batches is the gradient of the large batch.
        loss = total / len(candidates)
        if not torch.isfinite(loss):
            self._tell_not_finite(loss, candidates, inputs["row"], model.training)
        return (loss, {"logits": candidates}) if return_outputs else loss

    def _tell_not_finite(
        self, loss: torch.Tensor, candidates: torch.Tensor, rows: torch.Tensor, training: bool
    ) -> None:
        dataset: Any = self.train_dataset if training else self.eval_dataset
        at_fault = ~candidates.isfinite().all(-1)
        named = rows[at_fault] if at_fault.any() else rows
        queries = ", ".join(repr(dataset.query(int(row))) for row in named[:_NAMED])
        weights = "the weights are no longer finite" if at_fault.all() else "the others of the batch are finite"
        raise FloatingPointError(
            f"loss is {loss.item()} at step {self.state.global_step}, with queries {queries} ({weights}). Lower the "
            "learning rate, set --max_grad_norm, or remove these queries (the last checkpoint is from before)"
        )

    def prediction_step(self, model: torch.nn.Module, inputs: dict, *_: Any, **__: Any) -> tuple:
        """Return loss, candidates' logits, and scores with benchmarks of an evaluation batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs["logits"], torch.cat([inputs["scores"], inputs["benchmark"][:, None]], 1)

    def create_optimizer(self, *_: Any, **__: Any) -> torch.optim.Optimizer:
        """Create the configured optimizer over two groups: adapters, and rows without weight decay."""
        if self.optimizer is None:
            rows: list[torch.nn.Parameter] = []
            adapters: list[torch.nn.Parameter] = []
            model: Any = self.model
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    (rows if name.endswith("expert_rows") else adapters).append(parameter)
            rate = self.rows_learning_rate or self.args.learning_rate
            groups = [
                {"params": adapters, "weight_decay": self.args.weight_decay},
                {"params": rows, "weight_decay": 0.0, "lr": rate},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a composite of the present weights. The Trainer's method would gather the whole model under ZeRO-3."""
        trained = Trained.of(self.composite, probe=False)  # on every process
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            write_checkpoint(folder, self.composite, trained, self.state.global_step)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate, and exclude the time from the training's speed."""
        found = super().evaluate(*arguments, **options)
        self.begin_measuring()
        return found

    def begin_measuring(self) -> None:
        """Start the measurement of the speed."""
        self._logged = (time.perf_counter(), self.state.num_input_tokens_seen)

    def log(self, logs: dict[str, float], *arguments: Any) -> None:
        """Log, with the speed since the last log."""
        if "loss" in logs:
            since, before = self._logged
            self.begin_measuring()
            now, seen = self._logged
            if seen > before:
                logs = logs | {"tokens_per_second": round((seen - before) / (now - since), 1)}
        super().log(logs, *arguments)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random states, and sync the checkpoint to disk.

        This is the last step before `trainer_state.json`, which marks the checkpoint as complete.
        """
        super()._save_rng_state(output_dir)
        barrier()  # the other processes' states too
        if self.args.should_save:
            sync_folder(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        last = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        best = best_checkpoint(self.state, last)
        logger.info("best checkpoint: %s (score %s)", best, self.state.best_metric)
        self._restore(best)

    def _restore(self, folder: Path) -> None:
        """Load a checkpoint's adapter and rows into the model, in place, so that the optimizer keeps its parameters."""
        read_checkpoint(folder, self.composite)


class _Order(TrainerCallback):
    """Callback that makes the order of an epoch's batches depend on the seed and the epoch alone.

    The Trainer's sampler for batches of similar length draws from the process's random state. This state differs in a
    resumed run and may differ between processes, which would then go through the queries in different orders.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seed the generator for this epoch. A run resumed within the epoch uses the same seed."""
        seed = args.seed if args.data_seed is None else args.data_seed
        self.generator.manual_seed(seed + int(state.epoch or 0))


class _StartCounts(TrainerCallback):
    """Callback that makes the weights at the start of training compete for the best checkpoint.

    So a composite trained with LoRA is never worse on validation than the rows it started from.
    """

    def __init__(self) -> None:
        self.trainer: DispatchTrainer | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate and save the weights at the start, unless a checkpoint is resumed."""
        start = Path(str(args.output_dir)) / START
        if state.global_step and state.best_global_step == 0 and start.exists():
            state.best_model_checkpoint = str(start)  # the Trainer searches by step, in the old folder
        if self.trainer is None:
            return
        if state.global_step:
            self.trainer.begin_measuring()
            return
        found = self.trainer.evaluate()
        control.should_log = False
        self.trainer.save_model(str(start))
        state.best_metric, state.best_model_checkpoint, state.best_global_step = found["eval_score"], str(start), 0
        logger.info("validation score at the start: %.4f", found["eval_score"])


class Examples(torch.utils.data.Dataset):
    """A split of a supervision as examples.

    Args:
        supervision: Supervision with the split.
        name: Name of the split.
        queries: Queries of the split.
        arrays: Targets, scores and weights of the split. See `Supervision.arrays`.
        positions: Positions of the decisions. Defaults to the starts of the queries.
        learn: If true, leave out queries of weight 0, which have no loss, and scale the other weights to mean 1.
    """

    def __init__(
        self,
        supervision: Supervision,
        name: str,
        queries: Sequence[Query],
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
        positions: Positions | None = None,
        *,
        learn: bool,
    ) -> None:
        positions = positions or Positions.starts(len(queries))
        self._side, self._queries, self._positions = supervision.side(name), queries, positions
        columns = dict(zip(("target", "scores", "weight"), arrays, strict=True))
        # Each query carries the number of its benchmark, since the Trainer may evaluate in another order.
        columns["benchmark"] = np.unique(supervision.benchmarks(name), return_inverse=True)[1]
        self._weights = columns.pop("weight")[positions.query] * positions.share
        self._kept = np.arange(len(self._weights))
        if learn:
            self._kept = np.flatnonzero(self._weights)
            self._weights /= self._weights[self._kept].mean()
        self._columns = columns

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self._kept[index])
        row = int(self._positions.query[place])
        query = self._queries[row].followed_by(self._positions.prefixes[place])
        columns = {key: column[row] for key, column in self._columns.items()}
        return {"query": query, "input_ids": query.ids, "row": row, "weight": self._weights[place], **columns}

    def query(self, row: int) -> str:
        """Return the id of a query, for error messages."""
        return self._side[row]["id"]


def wrap_with_lora(meta: MetaLLM, options: ExpertokenArguments) -> None:
    """Add new LoRA adapters to the meta LLM's backbone. The rows stay trainable.

    Raises:
        ExpertokenError: `lora_target_modules` does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    targets = options.lora_target_modules
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        exclude_modules=_beside_texts(meta),
        task_type="CAUSAL_LM",
    )
    try:
        adapted: Any = get_peft_model(meta.model, config)
    except ValueError as error:
        raise ExpertokenError(f"--lora_target_modules {' '.join(targets)}: {one_line(error)}") from None
    meta.model = adapted
    meta.head.expert_rows.requires_grad_(True)


def _beside_texts(meta: MetaLLM) -> str | None:
    """Return a pattern of the modules that text does not pass, such as a vision tower, or None without such modules.

    Adapters on these modules would have no gradients, and DDP refuses such parameters.
    """
    model: Any = meta.model
    try:
        stack = layer_stack(model)[0]
    except ExpertokenError:  # the model's structure is unknown
        return None
    text = next(name for name, module in model.named_modules() if module is stack)
    heads = {id(module) for module in meta.head.modules()}
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) not in heads]
    beside = any(not name.startswith(f"{text}.") for name in linear)
    return rf"(?!{re.escape(text)}\.).*" if text and beside else None


def _out_of_memory(trainer: DispatchTrainer) -> str:
    """Return the error message for a lack of memory, with the smallest change first."""
    arguments, size = trainer.args, trainer.args.per_device_train_batch_size
    advice = []
    if size > 1:
        part = next(divisor for divisor in range(2, size + 1) if size % divisor == 0)
        more = part * arguments.gradient_accumulation_steps
        advice.append(
            f"--per_device_train_batch_size {size // part} --gradient_accumulation_steps {more} (the same batches)"
        )
    if not arguments.gradient_checkpointing:
        advice.append("--gradient_checkpointing true")
    if arguments.device.type != "cpu" and not (arguments.bf16 or arguments.fp16):
        advice.append("--bf16 true")
    advice = [*advice, "with another --out --accelerate_config zero3 or --method qlora"]
    return (
        f"out of memory at step {trainer.state.global_step} with {size} queries per batch. Try {', or '.join(advice)} "
        "(with the same --out the run resumes from the last complete checkpoint)"
    )


def train_lora(
    composite: Composite,
    train: Examples,
    validation: Examples,
    *,
    objective: str,
    options: ExpertokenArguments,
    arguments: TrainingArguments,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Train. At the end the meta LLM has the best checkpoint's adapter and rows.

    Returns:
        Entries for the manifest: steps, best score, seconds.

    Raises:
        ExpertokenError: `save_strategy` does not fit, memory ran out, or a checkpoint can't be written or read.
    """
    meta, output = composite.meta, Path(str(arguments.output_dir))
    set_seed(arguments.seed)  # the Trainer does so too, but after the adapters are initialised
    wrap_with_lora(meta, options)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        chosen, found = np.asarray(prediction.predictions).argmax(-1), np.asarray(prediction.label_ids)
        return {"score": mean_score(chosen, found[:, :-1], found[:, -1])}

    arguments.remove_unused_columns = False
    arguments.load_best_model_at_end = True
    arguments.metric_for_best_model = "score"
    arguments.greater_is_better = True
    # The best of the checkpoints is kept, so exactly the checkpoints are evaluated.
    if arguments.save_strategy not in ("steps", "epoch"):
        given = getattr(arguments.save_strategy, "value", arguments.save_strategy)
        raise ExpertokenError(
            f"--save_strategy: expected steps or epoch, got {given}. Method lora evaluates each checkpoint"
        )
    arguments.eval_strategy = IntervalStrategy(arguments.save_strategy)
    arguments.eval_steps = arguments.save_steps
    arguments.ddp_find_unused_parameters = False
    trainer = DispatchTrainer(
        composite,
        objective,
        rows_learning_rate=options.rows_learning_rate,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=score,
    )
    start = _StartCounts()
    start.trainer = trainer
    trainer.add_callback(start)
    team = Team(arguments.process_index, arguments.world_size)
    # The first process searches for all: on other machines the folder may appear later, or not at all.
    checkpoint = team.agree(lambda: find_checkpoint(options.resume, output, run))
    finished = team.agree(lambda: finished_run(options.resume, output, run))
    if finished:
        state = TrainerState.load_from_json(str(finished))
        return _as_finished(trainer, state, output / f"checkpoint-{state.global_step}")
    if arguments.process_index == 0:
        record_run(options.resume, output, run)
    barrier()
    if checkpoint:
        logger.info("resuming from %s", checkpoint)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    # With `auto` this is the same run. From a checkpoint passed as a path the user may want to train further.
    if checkpoint and state and options.resume == "auto" and state.global_step >= state.max_steps:
        # The run was killed after its last step. The Trainer would take one more step before it stops.
        return _as_finished(trainer, state, checkpoint)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (OSError, RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ExpertokenError(_out_of_memory(trainer)) from error
        # torch reports an incomplete file as a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_ARCHIVE):
            raise
        raise ExpertokenError(
            f"{arguments.output_dir}: a checkpoint could not be written or read ({one_line(error)}). Checkpoints "
            "before it are complete: run the same command to resume"
        ) from error
    if arguments.process_index == 0:
        record_finished(output, trainer.state)
    # accelerate wrapped the model's forward in autocast for --bf16. A decision is computed without it.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    meta.model.eval()
    if trainer.state.best_global_step == 0 and options.warm_start:
        logger.warning(
            "no checkpoint is better on validation than the rows at the start of training. The adapter changes "
            "nothing, and method tokens gives the same decisions without it"
        )
    return {
        "steps": trainer.state.global_step,
        "validation_score": trainer.state.best_metric,
        "seconds": round(outcome.metrics["train_runtime"], 1),
    }


def _as_finished(trainer: DispatchTrainer, state: TrainerState, last: Path) -> dict[str, Any]:
    """Restore the best weights of a run that was already finished, and return the entries for its manifest."""
    trainer.state = state
    trainer._restore(best_checkpoint(state, last))
    trainer.meta.model.eval()
    return {"steps": state.global_step, "validation_score": state.best_metric, "seconds": 0.0, "engine": False}
