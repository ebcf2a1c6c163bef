"""The application: routes, errors as OpenAI's API has them, one line of log for each request."""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ...modeling.backend import Piece
from ...modeling.chat import Message, as_messages
from ...modeling.errors import ExpertokenError, NoAnswerError, one_line
from ...modeling.policy import Policy
from ..answering import AnsweringModel
from ..reply import Reply
from ..sessions import Affinity, LastAnswer, key_of, open_store
from .completions import Completion, merged, public
from .guard import Guard, error_body
from .prometheus import Metrics
from .schema import ChatRequest
from .settings import Settings
from .tracing import Tracing

logger = logging.getLogger("expertoken.requests")

T = TypeVar("T")

_SILENCE = 10.0  # seconds without a word, until a comment keeps proxies and browsers waiting
_GONE = 499  # the client went away: as nginx logs it; nobody reads it
_STOPPED = HTTPStatus.SERVICE_UNAVAILABLE  # the server stopped before the answer was whole
_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class UnknownModelError(ExpertokenError):
    """A model that is not served here."""


class Service:
    """What the routes share.

    Args:
        composite: that answers; its observer becomes `metrics`.
        settings: of the server.
    """

    def __init__(self, composite: AnsweringModel, settings: Settings) -> None:
        self.composite, self.settings, self.tracing = composite, settings, Tracing()
        self.metrics = Metrics(composite)
        composite.observe(self.metrics)
        composite.limit = settings.max_prompt_tokens
        composite.chooser.candidates(composite.policy)  # a policy that fits nobody is told at the start
        self.started = int(time.time())
        self.draining = False
        self.sessions = open_store(settings.session_store)
        for expert in composite.pool.experts:
            if expert.kind.remote:  # costs nothing to hold; local ones are loaded when they are called
                _open(composite, expert.name)

    @property
    def models(self) -> list[str]:
        """Names that clients may ask for."""
        allowed = self.composite.policy.candidates(self.composite.pool)
        return [self.settings.name, *(f"{self.settings.name}/{name}" for name in allowed)]

    def policy(self, request: ChatRequest) -> Policy:
        """Of a request: the composite's own, what the request says, and the expert that it addresses.

        Raises:
            UnknownModelError: the model is none of ours.
        """
        if request.model not in self.models:
            raise UnknownModelError(f"no model {request.model!r} here; GET /v1/models lists them")
        own = self.composite.policy
        policy = Policy.parse(request.expertoken.policy, own).within(own)
        if request.model == self.settings.name:
            return policy
        # Addressed by name: it alone, without thresholds and costs.
        return Policy(allow=(request.model.removeprefix(f"{self.settings.name}/"),))

    def messages(self, request: ChatRequest) -> list[Message]:
        """The conversation.

        Raises:
            ExpertokenError: it is not well formed, or too long.
        """
        if len(request.messages) > self.settings.max_messages:
            raise ExpertokenError(f"{len(request.messages)} messages; at most {self.settings.max_messages} are read")
        return as_messages(request.messages)

    async def affinity(self, messages: list[Message], request: ChatRequest, http: Request) -> Affinity:
        """What binds a conversation that goes on to who answered last: clients do not say who that was."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        known = None
        if answers:
            so_far, where = messages[: answers[-1] + 1], _session_of(request, http)
            known = await self.sessions.get(await asyncio.to_thread(key_of, so_far, tools=request.tools, **where))
        return await asyncio.to_thread(Affinity.of, messages, self.composite.pool, known)

    async def remember(self, completion: Completion, reply: Reply) -> None:
        """Who gave an answer, for when the chat goes on."""
        calls = [{"id": call} for call in reply.calls]
        said: Message = {"role": "assistant", "content": reply.text, "tool_calls": calls}
        messages, tools = [*completion.request.messages, said], completion.request.tools
        key = await asyncio.to_thread(key_of, messages, session=completion.session, scope=completion.scope, tools=tools)
        tokens = reply.prompt_tokens + reply.completion_tokens
        await self.sessions.put(key, LastAnswer(reply.expert, tokens, time.time()))

    async def answer(self, request: ChatRequest, http: Request) -> Completion:
        """Decide; nothing is asked of an expert yet."""
        policy = self.policy(request)
        messages = await asyncio.to_thread(self.messages, request)  # megabytes of them take a while
        affinity = await self.affinity(messages, request, http)
        first = request.generation(self.settings.max_new_tokens)
        with self.tracing.span("decide"):
            decision = await self.composite.adecide(messages, policy, first, affinity)
        streams = [self.composite.answer(messages, decision, first)]
        for number in range(1, request.n):
            # The decision's cache serves one answer; it is changed by that.
            other = request.generation(self.settings.max_new_tokens, number)
            streams.append(self.composite.answer(messages, replace(decision, own=None), other))
        # Without keys whoever asks owns this machine.
        return Completion(request, streams, reasons=not self.settings.api_keys, **_session_of(request, http))

    def log(
        self, completion: Completion | None, request: ChatRequest, status: int, started: float, http: Request
    ) -> None:
        """One line about a request, without what was said in it unless the operator wants that."""
        http.scope["state"]["logged"] = True
        entry: dict[str, Any] = {
            "time": round(started, 3),
            "seconds": round(time.time() - started, 4),
            "status": status,
            "model": request.model if request.model in self.models else None,
            "stream": request.stream,
            "messages": len(request.messages),
        }
        if completion is not None:
            entry |= {"id": completion.id, "answers": [_told(reply) for reply in completion.replies]}
        if self.settings.log_content:
            texts = [reply.text for reply in completion.replies] if completion else []
            entry |= {"request": request.messages, "texts": texts}
        logger.info(json.dumps(entry))

    def trace(self, completion: Completion) -> None:
        """What the log tells, in the request's span; before the response's last byte, with which the span ends."""
        self.tracing.note({"id": completion.id} | _told(completion.replies[0]))

    async def finish(self, completion: Completion, status: int, started: float, http: Request) -> None:
        """An answer ended, as far as it came."""
        for reply in completion.replies:
            if reply.finish is None and reply.text:  # whoever stopped it may go on from there
                await self.remember(completion, reply)
        self.log(completion, completion.request, status, started, http)


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
    except ExpertokenError as error:  # the others answer
        logger.warning("expert %r can't be asked: %s", name, one_line(error))


def _session_of(request: ChatRequest, http: Request) -> dict[str, Any]:
    """Return the session that a request says that it belongs to, and what keeps it apart from other clients'."""
    key = http.headers.get("authorization", "")
    scope = hashlib.blake2b(key.encode(), digest_size=16).hexdigest() if key else ""
    return {"session": http.headers.get("x-session-id") or request.session, "scope": scope}


