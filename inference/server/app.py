"""The application: routes, and errors in the form that clients of each API read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from markdown_it import MarkdownIt
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ...modeling.errors import ExpertokenError
from ..answering import AnsweringModel
from .anthropic_messages import MESSAGES, MessagesRequest
from .completions import public
from .feedback import FeedbackRequest
from .guard import Guard, anthropic_error, error_body
from .openai_responses import RESPONSES, ResponsesRequest
from .schema import ChatRequest, RenderRequest
from .service import Service, UnknownModelError, client_of, model_card, status_of
from .settings import Settings
from .streaming import answered

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(composite: AnsweringModel, settings: Settings | None = None) -> FastAPI:
    """Create the application that serves a composite, for any ASGI server.

    Args:
        composite: Loaded composite.
        settings: Settings of the server. Defaults to `Settings()`.
    """
    settings = settings or Settings()
    service = Service(composite, settings)
    # FastAPI's page /docs is off, since it loads scripts from other hosts.
    app = FastAPI(title="expertoken", version="1", docs_url=None, redoc_url=None, lifespan=lambda _: _watched(service))
    app.state.service = service
    open_paths = {"/", "/health", "/ready", *(f"/{file.name}" for file in _PAGE.iterdir())}
    app.add_middleware(
        Guard,
        settings=settings,
        metrics=service.metrics,
        open_paths=open_paths,
        stopping=lambda: service.draining,
        keys=lambda: service.keys,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_errors(app)

    _add_status(app, service)

    @app.get("/v1/models")
    async def models(http: Request) -> dict[str, Any]:
        """List the composite, and each expert as `composite/expert`."""
        return {
            "object": "list",
            "data": [model_card(name, service, client_of(http)) for name in service.models(client_of(http))],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str, http: Request) -> dict[str, Any]:
        """Return one model of the list."""
        if name not in service.models(client_of(http)):
            raise UnknownModelError(f"unknown model {name!r}. GET /v1/models lists the models that you may use.")
        return model_card(name, service, client_of(http))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation in the form of OpenAI's chat completions API."""
        return await answered(service, request, http)

    @app.post("/v1/messages", response_model=None)
    async def messages(request: MessagesRequest, http: Request) -> Response:
        """Answer a conversation in the form of Anthropic's Messages API."""
        return await answered(service, await asyncio.to_thread(request.chat), http, MESSAGES)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: MessagesRequest, http: Request) -> dict[str, int]:
        """Count a conversation's tokens approximately, as the meta LLM reads them."""
        chat = await asyncio.to_thread(request.chat)
        service.policy(chat, client_of(http))  # raises if the client may not use the model
        return {"input_tokens": await asyncio.to_thread(service.count, chat)}

    @app.post("/v1/responses", response_model=None)
    async def responses(request: ResponsesRequest, http: Request) -> Response:
        """Answer a conversation in the form of OpenAI's Responses API."""
        return await answered(service, await asyncio.to_thread(request.chat), http, RESPONSES)

    @app.post("/v1/route")
    async def route(request: ChatRequest, http: Request) -> dict[str, Any]:
        """Decide which candidate would answer, without answering."""
        return await service.route(request, http)

    if service.feedback is not None:

        @app.post("/v1/feedback")
        async def feedback(request: FeedbackRequest, http: Request) -> dict[str, Any]:
            """Record a judgement of the answer with an id."""
            return await asyncio.to_thread(service.judge, request, http)

    _add_page(app)
    return app


@asynccontextmanager
async def _watched(service: Service) -> AsyncIterator[None]:
    """Check addresses while the application runs."""
    watching = asyncio.create_task(service.watch()) if service.settings.check_interval else None
    yield
    if watching:
        watching.cancel()


def _add_page(app: FastAPI) -> None:
    """Add a route for each file of the chat page.

    A mount at / would also match requests with a wrong method for one of the other routes.
    """

    def page(name: str) -> None:
        @app.api_route("/" if name == "index.html" else f"/{name}", methods=["GET", "HEAD"], include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(_PAGE / name, headers=_PAGE_HEADERS)

    for found in _PAGE.iterdir():
        page(found.name)

    # Raw HTML stays text, links can't run scripts, and pictures on other hosts are not loaded.
    markdown = MarkdownIt("js-default", {"breaks": True}).disable("image")

    few = anyio.CapacityLimiter(2)  # adversarial Markdown takes seconds to render

    def rendered(asked: RenderRequest) -> dict[str, list[str]]:
        return {"html": [str(markdown.render(text)) for text in asked.texts]}

    @app.post("/render", include_in_schema=False)
    async def render(asked: RenderRequest) -> dict[str, list[str]]:
        return await anyio.to_thread.run_sync(rendered, asked, limiter=few)


def _add_status(app: FastAPI, service: Service) -> None:
    """Add the routes for monitoring: health, readiness and metrics."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Report that the process runs."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> Response:
        """Report whether a load balancer should send requests. It should send none while the server shuts down."""
        status = HTTPStatus.SERVICE_UNAVAILABLE if service.draining else HTTPStatus.OK
        return JSONResponse({"status": "draining" if service.draining else "ready"}, status)

    @app.get("/metrics")
    async def metrics(http: Request) -> Response:
        """Return the metrics for Prometheus. A key that is restricted to some experts gets status 403."""
        client = client_of(http)
        if client is not None and client.experts is not None:
            return JSONResponse(
                error_body("expected a key for all experts, since metrics cover them all", "invalid_request_error"), 403
            )
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_errors(app: FastAPI) -> None:
    """Register handlers that return every error in the form of OpenAI's API."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            place, told = None, f"expected JSON in the body: {first['ctx']['error']} at character {first['loc'][-1]}"
        else:
            # pydantic adds names of its own types to `loc`, which are no fields.
            parts = [str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier()]
            place = ".".join(parts) or None
            told = f"{place or 'body'}: {first['msg']}"
        return JSONResponse(error_body(told, "invalid_request_error", param=place), 400)

    @app.exception_handler(ValidationError)
    async def mistranslated(http: Request, error: ValidationError) -> JSONResponse:
        """Return the error of another API's request whose translation is no valid request of the chat API."""
        return await malformed(
            http, RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()])
        )

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> JSONResponse:
        # This handler runs outside of the guard, which converts the other errors to Anthropic's form.
        told = "the server failed with an unexpected error. Its log holds the cause."
        anthropics = http.url.path.startswith("/v1/messages")
        return JSONResponse(anthropic_error(told, 500) if anthropics else error_body(told, "server_error"), 500)

    @app.exception_handler(ExpertokenError)
    async def refused(_: Request, error: ExpertokenError) -> JSONResponse:
        status = status_of(error)
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        code = {404: "model_not_found", 502: "no_answer"}.get(status)
        return JSONResponse(error_body(public(error), kind, code), status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=error.headers)
