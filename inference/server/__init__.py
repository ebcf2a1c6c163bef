"""The composite as an OpenAI-compatible HTTP server, with a web page."""

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