def create_app(composite: AnsweringModel, settings: Settings | None = None) -> FastAPI:
    """The server of a composite, to be run by any ASGI server.

    Args:
        composite: a loaded composite.
        settings: how it is served.
    """
    settings = settings or Settings()
    service = Service(composite, settings)
    # No /docs: that page loads its scripts from elsewhere.
    app = FastAPI(title="expertoken", version="1", docs_url=None, redoc_url=None)
    app.state.service = service
    open_paths = {"/", "/health", "/ready", *(f"/{file.name}" for file in _PAGE.iterdir())}
    app.add_middleware(
        Guard,
        settings=settings,
        metrics=service.metrics,
        open_paths=open_paths,
        stopping=lambda: service.draining,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_errors(app)

    _add_status(app, service)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The composite, and each expert as `composite/expert`."""
        return {"object": "list", "data": [_model(name, service) for name in service.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in service.models:
            raise UnknownModelError(f"no model {name!r} here; GET /v1/models lists them")
        return _model(name, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation, as OpenAI's API does."""
        started, completion = time.time(), None
        try:
            completion = await _unless_gone(service.answer(request, http), http)
            if completion is None:
                service.log(None, request, _GONE, started, http)
                return Response(status_code=_GONE)
            if request.stream:
                return await _streamed(service, completion, started, http)
            body = await _unless_gone(completion.whole(), http)
            for reply in completion.replies if body is not None else ():
                await service.remember(completion, reply)
            response = JSONResponse(body)
        except BaseException as error:
            service.log(completion, request, _status(error), started, http)
            raise
        await service.finish(completion, _GONE if body is None else 200, started, http)
        service.trace(completion)
        return response

    _add_page(app)
    return app


def _add_page(app: FastAPI) -> None:
    """The chat page's files, each by its name: a mount at / would take what is wrongly asked of the other routes."""

    def page(name: str) -> None:
        @app.api_route("/" if name == "index.html" else f"/{name}", methods=["GET", "HEAD"], include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)

    for found in _PAGE.iterdir():
        page(found.name)


def _add_status(app: FastAPI, service: Service) -> None:
    """What watches a service asks."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken: not while it shuts down."""
        status = HTTPStatus.SERVICE_UNAVAILABLE if service.draining else HTTPStatus.OK
        return JSONResponse({"status": "draining" if service.draining else "ready"}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _model(name: str, service: Service) -> dict[str, Any]:
    """Return what is told of a model: under `supports` what it is known to do, of the composite what somebody does."""
    pool, own = service.composite.pool, service.settings.name
    allowed = service.composite.policy.candidates(pool)
    experts = [pool[one] for one in allowed if name in (own, f"{own}/{one}")]
    known = {can for expert in experts for can in expert.capabilities or ()}
    told: dict[str, Any] = {"id": name, "object": "model", "created": service.started, "owned_by": "expertoken"}
    told["supports"] = None if any(e.capabilities is None for e in experts) and not known else sorted(known)
    for key in ("context_length", "max_output_tokens"):
        lengths = [getattr(expert, key) for expert in experts]
        told[key] = None if None in lengths else max(lengths)
    return told


async def _streamed(service: Service, completion: Completion, started: float, http: Request) -> Response:
    """A streamed response. It begins with the first piece: an error before that is one of the whole request.

    Where that takes long (a model that thinks), the response begins before it.
    """
    pieces = merged(completion.streams)
    coming = asyncio.ensure_future(anext(pieces))
    begun = False
    try:
        told = await _unless_gone(asyncio.wait([coming], timeout=_SILENCE), http)
        if told is None:
            await service.finish(completion, _GONE, started, http)
            return Response(status_code=_GONE)
        if coming.done():
            coming.result()  # raises what went wrong
        begun = True
    finally:
        if not begun:
            await _ended(coming, pieces)

    async def all_pieces() -> AsyncGenerator[tuple[int, Piece], None]:
        found: tuple[int, Piece] | None = await coming
        while found is not None:
            index, piece = found
            if piece.finish is not None:  # before the client has it, and asks what comes next
                await service.remember(completion, completion.replies[index])
            yield index, piece
            found = await anext(pieces, None)

    status = _GONE

    async def events() -> AsyncGenerator[str, None]:
        nonlocal status
        async with aclosing(completion.events(all_pieces())) as told:
            async for event in told:
                yield event
        service.trace(completion)
        status = 200

    async def end(*, stopped: bool) -> None:
        await _ended(coming, pieces)
        await service.finish(completion, _STOPPED if stopped else status, started, http)

    return _Events(events(), end, service)


_CUT_OFF = json.dumps(error_body("the server was stopped in mid-answer", "server_error", "answer_broke_off"))


class _Events(StreamingResponse):
    """Server-sent events, with an end that comes whatever happens: the client may be gone before the first of them.

    While none comes (a model thinks, or is loaded to go on), comments keep proxies from closing the line.
    """

    def __init__(
        self, events: AsyncGenerator[str, None], end: Callable[..., Awaitable[None]], service: Service
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self._events = events
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._end, self._service = end, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        said, commenting, stopped = 0.0, None, False

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal said, commenting
            said = time.monotonic()
            if commenting is None:
                commenting = asyncio.ensure_future(comment())
            if message["type"] == "http.response.body" and not message.get("more_body"):
                commenting.cancel()
            await send(message)

        async def comment() -> None:
            while True:
                await asyncio.sleep(max(0.0, said + _SILENCE - time.monotonic()))
                if time.monotonic() - said >= _SILENCE:
                    await noting({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

        try:
            await super().__call__(scope, receive, noting)
        except asyncio.CancelledError:
            if not self._service.draining:
                raise
            stopped = True
            # The server stops, and this answer had its time: that is said, and is no crash.
            for body in (f"data: {_CUT_OFF}\n\n", "data: [DONE]\n\n", ""):
                await noting({"type": "http.response.body", "body": body.encode(), "more_body": bool(body)})
        finally:
            if commenting is not None:
                commenting.cancel()
            with anyio.CancelScope(shield=True):
                await self._events.aclose()
                await self._end(stopped=stopped)


async def _ended(coming: asyncio.Future, pieces: AsyncGenerator) -> None:
    """An answer that was begun, ended whatever it was doing."""
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    await pieces.aclose()


async def _unless_gone(answer: Awaitable[T], http: Request) -> T | None:
    """An answer or its first piece, or None where the client went away before: nobody generates for nobody."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _status(error: BaseException) -> int:
    if isinstance(error, asyncio.CancelledError):
        return _STOPPED
    if not isinstance(error, ExpertokenError):
        return HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, UnknownModelError):
        return HTTPStatus.NOT_FOUND
    failed = isinstance(error, NoAnswerError) and not error.refused
    return HTTPStatus.BAD_GATEWAY if failed else HTTPStatus.BAD_REQUEST


def _add_errors(app: FastAPI) -> None:
    """Every error in the form that clients of OpenAI's API read."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            place, told = None, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        else:
            # Without the names of pydantic's own types, which are no fields.
            parts = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
            place = ".".join(parts) or None
            told = f"{place or 'body'}: {first['msg']}"
        return JSONResponse(error_body(told, "invalid_request_error", param=place), 400)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)

    @app.exception_handler(ExpertokenError)
    async def refused(_: Request, error: ExpertokenError) -> JSONResponse:
        status = _status(error)
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        code = {404: "model_not_found", 502: "no_answer"}.get(status)
        return JSONResponse(error_body(public(error), kind, code), status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=error.headers)
