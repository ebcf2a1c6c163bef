"""Running the application under uvicorn."""

import asyncio
import gc
import signal
from socket import SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, getaddrinfo, socket
from threading import Timer
from types import FrameType

import uvicorn

from ...modeling.errors import ExpertokenError
from ..answering import AnsweringModel
from .app import create_app
from .connections import Connection
from .settings import Settings


def check_free(host: str, port: int) -> None:
    """See whether an address can be served.

    Raises:
        ExpertokenError: it can't; the message says why.
    """
    try:
        family, kind, *_, address = getaddrinfo(host, port, type=SOCK_STREAM)[0]
        with socket(family, kind) as trial:
            trial.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise ExpertokenError(
            f"{host}:{port} can't be served ({error.strerror or error}); take another --port, or --host"
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
    """Serve until a signal comes; then take no more requests, and end when those that run are through.

    Args:
        composite: a loaded composite.
        settings: how it is served.
        port: 0 takes a free one.
        drain: seconds for which /ready says no before that, so that a balancer sees it.
        shutdown: seconds that running requests may take then.
        trust_proxy: believe a proxy on this machine (or of `FORWARDED_ALLOW_IPS`) whom a request comes from.
        otel: trace requests with OpenTelemetry; see `tracing`.

    Raises:
        ImportError: `otel` is asked for and its extra is not installed.
    """
    app = create_app(composite, settings)
    tracing = app.state.service.tracing
    if otel:
        tracing.start(app)
    # uvicorn's own line for each request has the path and the address; ours tells more, and is one.
    config = uvicorn.Config(
        app, settings.host, port, access_log=False, log_level="info", timeout_graceful_shutdown=shutdown,
        proxy_headers=trust_proxy, http=Connection,
    )  # fmt: skip

    tasks: set[asyncio.Task] = set()  # a loop holds its tasks weakly

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if drain and not app.state.service.draining:
                Timer(drain, super().handle_exit, (sig, None)).start()
            else:
                super().handle_exit(sig, frame)
            app.state.service.draining = True

        async def startup(self, sockets: list[socket] | None = None) -> None:
            await super().startup(sockets)
            if hasattr(signal, "SIGHUP"):  # not on Windows
                reloading = app.state.service.reload
                loop = asyncio.get_running_loop()

                def reload() -> None:
                    task = loop.create_task(reloading())
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)

                loop.add_signal_handler(signal.SIGHUP, reload)

        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            running = list(self.server_state.tasks)
            await super().shutdown(sockets)
            if running:  # those that were cut off write their line of log yet
                await asyncio.wait(running, timeout=5)
            await app.state.service.sessions.aclose()
            tracing.stop()  # here, since uvicorn ends the process by the signal it got

    # What is loaded by now (half a million objects, most of them of libraries) stays. The collector would search it
    # some times a minute, while every stream waits for 0.3 s (benchmarks/serving.py).
    gc.collect()
    gc.freeze()
    Server(config).run()
