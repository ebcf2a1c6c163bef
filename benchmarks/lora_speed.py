"""Speed and memory of methods lora and tokens beside TRL's SFTTrainer: `python benchmarks/lora_speed.py`.

All trainers use the same model (SmolLM2-135M-Instruct), the same real queries, adapters, optimizer and number of steps,
in one pass over the data. The label is the expert token after the generation prompt. Method lora groups queries by
length, as the recipe `lora` does. TRL (with PEFT's trainable tokens) runs with its own random batches, and once more
with batches grouped by length. Method tokens learns from the same queries, from an empty cache.

Each trainer runs in its own process. The trainers take turns for several rounds. The queries have their own lengths in
one part, and one length in the other. Prints examples per second, peak memory, the validation score, and the ratios to
lora's values.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from expertoken.benchmarks import DATA

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
RATE = 1e-3
WARM = 2  # untimed steps at the start


def prepare(data: Path, out: Path, count: int, validation: int, tokens: int | None) -> None:
    """Write a supervision of random queries, each repeated and cut to about `tokens` tokens if that is given."""
    from expertoken.data_prep.reading import read_results
    from expertoken.data_prep.supervision import build_supervision

    results = read_results(data / "routerdc", "routerdc")
    results = results.take((results.queries["benchmark"] != "humaneval").to_numpy())
    results = results.take(np.random.default_rng(0).permutation(len(results))[: count + validation])
    if tokens:
        from transformers import AutoTokenizer

        from expertoken.examples.smollm2 import smollm2
        from expertoken.modeling.from_gguf import converted

        tokenizer = AutoTokenizer.from_pretrained(converted(Path(smollm2())))
        long = [f"{index}: " + (text + "\n") * tokens for index, text in enumerate(results.queries["prompt"])]
        results.queries["prompt"] = [tokenizer.decode(tokenizer(text).input_ids[:tokens]) for text in long]
    results.queries["split"] = ["train"] * count + ["validation"] * (len(results) - count)
    build_supervision(results, labelling="query", leaks="keep", near_duplicates="ignore").save(out)


def common(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Return the training arguments that lora and TRL share."""
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no", "use_cpu": True, "seed": 0,
        "logging_steps": 1000, "disable_tqdm": True,
    }  # fmt: skip


class Clock:
    """Clock of a Trainer, as its callback: from the end of the warm-up to the last step."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == WARM:
                    clock.started = time.perf_counter()
                clock.ended = time.perf_counter()

        self.started = self.ended = 0.0
        self.callback = Callback()


def ours(data: Path, work: Path, steps: int, batch: int) -> dict[str, float]:
    """Train by method lora and return seconds an example, peak memory in GiB and the validation score."""
    import torch
    from transformers import TrainingArguments

    from expertoken.data_prep.supervision import Supervision
    from expertoken.examples.smollm2 import smollm2
    from expertoken.modeling.composite import Composite, Manifest, describe_base
    from expertoken.modeling.meta import MetaLLM
    from expertoken.train.arguments import ExpertokenArguments
    from expertoken.train.lora import DispatchTrainer, Examples, wrap_with_lora

    supervision = Supervision.load(data)
    meta = MetaLLM.from_pretrained(str(smollm2()), len(supervision.pool))
    meta.rows = torch.stack([meta.initial_row(expert.description) for expert in supervision.pool])
    torch.manual_seed(0)
    wrap_with_lora(meta, ExpertokenArguments(meta="", data="", **{
        "lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": LORA["lora_dropout"]}))  # fmt: skip
    names = [expert.name for expert in supervision.pool]
    composite = Composite(meta, supervision.pool, Manifest(describe_base(meta), names))
    clock = Clock()
    trainer = DispatchTrainer(
        composite, "cross_entropy", rows_learning_rate=None,
        args=TrainingArguments(
            remove_unused_columns=False, train_sampling_strategy="group_by_length", **common(work, steps, batch)
        ),
        train_dataset=Examples(
            supervision, "train", supervision.queries("train", meta), supervision.arrays("train"), learn=True
        ),
        callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    memory = _peak()
    meta.model.eval()
    side = supervision.side("validation")
    scores = supervision.scores("validation")
    chosen = [int(meta.candidate_logits([meta.encode(messages)]).argmax()) for messages in side["messages"]]
    return {**_speed(clock, steps, batch), "memory": memory, "score": _score(scores, chosen)}


def tokens(data: Path, work: Path, steps: int, batch: int) -> dict[str, float]:
    """Train by method tokens from an empty cache: the states, then the fit. Return the same values as `ours`."""
    from expertoken.benchmarks.fitting import fit
    from expertoken.data_prep.supervision import Supervision
    from expertoken.examples.smollm2 import smollm2
    from expertoken.modeling.meta import MetaLLM

    os.environ["EXPERTOKEN_CACHE"] = str(work / "cache")
    shutil.rmtree(work / "cache", ignore_errors=True)
    supervision = Supervision.load(data)
    meta = MetaLLM.from_pretrained(str(smollm2()), len(supervision.pool))
    started = time.perf_counter()
    _, found, _ = fit(meta, supervision, "cross_entropy", sides=("train", "validation"))
    seconds = time.perf_counter() - started
    examples = sum(len(supervision.side(side)) for side in ("train", "validation"))
    return {"seconds": seconds / examples, "memory": _peak(), "score": found.chosen["validation_score"]}


def trl(data: Path, work: Path, steps: int, batch: int, sampling: str = "random") -> dict[str, float]:
    """Train by SFTTrainer with LoRA and trainable tokens. The loss covers the label only, which is the answer."""
    import datasets
    import torch
    from peft import LoraConfig
    from peft.utils.other import TrainableTokensWrapper
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from expertoken.data_prep.supervision import Supervision
    from expertoken.examples.smollm2 import smollm2
    from expertoken.modeling.chat import text_of
    from expertoken.modeling.from_gguf import converted

    setattr(TrainableTokensWrapper, "bias", None)  # noqa: B010 - TRL 1.16 reads the head's bias and crashes: PEFT 0.21's wrapper has none
    supervision = Supervision.load(data)
    folder = converted(Path(smollm2()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = [expert.token for expert in supervision.pool]
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids: Any = tokenizer.convert_tokens_to_ids(tokens)
    with torch.no_grad():
        mean = model.get_input_embeddings().weight.mean(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight[ids] = mean
    targets, _, weights = supervision.arrays("train")
    rows = np.flatnonzero(weights)

    def user(row: int, name: str = "train") -> list[dict[str, str]]:
        return [{"role": "user", "content": text_of(supervision.side(name)[row]["messages"][-1])}]

    labelled = [
        {
            "prompt": user(int(row)),
            "completion": [{"role": "assistant", "content": tokens[int(targets[row].argmax())]}],
        }
        for row in rows
    ]
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=ids, **LORA)
    clock = Clock()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(completion_only_loss=True, max_length=8192, gradient_checkpointing=False, bf16=False,
                       train_sampling_strategy=sampling, **common(work, steps, batch)),
        train_dataset=datasets.Dataset.from_list(labelled), processing_class=tokenizer, peft_config=config,
        callbacks=[clock.callback],
    )  # fmt: skip
    trainer.train()
    memory = _peak()
    trained = trainer.model.eval()
    scores, chosen = supervision.scores("validation"), []
    with torch.inference_mode():
        for row in range(len(scores)):
            encoded: Any = tokenizer.apply_chat_template(
                user(row, "validation"), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            chosen.append(int(trained(**encoded, logits_to_keep=1).logits[0, -1, ids].argmax()))
    return {**_speed(clock, steps, batch), "memory": memory, "score": _score(scores, chosen)}


def _peak() -> float:
    """Return the peak memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _speed(clock: Clock, steps: int, batch: int) -> dict[str, float]:
    """Return the seconds an example takes, without the warm-up."""
    return {"seconds": (clock.ended - clock.started) / (steps - WARM) / batch}


