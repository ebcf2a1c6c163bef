"""What a decision costs beside a bare prefill, and self's answer beside a plain one: `python benchmarks/decision.py`.

SmolLM2-135M-Instruct, real questions, pools of several sizes and states that decide, with rows by which always self is
chosen, or always an expert. Question by question, two of each in the order A B B A after a warm-up:
- the bare prefill: the model's forward pass with a KV cache and logits at the last position;
- the decision, as a chat makes it: the state, the rows, the distribution, and the policy; where self is chosen with the
  KV cache that its answer goes on from;
- an answer of the model alone (prefill and some tokens), and the composite's own answer after its decision.
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
    """A composite that always chooses self on these questions, or never."""
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
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


async def answer(composite: CompositeModel, question: str, tokens: int) -> None:
    """A turn of the composite."""
    await composite.achat(question, max_new_tokens=tokens)


async def alone(composite: CompositeModel, question: str, tokens: int) -> None:
    """The same answer of the model alone."""
    messages = [{"role": "user", "content": question}]
    async for _ in composite.backend("self").stream(messages, Generation(max_new_tokens=tokens)):
        pass


def measure(composite: CompositeModel, questions: list[str], tokens: int, *, own: bool) -> dict[str, list[float]]:
    """Seconds of each way, question by question."""
    meta = composite.meta
    times: dict[str, list[float]] = {name: [] for name in ("bare", "decision", *(("alone", "own") if own else ()))}

    @torch.inference_mode()
    def bare(query: Query) -> None:
        meta.plain(meta.pad([query])["input_ids"], use_cache=True, logits_to_keep=1)

    for number, text in enumerate([questions[0], *questions]):  # the first is a warm-up
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
            ways[second]()  # whoever comes first would find the caches cold
            found = dict.fromkeys(pair, 0.0)
            for name in (first, second, second, first):  # a drift of the machine's speed falls on both alike
                found[name] += seconds(ways[name]) / 2
            if number:
                for name in pair:
                    times[name].append(found[name])
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="default: $EXPERTOKEN_DATA; has routerdc/")
    parser.add_argument("--dtype", default="float32", help="of the meta LLM (default: %(default)s)")
    parser.add_argument("--experts", default="7,1000", help="default: %(default)s")
    parser.add_argument("--states", default="head,8:mean,15:last,22:both", help="default: %(default)s")
    parser.add_argument("--questions", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer (default: %(default)s)")
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
