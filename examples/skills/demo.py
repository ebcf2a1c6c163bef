"""The whole path on a real small LLM, on CPU: `make demo`.

Nothing is precomputed. A later run reuses the answers of an earlier one. Remove `demo/` to start again.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console

from expertoken.inference.composite_model import CompositeModel

from ..smollm2 import smollm2
from .measure import HERE, measure

ROOT = HERE.parent.parent
OUT = ROOT / "demo"
LEFT_OUT = "roman"

PROMPTS = (
    "What is 34 + 58?",
    "How many metres are 7 kilometres?",
    "Write an SQL query for the table films(title, director, rating): every title with rating over 50.",
    "Marta is a 41-year-old pilot from Quito. Give name, age and city as JSON.",
    "What day of the week comes 3 days after Friday?",
    "Write 277 in Roman numerals.",
    "What is the capital of Italy?",
    "Who was Albert Einstein?",
    "What is 34 + 59?",
)
SECOND_TURN = PROMPTS[-1]

console = Console(highlight=False, soft_wrap=True)
warnings.filterwarnings("ignore", category=FutureWarning)  # raised by libraries about each other
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # suppresses DeepSpeed's warning about a missing GPU


def step(number: int, title: str) -> None:
    """Print the heading of a step."""
    console.print(f"\n[bold]{number}. {title}", style="magenta")


def run(*command: str | Path) -> None:
    """Print a command as a user would type it, and run it."""
    words = [str(word) for word in command]
    shown = [word.replace(f"{ROOT}/", "") for word in words]
    console.print(f"[bold]$ {shlex.join(shown)}", style="cyan")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(words, check=True, env=environment, cwd=ROOT)


def split_results(answers: dict[str, Path], first: Path, new: Path) -> None:
    """Split the answers into those before the left-out expert is added, and the new ones that come with it."""
    for folder in (first, new):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, file in answers.items():
        lines = file.read_text().splitlines(keepends=True)
        about = [json.loads(line)["benchmark"] == LEFT_OUT for line in lines]
        if name == LEFT_OUT:
            (new / file.name).write_text("".join(lines))
            continue
        (first / file.name).write_text("".join(line for line, new_ in zip(lines, about, strict=True) if not new_))
        (new / file.name).write_text("".join(line for line, new_ in zip(lines, about, strict=True) if new_))


def transcript(folder: Path) -> None:
    """Print the composite's answers to the prompts, with experts and probabilities. The last two are one chat."""
    composite = CompositeModel.from_pretrained(folder)
    chat: list[dict[str, str]] = []
    for prompt in PROMPTS:
        chat = [*(chat if prompt == SECOND_TURN else []), {"role": "user", "content": prompt}]
        reply = composite.chat(chat, max_new_tokens=40)
        chat.append({"role": "assistant", "content": reply.text})
        ranked = [f"{name} {reply.dispatch.probabilities[name]:.2f}" for name in reply.dispatch.ranking[:3]]
        console.print(f"[bold]> {prompt}")
        console.print(f"{reply.text.strip()}", markup=False)
        console.print(f"  answered by {reply.expert} ({', '.join(ranked)})", style="dim", markup=False)


def verdict(folder: Path) -> bool:
    """Print the scores and return whether the composite's interval lies above every single candidate's."""
    report = json.loads((folder / "report" / "report.json").read_text())
    ours, *others = report["results"]
    best = max((row for row in others if row["kind"] == "expert"), key=lambda row: row["mean_score_interval"][1])
    above = ours["mean_score_interval"][0] > best["mean_score_interval"][1]
    console.print(
        f"composite {_percent(ours)} {'above' if above else 'NOT above'} the best single model, {best['name']} "
        f"{_percent(best)}",
        style="bold green" if above else "bold red",
        markup=False,
    )
    return above


def _percent(row: dict) -> str:
    low, high = row["mean_score_interval"]
    return f"{100 * row['mean_score']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def main() -> None:
    """Run the demo. The exit status is 0 if the composite is above every single candidate."""
    started = time.perf_counter()
    results, new_results, composite = OUT / "results", OUT / "results-new", OUT / "composite"
    step(1, "every expert and the meta LLM alone answer the benchmark (held-in and held-out tasks)")
    answers = measure(OUT / "answers")
    split_results(answers, results, new_results)
    step(2, "labels: the best candidate of each query")
    pool = HERE / "pool.yaml"
    run("expertoken", "prepare", results, "--pool", pool, "--validation", "0.25", "--out", OUT / "supervision")
    step(3, "expert tokens, trained on the meta LLM's hidden states at the start of its answer")
    launch = ("accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
    run(
        *(*launch, "--dynamo_backend", "no", "-m", "expertoken.train", "tokens"),
        *("--meta", smollm2(), "--data", OUT / "supervision", "--out", composite),
    )
    step(4, "evaluation on held-out tasks")
    run("expertoken", "evaluate", composite, "--data", OUT / "supervision", "--baselines", "none")
    step(5, f"one more expert, {LEFT_OUT}, plugged in")
    run(
        *("expertoken", "expert", "add", composite, "--name", LEFT_OUT, "--backend", "adapter"),
        *("--model", HERE / "adapters" / LEFT_OUT, "--results", new_results),
        *("--description", "writes numbers as Roman numerals"),
    )
    run("expertoken", "evaluate", composite, "--contexts", "1000")
    step(6, "a chat with the composite as one model")
    transcript(composite)
    above = verdict(composite)
    console.print(f"{time.perf_counter() - started:.0f} s; the composite is in {composite.relative_to(ROOT)}/")
    chat = ("expertoken", "chat", composite)
    if sys.stdin.isatty() and console.input("Chat with it now? (y/n) ").strip().lower().startswith("y"):
        run(*chat)
    else:
        console.print(f"Chat with it: .venv/bin/expertoken chat {composite.relative_to(ROOT)}")
    sys.exit(0 if above else 1)


if __name__ == "__main__":
    main()
