"""One training run: supervision in, composite folder out."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data_prep.labels import OBJECTIVE_OF
from ..data_prep.supervision import Supervision, kept_at
from ..modeling.chat import Query
from ..modeling.composite import Composite, Manifest, Trained, describe_base
from ..modeling.distributed import Team, barrier
from ..modeling.errors import ConfigError, ExpertokenError, did_you_mean
from ..modeling.files import check_product
from ..modeling.meta import MetaLLM
from ..modeling.pool import ExpertPool
from ..modeling.saving import save_composite
from ..modeling.sharding import is_split
from ..modeling.source import Source
from ..modeling.states import cached_states
from .arguments import ExpertokenArguments
from .config import make_arguments
from .positions import Positions, own_answers
from .processes import check_offload, check_world, exclusive, loading
from .row_optimizer import Problem
from .tokens import Fit, fit_rows, mean_score

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def check_run(options: ExpertokenArguments, arguments: "TrainingArguments", supervision: Supervision) -> None:
    """Refuse a run that can't end well, before a model is loaded.

    Raises:
        ExpertokenError: the supervision lacks a side, the folder is taken, or options contradict each other.
    """
    for side in ("train", "validation"):
        supervision.side(side)
    if options.out not in (None, arguments.output_dir):
        raise ExpertokenError(f"out {options.out!r} and the Trainer's output_dir {arguments.output_dir!r} differ")
    check_product(str(arguments.output_dir), "composite")
    if options.anywhere and not supervision.pool.has_self:
        raise ExpertokenError(
            "--anywhere: positions inside the meta LLM's own answer need `self` in the pool; without it there is no "
            "such answer"
        )
    check_offload(arguments)
    if options.method == "qlora" and getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3:
        raise ExpertokenError("method qlora: ZeRO-3 can't split 4-bit weights; launch it with ddp or zero2")
    if arguments.n_gpu > 1:
        # The Trainer would wrap the model in DataParallel, which splits what `logits_to_keep` must not split.
        raise ExpertokenError(
            f"one process sees {arguments.n_gpu} GPUs; start it with `accelerate launch -m expertoken.train ...`, or "
            "show it one with CUDA_VISIBLE_DEVICES=0"
        )


def load_meta(options: ExpertokenArguments, arguments: "TrainingArguments", pool: ExpertPool) -> MetaLLM:
    """Load the meta LLM with a row for each expert, which starts at the expert's description.

    Raises:
        ExpertokenError: the model can't be loaded.
    """
    source = Source(options.meta, options.revision, options.trust_remote_code)
    # Under ZeRO-3 DeepSpeed brings each process its share; the whole is on a GPU only where it computes states.
    split_later = getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3 and not options.warm_start
    with loading(arguments):
        meta = MetaLLM.from_pretrained(
            source,
            len(pool),
            device="cpu" if split_later else arguments.device,
            dtype=options.dtype,
            quantization="nf4" if options.method == "qlora" else None,
            attention=options.attn_implementation,
        )
    meta.rows = torch.stack([meta.initial_row(expert.description) for expert in pool])
    return meta


def describe(
    options: ExpertokenArguments,
    arguments: "TrainingArguments",
    supervision: Supervision,
    meta: MetaLLM,
    objective: str,
) -> Manifest:
    """Return the manifest of the composite that a run is going to write."""
    info = supervision.info
    return Manifest(
        base=describe_base(meta),
        experts=[expert.name for expert in supervision.pool],
        training={
            "method": options.method,
            "objective": objective,
            "labelling": info.labelling,
            "processes": arguments.world_size,
            "dispatch": "anywhere" if options.anywhere else "start",
        },
        data={"path": str(Path(options.data).resolve()), "fingerprint": info.fingerprint, "sizes": info.sizes},
    )


class Run:
    """One training run: what its steps share.

    Args:
        options: our arguments.
        arguments: arguments of the Trainer.
    """

    def __init__(self, options: ExpertokenArguments, arguments: "TrainingArguments") -> None:
        self.options, self.arguments = options, arguments
        self.team = Team(arguments.process_index, arguments.world_size)
        self.output = Path(str(arguments.output_dir))
        self.supervision = Supervision.load(options.data)
        check_run(options, arguments, self.supervision)
        self.pool = self.supervision.pool
        strategy = self.supervision.info.labelling["strategy"]
        self.objective = options.objective or OBJECTIVE_OF.get(strategy, "cross_entropy")
        self.meta = load_meta(options, arguments, self.pool)
        manifest = describe(options, arguments, self.supervision, self.meta, self.objective)
        self.composite = Composite(self.meta, self.pool, manifest)
        self._queries: dict[str, list[Query]] = {}

    def queries(self, name: str) -> list[Query]:
        """Return the queries of a side; each is encoded once per run."""
        if name not in self._queries:
            self._queries[name] = self.supervision.queries(name, self.meta, quiet=self.team.rank > 0)
        return self._queries[name]

    def positions(self, name: str) -> Positions:
        """Return the positions at which a side is decided; validation only at its starts, where a choice is made."""
        queries = self.queries(name)
        if not self.options.anywhere or name == "validation":
            return Positions.starts(len(queries))
        length, most = self.options.anywhere_tokens, self.options.max_tokens
        answers = own_answers(self.meta, queries, length, max_tokens=most, team=self.team)
        return Positions.inside(answers, self.options.anywhere)

    def fit_tokens(self) -> Fit:
        """Compute the states of the train and validation sides, then fit the rows."""
        # Every process solves the same small problem on the same states: cheaper than sending the rows around.
        return fit_rows(
            self._problem("train"),
            self._problem("validation"),
            objective=self.objective,
            l2=self.options.l2,
            transform=self.meta.transform,
            with_self=self.pool.has_self,
        )

    def _problem(self, name: str) -> Problem:
        positions = self.positions(name)
        queries = positions.queries(self.queries(name))
        states = cached_states(
            self.meta, queries, max_tokens=self.options.max_tokens, team=self.team, label=f"{name} states"
        )
        targets, scores, weights = (array[positions.query] for array in self.supervision.arrays(name))
        benchmarks = self.supervision.benchmarks(name)[positions.query]
        return Problem(states, targets, scores, weights * positions.share, benchmarks)

    def run_tokens(self) -> dict[str, Any]:
        """Method `tokens`."""
        started = time.perf_counter()
        fit = self.fit_tokens()
        self.meta.rows = fit.rows
        self._log_path(fit)
        chosen = next(entry for entry in fit.path if entry["l2"] == fit.l2)
        return {"l2": fit.l2, **chosen, "seconds": round(time.perf_counter() - started, 1)}

    def run_lora(self) -> dict[str, Any]:
        """Methods `lora` and `qlora`."""
        from .lora import Examples, train_lora

        if self.options.warm_start:
            self.meta.rows = self.fit_tokens().rows
        return train_lora(
            self.composite,
            Examples(self.supervision, "train", self.queries("train"), self.positions("train"), learn=True),
            Examples(self.supervision, "validation", self.queries("validation"), learn=False),
            objective=self.objective,
            options=self.options,
            arguments=self.arguments,
            run=self._identity(),
        )

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint depends on: data and base by content and not by path, batches as a whole."""
        ignored = ("resume", "verify", "max_tokens", "meta", "data", "out", "attn_implementation")
        run = {key: value for key, value in asdict(self.options).items() if key not in ignored}
        run["objective"] = self.objective
        for key in ("learning_rate", "num_train_epochs", "max_steps", "seed", "optim", "lr_scheduler_type",
                    "warmup_steps", "weight_decay", "max_grad_norm", "train_sampling_strategy", "bf16", "fp16",
                    "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "data_seed"):  # fmt: skip
            value = getattr(self.arguments, key)
            run[key] = getattr(value, "value", value)
        a = self.arguments
        run["batch"] = a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size
        # DeepSpeed keeps its optimizer's states in files of its own, split as the stage says.
        stage = getattr(a.deepspeed_plugin, "zero_stage", "")
        run["distributed"] = f"{a.distributed_state.distributed_type.value}{stage}"
        run["processes"] = a.world_size  # grouping batches by length gives other batches for other numbers of processes
        run["data_fingerprint"] = self.supervision.info.fingerprint
        run["base_fingerprint"] = self.meta.base_fingerprint
        return json.loads(json.dumps(run))  # as it will be read: a tuple comes back as a list

    def _log_path(self, fit: Fit) -> None:
        """The regularisation path where `--report_to` wants it, a step for each strength."""
        wanted = [name for name in self.arguments.report_to or () if name != "none"]
        if not wanted or self.arguments.process_index > 0:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # accelerate's trackers: the Trainer's callbacks belong to a training loop, and here there is none.
        for name in wanted:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
                logger.warning("--report_to %s: not known to method tokens, %s", name, known)
                continue
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": self.arguments.output_dir} if kind.requires_logging_directory else {}
            tracker = kind("runs" if place else "expertoken", **place)
            tracker.start()
            tracker.store_init_configuration({"meta": self.options.meta, "objective": self.objective})
            for step, entry in enumerate(fit.path):
                tracker.log({f"tokens/{key}": value for key, value in entry.items()}, step=step)
            tracker.finish()

    def save(self, outcome: dict[str, Any]) -> None:
        """Write the composite folder: every process brings its part, the main one writes."""
        verify = self.options.verify
        if not outcome.pop("engine", True) and is_split(self.meta.model):
            logger.warning("not checked in a fresh process: nothing trains any more that could run split weights")
            verify = False
        self.composite.manifest.training |= outcome
        trained = Trained.of(self.composite, probe=verify)
        if self.arguments.process_index == 0:
            save_composite(self.composite, self.output, verify=verify, trained=trained)


def train(options: ExpertokenArguments, arguments: "TrainingArguments") -> Path:
    """Run one training and return its composite folder.

    Raises:
        ExpertokenError: the run can't end well, the model can't be loaded, or memory ran out.
    """
    check_world(arguments.world_size)
    output = Path(str(arguments.output_dir))
    with exclusive(output, Team(arguments.process_index, arguments.world_size)):
        run = Run(options, arguments)
        outcome = run.run_tokens() if options.method == "tokens" else run.run_lora()
        barrier()
        run.save(outcome)
        if arguments.process_index == 0:
            _summary(run, outcome, output)
        barrier()
    return output


def train_composite(
    meta: str,
    data: Supervision | Path | str,
    out: Path | str,
    **options: Any,
) -> Path:
    """Train expert tokens and write a composite folder.

    Args:
        meta: the meta LLM: hub id, local folder or GGUF file.
        data: a supervision, which is kept inside the composite's folder, or the folder of one.
        out: composite folder to write.
        **options: fields of `ExpertokenArguments` (`method`, `objective`, `l2`, ...) and of
            `transformers.TrainingArguments` (`learning_rate`, `num_train_epochs`, ...). Defaults are those of the
            command line, except that nothing is reported to trackers.

    Returns:
        the composite's folder.

    Raises:
        ConfigError: an option is unknown, or has a value that it can't have.
        ExpertokenError: the run can't end well, the model can't be loaded, or memory ran out.
        ImportError: the extra `train` is not installed.
    """
    if not isinstance(data, Supervision | Path | str):
        raise ConfigError(f"data: expected a supervision or the folder of one, got {type(data).__name__}")
    folder = kept_at(data, Path(out)) if isinstance(data, Supervision) else Path(data)
    parsed, arguments = make_arguments(meta, str(folder), str(out), options)
    check_product(out, "composite")
    if isinstance(data, Supervision):
        if arguments.process_index == 0:
            data.save(folder)
        barrier()
    return train(parsed, arguments)


def _summary(run: Run, outcome: dict[str, Any], output: Path) -> None:
    sizes = run.supervision.info.sizes
    scores = run.supervision.arrays("validation")[1]
    benchmarks = run.supervision.benchmarks("validation")
    singles = {
        name: mean_score(np.full(len(scores), index), scores, benchmarks) for index, name in enumerate(run.pool.names)
    }
    best = max(singles, key=singles.__getitem__)
    logger.info(
        "composite of %d experts%s written to %s: method %s, %d train queries, %.1f s; validation score %.4f "
        "(best single, %s: %.4f)",
        len(run.pool),
        " + self" if run.pool.has_self else "",
        output,
        run.options.method,
        sizes["train"],
        outcome["seconds"],
        outcome["validation_score"],
        best,
        singles[best],
    )
