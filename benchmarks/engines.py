"""Real engines as meta LLM: `python benchmarks/engines.py COMPOSITE --vllm PATH --llama PATH`.

The composite is exported and served by vLLM's command and by llama.cpp's `llama-server`. A gateway decides on each by
its log-probabilities. The queries are of the demo's kinds, with other numbers and names.

For each engine the benchmark prints how many decisions and how many of self's greedy answers equal the composite's. It
also prints two largest differences of a probability. The first is from the same checkpoint under transformers, and the
engine causes it. The second is from the composite, and the engine and the export cause it.

`make demo` creates a composite. docs/guides/deploy.md describes how to install the engines on a CPU.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertoken.inference.composite_model import CompositeModel
from expertoken.inference.gateway import GatewayModel
from expertoken.modeling.export import EXPORT_FILE, GATEWAY_FILE, export_checkpoint
from expertoken.modeling.policy import Policy

_KINDS = (
    "What is {0} + {1}?",
    "How many metres are {2} kilometres?",
    "Write an SQL query for the table {3}(title, director, rating): every title with rating over {0}.",
    "{4} is a {1}-year-old pilot from Quito. Give name, age and city as JSON.",
    "What day of the week comes {2} days after {5}?",
    "Write {6} in Roman numerals.",
    "What is the capital of {7}?",
    "Tell me something about {3}.",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_COUNTRIES = ("Italy", "Spain", "Peru", "Japan", "Kenya")
_TOP = 100  # log-probabilities: an expert outside of them counts as improbable, and self receives its share
_ANSWERS = 8  # answers of self that are compared


def questions(count: int) -> list[str]:
    """Return queries of the demo's kinds, with random numbers and names."""
    rng = random.Random(0)
    return [
        _KINDS[number % len(_KINDS)].format(
            rng.randint(10, 99), rng.randint(10, 99), rng.randint(2, 9), rng.choice(("films", "books", "songs")),
            rng.choice(("Marta", "Ben", "Ivo")), rng.choice(_DAYS), rng.randint(11, 999), rng.choice(_COUNTRIES),
        )
        for number in range(count)
    ]  # fmt: skip


@contextmanager
def engine(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """Run an engine and yield its address as soon as it answers."""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as stream:
        environment = os.environ | variables | {"HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 900
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} exited or did not answer within 900 s. See {log}.")
                time.sleep(1)
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait()


def _healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def gateway_on(checkpoint: Path, address: str) -> GatewayModel:
    """Build a gateway on an exported checkpoint. Its experts have dummy addresses, because they are not called."""
    document = yaml.safe_load((checkpoint / GATEWAY_FILE).read_text("utf-8"))
    document["meta"] |= {"model": "meta", "base_url": address, "top_logprobs": _TOP}
    for expert in document["experts"]:
        if expert["backend"] != "self":
            expert |= {"backend": "openai", "base_url": "http://127.0.0.1:9/v1", "model": expert["name"]}
            expert.pop("base", None)
    file = checkpoint.parent / "gateway.yaml"
    file.write_text(yaml.safe_dump(document), "utf-8")
    return GatewayModel.from_yaml(file)


@torch.inference_mode()
def exported(checkpoint: Path, names: list[str], asked: list[str]) -> list[dict[str, float]]:
    """Compute each expert's probability under transformers for each query. Self has the rest."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = json.loads((checkpoint / EXPORT_FILE).read_text("utf-8"))["experts"]
    found = []
    for text in asked:
        chat = [{"role": "user", "content": text}]
        given: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        shares = model(**given).logits[0, -1].softmax(-1)
        told = {name: float(shares[ids[name]]) for name in names if name in ids}
        found.append(told | {name: 1 - sum(told.values()) for name in names if name not in ids})
    return found


def row(name: str, composite: CompositeModel, gateway: GatewayModel, checkpoint: Path, asked: list[str]) -> str:
    """Measure one engine and format a row of the table."""
    own = composite.route(asked)
    started = time.perf_counter()
    theirs = [gateway.route(text) for text in asked]
    seconds = (time.perf_counter() - started) / len(asked)
    same = sum(one.expert == other.expert for one, other in zip(own, theirs, strict=True))
    apart = max(
        abs(one.probabilities[expert] - other.probabilities[expert])
        for one, other in zip(own, theirs, strict=True)
        for expert in one.probabilities
    )
    plain = exported(checkpoint, composite.pool.names, asked)
    engine_apart = max(
        abs(one[expert] - other.probabilities[expert])
        for one, other in zip(plain, theirs, strict=True)
        for expert in one
    )
    policy = Policy(threshold=1.0, default="self", fallbacks=0)
    texts = [
        [model.chat(text, policy=policy, max_new_tokens=24).text for text in asked[:_ANSWERS]]
        for model in (composite, gateway)
    ]
    answers = sum(one == other for one, other in zip(*texts, strict=True))
    parts = f"{engine_apart:.1e} | {apart:.1e}"
    return f"| {name} | {same} of {len(asked)} | {parts} | {answers} of {_ANSWERS} | {1000 * seconds:.0f} |"


def main() -> None:
    """Parse the command line, run each engine and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("composite", type=Path, help="Composite folder of the demo.")
    parser.add_argument("--vllm", help="Path of vLLM's command. Default: vLLM is skipped.")
    parser.add_argument("--llama", help="Path of llama.cpp's llama-server. Default: llama.cpp is skipped.")
    parser.add_argument(
        "--convert", help="Command that runs llama.cpp's convert_hf_to_gguf.py, Python included. Needed with --llama."
    )
    parser.add_argument("--questions", type=int, default=200, help="Number of queries. Default: %(default)s.")
    parser.add_argument("--out", type=Path, default=Path("runs/engines"), help="Folder to write. Default: %(default)s.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / "meta"
    if not checkpoint.exists():
        export_checkpoint(options.composite, checkpoint, prompts=questions(400)[200:])
    composite = CompositeModel.from_pretrained(options.composite, device="cpu")
    asked = questions(options.questions)
    head = (
        "engine",
        "the composite's decisions",
        "apart from the checkpoint, at most",
        "from the composite",
        "self's answers",
    )
    print(f"| {' | '.join((*head, 'ms a decision'))} |")
    print("|---|---|---|---|---|---|")
    if options.vllm:
        command = [
            options.vllm, "serve", str(checkpoint), "--served-model-name", "meta", "--host", "127.0.0.1", "--port",
            "8701", "--max-logprobs", str(_TOP), "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
            "--max-num-seqs", "8",
        ]  # fmt: skip
        with engine(command, 8701, options.out / "vllm.log") as address:
            print(row("vLLM", composite, gateway_on(checkpoint, address), checkpoint, asked), flush=True)
    if options.llama:
        file = options.out / "meta.gguf"
        if not file.exists():
            subprocess.run(
                [*shlex.split(options.convert), str(checkpoint), "--outfile", str(file), "--outtype", "f32"], check=True
            )
        command = [options.llama, "-m", str(file), "--host", "127.0.0.1", "--port", "8702", "-c", "4096", "--jinja"]
        with engine(command, 8702, options.out / "llama.log") as address:
            print(row("llama.cpp", composite, gateway_on(checkpoint, address), checkpoint, asked), flush=True)


if __name__ == "__main__":
    main()
