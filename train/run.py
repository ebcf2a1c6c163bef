"""One training run: supervision in, composite folder out."""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data_prep.labels import OBJECTIVE_OF
from ..data_prep.supervision import Supervision, kept_at
from ..modeling.chat import Query
from ..modeling.cluster import Cluster
from ..modeling.composite import Composite, Manifest, Trained, describe_base
from ..modeling.dispatch import gives_chances
from ..modeling.distributed import Team, barrier
from ..modeling.errors import ConfigError, ExpertokenError, did_you_mean
from ..modeling.files import check_product
from ..modeling.logits import LogitTransform
from ..modeling.meta import MetaLLM
from ..modeling.pool import ExpertPool
from ..modeling.saving import save_composite
from ..modeling.sharding import is_split
from ..modeling.source import Source
from ..modeling.state import AUTO, HEAD, StateSpec, candidates_for
from ..modeling.state_workers import StateWorkers
from ..modeling.states import cache_layers, cached_states
from ..modeling.view import View
from .arguments import ExpertokenArguments
from .config import make_arguments
from .positions import Positions, own_answers
from .prior import FEW, thinned
from .processes import check_offload, check_workers, check_world, exclusive, loading
from .row_optimizer import Problem
from .tokens import FOLDS, Fit, fit_rows, mean_score

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .lora import Examples

logger = logging.getLogger(__name__)


def check_run(options: ExpertokenArguments, arguments: "TrainingArguments", supervision: Supervision) -> None:
    """Refuse a run that can't succeed, before a model is loaded.

    Raises:
        ExpertokenError: The supervision lacks a split, the folder holds something else, or options contradict each
            other.
    """
    for side in ("train", "validation"):
        supervision.side(side)
    if options.out not in (None, arguments.output_dir):
        raise ExpertokenError(
            f"expected one output folder, got out {options.out!r} and the Trainer's output_dir "
            f"{arguments.output_dir!r}. They differ"
        )
    check_product(str(arguments.output_dir), "composite")
    if options.state != AUTO:
        StateSpec.parse(options.state)
    if options.anywhere and options.state != HEAD:
        raise ExpertokenError(
            f"--state {options.state}: positions inside an answer (--anywhere) are decided while its tokens are "
            f"generated, so expected {HEAD}"
        )
    if options.anywhere and not supervision.pool.has_self:
        raise ExpertokenError(
            "--anywhere: positions inside the meta LLM's own answer need `self` in the pool. Add it, or train without "
            "--anywhere"
        )
    if options.quantization and (options.method, options.quantization) not in (
        ("tokens", "nf4"),
        ("tokens", "int8"),
        ("qlora", "nf4"),
    ):
        raise ExpertokenError(
            f"--quantization {options.quantization}: not supported by method {options.method}. Use method tokens, or "
            "qlora, which is nf4"
        )
    check_offload(arguments)
    if options.method == "qlora" and getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3:
        raise ExpertokenError("method qlora: ZeRO-3 can't split 4-bit weights. Launch it with ddp or zero2")
    check_workers(options, arguments.world_size)
    if arguments.n_gpu > 1:
        # The Trainer would wrap the model in DataParallel, which wrongly splits `logits_to_keep`.
        raise ExpertokenError(
            f"expected one GPU per process, found {arguments.n_gpu}. Launch with `accelerate launch -m "
            "expertoken.train ...`, or set CUDA_VISIBLE_DEVICES=0"
        )


def cheapest_of_the_best(losses: np.ndarray) -> int:
    """Return the index of the first of S states whose loss ties with the least.

    Args:
        losses: `[S, F]` losses of the states in F folds, the cheapest state first.
    """
    best = int(losses.mean(1).argmin())
    above = losses - losses[best]
    errors = above.std(1, ddof=1) / math.sqrt(losses.shape[1])
    return int(np.flatnonzero(above.mean(1) <= errors)[0])


def load_meta(options: ExpertokenArguments, arguments: "TrainingArguments", pool: ExpertPool) -> MetaLLM:
    """Load the meta LLM with a row for each candidate, initialised from the candidate's description.

    Raises:
        ExpertokenError: The model can't be loaded.
    """
    source = Source(options.meta, options.revision, options.trust_remote_code)
    # Under ZeRO-3 DeepSpeed gives each process its share. The whole model is on a GPU only to compute states.
    computes = options.warm_start or options.state == AUTO
    split_later = getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3 and not computes
    with loading(arguments):
        meta = MetaLLM.from_pretrained(
            source,
            len(pool.names),
            device="cpu" if split_later else arguments.device,
            dtype=options.dtype,
            quantization="nf4" if options.method == "qlora" else options.quantization,
            attention=options.attn_implementation,
            state=StateSpec() if options.state == AUTO else StateSpec.parse(options.state),
        )
    meta.view = View(options.context_tokens)
    meta.rows = initial_rows(meta, pool)
    return meta


