"""The composite as a model of lm-evaluation-harness, so that all its benchmarks run on it.

`expertoken lm-eval run --model expertoken --model_args pretrained=composite/ --tasks ...` runs the harness's own
command with this model registered.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from tqdm.auto import tqdm

from ..modeling.backend import Generation, stop_texts
from ..modeling.errors import ExpertokenError
from ..modeling.harness import ChatLM, messages_of
from .batch import answer_all
from .factory import open_model

logger = logging.getLogger(__name__)


@register_model("expertoken")
class CompositeLM(ChatLM):
    """A composite, as `--model expertoken`.

    Args:
        pretrained: Composite folder.
        device: Device to load models on.
        max_gen_toks: Longest answer in tokens for tasks that set no limit.
        concurrent: Number of concurrent requests to endpoints.
        batch_size: Ignored argument of the harness. Batches are made by expert.
        **_: Further arguments of the harness, all ignored.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        max_gen_toks: int = 256,
        concurrent: int = 16,
        batch_size: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(str(pretrained), int(max_gen_toks))
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's default on every machine
        self.composite = open_model(pretrained, device=device)
        self.concurrent = int(concurrent)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers, each from the expert that the meta LLM chooses."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(place)
        answers = [""] * len(requests)
        for places in groups.values():
            generation = self.generation(requests[places[0]].args[1])
            conversations = [messages_of(requests[place].args[0]) for place in places]
            found = answer_all(self.composite, conversations, generation, concurrent=self.concurrent)
            for place, row in zip(places, found, strict=True):
                answers[place] = row["answer"] or ""
            if lost := [row["error"] for row in found if "error" in row]:
                logger.warning("%d of %d queries got no answer and count as wrong: %s", len(lost), len(found), lost[0])
        return answers

    def generation(self, options: Mapping[str, Any]) -> Generation:
        """Return the generation options of a task."""
        return Generation(
            max_new_tokens=self.longest(options),
            temperature=float(options.get("temperature") or 0) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p") or 1),
            stop=stop_texts(options.get("until")),
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, from the candidate that the meta LLM chooses for the context.

        Raises:
            ExpertokenError: The candidate provides no log-likelihoods.
        """
        contexts = [messages_of(request.args[0]) for request in requests]
        found = []
        bar = tqdm(requests, desc="loglikelihood", disable=disable_tqdm, delay=2)
        for request, messages, dispatch in zip(bar, contexts, self.composite.route(contexts), strict=True):
            backend = self.composite.backend(dispatch.expert)
            if not self.composite.pool[dispatch.expert].kind.scores_texts:
                raise ExpertokenError(
                    f"expert {dispatch.expert!r} provides no log-likelihoods of texts. "
                    "Use tasks with generated answers (`output_type: generate_until`)."
                )
            found.append(backend.log_likelihood(messages, request.args[1]))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse the request, because the perplexity of a text belongs to one model.

        Raises:
            ExpertokenError: Always.
        """
        raise ExpertokenError("perplexity is defined for one model, not for a composite. Evaluate an expert by itself.")
