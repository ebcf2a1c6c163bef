"""Positions inside the meta LLM's own answers, so that a composite can dispatch anywhere and not only at the start.

A query's label holds at these positions too. If an expert should answer, the meta LLM learns to hand over in the middle
of its own answer. If self should answer, it learns to hold back to the end. Answers are the meta LLM's own, greedy, and
kept in the cache.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling.batching import MAX_TOKENS, run_batches
from ..modeling.chat import Query
from ..modeling.distributed import ALONE, Team
from ..modeling.errors import ExpertokenError
from ..modeling.files import atomic_file, cache_folder
from ..modeling.fingerprint import describe_dtype
from ..modeling.loading import end_ids
from ..modeling.meta import MetaLLM
from ..modeling.sharding import is_split

_BLOCK = 256  # queries of one file of answers: the most that an interruption loses
_SEED = 0


@dataclass(frozen=True)
class Positions:
    """Positions of the decisions on the queries of a split: their starts, and positions inside answers.

    Attributes:
        query: Index of each position's query, `[M]`. The starts come first, in order.
        prefixes: Token ids of the answer before each position, M arrays. Empty at a start.
        share: Share of the query's weight, `[M]`: 1 at a start, and 1 for all positions inside one answer together.
    """

    query: np.ndarray
    prefixes: list[np.ndarray]
    share: np.ndarray

    @classmethod
    def starts(cls, count: int) -> "Positions":
        """Return the starts alone."""
        return cls(np.arange(count), [np.zeros(0, np.int32)] * count, np.ones(count, np.float32))

    @classmethod
    def inside(cls, answers: Sequence[np.ndarray], each: int) -> "Positions":
        """Return the start of every answer, and up to `each` distinct random positions inside it."""
        starts = cls.starts(len(answers))
        rng = np.random.default_rng(_SEED)
        query, prefixes, share = [], [], []
        for row, answer in enumerate(answers):
            drawn = np.sort(rng.permutation(len(answer))[:each]) + 1
            query += [row] * len(drawn)
            prefixes += [answer[:length] for length in drawn]
            share += [1 / max(len(drawn), 1)] * len(drawn)
        return cls(
            np.concatenate([starts.query, np.array(query, dtype=int)]),
            starts.prefixes + prefixes,
            np.concatenate([starts.share, np.array(share, np.float32)]),
        )

    def queries(self, side: Sequence[Query]) -> list[Query]:
        """Return the query of each position, made from the queries of the split."""
        return [
            side[query].followed_by(prefix) if len(prefix) else side[query]
            for query, prefix in zip(self.query, self.prefixes, strict=True)
        ]


def own_answers(
    meta: MetaLLM,
    queries: Sequence[Query],
    length: int,
    *,
    max_tokens: int = MAX_TOKENS,
    team: Team = ALONE,
) -> list[np.ndarray]:
    """Return the meta LLM's own greedy answers, without end tokens.

    Args:
        meta: Meta LLM. Its plain model answers.
        queries: N queries.
        length: Maximum length of an answer, in tokens.
        max_tokens: Padded tokens of one batch, answers included.
        team: Processes that share the work.

    Raises:
        ExpertokenError: Answers are missing, and the model is split by ZeRO-3 and can't generate them.
    """
    key = f"{meta.base_fingerprint}-{describe_dtype(meta.plain)}-{length}"
    folder = cache_folder("answers") / key
    blocks = [queries[start : start + _BLOCK] for start in range(0, len(queries), _BLOCK)]
    files = [folder / f"{_hash(block)}.npz" for block in blocks]
    missing = team.agree(lambda: [place for place, file in enumerate(files) if not file.exists()])
    if missing and is_split(meta.plain):
        raise ExpertokenError(
            "own answers: a model split by ZeRO-3 can't generate them before training. Run method tokens with "
            "--anywhere on the same data first (answers are kept in $EXPERTOKEN_CACHE), or load the model whole"
        )
    mine = missing[team.rank :: team.world]
    for place in tqdm(mine, desc="own answers", unit="block", delay=2, disable=team.rank > 0):
        answers = _generate(meta, blocks[place], length, max_tokens)
        with atomic_file(files[place]) as aside, aside.open("wb") as stream:
            np.savez(stream, *answers)
    team.barrier()
    found = []
    for file in files:
        with np.load(file) as stored:
            found += [stored[f"arr_{index}"] for index in range(len(stored.files))]
    return found


def _hash(block: Sequence[Query]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for query in block:
        digest.update(query.key)
    return digest.hexdigest()


@torch.inference_mode()
def _generate(meta: MetaLLM, block: Sequence[Query], length: int, max_tokens: int) -> list[np.ndarray]:
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(block)
    ends = end_ids(meta.plain, meta.tokenizer)

    def generate(batch: list[int]) -> list[list[int]]:
        inputs = meta.pad([block[row] for row in batch])
        model: Any = meta.plain
        produced = model.generate(
            **inputs, max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None
        )
        return produced[:, inputs["input_ids"].shape[1] :].tolist()

    batches = run_batches(
        list(map(len, block)),
        generate,
        label="own answers",
        max_tokens=max_tokens,
        generated=length,
        kept="Complete blocks of answers are kept",
    )
    for batch, produced in batches:
        for row, ids in zip(batch, produced, strict=True):
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answers[row] = np.array(ids[:stop], dtype=np.int32)
    return answers
