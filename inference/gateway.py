"""A composite whose meta LLM is served elsewhere: the gateway itself needs no weights and no GPU.

The meta LLM is an exported checkpoint (`expertoken export`) behind any OpenAI-compatible server that gives
log-probabilities, such as vLLM. The decision is one token's: its top log-probabilities name the experts' tokens. A YAML
file says where everything is:

    meta: {model: meta, base_url: "http://10.0.0.1:8000/v1", api_key_env: META_KEY, token_ids: {math: 151936},
      control_tokens: ["<|im_start|>", "<|im_end|>"]}
    experts:
      - {name: math, backend: openai, model: math-7b, base_url: "http://10.0.0.2:8000/v1"}
      - {name: self, backend: self}
    policy: {threshold: 0.4}    # optional; keys as `policy.Policy` has them
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import torch
import yaml

from ..modeling.backend import Backend, Generation, Opening, Piece, Timeouts
from ..modeling.chat import Message, apart, plain, text_of
from ..modeling.errors import ExpertFailedError, ExpertokenError, RequestRefusedError, one_line
from ..modeling.experts import Expert
from ..modeling.policy import Chooser, Policy
from ..modeling.pool import ExpertPool
from ..modeling.reminders import unnoted
from .answering import AnsweringModel
from .backends.addresses import told
from .backends.endpoint import ENDPOINT, EndpointBackend
from .breaker import Breaker
from .decider import Decision
from .loop import BackgroundLoop
from .observer import Observer
from .sessions import Affinity

logger = logging.getLogger(__name__)

_CHARACTERS = 4  # of a token, where nobody here can count them
_REQUEST = 4000  # characters of a request that are asked about alone: any meta LLM reads those
_CONCURRENT = 16  # decisions on a file
_NEVER = math.log(1e-12)
_FAILED = "the meta LLM can't be asked"
_META_KEYS = (*ENDPOINT.fields, "top_logprobs", "token_ids", "control_tokens")


class GatewayModel(AnsweringModel):
    """A composite on a meta LLM behind an endpoint.

    Args:
        meta: the endpoint; an `Expert` for its fields.
        pool: experts behind endpoints, and self, which the same endpoint answers.
        top_logprobs: log-probabilities to ask for; experts that are not among them count as improbable.
        token_ids: the experts' tokens in the checkpoint, which self's answers are kept from (`logit_bias`).
        control_tokens: of the checkpoint's chat template, which nobody's text may become.
        policy: how a candidate is chosen where a request says nothing else.
        timeouts: of endpoints.
        observer: is told what happens.

    Raises:
        ExpertokenError: an expert runs in this process, or an option is given that only models here have.
    """

    def __init__(
        self,
        meta: Expert,
        pool: ExpertPool,
        *,
        top_logprobs: int = 20,
        token_ids: Mapping[str, int] | None = None,
        control_tokens: Sequence[str] = (),
        policy: Policy | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        **unused: Any,
    ) -> None:
        local = [expert.name for expert in pool if not expert.kind.remote]
        if local or any(unused.values()):
            given = local or [key for key, value in unused.items() if value]
            raise ExpertokenError(
                f"a gateway holds no models: {', '.join(given)}; put local experts behind a server of their own "
                f"(`backend: {ENDPOINT.name}`)"
            )
        super().__init__(Chooser(pool), policy, observer)
        if not pool.has_self:
            logger.warning("without `self` in the pool nothing holds the experts' tokens above the ordinary ones")
        elif not token_ids:
            logger.warning("without `token_ids` self may write experts' tokens; `expertoken export` lists them")
        self.top_logprobs, self._opening = top_logprobs, Opening(timeouts=timeouts or Timeouts())
        self.meta, self._endpoint = meta, EndpointBackend(meta, timeouts)
        self._breaker = Breaker()
        self._file: Path | None = None
        self._options: dict[str, Any] = {}
        self._ids = dict(token_ids or {})
        self._sane = partial(_sane, control=tuple(control_tokens))
        self._self = _Self(self._endpoint, {str(place): -100 for place in self._ids.values()}, self._sane)

    @classmethod
    def from_yaml(cls, path: Path | str, **options: Any) -> "GatewayModel":
        """Read a gateway's file.

        Raises:
            ExpertokenError: it is not well formed; of the pool's mistakes see `ExpertPool.parse`.
        """
        path = Path(path)
        try:
            document = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ExpertokenError(f"{path}: can't be read ({one_line(error)})") from None
        meta = document.pop("meta", None) if isinstance(document, dict) else None
        if not isinstance(meta, dict) or not meta.get("model") or set(meta) - set(_META_KEYS):
            raise ExpertokenError(
                f"{path}, meta: expected a mapping with `model` and maybe {', '.join(_META_KEYS[1:])}"
            )
        try:
            policy = Policy.parse(document.pop("policy", None))
        except ExpertokenError as error:
            raise ExpertokenError(f"{path}, {error}") from None
        count = meta.pop("top_logprobs", 20)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ExpertokenError(f"{path}, meta.top_logprobs: expected a whole number of at least 1, got {count!r}")
        ids = meta.pop("token_ids", None) or {}
        if not isinstance(ids, dict) or not all(isinstance(place, int) for place in ids.values()):
            raise ExpertokenError(f"{path}, meta.token_ids: expected expert: id, as `expertoken export` writes them")
        control = meta.pop("control_tokens", None) or []
        if not isinstance(control, list) or not all(isinstance(token, str) and token for token in control):
            raise ExpertokenError(f"{path}, meta.control_tokens: expected texts, as `expertoken export` writes them")
        entry = {"name": "meta", "backend": ENDPOINT.name, **meta}
        endpoint = ExpertPool.parse({"experts": [entry]}, f"{path}, meta").experts[0]
        pool = ExpertPool.parse(document, str(path), path.parent)
        known: dict[str, Any] = {"top_logprobs": count, "token_ids": ids, "control_tokens": control, "policy": policy}
        gateway = cls(endpoint, pool, **known | options)
        gateway._file, gateway._options = path, options
        return gateway

    def reloaded(self) -> "GatewayModel":
        """Return the gateway as its file is now; this one goes on with its answers.

        Raises:
            ExpertokenError: it was not read from a file, or that is not well formed any more.
        """
        if self._file is None:
            raise ExpertokenError("this gateway was not read from a file")
        fresh = GatewayModel.from_yaml(self._file, **self._options)
        fresh._breakers |= {name: known for name, known in self._breakers.items() if name in fresh._breakers}
        return fresh

    @property
    def identity(self) -> str:
        """Tells models apart that decide or answer differently."""
        meta = self._endpoint.expert
        return f"{told(meta)}-{meta.model}"

    def count(self, text: str) -> int:
        """Tokens of a text, about."""
        return math.ceil(len(text) / _CHARACTERS)

    def backend(self, name: str) -> Backend:
        """The opened backend of a candidate; self is the meta LLM's endpoint."""
        expert = self.pool[name]
        if expert.is_self:
            return self._self
        if name not in self._backends:
            self._backends.setdefault(name, expert.kind.open(expert, self._opening))
        return self._backends[name]

    @property
    def opened(self) -> dict[str, Backend]:
        """Backends by candidate, as far as they were needed, and the meta LLM's."""
        return {self._endpoint.expert.name: self._endpoint} | super().opened

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Decide on many, some at a time."""
        return BackgroundLoop.call(self._decide(conversations, policy, generation))

    async def _decide(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None, generation: Generation | None
    ) -> list[Decision]:
        slots = asyncio.Semaphore(_CONCURRENT)

        async def one(messages: Sequence[Message]) -> Decision:
            async with slots:
                return await self.adecide(messages, policy, generation)

        return await asyncio.gather(*map(one, conversations))

    async def adecide(
        self,
        messages: Sequence[Message],
        policy: Policy | None = None,
        generation: Generation | None = None,
        affinity: Affinity | None = None,
    ) -> Decision:
        """Decide on a conversation by one token of the meta LLM's.

        Where its server can't be asked, the policy's `default` answers if one is named.

        Raises:
            ExpertokenError: the conversation is too long, or the meta LLM's server refuses it.
            NoAnswerError: the meta LLM's server can't be asked, and nobody is named for that.
        """
        policy = policy or self.policy
        unable = self._unable(messages, generation)
        names = self.chooser.candidates(policy, unable)
        if len(names) == 1:
            return self._undisputed(messages, names[0])
        affinity = affinity or Affinity.of(messages, self.pool)
        if (bound := self._bound(messages, policy, affinity, unable)) is not None:
            return bound
        self._check_length(self.about(messages), self.limit)
        started = time.perf_counter()
        if not self._breaker.admits():
            return self._undecided(messages, policy, f"{_FAILED}: it failed too often of late", started, generation)
        try:
            with anyio.fail_after(self._opening.timeouts.decision):
                logits, tokens = await self._ask_meta_somehow(self._unnamed(messages))
        except RequestRefusedError as error:
            self._breaker.left()
            raise ExpertokenError(f"the meta LLM does not take the conversation: {error}") from error
        except (ExpertFailedError, TimeoutError) as error:
            reason = one_line(error) or f"it did not decide within {self._opening.timeouts.decision or 0:g} s"
            self._breaker.failed()
            self.observer.failed(self._endpoint.expert.name, reason, begun=False)
            logger.warning("%s: %s", _FAILED, reason)
            return self._undecided(messages, policy, f"{_FAILED}: {reason}", started, generation)
        except BaseException:  # the user went away
            self._breaker.left()
            raise
        self._breaker.succeeded()
        dispatch = self.chooser.choose(
            policy, logits, prompt_tokens=tokens, last=affinity.last, cached=affinity.cached, unable=unable
        )
        seconds = time.perf_counter() - started
        self.observer.decided(dispatch, seconds, 1)
        return Decision(dispatch, tokens, seconds)

    async def _ask_meta_somehow(self, messages: Sequence[Message]) -> tuple[torch.Tensor, int]:
        """As `_ask_meta`; where its server refuses the conversation, by the newest request alone.

        It may be too long for the meta LLM, or have roles that its template does not take, and an expert may read it
        all the same.
        """
        try:
            return await self._ask_meta(messages)
        except RequestRefusedError:
            request = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
            text = text_of(request, placeholders=True)[-_REQUEST:]
            if len(messages) == 1 and text == request.get("content"):
                raise
            logits, tokens = await self._ask_meta([{"role": "user", "content": text}])
            return logits, max(tokens, self.about(messages))

    async def _ask_meta(self, messages: Sequence[Message]) -> tuple[torch.Tensor, int]:
        """Return the candidates' logits `[C]` (their log-probabilities) and the number of prompt tokens."""
        first = await self._endpoint.first_token(unnoted(self._sane(messages))[0], self.top_logprobs)
        found = [
            first.logprobs.get(expert.token, first.by_id.get(self._ids.get(expert.name, -1), _NEVER))
            for expert in self.pool
        ]
        unknown = [place for place in first.unnamed if place is None or not self._ids]
        if max(found) == _NEVER and unknown:  # or self would win every decision
            raise ExpertFailedError(
                "its endpoint tells neither the text nor a known id of the tokens; name the ids as meta.token_ids"
            )
        if self.pool.has_self:
            ordinary = 1 - sum(math.exp(value) for value in found)
            found.append(math.log(max(ordinary, 1e-12)))
        elif max(found) == _NEVER:
            raise ExpertFailedError(
                f"no expert's token is among its {self.top_logprobs} most probable ones; is it the exported checkpoint?"
            )
        read = self.about(messages) if first.prompt_tokens is None else first.prompt_tokens
        return torch.tensor(found), read


