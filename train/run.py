"""One training run: supervision in, composite folder out."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data_prep.labels import OBJECTIVE_OF
from ..data_prep.supervision import Supervision
from ..modeling.composite import Composite, Manifest, Trained, describe_base, save_composite
from ..modeling.errors import ExpertokenError, did_you_mean
from ..modeling.files import check_product
from ..modeling.meta import MetaLLM, Source
from ..modeling.sharding import is_split
from .anywhere import Positions, own_answers
from .arguments import ExpertokenArguments
from .features import cached_states, encode_all
from .processes import Team, barrier, check_offload, check_world, exclusive, loading
from .tokens import Fit, Problem, fit_rows, mean_score

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


class Run:
    """What the steps of one training run share.

    Args:
        options: our arguments.
        arguments: the Trainer's.
    """

    def __init__(self, options: ExpertokenArguments, arguments: "TrainingArguments") -> None:
        self.options, self.arguments = options, arguments
        self.team = Team(arguments.process_index, arguments.world_size)
        self.supervision = Supervision.load(options.data)
        for side in ("train", "validation"):
            self.supervision.side(side)  # told before a model is loaded
        self.pool = self.supervision.pool
        self.objective = options.objective or OBJECTIVE_OF.get(
            self.supervision.info.labelling["strategy"], "cross_entropy"
        )
        check_product(arguments.output_dir, "composite")
        if options.anywhere and not self.pool.has_self:
            raise ExpertokenError(
                "--anywhere: positions inside the meta LLM's own answer need `self` in the pool; without it there is "
                "no such answer"
            )
        check_offload(arguments)
        if options.method == "qlora" and getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3:
            raise ExpertokenError("method qlora: ZeRO-3 can't split 4-bit weights; launch it with ddp or zero2")
        if arguments.n_gpu > 1:
            # The Trainer would wrap the model in DataParallel, which splits what `logits_to_keep` must not split.
            raise ExpertokenError(
                f"one process sees {arguments.n_gpu} GPUs; start it with `accelerate launch -m expertoken.train ...`, "
                "or show it one with CUDA_VISIBLE_DEVICES=0"
            )
        source = Source(options.meta, options.revision, options.trust_remote_code)
        with loading(arguments):
            # Under ZeRO-3 DeepSpeed brings each process its share; the whole is on a GPU only where it computes states.
            split_later = getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3 and not options.warm_start
            self.meta = MetaLLM.from_pretrained(
                source,
                len(self.pool),
                device="cpu" if split_later else arguments.device,
                dtype=options.dtype,
                quantization="nf4" if options.method == "qlora" else None,
                attention=options.attn_implementation,
            )
        self.meta.rows = torch.stack([self.meta.initial_row(expert.description) for expert in self.pool])
        info = self.supervision.info
        manifest = Manifest(
            base=describe_base(self.meta),
            experts=[expert.name for expert in self.pool],
            training={
                "method": options.method,
                "objective": self.objective,
                "labelling": info.labelling,
                "processes": arguments.world_size,
                "dispatch": "anywhere" if options.anywhere else "start",
            },
            data={"path": str(Path(options.data).resolve()), "fingerprint": info.fingerprint, "sizes": info.sizes},
        )
        self.composite = Composite(self.meta, self.pool, manifest)

    def fit_tokens(self) -> Fit:
        """States of the train and validation sides, then the rows."""
        sides = {}
        for name in ("train", "validation"):
            encoded = self._encoded(name)
            positions = self.positions(name, encoded)
            sequences = positions.sequences(encoded)
            features = cached_states(
                self.meta, sequences, max_tokens=self.options.max_tokens, team=self.team, label=f"{name} features"
            )
            targets, scores, weights = (array[positions.query] for array in self.supervision.arrays(name))
            benchmarks = np.asarray(self.supervision.side(name)["benchmark"], dtype=str)[positions.query]
            sides[name] = Problem(features, targets, scores, weights * positions.share, benchmarks)
        # Every process solves the same small problem on the same states: cheaper than sending the rows around.
        return fit_rows(
            sides["train"],
            sides["validation"],
            objective=self.objective,
            l2=self.options.l2,
            transform=self.meta.transform,
            with_self=self.pool.has_self,
        )

    def _encoded(self, name: str) -> list[np.ndarray]:
        quiet = self.arguments.process_index != 0
        return encode_all(self.meta, self.supervision.side(name)["messages"], f"{name}, encoding", quiet=quiet)

    def positions(self, name: str, encoded: Sequence[np.ndarray]) -> Positions:
        """Where the queries of a side are decided; of validation at their starts, as its score is a choice's."""
        if not self.options.anywhere or name == "validation":
            return Positions.starts(len(encoded))
        answers = own_answers(
            self.meta, encoded, self.options.anywhere_tokens, max_tokens=self.options.max_tokens, team=self.team
        )
        return Positions.inside(answers, self.options.anywhere)

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
        # What a checkpoint depends on. Data and base by content, not by path; batches as a whole, however they are cut.
        ignored = ("resume", "verify", "max_tokens", "meta", "data", "attn_implementation")
        self.options.objective = self.objective
        run = {key: value for key, value in asdict(self.options).items() if key not in ignored}
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
        run["processes"] = a.world_size  # batches grouped by length are others for others
        run["data_fingerprint"] = self.supervision.info.fingerprint
        run["base_fingerprint"] = self.meta.base_fingerprint
        positions = self.positions("train", self._encoded("train")) if self.options.anywhere else None
        return train_lora(
            self.composite,
            Examples(self.meta, self.supervision, "train", learn=True, positions=positions),
            Examples(self.meta, self.supervision, "validation", learn=False),
            options=self.options,
            arguments=self.arguments,
            run=run,
        )

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
            save_composite(self.composite, Path(self.arguments.output_dir), verify=verify, trained=trained)


def train(options: ExpertokenArguments, arguments: "TrainingArguments") -> Path:
    """Run one training to its composite folder."""
    check_world(arguments.world_size)
    output = Path(arguments.output_dir)
    with exclusive(output, Team(arguments.process_index, arguments.world_size)):
        run = Run(options, arguments)
        outcome = run.run_tokens() if options.method == "tokens" else run.run_lora()
        barrier()
        run.save(outcome)
        if arguments.process_index == 0:
            _summary(run, outcome, output)
        barrier()
    return output


def _summary(run: Run, outcome: dict[str, Any], output: Path) -> None:
    sizes = run.supervision.info.sizes
    scores = run.supervision.arrays("validation")[1]
    benchmarks = run.supervision.side("validation")["benchmark"]
    singles = {
        name: mean_score(torch.full((len(scores),), index).numpy(), scores, benchmarks)
        for index, name in enumerate(run.pool.names)
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
