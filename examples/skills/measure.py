"""Scored answers of each expert and the meta LLM alone: `python -m expertoken.examples.skills.measure OUT`.

All models answer all benchmarks. Writes benchmark results as JSONL, a file per model, in the `table` format of
`expertoken prepare`. A model is skipped if its file for the same weights and questions exists.
"""

import argparse
import hashlib
import json
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from expertoken.inference.backends.models import LocalModels
from expertoken.modeling.backend import Generation, Opening
from expertoken.modeling.experts import Expert
from expertoken.modeling.files import atomic_file
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.source import Source

from ..smollm2 import smollm2
from .tasks import BENCHMARKS, SKILLS, tasks

HERE = Path(__file__).parent
SIDES = {
    "held_in": ("train", 20),
    "held_out": ("test", 12),
}  # the split's name in results, and its tasks of each benchmark
_LONGEST_ANSWER = 34  # tokens: the longest right answer, a date past a month's end, has 33 and an end token


def full_pool() -> ExpertPool:
    """Return the demo's pool with the left-out expert."""
    pool = ExpertPool.from_yaml(HERE / "pool.yaml")
    names = {expert.name for expert in pool}
    left_out = [
        Expert(name, "adapter", str(HERE / "adapters" / name), skill.DESCRIPTION)
        for name, skill in SKILLS.items()
        if name not in names
    ]
    return ExpertPool([*pool.candidates, *left_out])


def questions() -> list[dict[str, str]]:
    """Return the tasks of each benchmark and split."""
    return [
        {"query": task.prompt, "answer": task.answer, "benchmark": benchmark, "split": split}
        for benchmark in BENCHMARKS
        for side, (split, count) in SIDES.items()
        for task in islice(tasks(benchmark, side), count)
    ]


def _key(expert: Expert, asked: list[dict[str, str]]) -> str:
    """Hash the inputs of a model's answers: its weights, the questions, and the longest answer."""
    digest = hashlib.sha256(json.dumps([asked, _LONGEST_ANSWER]).encode())
    if expert.model:
        digest.update((Path(expert.model) / "adapter_model.safetensors").read_bytes())
    return digest.hexdigest()[:8]


def measure(out: Path) -> dict[str, Path]:
    """Generate and score the answers of all models of the full pool.

    Returns:
        The file of each model's scored answers, under `out`.
    """
    models = LocalModels()
    base = Source(str(smollm2()))
    asked = questions()
    pool = full_pool()
    files = {expert.name: out / f"{expert.name}-{_key(expert, asked)}.jsonl" for expert in pool.candidates}
    missing = [expert for expert in pool.candidates if not files[expert.name].exists()]
    for expert in tqdm(missing, desc="answering", unit="model", disable=not missing):
        backend = expert.kind.open(expert, Opening(base, models))
        conversations = [[{"role": "user", "content": row["query"]}] for row in asked]
        answers = backend.complete(conversations, Generation(max_new_tokens=_LONGEST_ANSWER), batch_size=64)
        with atomic_file(files[expert.name]) as aside, aside.open("w") as file:
            for row, answer in zip(asked, answers, strict=True):
                response = answer.text
                score = BENCHMARKS[row["benchmark"]].score(response, row["answer"])
                file.write(json.dumps({"model": expert.name, **row, "response": response, "score": score}) + "\n")
    return files


def main() -> None:
    """Parse the command line and measure all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="Folder for the results.")
    measure(parser.parse_args().out)


if __name__ == "__main__":
    main()
