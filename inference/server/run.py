"""Running the application under uvicorn."""

from socket import socket
from types import FrameType

import uvicorn

from ..answering import AnsweringModel
from .app import create_app
from .settings import Settings


def run(composite: AnsweringModel, settings: Settings, *, port: int, shutdown: int = 30, otel: bool = False) -> None:
    """Serve until a signal comes; then take no more requests, and end when those that run are through.

    Args:
        composite: a loaded composite.
        settings: how it is served.
        port: 0 takes a free one.
        shutdown: seconds that running requests may take then.
        otel: trace requests with OpenTelemetry; see `tracing`.

    Raises:
        ExpertokenError: `otel` is asked for and its extra is missing.
    """
    app = create_app(composite, settings)
    tracing = app.state.service.tracing
    if otel:
        tracing.start(app)
    # uvicorn's own line for each request has the path and the address; ours tells more, and is one.
    config = uvicorn.Config(
        app, settings.host, port, access_log=False, log_level="info", timeout_graceful_shutdown=shutdown
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.service.draining = True
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket] | None = None) -> None:
            await super().shutdown(sockets)
            tracing.stop()  # here, since uvicorn ends the process by the signal it got

    Server(config).run()
