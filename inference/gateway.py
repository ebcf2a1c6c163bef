"""A composite whose meta LLM is served elsewhere: the gateway itself needs no weights and no GPU.

The meta LLM is an exported checkpoint (`expertoken export`) behind any OpenAI-compatible server that gives
log-probabilities, such as vLLM. The decision is one token's: its top log-probabilities name the experts' tokens. A YAML
file says where everything is:

    meta: {model: meta, base_url: "http://10.0.0.1:8000/v1", api_key_env: META_KEY, top_logprobs: 20}
    experts:
      - {name: math, backend: openai, model: math-7b, base_url: "http://10.0.0.2:8000/v1"}
      - {name: self, backend: self}
    policy: {threshold: 0.4}    # optional; keys as `policy.Policy` has them
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..modeling.chat import Message, text_of
from ..modeling.dispatch import Dispatch
from ..modeling.errors import ExpertFailedError, ExpertokenError, NoAnswerError, one_line
from ..modeling.experts import SELF, Expert, ExpertPool
from .answering import AnsweringModel
from .backends import Backend, Timeouts
from .backends.endpoint import EndpointBackend
from .decider import Decision
from .loop import BackgroundLoop
from .observer import Observer
from .policy import Policy, last_answerer

_FORGED = "<|expert:"
_CHARACTERS = 4  # of a token, where nobody here can count them
_NEVER = math.log(1e-12)
_META_KEYS = ("model", "base_url", "api_key_env", "top_logprobs")


class GatewayModel(AnsweringModel):
    """A composite on a meta LLM behind an endpoint.

    Args:
        meta: the endpoint; an `Expert` for its fields.
        pool: experts behind endpoints, and self, which the same endpoint answers.
        top_logprobs: log-probabilities to ask for; experts that are not among them count as improbable.
        policy: how a candidate is chosen where a request says nothing else.
        timeouts: of endpoints.
        observer: is told what happens.
    """

    def __init__(
        self,
        meta: Expert,
        pool: ExpertPool,
        *,
        top_logprobs: int = 20,
        policy: Policy | None = None,
        timeouts: Timeouts | None = None,
        observer: Observer | None = None,
        **unused: Any,
    ) -> None:
        local = [expert.name for expert in pool if expert.backend != "openai"]
        if local or any(unused.values()):
            given = local or [key for key, value in unused.items() if value]
            raise ExpertokenError(
                f"a gateway holds no models: {', '.join(given)}; put local experts behind a server of their own "
                "(`backend: openai`)"
            )
        super().__init__(pool, policy, observer)
        self.top_logprobs, self._timeouts = top_logprobs, timeouts
        self._endpoint = EndpointBackend(meta, timeouts)

    @classmethod
    def from_yaml(cls, path: Path | str, **options: Any) -> "GatewayModel":
        """Read a gateway's file.

        Raises:
            ExpertokenError: it is not well formed; the message lists every mistake of the pool.
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
        endpoint = {"experts": [{"name": "meta", "backend": "openai", **meta}]}
        endpoint = ExpertPool.parse(endpoint, f"{path}, meta").experts[0]
        pool = ExpertPool.parse(document, str(path), path.parent)
        return cls(endpoint, pool, top_logprobs=count, **{"policy": policy} | options)

    @property
    def identity(self) -> str:
        """Tells models apart that decide or answer differently."""
        meta = self._endpoint.expert
        return f"{meta.base_url}-{meta.model}"

    def count(self, text: str) -> int:
        """Tokens of a text, about."""
        return math.ceil(len(text) / _CHARACTERS)

    def backend(self, name: str) -> Backend:
        """The opened backend of a candidate; self is the meta LLM's endpoint."""
        expert = self.pool[name]
        if expert.backend == SELF:
            return self._endpoint
        return self._backends.setdefault(name, self._backends.get(name) or EndpointBackend(expert, self._timeouts))

    def _decide_all(self, conversations: Sequence[list[Message]], policy: Policy | None) -> list[Dispatch]:
        return [BackgroundLoop.call(self.adecide(messages, policy)).dispatch for messages in conversations]

    async def adecide(self, messages: Sequence[Message], policy: Policy | None = None) -> Decision:
        """Decide on a conversation by one token of the meta LLM's.

        Raises:
            NoAnswerError: the meta LLM's server can't be asked. Without a decision nobody is the right one to ask.
        """
        policy = policy or self.policy
        names = policy.candidates(self.pool)
        started = time.perf_counter()
        if len(names) == 1:  # an expert that is addressed answers, whether the meta LLM can be asked or not
            tokens = self._about(messages)
            dispatch = Dispatch(names[0], {names[0]: 1.0}, "nobody else may answer", (names[0],))
        else:
            try:
                logits, tokens = await self._ask_meta(self._unnamed(messages))
            except ExpertFailedError as error:
                raise NoAnswerError(f"the meta LLM can't be asked: {error}") from error
            last = last_answerer(messages, self.pool)
            dispatch = policy.choose(self.pool, logits, prompt_tokens=tokens, last=last)
        seconds = time.perf_counter() - started
        self.observer.decided(dispatch, seconds, 1)
        return Decision(dispatch, tokens, seconds)

    async def _ask_meta(self, messages: Sequence[Message]) -> tuple[torch.Tensor, int]:
        """Logits of the candidates `[C]` (their log-probabilities), and tokens that were read."""
        import openai

        # The server's tokenizer knows the experts' tokens, so a user could write one: it is taken apart.
        safe = [m | {"content": text_of(m).replace(_FORGED, "< |expert:")} for m in messages]
        expert = self._endpoint.expert
        try:
            answer = await self._endpoint.client().chat.completions.create(
                model=expert.model, messages=safe, max_tokens=1, temperature=0.0, logprobs=True,
                top_logprobs=self.top_logprobs,
            )  # fmt: skip
            top = answer.choices[0].logprobs.content[0].top_logprobs
        except openai.APIStatusError as error:
            raise ExpertFailedError(f"its endpoint answered {error.status_code}") from error
        except (AttributeError, IndexError, TypeError) as error:
            raise ExpertFailedError("its endpoint gives no log-probabilities") from error
        except Exception as error:
            raise ExpertFailedError(f"its endpoint could not be used ({type(error).__name__})") from error
        known = {entry.token: entry.logprob for entry in top}
        found = [known.get(expert.token, _NEVER) for expert in self.pool]
        if self.pool.has_self:
            ordinary = 1 - sum(math.exp(value) for value in found)
            found.append(math.log(max(ordinary, 1e-12)))
        elif max(found) == _NEVER:
            raise ExpertFailedError(
                f"no expert's token is among its {self.top_logprobs} most probable ones; is it the exported checkpoint?"
            )
        read = answer.usage.prompt_tokens if answer.usage else self._about(messages)
        return torch.tensor(found), read

    def _about(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation, about."""
        return sum(self.count(text_of(message)) for message in messages)
