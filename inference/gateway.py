"""A composite whose meta LLM is served elsewhere: the gateway itself needs no weights and no GPU.

The meta LLM is an exported checkpoint (`expertoken export`) behind any OpenAI-compatible server that returns
log-probabilities, such as vLLM. A decision is one generated token, whose top log-probabilities include the experts'
tokens. A YAML file holds the addresses, the pool and the policy:

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

_CHARACTERS = 4  # approximate characters of a token, because no tokenizer is available here
_REQUEST = 4000  # characters of a request that is sent alone: short enough for any meta LLM
_CONCURRENT = 16  # concurrent decisions on a file
_NEVER = math.log(1e-12)
_FAILED = "the meta LLM is unavailable"
_META_KEYS = (*ENDPOINT.fields, "top_logprobs", "token_ids", "control_tokens")


class GatewayModel(AnsweringModel):
    """A composite on a meta LLM behind an endpoint.

    Args:
        meta: Endpoint of the meta LLM, as an `Expert`.
        pool: Experts behind endpoints, and self, which the meta LLM's endpoint answers.
        top_logprobs: Number of log-probabilities to request. Experts outside them count as improbable.
        token_ids: Ids of the experts' tokens in the checkpoint. Self's answers exclude them (`logit_bias`).
        control_tokens: Control tokens of the checkpoint's chat template, which no text may become.
        policy: Default policy for requests that set none.
        timeouts: Timeouts of endpoints.
        observer: Observer that is notified of decisions, answers and failures.

    Raises:
        ExpertokenError: An expert runs in this process, or an option needs local models.
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
                f"a gateway holds no models, got {', '.join(given)}. Serve local experts behind an endpoint "
                f"(`backend: {ENDPOINT.name}`)."
            )
        super().__init__(Chooser(pool), policy, observer)
        if not pool.has_self:
            logger.warning(
                "the pool has no `self`, so nothing keeps experts' tokens above ordinary ones, and the top "
                "log-probabilities may miss them"
            )
        elif not token_ids:
            logger.warning(
                "the file has no `token_ids`, so self may generate experts' tokens. `expertoken export` lists the ids."
            )
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
            ExpertokenError: The file is not well formed. `ExpertPool.parse` lists the errors of its pool.
        """
        path = Path(path)
        try:
            document = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ExpertokenError(f"{path}: can't be read ({one_line(error)})") from None
        meta = document.pop("meta", None) if isinstance(document, dict) else None
        if not isinstance(meta, dict) or not meta.get("model") or set(meta) - set(_META_KEYS):
            raise ExpertokenError(
                f"{path}, meta: expected a mapping with `model` and optionally {', '.join(_META_KEYS[1:])}"
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
        """Return a gateway from the current file. This gateway continues its in-flight answers.

        Raises:
            ExpertokenError: The gateway was not read from a file, or the file is no longer well formed.
        """
        if self._file is None:
            raise ExpertokenError("expected a gateway read from a file, got one built in memory")
        fresh = GatewayModel.from_yaml(self._file, **self._options)
        fresh._breakers |= {name: known for name, known in self._breakers.items() if name in fresh._breakers}
        return fresh

    @property
    def identity(self) -> str:
        """Fingerprint that differs between gateways that decide or answer differently."""
        meta = self._endpoint.expert
        return f"{told(meta)}-{meta.model}"

    def count(self, text: str) -> int:
        """Estimate the number of tokens of a text."""
        return math.ceil(len(text) / _CHARACTERS)

    def backend(self, name: str) -> Backend:
        """Return the opened backend of a candidate. The backend of self is the meta LLM's endpoint."""
        expert = self.pool[name]
        if expert.is_self:
            return self._self
        if name not in self._backends:
            self._backends.setdefault(name, expert.kind.open(expert, self._opening))
        return self._backends[name]

    @property
    def opened(self) -> dict[str, Backend]:
        """Backends opened so far, by candidate, and the meta LLM's."""
        return {self._endpoint.expert.name: self._endpoint} | super().opened

    def decide(
        self,
        conversations: Sequence[Sequence[Message]],
        policy: Policy | None = None,
        generation: Generation | None = None,
    ) -> list[Decision]:
        """Decide on several conversations, 16 at a time."""
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
        """Decide on a conversation by one token of the meta LLM.

        The policy's `default` answers if the meta LLM's server is unavailable.

        Raises:
            ExpertokenError: The conversation is too long, or the meta LLM's server refuses it.
            NoAnswerError: The meta LLM's server is unavailable, and the policy names no default.
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
            return self._undecided(messages, policy, f"{_FAILED}: it failed too often recently", started, generation)
        try:
            with anyio.fail_after(self._opening.timeouts.decision):
                logits, tokens = await self._ask_meta_somehow(self._unnamed(messages))
        except RequestRefusedError as error:
            self._breaker.left()
            raise ExpertokenError(f"the meta LLM refuses the conversation: {error}") from error
        except (ExpertFailedError, TimeoutError) as error:
            reason = one_line(error) or f"it did not decide within {self._opening.timeouts.decision or 0:g} s"
            self._breaker.failed()
            self.observer.failed(self._endpoint.expert.name, reason, begun=False)
            logger.warning("%s: %s", _FAILED, reason)
            return self._undecided(messages, policy, f"{_FAILED}: {reason}", started, generation)
        except BaseException:  # the user disconnected
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
        """Return logits and prompt tokens as in `_ask_meta`, falling back to the newest request alone.

        The server may refuse a conversation that is too long for the meta LLM, or that has roles its template does not
        accept. An expert may still read it.
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
        if max(found) == _NEVER and unknown:  # otherwise self would win every decision
            raise ExpertFailedError(
                "its endpoint returns neither texts nor known ids of the tokens. Set the ids as meta.token_ids."
            )
        if self.pool.has_self:
            ordinary = 1 - sum(math.exp(value) for value in found)
            found.append(math.log(max(ordinary, 1e-12)))
        elif max(found) == _NEVER:
            raise ExpertFailedError(
                f"expected an expert's token among its {self.top_logprobs} most probable ones, found none. "
                "Check that it serves the exported checkpoint."
            )
        read = self.about(messages) if first.prompt_tokens is None else first.prompt_tokens
        return torch.tensor(found), read


