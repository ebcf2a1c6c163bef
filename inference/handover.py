"""Handing over in mid-answer: at every token of self's own answer the meta LLM may call for an expert."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..modeling.dispatch import Dispatch, candidate_logits, dispatch_forward
from ..modeling.meta import MetaLLM


class HandOver(Exception):  # noqa: N818 - no error: it ends self's part of an answer
    """Self stops, and an expert goes on with the answer."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch.reason)
        self.dispatch = dispatch


class Watch:
    """Decides at every position of an answer that self gives, as a logits processor of `generate`.

    Where LoRA was trained, self is the model without it and the decision the model with it: that one reads along, which
    costs a second forward pass for each token. Else the decision's logits are the answer's own.

    Args:
        meta: that decides.
        self_name: of self.
        choose: from the candidates' logits `[C]`.
        end: id that ends an answer.
        start: tokens of the conversation: at its end it was decided already.

    Attributes:
        dispatch: the decision for an expert, or None as long as there was none.
    """

    def __init__(
        self, meta: MetaLLM, self_name: str, choose: Callable[[torch.Tensor], Dispatch], end: int, start: int
    ) -> None:
        self.meta, self.self_name, self.choose, self.end, self.start = meta, self_name, choose, end, start
        self.dispatch: Dispatch | None = None
        self._logits: torch.Tensor | None = None
        self._cache: Any = None
        self._thread: int | None = None

    def __enter__(self) -> "Watch":
        # Before anything is done to them: processors of the generation (penalties, temperature) are not the decision's.
        # By thread, since decisions on other conversations run through the same head meanwhile.
        self._thread = threading.get_ident()
        self._hook = self.meta.head.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _note(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._logits = output[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the next token, without the experts' own; where an expert is called for, nothing but the end."""
        self.dispatch = self._decide(input_ids)
        allowed = scores.clone()
        if self.dispatch is None:
            allowed[:, self.meta.vocab_size :] = -torch.inf
        else:
            allowed[:] = -torch.inf
            allowed[:, self.end] = 0
        return allowed

    def _decide(self, input_ids: torch.Tensor) -> Dispatch | None:
        logits = self._read_along(input_ids) if self.meta.adapted else self.meta.transform(self._head_logits())
        if input_ids.shape[1] <= self.start:
            return None
        candidates = candidate_logits(logits, self.meta.first_candidate)[0].cpu()
        dispatch = self.choose(candidates)
        return None if dispatch.expert == self.self_name else dispatch

    def _head_logits(self) -> torch.Tensor:
        assert self._logits is not None  # the head has run by the time `generate` asks for a token
        return self._logits.float()

    def _read_along(self, input_ids: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(config=self.meta.plain.config)
        seen = self._cache.get_seq_length()
        mask = torch.ones_like(input_ids)
        if seen == 0:
            logits, _ = dispatch_forward(self.meta.model, input_ids, mask, past_key_values=self._cache, use_cache=True)
            return logits
        new = input_ids[:, seen:]
        output = self.meta.model(
            input_ids=new,
            attention_mask=mask,
            position_ids=torch.arange(seen, input_ids.shape[1], device=new.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]
