"""External processor for Envoy (`ext_proc`): it decides on chat completions, and Envoy sends them to the experts.

Envoy's own routes map the header `x-expertoken-expert` to upstream clusters. Answers do not pass through this process,
so Envoy's retries take the place of fallbacks, and self hands nothing over in mid-answer.

Rejected: gRPC's own package of Envoy's protocols (xds-protos). It overwrites files of OpenTelemetry's packages.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx
from fastapi import FastAPI

from ...modeling.errors import ExpertokenError, require_extra
from .service import Service

if TYPE_CHECKING:
    import grpc.aio

EXPERT = "x-expertoken-expert"
"""Header with the name of the chosen candidate, which Envoy's routes match."""

_SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
_PATH = "/v1/chat/completions"
_PASSED = ("authorization", "x-api-key", "content-type", "x-session-id", "x-request-id", "traceparent", "tracestate")
_KEYS = ("authorization", "x-api-key")
_FRAME = 64 * 2**10  # bytes of a message beside the body: the headers
_GRACE = 5.0  # seconds for decisions in progress at the end


async def start(app: FastAPI, port: int) -> "grpc.aio.Server":
    """Start the external processor of an application, on the same host.

    Args:
        app: Application whose `/v1/route` decides, with its keys and limits.
        port: Port to bind to. 0 for a free one.

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
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", settings.max_body + _FRAME)])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, {"Process": process})])
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        raise ExpertokenError(f"--ext-proc {port}: can't be served on {settings.host}. Choose another port.") from None
    await server.start()
    return server


async def stop(server: "grpc.aio.Server") -> None:
    """Stop an external processor after its decisions in progress."""
    await server.stop(_GRACE)


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
        """Answer each stage of one HTTP request with the changes that Envoy makes to it."""
        answer, headers = self._messages.ProcessingResponse, dict[str, str]()
        async for request in requests:
            if request.request_headers is not None:
                headers = _headers_of(request.request_headers.headers)
                # A client must not choose the upstream by itself.
                unset = self._messages.HeaderMutation(remove_headers=[EXPERT])
                changes = self._messages.CommonResponse(header_mutation=unset, clear_route_cache=EXPERT in headers)
                yield answer(request_headers=self._messages.HeadersResponse(response=changes))
            elif request.request_body is not None:
                yield await self._decided(headers, request.request_body.body)
            elif request.response_headers is not None:
                yield answer(response_headers=self._messages.HeadersResponse())
            elif request.response_body is not None:
                yield answer(response_body=self._messages.BodyResponse())
            else:
                stage = "request_trailers" if request.request_trailers is not None else "response_trailers"
                yield answer(**{stage: self._messages.TrailersResponse()})

    async def _decided(self, headers: Mapping[str, str], body: bytes) -> Any:
        """Return the changes to a request that send it to the chosen candidate, or the response of an error."""
        messages = self._messages
        if headers.get(":method") != "POST" or headers.get(":path", "").partition("?")[0] != _PATH:
            return messages.ProcessingResponse(request_body=messages.BodyResponse())
        passed = {name: headers[name] for name in _PASSED if name in headers}
        asked = await asyncio.to_thread(_remembered, body)  # megabytes take a while
        found = await self._client.post("/v1/route", content=asked, headers=passed)
        if found.status_code != HTTPStatus.OK:
            return messages.ProcessingResponse(immediate_response=self._refusal(found))
        decision = found.json()
        expert = self._service.composite.pool[decision["expert"]]
        # A model of this process is reached through the server's own API, and an endpoint under its own name.
        model = expert.model if expert.kind.remote else decision["model"]
        changed = await asyncio.to_thread(lambda: json.dumps(json.loads(body) | {"model": model}).encode())
        told = {EXPERT: expert.name, "content-length": str(len(changed))}
        mutation = messages.HeaderMutation(
            set_headers=[_header(name, value) for name, value in told.items()],
            # A key of this server is no key of the expert's.
            remove_headers=list(_KEYS) if expert.kind.remote and self._service.keys else [],
        )
        changes = messages.CommonResponse(
            header_mutation=mutation, body_mutation=messages.BodyMutation(body=changed), clear_route_cache=True
        )
        return messages.ProcessingResponse(request_body=messages.BodyResponse(response=changes))

    def _refusal(self, found: httpx.Response) -> Any:
        from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode

        kept = [name for name in ("content-type", "retry-after") if name in found.headers]
        return self._messages.ImmediateResponse(
            status=HttpStatus(code=StatusCode(found.status_code)),
            headers=self._messages.HeaderMutation(set_headers=[_header(name, found.headers[name]) for name in kept]),
            body=found.content,
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


def _headers_of(headers: Any) -> dict[str, str]:
    return {one.key: one.value or one.raw_value.decode("latin-1") for one in headers.headers}


def _remembered(body: bytes) -> bytes:
    """Return the body of a request that asks for its decision to be kept. A body that is no object is unchanged."""
    try:
        asked = json.loads(body)
        options = asked.get("expertoken") or {}
        return json.dumps(asked | {"expertoken": options | {"remember": True}}).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return body  # the route reports what is wrong