class _Self(Backend):
    """The backend of self's answers: the meta LLM's endpoint.

    Args:
        endpoint: Endpoint of the exported checkpoint.
        bias: Logit bias by token id, which keeps the experts' tokens out of answers.
        sane: Function that removes control tokens from a conversation.
    """

    def __init__(
        self, endpoint: EndpointBackend, bias: dict[str, int], sane: Callable[[Sequence[Message]], list[Message]]
    ) -> None:
        self._endpoint, self._bias, self._sane = endpoint, bias, sane

    def stream(
        self, messages: Sequence[Message], generation: Generation, *, begun: str = ""
    ) -> AsyncGenerator[Piece, None]:
        """Stream the endpoint's answer."""
        extra = dict(generation.extra)
        if self._bias:
            extra["logit_bias"] = extra.get("logit_bias", {}) | self._bias
        begun = self._sane([{"role": "assistant", "content": begun}])[0]["content"]
        # A local model is greedy by default. A server would sample.
        temperature = 0.0 if generation.temperature is None else generation.temperature
        asked = replace(generation, extra=extra, temperature=temperature)
        return self._endpoint.stream(self._sane(messages), asked, begun=begun)


def _sane(messages: Sequence[Message], control: Sequence[str]) -> list[Message]:
    """Return a conversation in which no text becomes a control token of a remote tokenizer."""
    told = plain(messages, placeholders=True)
    return [message | {"content": apart(message["content"], control)} for message in told]