class _Self(Backend):
    """The meta LLM's own answers, from its endpoint.

    Args:
        endpoint: of the exported checkpoint.
        bias: by token id, of the experts' tokens: an answer has no use for them.
        sane: makes a conversation harmless.
    """

    def __init__(
        self, endpoint: EndpointBackend, bias: dict[str, int], sane: Callable[[Sequence[Message]], list[Message]]
    ) -> None:
        self._endpoint, self._bias, self._sane = endpoint, bias, sane

    def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """As of the endpoint."""
        extra = dict(generation.extra)
        if self._bias:
            extra["logit_bias"] = extra.get("logit_bias", {}) | self._bias
        begun = self._sane([{"role": "assistant", "content": begun}])[0]["content"]
        # Where nobody says otherwise a model in the process is greedy; a server would sample.
        temperature = 0.0 if generation.temperature is None else generation.temperature
        asked = replace(generation, extra=extra, temperature=temperature)
        return self._endpoint.stream(self._sane(messages), asked, begun=begun)


def _sane(messages: Sequence[Message], control: Sequence[str]) -> list[Message]:
    """A conversation for a tokenizer elsewhere: nothing that is written in it becomes a control token there."""
    told = plain(messages, placeholders=True)
    return [message | {"content": apart(message["content"], control)} for message in told]
