"""Shared state of the routes: allowed candidates, sessions, decisions, and one log line for each request."""

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request

from ...modeling.backend import REQUEST_HEADERS, Generation
from ...modeling.chat import Message, as_messages
from ...modeling.errors import ExpertokenError, NoAnswerError, one_line
from ...modeling.pictures import check_pictures
from ...modeling.policy import Policy
from ..answering import AnsweringModel
from ..decider import Decision
from ..loop import in_thread
from ..reply import Reply
from ..sessions import Affinity, LastAnswer, key_of_request, keys_of, open_store
from .completions import Completion, visible
from .feedback import Feedback, FeedbackRequest
from .keys import Client, KeyRing, ring_of
from .prometheus import Metrics
from .schema import ChatRequest
from .settings import Settings
from .tracing import Tracing

logger = logging.getLogger("expertoken.requests")

T = TypeVar("T")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

STOPPED = HTTPStatus.SERVICE_UNAVAILABLE
"""Status of a request whose answer was not complete when the server stopped."""


class UnknownModelError(ExpertokenError):
    """Error of a request for a model that this server does not serve."""


class Service:
    """State and functions that the routes share.

    Args:
        composite: Composite that answers. Its observer is replaced by `metrics`.
        settings: Settings of the server.
    """

    def __init__(self, composite: AnsweringModel, settings: Settings) -> None:
        self.composite, self.settings, self.tracing = composite, settings, Tracing()
        self.keys = ring_of(settings.api_keys, settings.key_file)
        self.metrics = Metrics(lambda: self.composite)
        self.started = int(time.time())
        self.draining = False
        self._reloading = asyncio.Lock()
        self.sessions = open_store(settings.session_store)
        self.feedback = None if settings.feedback is None else Feedback(settings.feedback)
        self._use(composite, self.keys)

    def _use(self, composite: AnsweringModel, keys: KeyRing) -> None:
        """Use a composite and keys for all later requests.

        Raises:
            ExpertokenError: The composite's policy, or a key's restriction of it, allows no candidate.
        """
        composite.chooser.candidates(composite.policy)
        for client in keys.clients:
            try:
                composite.chooser.candidates(_narrowed(composite.policy, client))
            except ExpertokenError as error:
                raise ExpertokenError(f"the key of {client.name!r}: {error}") from None
        composite.observe(self.metrics)
        composite.limit = self.settings.max_prompt_tokens
        for expert in composite.pool.experts:
            if expert.kind.remote:  # an open endpoint takes no memory, and local experts are loaded on demand
                _open(composite, expert.name)
        self.composite, self.keys = composite, keys

    async def reload(self) -> bool:
        """Reload pool, rows, calibration and keys. In-flight answers continue with the old ones.

        Returns:
            True if the reload succeeded. Otherwise nothing changes, and the log holds the reason.
        """
        async with self._reloading:  # reloads run in turn, so that the newest files take effect last
            try:
                composite = await asyncio.wrap_future(in_thread(self.composite.reloaded))
                keys = await asyncio.to_thread(ring_of, self.settings.api_keys, self.settings.key_file)
                self._use(composite, keys)
            except Exception as error:  # backends of other packages raise their own errors
                logger.error(
                    "reload failed, keeping pool and keys: %s",
                    error if isinstance(error, ExpertokenError) else one_line(error),
                )
                return False
        names = ", ".join(composite.policy.candidates(composite.pool))
        logger.warning("reloaded: %s may answer, %d keys", names, len(keys.clients))
        return True

    async def watch(self) -> None:
        """Check periodically which addresses of experts and meta LLM are up, until cancelled."""
        while True:
            for backend in list(self.composite.opened.values()):
                try:
                    await backend.check_addresses()
                except Exception as error:  # backends of other packages raise their own errors
                    logger.error("address check failed, retrying at the next interval: %s", one_line(error))
            await asyncio.sleep(self.settings.check_interval)

    def models(self, client: Client | None = None) -> list[str]:
        """Return the names of the models that a client may request."""
        allowed = _narrowed(self.composite.policy, client).candidates(self.composite.pool)
        return [self.settings.name, *(f"{self.settings.name}/{name}" for name in allowed)]

    def policy(self, request: ChatRequest, client: Client | None = None) -> Policy:
        """Return the policy of a request: the composite's own, restricted by the key, the request and its model.

        Raises:
            UnknownModelError: The model does not exist, or the client may not use it.
        """
        if request.model not in self.models(client):
            raise UnknownModelError(
                f"unknown model {request.model!r}. GET /v1/models lists the models that you may use."
            )
        own = _narrowed(self.composite.policy, client)
        policy = Policy.parse(request.expertoken.policy, own).within(own)
        if request.model == self.settings.name:
            return policy
        # An expert that is addressed by name answers alone, without thresholds and costs.
        return Policy(allow=(request.model.removeprefix(f"{self.settings.name}/"),))

    def messages(self, request: ChatRequest) -> list[Message]:
        """Return the conversation of a request.

        Raises:
            ExpertokenError: The conversation is not well formed, is too long, or has a picture that is not allowed.
        """
        if len(request.messages) > self.settings.max_messages:
            raise ExpertokenError(
                f"expected at most {self.settings.max_messages} messages, got {len(request.messages)}. "
                "Shorten the conversation."
            )
        messages = as_messages(request.messages)
        check_pictures(messages, self.settings.image_hosts)
        return messages

    async def affinity(
        self, composite: AnsweringModel, messages: list[Message], request: ChatRequest, http: Request
    ) -> Affinity:
        """Return what binds a continued conversation to its last expert, which clients do not name."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        known, exact = None, True
        if answers:

            def keys() -> list[str]:
                so_far, where = messages[: answers[-1] + 1], session_of(request, http)
                answered, *of_session = keys_of(so_far, tools=request.tools, **where)
                return [answered, key_of_request(so_far[:-1], tools=request.tools, **where), *of_session]

            for place, key in enumerate(await asyncio.to_thread(keys)):
                if (known := await self.sessions.get(key)) is not None:
                    exact = place < 2  # keys of this conversation, not of its session
                    break
        return await asyncio.to_thread(partial(Affinity.of, messages, composite.pool, known, exact=exact))

    async def remember(self, completion: Completion, reply: Reply) -> None:
        """Store which expert gave an answer, for the conversation's next request."""
        calls = [{"id": call} for call in reply.calls]
        said: Message = {"role": "assistant", "content": reply.text, "tool_calls": calls}
        messages, tools = [*completion.request.messages, said], completion.request.tools
        keys = await asyncio.to_thread(
            keys_of, messages, session=completion.session, scope=completion.scope, tools=tools
        )
        tokens = reply.prompt_tokens + reply.completion_tokens
        if self.feedback is not None and reply is completion.replies[0]:
            await asyncio.to_thread(
                self.feedback.remember, completion.id, completion.request.messages, reply.expert, completion.scope
            )
        for key in keys:
            await self.sessions.put(key, LastAnswer(reply.expert, tokens, time.time()))

    def begin(self, http: Request) -> str:
        """Return the id of a request: the client's own, or a new one.

        Requests to experts carry the id and the headers that join the trace.
        """
        given = http.headers.get("x-request-id", "")
        found = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        REQUEST_HEADERS.set({"x-request-id": found} | self.tracing.propagated(http.headers))
        http.scope["state"]["request_id"] = found
        return found

    async def _decide(
        self, request: ChatRequest, http: Request, generation: Generation
    ) -> tuple[AnsweringModel, list[Message], Affinity, Decision]:
        """Return the decision on a request, with the composite that made it and what it read."""
        policy, composite = self.policy(request, client_of(http)), self.composite
        messages = await asyncio.to_thread(self.messages, request)  # megabytes take a while
        affinity = await self.affinity(composite, messages, request, http)
        with self.tracing.span("decide"):
            decision = await composite.adecide(messages, policy, generation, affinity)
        return composite, messages, affinity, decision

    async def answer(self, request: ChatRequest, http: Request) -> Completion:
        """Decide on a request. No request is sent to an expert yet."""
        first = request.generation(self.settings.max_new_tokens)
        composite, messages, affinity, decision = await self._decide(request, http, first)
        streams = [composite.answer(messages, decision, first)]
        for number in range(1, request.n):
            # The decision's KV cache serves one answer only, which changes it.
            other = request.generation(self.settings.max_new_tokens, number)
            streams.append(composite.answer(messages, replace(decision, own=None), other))
        if affinity.last is not None:
            self.metrics.went_on(affinity.last, decision.dispatch.expert)
        # Without keys only the owner of this machine can send requests.
        return Completion(
            request,
            streams,
            reasons=not self.keys,
            visible_to=getattr(client_of(http), "experts", None),
            **session_of(request, http),
        )

    async def route(self, request: ChatRequest, http: Request) -> dict[str, Any]:
        """Return the candidate that would answer, with everything that the decision weighed.

        No request is sent to an expert.
        """
        started = time.time()
        self.begin(http)
        generation = request.generation(self.settings.max_new_tokens)
        composite, messages, affinity, decision = await self._decide(request, http, generation)
        dispatch, names = decision.dispatch, composite.pool.names
        client = client_of(http)
        if request.expertoken.remember:
            key = partial(key_of_request, messages, tools=request.tools, **session_of(request, http))
            sent = LastAnswer(dispatch.expert, decision.prompt_tokens, time.time())
            await self.sessions.put(await asyncio.to_thread(key), sent)
            if affinity.last is not None:
                self.metrics.went_on(affinity.last, dispatch.expert)
        self.log(None, request, HTTPStatus.OK, started, http, decided=dispatch.expert)

        def seen(table: Mapping[str, T]) -> dict[str, T]:
            return visible(table, None if client is None else client.experts)

        cached = {affinity.last or "": affinity.cached}
        usd = composite.chooser.known_usd(decision.prompt_tokens, cached).tolist()
        return {
            "object": "route",
            "model": f"{self.settings.name}/{dispatch.expert}",
            "expert": dispatch.expert,
            "reason": dispatch.reason,
            "ranking": list(dispatch.ranking),
            "probabilities": seen(dispatch.probabilities),
            "chances": None if dispatch.chances is None else seen(dispatch.chances),
            "costs": seen({name: None if math.isnan(cost) else cost for name, cost in zip(names, usd, strict=True)}),
            "last": affinity.last,
            "prompt_tokens": decision.prompt_tokens,
            "view": await asyncio.to_thread(composite.view, messages),
            "decided_seconds": round(decision.seconds, 4),
        }

    def count(self, request: ChatRequest) -> int:
        """Return the approximate number of tokens of a conversation and its tools."""
        return self.composite.about(self.messages(request)) + self.composite.about_tools(request.tools)

    def headers(self, completion: Completion, http: Request) -> dict[str, str]:
        """Return the headers of an answer that describe its decision."""
        reply = completion.replies[0]
        told = {
            "x-request-id": http.scope["state"]["request_id"],
            "x-expertoken-expert": reply.expert,
            "x-expertoken-decision-ms": f"{1000 * reply.decided:.1f}",
        }
        share = reply.dispatch.probabilities.get(reply.expert)
        return told | ({} if share is None else {"x-expertoken-probability": f"{share:.4f}"})

    def judge(self, request: FeedbackRequest, http: Request) -> dict[str, Any]:
        """Record a user's judgement of an answer."""
        assert self.feedback is not None
        told = self.feedback.judge(request, _scope_of(http))
        self.metrics.judged(told["expert"], told["score"])
        return told

    def log(
        self,
        completion: Completion | None,
        request: ChatRequest,
        status: int,
        started: float,
        http: Request,
        *,
        decided: str | None = None,
    ) -> None:
        """Log one line about a request. It holds messages and answers only if the operator enables that.

        Args:
            completion: Answers, or None if there are none.
            request: Request.
            status: HTTP status of the response.
            started: Time of the request's arrival, as in `time.time()`.
            http: Request as the web framework has it.
            decided: Candidate that a decision without an answer chose.
        """
        http.scope["state"]["logged"] = True
        entry: dict[str, Any] = {
            "time": round(started, 3),
            "seconds": round(time.time() - started, 4),
            "status": status,
            "model": request.model if request.model in self.models() else None,
            "client": getattr(client_of(http), "name", None),
            "stream": request.stream,
            "request_id": http.scope["state"].get("request_id"),
            "messages": len(request.messages),
        }
        if decided is not None:
            entry["decided"] = decided
        if completion is not None:
            entry |= {"id": completion.id, "answers": [_told(reply) for reply in completion.replies]}
        if self.settings.log_content:
            texts = [reply.text for reply in completion.replies] if completion else []
            entry |= {"request": request.messages, "texts": texts}
        logger.info(json.dumps(entry))

    def trace(self, completion: Completion) -> None:
        """Add the answer's id, and the log's values of the first answer, to the request's span.

        The span ends with the response's last byte, so the call comes before it.
        """
        self.tracing.note({"id": completion.id} | _told(completion.replies[0]))

    async def finish(self, completion: Completion, status: int, started: float, http: Request) -> None:
        """Record the end of an answer, complete or not."""
        for reply in completion.replies:
            if reply.finish is None and reply.text:  # the user who stopped it may continue from there
                await self.remember(completion, reply)
        if (client := client_of(http)) is not None:
            self.metrics.used(client.name, completion.replies)
        self.log(completion, completion.request, status, started, http)


