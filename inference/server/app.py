"""The application: routes, errors as OpenAI's API has them, one line of log for each request."""

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from ...modeling.chat import Message, as_messages, text_of
from ...modeling.errors import ExpertokenError, NoAnswerError, one_line
from ..answering import AnsweringModel
from ..backends import Piece
from ..policy import Policy
from .completions import Completion, merged, public
from .guard import Guard, error_body
from .metrics import Metrics
from .schema import ChatRequest
from .settings import Settings
from .tracing import Tracing

logger = logging.getLogger("expertoken.requests")

T = TypeVar("T")

_REMEMBERED = 10_000  # answers whose expert is known when their chat goes on
_GONE = 499  # the client went away: as nginx logs it; nobody reads it
_PAGE = Path(__file__).parent / "page"


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
        self.metrics = Metrics(composite.local_models)
        composite.observe(self.metrics)
        composite.longest = min(composite.longest, settings.max_prompt_tokens or composite.longest)
        self.started = int(time.time())
        self.draining = False
        self._answerers: OrderedDict[bytes, str] = OrderedDict()
        for expert in composite.pool.experts:
            if expert.backend == "openai":  # costs nothing to hold; local ones are loaded when they are called
                _open(composite, expert.name)

    @property
    def models(self) -> list[str]:
        """Names that clients may ask for."""
        return [self.settings.name, *(f"{self.settings.name}/{name}" for name in self.composite.pool.names)]

    def policy(self, request: ChatRequest) -> Policy:
        """Of a request: the composite's own, what the request says, and the expert that it addresses.

        Raises:
            UnknownModelError: the model is none of ours.
        """
        if request.model not in self.models:
            raise UnknownModelError(f"no model {request.model!r} here; GET /v1/models lists them")
        policy = Policy.parse(request.expertoken.policy, self.composite.policy)
        if request.model == self.settings.name:
            return policy
        # Addressed by name: it alone, whatever the composite's policy says of it.
        return Policy(allow=(request.model.removeprefix(f"{self.settings.name}/"),))

    def messages(self, request: ChatRequest) -> list[Message]:
        """The conversation, with who gave its answers as far as that is remembered.

        Raises:
            ExpertokenError: it is not well formed, or too long.
        """
        messages = as_messages(request.messages)
        if len(messages) > self.settings.max_messages:
            raise ExpertokenError(f"{len(messages)} messages; at most {self.settings.max_messages} are read")
        return [self._named(message) for message in messages]

    def _named(self, message: Message) -> Message:
        if message["role"] != "assistant":  # what a user calls himself is no expert's name
            return message
        name = message.get("name") or self._answerers.get(_hash(text_of(message)))
        return message | {"name": name} if name else message

    def remember(self, text: str, expert: str) -> None:
        """Who gave an answer: clients send the text back without it when the chat goes on."""
        self._answerers[_hash(text)] = expert
        self._answerers.move_to_end(_hash(text))
        while len(self._answerers) > _REMEMBERED:
            self._answerers.popitem(last=False)

    async def answer(self, request: ChatRequest) -> Completion:
        """Decide; nothing is asked of an expert yet."""
        policy, messages = self.policy(request), self.messages(request)
        with self.tracing.span("decide"):
            decision = await self.composite.adecide(messages, policy)
        first = request.generation(self.settings.max_new_tokens)
        streams = [self.composite.answer(messages, decision, first)]
        for number in range(1, request.n):
            # The decision's cache serves one answer; it is changed by that.
            other = request.generation(self.settings.max_new_tokens, number)
            streams.append(self.composite.answer(messages, replace(decision, own=None), other))
        return Completion(request, streams)

    def log(self, completion: Completion | None, request: ChatRequest, status: int, started: float) -> None:
        """One line about a request, without what was said in it unless the operator wants that."""
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
            self.tracing.note({"id": completion.id} | _told(completion.replies[0]))
        if self.settings.log_content:
            texts = [reply.text for reply in completion.replies] if completion else []
            entry |= {"request": request.messages, "texts": texts}
        logger.info(json.dumps(entry))


def _told(reply: Any) -> dict[str, Any]:
    return {
        "expert": reply.expert,
        "finish": reply.finish,
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


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()


def create_app(composite: AnsweringModel, settings: Settings | None = None) -> FastAPI:
    """The server of a composite, to be run by any ASGI server.

    Args:
        composite: a loaded composite.
        settings: how it is served.
    """
    settings = settings or Settings()
    service = Service(composite, settings)
    app = FastAPI(title="expertoken", version="1", redoc_url=None)
    app.state.service = service
    open_paths = {"/", "/health", "/ready", *(f"/{file.name}" for file in _PAGE.iterdir())}
    app.add_middleware(Guard, settings=settings, metrics=service.metrics, open_paths=open_paths)
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
        started, completion, status = time.time(), None, 500
        try:
            completion = await service.answer(request)
            if request.stream:
                response = await _streamed(service, completion, started, http)
                status = response.status_code
                return response
            body = await _unless_gone(completion.whole(), http)
            status = _GONE if body is None else 200
            for reply in completion.replies:
                service.remember(reply.text, reply.expert)
            return JSONResponse(body)
        except ExpertokenError as error:
            status = _status(error)
            raise
        finally:
            if not (request.stream and status == 200):
                service.log(completion, request, status, started)

    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    """What watches a service asks."""

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

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
    return {"id": name, "object": "model", "created": service.started, "owned_by": "expertoken"}


async def _streamed(service: Service, completion: Completion, started: float, http: Request) -> Response:
    """A streamed response. It begins with the first piece: an error before that is one of the whole request."""
    pieces = merged(completion.streams)
    first = await _unless_gone(anext(pieces), http)
    if first is None:
        await pieces.aclose()
        return Response(status_code=_GONE)

    async def all_pieces() -> AsyncIterator[tuple[int, Piece]]:
        try:
            yield first
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def events() -> AsyncIterator[str]:
        try:
            async for event in completion.events(all_pieces()):
                yield event
        finally:
            for reply in completion.replies:
                service.remember(reply.text, reply.expert)
            service.log(completion, completion.request, 200, started)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


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


def _status(error: ExpertokenError) -> int:
    if isinstance(error, UnknownModelError):
        return HTTPStatus.NOT_FOUND
    failed = isinstance(error, NoAnswerError) and not error.refused
    return HTTPStatus.BAD_GATEWAY if failed else HTTPStatus.BAD_REQUEST


def _add_errors(app: FastAPI) -> None:
    """Every error in the form that clients of OpenAI's API read."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_body(f"{place or 'body'}: {first['msg']}", "invalid_request_error", param=place), 400)

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
