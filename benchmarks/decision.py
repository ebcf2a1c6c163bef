"""Cost of a decision beside a bare prefill, and of self's answer beside a plain one: `python benchmarks/decision.py`.

The benchmark uses SmolLM2-135M-Instruct, real queries, and pools of several sizes read at several states. The rows
choose either always self or always an expert. Two pairs are timed for each query, in the order A B B A after a warm-up.

1. A bare prefill (the model's forward pass with a KV cache and logits at the last position) and a decision. The
   decision is a chat's: the state, the rows, the distribution, and the policy. Where self is chosen, it includes the KV
   cache from which self's answer continues.
2. An answer of the model alone (prefill and some tokens) and the composite's own answer after its decision.

Prints medians and ratios.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertoken.benchmarks import DATA
from expertoken.data_prep.reading import read_results
from expertoken.examples.smollm2 import smollm2
from expertoken.inference.composite_model import CompositeModel
from expertoken.modeling.backend import Generation
from expertoken.modeling.chat import Query
from expertoken.modeling.composite import Composite, Manifest, describe_base
from expertoken.modeling.experts import Expert
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.pool import ExpertPool
from expertoken.modeling.state import StateSpec
from expertoken.modeling.states import states_of


def composite_with(count: int, dtype: str, state: str, questions: list[str], *, own: bool) -> CompositeModel:
    """Build a composite that always chooses self on these queries (`own`), or never."""
    experts = [Expert(f"expert-{index}", "openai", "m", base_url="http://127.0.0.1:9/v1") for index in range(count)]
    meta = MetaLLM.from_pretrained(str(smollm2()), count + 1, dtype=dtype, state=StateSpec.parse(state))
    hidden = torch.from_numpy(np.ascontiguousarray(states_of(meta, questions).hidden))
    one = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1)).solution[:, 0]
    rows = torch.randn(count + 1, meta.row_width, generator=torch.Generator().manual_seed(0)) * 1e-4
    rows[-1 if own else 0] += 20 * one
    meta.rows = rows
    pool = ExpertPool([*experts, Expert("self", "self")])
    return CompositeModel(Composite(meta, pool, Manifest(describe_base(meta), [expert.name for expert in experts])))


def seconds(run: Callable[[], object]) -> float:
    """Time one call in seconds."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


async def answer(composite: CompositeModel, question: str, tokens: int) -> None:
    """Run one turn of the composite: its decision and its answer."""
    await composite.achat(question, max_new_tokens=tokens)


async def alone(composite: CompositeModel, question: str, tokens: int) -> None:
    """Generate the same answer with the meta LLM alone, without a decision."""
    messages = [{"role": "user", "content": question}]
    async for _ in composite.backend("self").stream(messages, Generation(max_new_tokens=tokens)):
        pass


def measure(composite: CompositeModel, questions: list[str], tokens: int, *, own: bool) -> dict[str, list[float]]:
    """Return the seconds of each way, one value per query."""
    meta = composite.meta
    times: dict[str, list[float]] = {name: [] for name in ("bare", "decision", *(("alone", "own") if own else ()))}

    @torch.inference_mode()
    def bare(query: Query) -> None:
        meta.plain(meta.pad([query])["input_ids"], use_cache=True, logits_to_keep=1)

    for number, text in enumerate([questions[0], *questions]):  # the first query is a warm-up
        question = composite._question([{"role": "user", "content": text}], None, answer=True)
        [decision] = composite._decider.decide([question])
        assert (decision.dispatch.expert == "self") == own
        ways: dict[str, Any] = {
            "bare": partial(bare, question.query),
            "decision": partial(composite._decider.decide, [question]),
            "alone": lambda text=text: asyncio.run(alone(composite, text, tokens)),
            "own": lambda text=text: asyncio.run(answer(composite, text, tokens)),
        }
        for pair in (["bare", "decision"], ["alone", "own"])[: 1 + own]:
            first, second = pair if number % 2 else pair[::-1]
            ways[second]()  # without this call the first measured way would meet cold caches
            found = dict.fromkeys(pair, 0.0)
            for name in (first, second, second, first):  # a drift of the machine's speed affects both equally
                found[name] += seconds(ways[name]) / 2
            if number:
                for name in pair:
                    times[name].append(found[name])
    return times


def main() -> None:
    """Parse the command line, measure each case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerdc/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    parser.add_argument("--experts", default="7,1000", help="Sizes of the pools. Default: %(default)s.")
    parser.add_argument(
        "--states", default="head,8:mean,15:last,22:both", help="States that the rows read. Default: %(default)s."
    )
    parser.add_argument("--questions", type=int, default=40, help="Number of queries. Default: %(default)s.")
    parser.add_argument("--tokens", type=int, default=16, help="Tokens of an answer. Default: %(default)s.")
    options = parser.parse_args()
    results = read_results(options.data / "routerdc", "routerdc")
    chosen = np.random.default_rng(0).permutation(len(results))[: options.questions]
    questions = results.queries["prompt"].iloc[chosen].tolist()
    print(
        "| state | experts | chosen | bare prefill, s | decision, s | ratio | alone, s | decision and own, s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [(state, int(count), own) for state in options.states.split(",") for count in options.experts.split(",")
             for own in (False, True)]  # fmt: skip
    for state, count, own in cases:
        composite = composite_with(count, options.dtype, state, questions, own=own)
        times = measure(composite, questions, options.tokens, own=own)
        arrays = {name: np.array(values) for name, values in times.items()}
        cells = [state, f"{count:,}", "self" if own else "an expert"]
        for first, second in (("bare", "decision"), ("alone", "own"))[: 1 + own]:
            ratios = arrays[second] / arrays[first]
            low, middle, high = np.percentile(ratios, (10, 50, 90))
            cells += [f"{np.median(arrays[first]):.3f}", f"{np.median(arrays[second]):.3f}"]
            cells.append(f"{middle:.3f}x ({low:.3f} to {high:.3f})")
        cells += [""] * (9 - len(cells))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
