"""The composite as a model of lm-evaluation-harness, so that anyone's benchmark runs on it.

`expertoken lm-eval run --model expertoken --model_args pretrained=composite/ --tasks ...` is the harness's own command
with this model known to it.
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
        pretrained: the composite folder.
        device: where models go.
        max_gen_toks: of an answer where the task says nothing.
        concurrent: requests to endpoints at a time.
        batch_size: taken for the harness's sake; batches are made by expert.
        **_: of the harness's, which mean nothing here.
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
            device = None  # the harness's default, whatever the machine has
        self.composite = open_model(pretrained, device=device)
        self.concurrent = int(concurrent)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, by whom the meta LLM chooses."""
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
                logger.warning(
                    "%d of %d questions got no answer and count as wrong: %s", len(lost), len(found), lost[0]
                )
        return answers

    def generation(self, options: Mapping[str, Any]) -> Generation:
        """Return the options of a task as ours."""
        return Generation(
            max_new_tokens=self.longest(options),
            temperature=float(options.get("temperature") or 0) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p") or 1),
            stop=stop_texts(options.get("until")),
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, from the candidate that the meta LLM chooses for the context.

        Raises:
            ExpertokenError: that candidate gives none.
        """
        contexts = [messages_of(request.args[0]) for request in requests]
        found = []
        bar = tqdm(requests, desc="loglikelihood", disable=disable_tqdm, delay=2)
        for request, messages, dispatch in zip(bar, contexts, self.composite.route(contexts), strict=True):
            backend = self.composite.backend(dispatch.expert)
            if not self.composite.pool[dispatch.expert].kind.scores_texts:
                raise ExpertokenError(
                    f"expert {dispatch.expert!r} gives no log-likelihoods of texts; take tasks with generated answers "
                    "(`output_type: generate_until`)"
                )
            found.append(backend.log_likelihood(messages, request.args[1]))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not of a composite: perplexity of a text is one model's.

        Raises:
            ExpertokenError: always.
        """
        raise ExpertokenError("perplexity is one model's, not a composite's; evaluate an expert by itself")
