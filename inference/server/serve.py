"""Process of the server: the application under uvicorn."""

import asyncio
import gc
import signal
from socket import SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from threading import Timer
from types import FrameType
from typing import Any

import uvicorn

from ...modeling.errors import ExpertokenError
from ..answering import AnsweringModel
from ..signals import reload_was_asked
from . import envoy
from .app import create_app
from .connections import Connection
from .settings import Settings


def check_free(host: str, port: int) -> None:
    """Check whether an address can be served.

    Raises:
        ExpertokenError: The address can't be served. The message has the reason.
    """
    try:
        family, kind, *_, address = getaddrinfo(host, port, type=SOCK_STREAM)[0]
        with socket(family, kind) as trial:
            trial.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise ExpertokenError(
            f"{host}:{port} can't be served ({error.strerror or error}). Choose another --port or --host."
        ) from None


def run(
    composite: AnsweringModel,
    settings: Settings,
    *,
    port: int,
    drain: float = 0.0,
    shutdown: int = 30,
    trust_proxy: bool = False,
    otel: bool = False,
) -> None:
    """Serve until a signal arrives, then refuse new requests and exit when the in-flight requests have ended.

    Args:
        composite: Loaded composite.
        settings: Settings of the server.
        port: Port to bind to. 0 for a free one.
        drain: Seconds to report 'not ready' on /ready after the signal before refusing new requests, so that a load
            balancer can drain traffic.
        shutdown: Seconds for in-flight requests to end after that.
        trust_proxy: If true, a proxy on this machine (or in `FORWARDED_ALLOW_IPS`) sets the address of the client.
        otel: If true, requests are traced with OpenTelemetry. See `tracing`.

    Raises:
        ImportError: `otel` or the setting `ext_proc` is set, and its extra is not installed.
    """
    app = create_app(composite, settings)
    tracing = app.state.service.tracing
    if otel:
        tracing.start(app)
    # The service logs one line for each request, which holds more than uvicorn's own line (path and address).
    config = uvicorn.Config(
        app, settings.host, port, access_log=False, log_level="info", timeout_graceful_shutdown=shutdown,
        proxy_headers=trust_proxy, http=Connection,
    )  # fmt: skip

    processors: list[Any] = []
    tasks: set[asyncio.Task] = set()  # an event loop holds only weak references to its tasks

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if drain and not app.state.service.draining:
                Timer(drain, super().handle_exit, (sig, None)).start()
            else:
                super().handle_exit(sig, frame)
            app.state.service.draining = True

        async def startup(self, sockets: list[socket] | None = None) -> None:
            if settings.ext_proc is not None:
                processors.append(await envoy.start(app))
            await super().startup(sockets)
            if hasattr(signal, "SIGHUP"):  # not on Windows
                reloading = app.state.service.reload
                loop = asyncio.get_running_loop()

                def reload() -> None:
                    task = loop.create_task(reloading())
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

                loop.add_signal_handler(signal.SIGHUP, reload)
                if reload_was_asked():
                    reload()

        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            running = list(self.server_state.tasks)
            ending = [processor.stop(shutdown) for processor in processors]
            await asyncio.gather(super().shutdown(sockets), *ending)
            if running:  # requests that were cut off still have to log their line
                await asyncio.wait(running, timeout=5)
            await app.state.service.sessions.aclose()
            tracing.stop()  # here, since uvicorn ends the process with the signal it received

    # The objects loaded so far (half a million, mostly of libraries) stay in memory. Without `freeze` the garbage
    # collector scans them a few times a minute, and every stream pauses for 0.3 s (benchmarks/serving.py).
    gc.collect()
    gc.freeze()
    Server(config).run()
