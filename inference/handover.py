"""Handing over inside an answer: at every token of self's own answer the meta LLM may call for an expert."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from ..modeling.dispatch import Dispatch, candidate_logits, dispatch_forward
from ..modeling.meta import MetaLLM


class HandOver(Exception):  # noqa: N818 - a signal, not an error
    """The end of self's part of an answer, which an expert continues."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__(dispatch.reason)
        self.dispatch = dispatch


class Watch:
    """Decisions at every position of an answer that self gives, as a logits processor of `generate`.

    With trained LoRA, self is the model without the adapter and the decision is made by the model with it. The adapted
    model then reads the answer too, which costs a second forward pass for each token. Otherwise the decision uses the
    answer's own logits.

    Args:
        meta: Meta LLM that decides.
        self_name: Name of self.
        choose: Function from the candidates' logits `[C]` to a dispatch.
        end: Token id that ends an answer.
        start: Number of tokens of the conversation. Its end was already decided.

    Attributes:
        dispatch: Dispatch to an expert, or None until there is one.
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
        # The hook reads raw logits: processors of the generation (penalties, temperature) must not affect the decision.
        # Logits are kept by thread, because other conversations are decided through the same head meanwhile.
        self._thread = threading.get_ident()
        self._hook = self.meta.head.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _note(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == self._thread:
            self._logits = output[:, -1]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the expert tokens in the scores of the next token.

        If an expert is called for, only the end token remains.
        """
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
        assert self._logits is not None  # the head runs before `generate` calls this processor
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
