"""OpenAI-compatible HTTP server of a composite, with a chat page."""

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