def client_of(http: Request) -> Client | None:
    """Return the client of a request's key, or None if the server has no keys."""
    found: Client | None = http.scope["state"].get("client")
    return found


def _narrowed(policy: Policy, client: Client | None) -> Policy:
    """Return a policy restricted to the experts that a client may use."""
    return policy if client is None or client.experts is None else policy.within(Policy(allow=client.experts))


def _told(reply: Any) -> dict[str, Any]:
    return {
        "expert": reply.expert,
        "finish": reply.finish,
        "handed_over": reply.handed_over.expert if reply.handed_over else None,
        "failed": list(reply.failures),
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "cost": reply.cost,
        "decided": round(reply.decided, 4),
        "first": round(reply.first, 4),
    }


def _open(composite: AnsweringModel, name: str) -> None:
    try:
        composite.backend(name)
    except ExpertokenError as error:
        logger.warning("expert %r can't be opened, so requests fall back to the others: %s", name, one_line(error))


def session_of(request: ChatRequest, http: Request) -> dict[str, Any]:
    """Return the session that a request names, and the scope that separates it from other clients' sessions."""
    return {"session": http.headers.get("x-session-id") or request.session, "scope": _scope_of(http)}


def _scope_of(http: Request) -> str:
    client = client_of(http)
    return "" if client is None else client.digest


def model_card(name: str, service: Service, client: Client | None = None) -> dict[str, Any]:
    """Return the description of a model.

    An expert's `supports` lists its known capabilities. The composite's lists every capability that at least
    one expert has.
    """
    pool, own = service.composite.pool, service.settings.name
    allowed = _narrowed(service.composite.policy, client).candidates(pool)
    experts = [pool[one] for one in allowed if name in (own, f"{own}/{one}")]
    known = {can for expert in experts for can in expert.capabilities or ()}
    told: dict[str, Any] = {"id": name, "object": "model", "created": service.started, "owned_by": "expertoken"}
    told["supports"] = None if any(e.capabilities is None for e in experts) and not known else sorted(known)
    for key in ("context_length", "max_output_tokens"):
        lengths = [getattr(expert, key) for expert in experts]
        told[key] = None if None in lengths else max(lengths)
    return told


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error."""
    if isinstance(error, asyncio.CancelledError):
        return STOPPED
    if not isinstance(error, ExpertokenError):
        return HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, UnknownModelError):
        return HTTPStatus.NOT_FOUND
    failed = isinstance(error, NoAnswerError) and not error.refused
    return HTTPStatus.BAD_GATEWAY if failed else HTTPStatus.BAD_REQUEST
