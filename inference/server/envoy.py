"""External processor for Envoy (`ext_proc`): it decides on chat completions, and Envoy sends them to the experts.

Envoy's own routes map the header `x-expertoken-expert` to upstream clusters. Answers do not pass through this process,
so Envoy's retries take the place of fallbacks, and self hands nothing over in mid-answer.

Rejected: gRPC's own package of Envoy's protocols (xds-protos). It overwrites files of OpenTelemetry's packages.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import FastAPI

from ...modeling.errors import ExpertokenError, require_extra
from ..backends.wire import sendable
from .service import Service

if TYPE_CHECKING:
    import grpc.aio

logger = logging.getLogger(__name__)

EXPERT = "x-expertoken-expert"
"""Header with the name of the chosen candidate, which Envoy's routes match."""

_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
_PATH = "/v1/chat/completions"
_FORWARDED = (
    "authorization", "x-api-key", "content-type", "x-session-id", "x-request-id", "traceparent", "tracestate",
)  # fmt: skip
_KEYS = ("authorization", "x-api-key")
_LIMITS = ("max_completion_tokens", "max_tokens")
_FRAME = 64 * 2**10  # bytes of a message beside the body: the headers


async def start(app: FastAPI) -> "grpc.aio.Server":
    """Start the external processor of an application, on its host and the port `ext_proc` of its settings.

    Args:
        app: Application whose `/v1/route` decides, with its keys and limits.

    Returns:
        Running gRPC server.

    Raises:
        ImportError: The extra `envoy` is not installed.
        ExpertokenError: The port can't be bound.
    """
    messages: Any = require_extra("envoy_data_plane.envoy.service.ext_proc.v3", "envoy")
    import grpc.aio

    settings = app.state.service.settings
    process = grpc.stream_stream_rpc_method_handler(
        Processor(app, messages).process,
        request_deserializer=messages.ProcessingRequest.FromString,
        response_serializer=bytes,
    )
    # Without the second option another server could bind the same port, and each would get a part of the requests.
    options = [("grpc.max_receive_message_length", settings.max_body + _FRAME), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, {"Process": process})])
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        bound = server.add_insecure_port(f"{host}:{settings.ext_proc}")
    except RuntimeError:
        raise ExpertokenError(
            f"--ext-proc {settings.ext_proc}: can't be served on {settings.host}. Choose another port."
        ) from None
    await server.start()
    logger.warning("Envoy's external processor listens on %s:%d", host, bound)
    return server


class Processor:
    """Processor of HTTP requests that Envoy holds until their expert is known.

    Args:
        app: Application whose `/v1/route` decides.
        messages: Module of the protocol's messages.
    """

    def __init__(self, app: FastAPI, messages: Any) -> None:
        self._messages = messages
        self._service: Service = app.state.service
        # The route checks keys and limits, and reads the body, as for every other client.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)  # noqa: S113

    async def process(self, requests: AsyncIterator[Any], _: Any) -> AsyncIterator[Any]:
        """Answer the headers and the body of one HTTP request with the changes that Envoy makes to them.

        The stream ends there. Otherwise it would last as long as the expert's answer, and the end of this server would
        cut that answer off.
        """
        messages = self._messages
        headers: dict[str, bytes] = {}
        async for request in requests:
            if request.request_body is not None:
                yield await self._decided(headers, request.request_body.body)
                return
            if request.request_headers is None:
                return
            headers = _headers_of(request.request_headers.headers)
            # A client must not choose the upstream by itself.
            unset = messages.HeaderMutation(remove_headers=[EXPERT])
            changes = messages.CommonResponse(header_mutation=unset, clear_route_cache=EXPERT in headers)
            yield messages.ProcessingResponse(request_headers=messages.HeadersResponse(response=changes))
            if request.request_headers.end_of_stream:
                return

    async def _decided(self, headers: Mapping[str, bytes], body: bytes) -> Any:
        """Return the changes to a request that send it to the chosen candidate, or the response of an error."""
        messages = self._messages
        if headers.get(":method") != b"POST" or headers.get(":path", b"").partition(b"?")[0] != _PATH.encode():
            return messages.ProcessingResponse(request_body=messages.BodyResponse())
        before = self._service.composite.pool  # a reload during the decision may remove the expert
        forwarded = [(name.encode(), headers[name]) for name in _FORWARDED if name in headers]
        request, asked = await asyncio.to_thread(_remembered, body)  # megabytes take a while
        response = await self._client.post("/v1/route", content=asked, headers=forwarded)
        if response.status_code != HTTPStatus.OK:
            return messages.ProcessingResponse(immediate_response=self._refusal(response))
        decision = response.json()
        name = decision["expert"]
        expert = before[name] if name in before.names else self._service.composite.pool[name]
        remote = expert.kind.remote
        if remote:
            most = (self._service.settings.max_new_tokens, expert.max_output_tokens)
            changed = await asyncio.to_thread(
                _for_expert, request, expert.model, [one for one in most if one is not None]
            )
        else:  # a model of this process, which the server's own API reaches and limits
            changed = await asyncio.to_thread(_dumped, request | {"model": decision["model"]})
        mutation = messages.HeaderMutation(
            set_headers=[_header(EXPERT, name), _header("content-length", str(len(changed)))],
            remove_headers=list(_KEYS) if remote else [],  # a key of this server is no key of the expert's
        )
        changes = messages.CommonResponse(
            header_mutation=mutation, body_mutation=messages.BodyMutation(body=changed), clear_route_cache=True
        )
        return messages.ProcessingResponse(request_body=messages.BodyResponse(response=changes))

    def _refusal(self, response: httpx.Response) -> Any:
        from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode

        kept = [name for name in ("content-type", "retry-after") if name in response.headers]
        headers = [_header(name, response.headers[name]) for name in kept]
        return self._messages.ImmediateResponse(
            status=HttpStatus(code=StatusCode(response.status_code)),
            headers=self._messages.HeaderMutation(set_headers=headers),
            body=response.content,
            details="expertoken",
        )


def _header(name: str, value: str) -> Any:
    from envoy_data_plane.envoy.config.core.v3 import (
        HeaderValue,
        HeaderValueOption,
        HeaderValueOptionHeaderAppendAction,
    )

    return HeaderValueOption(
        header=HeaderValue(key=name, raw_value=value.encode()),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )


def _headers_of(headers: Any) -> dict[str, bytes]:
    return {one.key: one.raw_value or one.value.encode() for one in headers.headers}


def _remembered(body: bytes) -> tuple[dict[str, Any], bytes]:
    """Return a parsed request, and its body with the wish that the decision is kept.

    The body of no request is returned unchanged, with an empty request: the route reports what is wrong.
    """
    try:
        request = json.loads(body)
        options = request.get("expertoken")
        return request, _dumped(request | {"expertoken": ({} if options is None else options) | {"remember": True}})
    except (ValueError, RecursionError, AttributeError, TypeError):
        return {}, body


def _for_expert(request: Mapping[str, Any], model: str | None, most: Sequence[int]) -> bytes:
    """Return the body that an endpoint gets: its own model, no options of the composite, and a limit within `most`."""
    limits = {name: request[name] for name in _LIMITS if request.get(name) is not None}
    if most:
        limits = {name: min(limit, *most) for name, limit in limits.items()} or {"max_tokens": min(most)}
    kept = {name: value for name, value in request.items() if name != "expertoken"}
    return _dumped(kept | limits | {"model": model})


def _dumped(request: Mapping[str, Any]) -> bytes:
    return json.dumps(sendable(dict(request)), ensure_ascii=False).encode()