def initial_rows(meta: MetaLLM, pool: ExpertPool) -> torch.Tensor:
    """Return the rows at the start of training, made from the candidates' descriptions, `[C, P d]`."""
    return torch.stack([meta.initial_row(candidate.description) for candidate in pool.candidates])


def describe(
    options: ExpertokenArguments,
    arguments: "TrainingArguments",
    supervision: Supervision,
    meta: MetaLLM,
    objective: str,
) -> Manifest:
    """Return the manifest of the composite that a run writes."""
    info = supervision.info
    weight = info.labelling.get("cost_weight", 0.0)
    # Chances do not contain costs. The policy weighs costs in the decision, with the weight that the labels used.
    return Manifest(
        base=describe_base(meta),
        experts=[expert.name for expert in supervision.pool],
        training={
            "method": options.method,
            "objective": objective,
            "labelling": info.labelling,
            "processes": arguments.world_size,
            "dispatch": "anywhere" if options.anywhere else "start",
            "usd_per_query": supervision.usd_per_query(),
        },
        decision={"policy": {"cost_weight": weight}} if weight and gives_chances(objective) else {},
        data=info.described(Path(options.data).resolve()),
    )


class Run:
    """One training run: the state shared by its steps.

    Args:
        options: Arguments of expertoken.
        arguments: Arguments of the Trainer.
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
        self.chances = gives_chances(self.objective)
        few = [f"{name} ({count})" for name, count in self.supervision.measured().items() if count < FEW]
        if few and self.team.rank == 0:
            logger.warning("measured on fewer than %d queries to learn from: %s", FEW, ", ".join(few))
        self.meta = load_meta(options, arguments, self.pool)
        manifest = describe(options, arguments, self.supervision, self.meta, self.objective)
        self.composite = Composite(self.meta, self.pool, manifest)
        self._queries: dict[str, list[Query]] = {}
        self._workers: StateWorkers | None = None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute states within the block as the options say: on a cluster, or in this process."""
        options = self.options
        computes = options.method == "tokens" or options.warm_start or options.state == AUTO
        if not options.ray_workers or not computes:
            yield
            return
        cluster = Cluster(options.ray_address, options.ray_cpus, options.ray_gpus)
        try:
            with StateWorkers(self.meta, options.ray_workers, cluster, options.attn_implementation) as self._workers:
                yield
        finally:
            self._workers = None

    def queries(self, name: str) -> list[Query]:
        """Return the queries of a split. Each split is encoded once per run."""
        if name not in self._queries:
            self._queries[name] = self.supervision.queries(name, self.meta, quiet=self.team.rank > 0)
        return self._queries[name]

    def positions(self, name: str) -> Positions:
        """Return the positions of the decisions on a split. For validation these are the starts alone.

        The checkpoint is chosen by the decisions at the starts.
        """
        queries = self.queries(name)
        if not self.options.anywhere or name == "validation":
            return Positions.starts(len(queries))
        length, most = self.options.anywhere_tokens, self.options.max_tokens
        answers = own_answers(self.meta, queries, length, max_tokens=most, team=self.team)
        return Positions.inside(answers, self.options.anywhere)

    def choose_state(self, *sides: str) -> list[dict[str, Any]]:
        """Choose the state by folds of these splits if `--state auto` is set, and return the result of each state.

        States tie if their losses on held-out queries are within one standard error of the least (over the folds,
        paired). Of tied states the one with the fewest layers is chosen.

        If all queries have subjects, folds of whole subjects count in addition to the ordinary folds. A state that
        carries over to new subjects is worth more than one that fits the known ones. But experts of one subject each
        can be distinguished on known subjects only.
        """
        if self.options.state != AUTO:
            return []
        specs = candidates_for(self.meta.layers)
        if self.team.world == 1:
            asked = [query for side in sides for query in self.queries(side)]
            layers = sorted({spec.layer or self.meta.layers for spec in specs})
            most, label = self.options.max_tokens, "states of all layers"
            cache_layers(self.meta, asked, layers, max_tokens=most, workers=self._workers, label=label)
        known = [self.supervision.subjects(side) for side in sides]
        subjects = [names for names in known if names is not None]
        by_subject = len(subjects) == len(sides) and len(np.unique(np.concatenate(subjects))) >= FOLDS
        found: list[dict[str, Any]] = []
        losses = []
        for spec in specs:
            # The head's own state is the state behind the last layer at the last token, so it needs no extra pass.
            self.meta.read_at(spec if spec.layer else StateSpec(self.meta.layers), len(self.pool.names))
            problem = self._problem(sides)
            problems = [problem]
            if by_subject:
                problems.append(replace(problem, groups=np.concatenate(subjects)))
            # Every second strength is enough to compare states. The final fit tries all.
            transform = self.meta.transform if spec.layer else LogitTransform.of(self.meta.plain.config)
            options: dict[str, Any] = {"l2": sorted(self.options.l2)[::2], "transform": transform}
            fits = [self._fit(one, **options) for one in problems]
            if any(not len(fit.fold_losses) for fit in fits):
                raise ExpertokenError(
                    f"--state {AUTO}: expected at least {FOLDS} queries to choose by, found {len(problem.weights)}. "
                    "Pass a state, such as 8:mean"
                )
            entry = {"state": str(spec), **fits[0].chosen}
            if len(fits) > 1:
                entry["subject_loss"] = float(fits[1].fold_losses.mean())
            found.append(entry)
            losses.append(np.concatenate([fit.fold_losses for fit in fits]))
        choice = cheapest_of_the_best(np.stack(losses))
        self.meta.read_at(specs[choice], len(self.pool.names))
        self.meta.rows = initial_rows(self.meta, self.pool)
        if self.team.rank == 0:
            least = min(found, key=lambda entry: entry["validation_loss"])
            logger.info(
                "state: %s chosen of %d (loss %.4f on held-out queries, the least, of %s, is %.4f)",
                specs[choice], len(specs), found[choice]["validation_loss"], least["state"], least["validation_loss"],
            )  # fmt: skip
        return found

    def fit_tokens(self, *sides: str) -> Fit:
        """Compute the states of splits of the supervision, then fit the rows on all of them."""
        fit = self._fit(self._problem(sides), l2=self.options.l2, transform=self.meta.transform)
        if (edge := fit.edge()) and self.team.rank == 0:
            logger.warning("%s", edge)
        return fit

    def _fit(self, problem: Problem, **options: Any) -> Fit:
        """Fit rows in the first process, on all cores, and send them to the others, which are idle until then."""
        alone = self.team.world > 1
        return self.team.agree(lambda: fit_rows(problem, objective=self.objective, all_cores=alone, **options))

    def _problem(self, sides: Sequence[str]) -> Problem:
        queries: list[Query] = []
        arrays: list[tuple[np.ndarray, ...]] = []
        for name in sides:
            positions = self.positions(name)
            queries += positions.queries(self.queries(name))
            columns = (*self._learnt(name), self.supervision.absent(name))
            targets, scores, weights, left_out, absent = (array[positions.query] for array in columns)
            groups = self.supervision.origins(name)[positions.query]
            benchmarks = self.supervision.benchmarks(name)[positions.query]
            arrays.append((targets, scores, weights * positions.share, benchmarks, groups, absent, left_out))
        joined = (np.concatenate(parts) for parts in zip(*arrays, strict=True))
        label = " and ".join(sides) + " states"
        most = self.options.max_tokens
        states = cached_states(self.meta, queries, max_tokens=most, team=self.team, workers=self._workers, label=label)
        return Problem(states, *joined)

    def run_tokens(self) -> dict[str, Any]:
        """Run method `tokens` and return the entries for the manifest."""
        started = time.perf_counter()
        # The fit also uses the validation split, since the strength is chosen by folds of both.
        with self._computing():
            states = self.choose_state("train", "validation")
            fit = self.fit_tokens("train", "validation")
        self.meta.rows = fit.rows
        self._log_path(fit)
        seconds = round(time.perf_counter() - started, 1)
        told = {"l2": fit.l2, "l2_at_edge": fit.at_edge, "validation_by": "folds", **fit.chosen, "seconds": seconds}
        return told | ({"states": states} if states else {})

    def run_lora(self) -> dict[str, Any]:
        """Run method `lora` or `qlora` and return the entries for the manifest."""
        from .lora import train_lora

        with self._computing():
            states = self.choose_state("train")
            if self.options.warm_start:
                # Not on validation, which chooses among the checkpoints.
                self.meta.rows = self.fit_tokens("train").rows
        outcome = train_lora(
            self.composite,
            self._examples("train", self.positions("train"), learn=True),
            self._examples("validation", None, learn=False),
            objective=self.objective,
            options=self.options,
            arguments=self.arguments,
            run=self._identity(),
        )
        return outcome | ({"states": states} if states else {})

    def _examples(self, name: str, positions: Positions | None, *, learn: bool) -> "Examples":
        from .lora import Examples

        targets, scores, weights, left_out = self._learnt(name)
        scores = np.where(left_out, np.float32(np.nan), scores) if learn else scores
        return Examples(self.supervision, name, self.queries(name), (targets, scores, weights), positions, learn=learn)

    def _learnt(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return a split's targets, scores (or utilities, if the objective learns them), weights and left-out cells."""
        targets, scores, weights = self.supervision.arrays(name, utilities=not self.chances)
        absent = self.supervision.absent(name)
        return targets, scores, weights, thinned(scores, absent) if self.chances else np.zeros_like(absent)

    def _identity(self) -> dict[str, Any]:
        """Return the settings that a checkpoint depends on: data and base by content, not by path, and batch totals."""
        ignored = ("resume", "verify", "max_tokens", "meta", "data", "out", "attn_implementation", "ray_workers",
                   "ray_address", "ray_cpus", "ray_gpus")  # fmt: skip
        run = {key: value for key, value in asdict(self.options).items() if key not in ignored}
        run["objective"] = self.objective
        run["state"] = str(self.meta.state)  # the state chosen, since a checkpoint's rows and layers belong to it
        for key in ("learning_rate", "num_train_epochs", "max_steps", "seed", "optim", "lr_scheduler_type",
                    "warmup_steps", "weight_decay", "max_grad_norm", "train_sampling_strategy", "bf16", "fp16",
                    "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs", "data_seed"):  # fmt: skip
            value = getattr(self.arguments, key)
            run[key] = getattr(value, "value", value)
        a = self.arguments
        run["batch"] = a.per_device_train_batch_size * a.gradient_accumulation_steps * a.world_size
        # DeepSpeed keeps its optimizer's states in separate files, split according to the stage.
        stage = getattr(a.deepspeed_plugin, "zero_stage", "")
        run["distributed"] = f"{a.distributed_state.distributed_type.value}{stage}"
        run["processes"] = a.world_size  # batches grouped by length depend on it
        run["data_fingerprint"] = self.supervision.info.fingerprint
        run["base_fingerprint"] = self.meta.base_fingerprint
        return json.loads(json.dumps(run))  # equal to the value read back: a tuple comes back as a list

    def _log_path(self, fit: Fit) -> None:
        """Log the regularisation path to the trackers of `--report_to`, one step for each strength."""
        wanted = [name for name in self.arguments.report_to or () if name != "none"]
        if not wanted or self.arguments.process_index > 0:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # accelerate's trackers, since the Trainer's callbacks need a training loop.
        for name in wanted:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
                logger.warning("--report_to %s: not known to method tokens and skipped, %s", name, known)
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
        """Write the composite folder. Every process contributes its part, and the main process writes."""
        verify = self.options.verify
        if not outcome.pop("engine", True) and is_split(self.meta.model):
            logger.warning("not checked in a fresh process: split weights can't be run after the end of training")
            verify = False
        self.composite.manifest.training |= outcome
        trained = Trained.of(self.composite, probe=verify)
        if self.arguments.process_index == 0:
            save_composite(self.composite, self.output, verify=verify, trained=trained)


def train(options: ExpertokenArguments, arguments: "TrainingArguments") -> Path:
    """Run one training and return its composite folder.

    Raises:
        ExpertokenError: The run can't succeed, the model can't be loaded, or memory ran out.
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
        meta: Meta LLM: hub id, local folder or GGUF file.
        data: Supervision or its folder. A supervision in memory is saved inside the composite folder.
        out: Composite folder to write.
        **options: Fields of `ExpertokenArguments` (`method`, `objective`, `l2`, ...) and of
            `transformers.TrainingArguments` (`learning_rate`, `num_train_epochs`, ...). Defaults are the same as on
            the command line, except that nothing is reported to trackers.

    Returns:
        The composite folder.

    Raises:
        ConfigError: An option is unknown or has an invalid value.
        ExpertokenError: The run can't succeed, the model can't be loaded, or memory ran out.
        ImportError: The extra `train` is not installed.
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
    sides = ("train", "validation") if outcome.get("validation_by") == "folds" else ("validation",)
    scores = np.concatenate([run.supervision.arrays(side, utilities=not run.chances)[1] for side in sides])
    benchmarks = np.concatenate([run.supervision.benchmarks(side) for side in sides])
    singles = {
        name: mean_score(np.full(len(scores), index), scores, benchmarks) for index, name in enumerate(run.pool.names)
    }
    best = max(singles, key=singles.__getitem__)
    logger.info(
        "composite of %d experts%s written to %s: method %s, %d train queries, %.1f s, validation score %.4f "
        "(best single, %s: %.4f)",
        len(run.pool),
        " + self" if run.pool.has_self else "",
        output,
        run.options.method,
        sizes["train"],
        outcome["seconds"],
        outcome.get("validation_score", math.nan),
        best,
        singles[best],
    )
