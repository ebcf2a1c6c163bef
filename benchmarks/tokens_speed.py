"""Method tokens beside the bare forward pass, and beside the recipe it replaces: `python benchmarks/tokens_speed.py`.

The benchmark uses RouterDC's queries and SmolLM2-135M-Instruct. Three ways run over the same data, in turn.

1. The forward pass runs alone, in batches of similar length, with one row of logits per query.
2. Method tokens starts from an empty cache. It makes the same pass, caches the states, and fits all its strengths.
3. Expert-Token-Routing's recipe (arXiv 2403.16854) pads every query to the longest and computes logits at every
   position. Several epochs of forward and backward passes train the expert rows only.

Prints seconds, ratios and the validation score of both trainings.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from expertoken.benchmarks import DATA
from expertoken.benchmarks.fitting import problems_of
from expertoken.data_prep.reading import read_results
from expertoken.data_prep.supervision import Supervision, build_supervision
from expertoken.examples.smollm2 import smollm2
from expertoken.modeling.batching import token_batches
from expertoken.modeling.chat import Query
from expertoken.modeling.dispatch import positions
from expertoken.modeling.meta import MetaLLM
from expertoken.modeling.states import state_logits, states_of
from expertoken.train.arguments import L2
from expertoken.train.row_optimizer import Problem
from expertoken.train.tokens import fit_rows, mean_score

SIDES = ("train", "validation")
BATCH_TOKENS = 4096
RECIPE = {"batch": 8, "rate": 5e-3}


def prepare(data: Path, count: int, longest: int) -> Supervision:
    """Draw queries of at most about `longest` tokens, because the recipe pads all of them to the longest."""
    results = read_results(data / "routerdc", "routerdc")
    results = results.take((results.queries["prompt"].str.len() < 3 * longest).to_numpy())
    results = results.take(np.random.default_rng(0).permutation(len(results))[:count])
    results.queries["split"] = ["train"] * (4 * count // 5) + ["validation"] * (count - 4 * count // 5)
    return build_supervision(results, labelling="subject", leaks="keep", near_duplicates="ignore")


@torch.inference_mode()
def forward(meta: MetaLLM, queries: list[Query]) -> float:
    """Time the forward pass alone, in seconds."""
    started = time.perf_counter()
    for batch in token_batches([len(query) for query in queries], BATCH_TOKENS):
        inputs = meta.pad([queries[row] for row in batch])
        meta.plain(**inputs, position_ids=positions(meta.plain, inputs), logits_to_keep=1)
    return time.perf_counter() - started


def tokens(meta: MetaLLM, supervision: Supervision) -> tuple[float, float]:
    """Train by method tokens from an empty cache and return the seconds and the validation score."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EXPERTOKEN_CACHE"] = cache
        started = time.perf_counter()
        found = {side: states_of(meta, supervision.side(side)["messages"], label=side) for side in SIDES}
        train, validation = problems_of(supervision, found)
        fit = fit_rows(train, objective="cross_entropy", transform=meta.transform, l2=L2)
        seconds = time.perf_counter() - started
    return seconds, score(fit.rows, meta, validation)


def score(rows: torch.Tensor, meta: MetaLLM, side: Problem) -> float:
    """Return the mean score of the candidates that the rows choose."""
    chosen = state_logits(rows, side.states, meta.transform).argmax(-1).numpy()
    return mean_score(chosen, side.scores, side.benchmarks)


def recipe(meta: MetaLLM, supervision: Supervision, epochs: int) -> tuple[float, float]:
    """Train by the recipe that method tokens replaces and return the seconds and the validation score."""
    encoded = {side: [list(query) for query in supervision.queries(side, meta)] for side in SIDES}
    longest = max(len(ids) for sequences in encoded.values() for ids in sequences)
    targets, _, weights = supervision.arrays("train")
    labels = torch.from_numpy(targets.argmax(1)) + meta.vocab_size
    for parameter in meta.model.parameters():
        parameter.requires_grad_(False)
    rows = torch.stack([meta.initial_row(expert.description) for expert in supervision.pool])
    meta.rows = rows
    meta.head.expert_rows.requires_grad_(True)
    optimizer = torch.optim.AdamW([meta.head.expert_rows], lr=RECIPE["rate"], weight_decay=0.0)
    order = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for _ in range(epochs):
        kept = torch.from_numpy(np.flatnonzero(weights))
        batches = kept[torch.randperm(len(kept), generator=order)].split(RECIPE["batch"])
        for batch in tqdm(batches, desc="recipe", leave=False):
            sequences = [encoded["train"][int(row)] for row in batch]
            # Padding is on the right, to one length. The label is at each query's last token, with -100 elsewhere.
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
            wanted = torch.full_like(ids, -100)
            for place, (row, sequence) in enumerate(zip(batch, sequences, strict=True)):
                wanted[place, len(sequence) - 1] = labels[row]
            logits = meta.model(input_ids=ids, attention_mask=mask).logits
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100).backward()
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.perf_counter() - started
    found = {side: states_of(meta, supervision.side(side)["messages"], label=side) for side in SIDES}
    _, validation = problems_of(supervision, found)
    return seconds, score(meta.rows, meta, validation)


def main() -> None:
    """Parse the command line, run the three ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="Folder with routerdc/. Default: $EXPERTOKEN_DATA.")
    parser.add_argument("--dtype", default="float32", help="Data type of the meta LLM. Default: %(default)s.")
    parser.add_argument("--queries", type=int, default=400, help="Number of queries. Default: %(default)s.")
    parser.add_argument(
        "--longest", type=int, default=512, help="Approximate longest query, in tokens. Default: %(default)s."
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="Rounds of the forward pass and method tokens. Default: %(default)s."
    )
    parser.add_argument("--epochs", type=int, default=3, help="Epochs of the recipe. 0 skips it. Default: %(default)s.")
    options = parser.parse_args()
    supervision = prepare(options.data, options.queries, options.longest)
    meta = MetaLLM.from_pretrained(str(smollm2()), len(supervision.pool), dtype=options.dtype)
    sequences = [query for side in SIDES for query in supervision.queries(side, meta)]
    forward(meta, sequences[:20])  # warm-up
    bare, ours, scores = [], [], []
    for _ in range(options.rounds):
        bare.append(forward(meta, sequences))
        seconds, score = tokens(meta, supervision)
        ours.append(seconds)
        scores.append(score)
    ratios = np.array(ours) / np.array(bare)
    lengths = [len(ids) for ids in sequences]
    print(f"{len(sequences)} queries of {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most\n")
    print("| | seconds | against the forward pass | validation score |\n|---|---|---|---|")
    print(f"| forward pass | {np.median(bare):.1f} | 1.00x | |")
    spread = f"{np.median(ratios):.3f}x ({ratios.min():.3f} to {ratios.max():.3f})"
    print(f"| method tokens, {len(L2)} strengths | {np.median(ours):.1f} | {spread} | {scores[0]:.4f} |", flush=True)
    if options.epochs:
        seconds, score = recipe(meta, supervision, options.epochs)
        name = f"padded, {options.epochs} epochs"
        print(f"| {name} | {seconds:.1f} | {seconds / np.median(bare):.1f}x | {score:.4f} |")
        print(f"\nmethod tokens is {seconds / np.median(ours):.1f} times as fast as the recipe")


if __name__ == "__main__":
    main()
