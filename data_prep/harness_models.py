"""Experts as models of lm-evaluation-harness. Needs the extra `collect`."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm.auto import tqdm

from ..modeling.backend import Generation, Opening, Timeouts, stop_texts
from ..modeling.chat import Message
from ..modeling.experts import Expert
from ..modeling.harness import ChatLM, messages_of
from ..modeling.loading import load_causal_lm
from ..modeling.source import Source
from ..modeling.stops import StopTexts

_CONCURRENT = 8  # requests
_TIMEOUTS = Timeouts(first=300.0, idle=120.0, retries=3)  # long, because a benchmark must not miss an answer
_SEED = 1234  # the harness's own default


def language_model(expert: Expert, base: Source | None, *, batch_size: int = 8, trust_remote_code: bool = False) -> LM:
    """Return an expert as a model of the harness.

    Args:
        expert: Expert to evaluate.
        base: Source of the meta LLM's base, for experts that run on it.
        batch_size: Conversations per batch, for a model in this process.
        trust_remote_code: If true, the model's repository may run its own code.

    Raises:
        ExpertokenError: The expert cannot be loaded or opened.
    """
    weights = expert.kind.weights(expert, base) if expert.kind.is_weights else None
    if weights is None:
        return BackendLM(expert, base)
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_causal_lm(replace(weights.source, trust_remote_code=trust_remote_code))
    if weights.adapter is not None:
        from peft import PeftModel

        folder, revision = weights.adapter
        # Merged, because the harness ties the weights of its model, which breaks PEFT's wrappers.
        model = PeftModel.from_pretrained(model, folder, revision=revision).merge_and_unload()
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


class BackendLM(ChatLM):
    """An expert behind any backend.

    Args:
        expert: Expert to evaluate.
        base: Source of the meta LLM's base.

    Attributes:
        used: Prompt and completion tokens by context, as far as the backend counts them.

    Raises:
        ExpertFailedError: The expert cannot be opened.
    """

    def __init__(self, expert: Expert, base: Source | None) -> None:
        super().__init__(expert.name)
        self._kind = expert.kind
        self._backend = self._kind.open(expert, Opening(base, timeouts=_TIMEOUTS))
        self.used: dict[str, tuple[int, int]] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations.

        Raises:
            NotImplementedError: Experts of this kind return none.
        """
        if not self._kind.scores_texts:
            return super().loglikelihood(requests, disable_tqdm)
        return [
            self._backend.log_likelihood(messages_of(context), text) for context, text in (r.args for r in requests)
        ]

    def generation(self, options: Mapping[str, Any]) -> Generation:
        """Convert the options of a task as the harness's own chat endpoint does, its seed included."""
        ours = ("until", "max_gen_toks", "max_tokens", "temperature", "top_p", "do_sample", "seed")
        return Generation(
            max_new_tokens=self.longest(options),
            temperature=float(options.get("temperature") or 0),
            top_p=None if options.get("top_p") is None else float(options["top_p"]),
            seed=int(options.get("seed", _SEED)),
            stop=stop_texts(options.get("until")),
            extra={key: value for key, value in options.items() if key not in ours},
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the expert's answers."""
        return asyncio.run(self._answer_all(requests, quiet=disable_tqdm))

    async def _answer_all(self, requests: list[Instance], *, quiet: bool) -> list[str]:
        slots = asyncio.Semaphore(_CONCURRENT)
        with tqdm(total=len(requests), desc="answers", delay=2, disable=quiet) as bar:

            async def answer(request: Instance) -> str:
                context, options = request.args
                async with slots:
                    text = await self._answer(context, messages_of(context), self.generation(options))
                bar.update()
                return text

            return await asyncio.gather(*map(answer, requests))

    async def _answer(self, context: str, messages: list[Message], generation: Generation) -> str:
        texts, stops = [], StopTexts(generation.stop)  # applied here, so that backends need no stop texts
        async with aclosing(self._backend.stream(messages, generation)) as pieces:
            async for piece in pieces:  # read beyond a stop text, because the usage comes last
                if not stops.reached:
                    texts.append(stops.feed(piece.text))
                if piece.usage is not None:
                    self.used[context] = piece.usage
        return "".join(texts) + stops.rest()
