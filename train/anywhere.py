"""Positions inside the meta LLM's own answers, so that a composite can dispatch anywhere and not only at the start.

A query's label holds at them too: where an expert should answer, the meta LLM hands over in the middle of its own
answer; where it should answer itself, it holds back to the end. Answers are the meta LLM's own, greedy, and kept in the
cache.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ..modeling.errors import ExpertokenError, is_out_of_memory
from ..modeling.files import atomic_file, cache_folder
from ..modeling.meta import MetaLLM, describe_dtype, end_ids, fingerprint, token_batches
from ..modeling.sharding import is_split
from .features import ALONE
from .processes import Team

_BLOCK = 256  # queries of one file of answers: what an interruption costs at most
_SEED = 0


@dataclass(frozen=True)
class Positions:
    """Where a side's queries are decided: at their starts, and inside answers.

    Attributes:
        query: `[M]` which query, the starts first, in order.
        prefixes: M, ids of the answer so far; empty at a start.
        share: `[M]` of the query's weight; starts have all of it, the positions inside an answer have as much together.
    """

    query: np.ndarray
    prefixes: list[np.ndarray]
    share: np.ndarray

    @classmethod
    def starts(cls, count: int) -> "Positions":
        """The starts alone."""
        return cls(np.arange(count), [np.zeros(0, np.int32)] * count, np.ones(count, np.float32))

    @classmethod
    def inside(cls, answers: Sequence[np.ndarray], each: int) -> "Positions":
        """The starts, and up to `each` positions inside every answer, drawn without replacement."""
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

    def sequences(self, encoded: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Token ids up to each position, from the queries' own."""
        return [
            np.concatenate([np.asarray(encoded[query], np.int32), prefix]) if len(prefix) else encoded[query]
            for query, prefix in zip(self.query, self.prefixes, strict=True)
        ]


def own_answers(
    meta: MetaLLM,
    encoded: Sequence[Sequence[int]],
    length: int,
    *,
    max_tokens: int = 4096,
    team: Team = ALONE,
) -> list[np.ndarray]:
    """What the meta LLM answers by itself, greedily; end tokens are left out.

    Args:
        meta: the meta LLM; its plain model answers.
        encoded: ids up to the dispatch position.
        length: tokens at most.
        max_tokens: padded tokens of one batch, answers included.
        team: the processes that share the work.

    Raises:
        ExpertokenError: answers are missing and the model, split by ZeRO-3, can't give them.
    """
    key = f"{fingerprint(meta.plain)}-{describe_dtype(meta.plain)}-{length}"
    folder = cache_folder("answers") / key
    blocks = [encoded[start : start + _BLOCK] for start in range(0, len(encoded), _BLOCK)]
    files = [folder / f"{_hash(block)}.npz" for block in blocks]
    missing = team.agree(lambda: [place for place, file in enumerate(files) if not file.exists()])
    if missing and is_split(meta.plain):
        raise ExpertokenError(
            "own answers: a model that ZeRO-3 has split can't give them before training; run method tokens with "
            "--anywhere on the same data before (they are kept in $EXPERTOKEN_CACHE), or load whole"
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


def _hash(block: Sequence[Sequence[int]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for ids in block:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int32).tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _generate(meta: MetaLLM, block: Sequence[Sequence[int]], length: int, max_tokens: int) -> list[np.ndarray]:
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(block)
    ends = end_ids(meta.plain, meta.tokenizer)
    for batch in token_batches([len(ids) + length for ids in block], max_tokens):
        inputs = meta.pad([block[row] for row in batch])
        try:
            produced = meta.plain.generate(
                **inputs, max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            longest = inputs["input_ids"].shape[1]
            fewer = f"--max_tokens {len(batch) // 2 * (longest + length)}, " if len(batch) > 1 else ""
            raise ExpertokenError(
                f"own answers: out of memory in a batch of {len(batch)} x {longest} + {length} tokens; try {fewer}"
                "--dtype bfloat16 or a smaller meta LLM. Whole blocks of answers are kept"
            ) from error
        for row, ids in zip(batch, produced[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answers[row] = np.array(ids[:stop], dtype=np.int32)
    return answers