def _score(scores: np.ndarray, chosen: list[int]) -> float:
    return float(np.nan_to_num(scores)[np.arange(len(chosen)), chosen].mean())


SIDES: dict[str, Any] = {
    "lora": ours, "TRL": trl, "TRL, grouped": partial(trl, sampling="group_by_length"), "tokens": tokens,
}  # fmt: skip


def run(side: str, data: Path, work: Path, steps: int, batch: int) -> dict[str, float]:
    """Run one trainer in its own process and return its values."""
    command = [sys.executable, __file__, "--side", side, "--supervision", str(data), "--out", str(work)]
    done = subprocess.run([*command, "--steps", str(steps), "--batch", str(batch)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parse the command line, run the trainers in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerdc/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lora_speed"), help="Folder to write. Default: %(default)s."
    )
    parser.add_argument("--steps", type=int, default=32, help="Number of training steps. Default: %(default)s.")
    parser.add_argument("--batch", type=int, default=8, help="Queries of a training step. Default: %(default)s.")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="Number of rounds at the queries' own lengths. 0 skips that part. Default: %(default)s.",
    )
    parser.add_argument(
        "--lengths",
        default="128,512,1024",
        help="Lengths of the second part, in tokens. Queries repeat or are cut. '' skips it. Default: %(default)s.",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--supervision", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(SIDES[options.side](options.supervision, options.out, options.steps, options.batch)))
        return
    print("| tokens a question | | examples/s | peak GiB | validation score | lora is faster | lora needs, of memory |")
    print("|---|---|---|---|---|---|---|")
    lengths = [None] * bool(options.rounds) + [int(text) for text in options.lengths.split(",") if text]
    for length in lengths:
        steps, batch = (options.steps, options.batch) if length is None else (WARM + 2, 2)
        data = options.out / f"supervision-{length or 'own'}"
        # The second part measures speed and memory only: two validation queries give no score to compare.
        prepare(options.data, data, steps * batch, 2 * steps * batch if length is None else 2, length)
        rounds = options.rounds if length is None else 1
        found: dict[str, list[Any]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                found[side].append(run(side, data, options.out / side, steps, batch))
        median = {
            side: {key: float(np.median([entry[key] for entry in entries])) for key in entries[0]}
            for side, entries in found.items()
        }
        for side, entry in median.items():
            cells = [
                str(length or "own"),
                side,
                f"{1 / entry['seconds']:.2f}",
                f"{entry['memory']:.2f}",
                "" if length else f"{entry['score']:.3f}",
            ]
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[side], found["lora"], strict=True)]
            cells.append(f"{np.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
            cells.append(f"{median['lora']['memory'] / entry['memory']:.2f}x")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
