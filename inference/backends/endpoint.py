"""OpenAI-compatible endpoints, through the `openai` client."""

from collections.abc import Iterator, Sequence
from typing import Any

from ...modeling.chat import Message
from ...modeling.errors import ExpertFailedError
from ...modeling.experts import Expert
from .base import Backend, Generation

_TIMEOUT = 60.0  # seconds without a byte


class EndpointBackend(Backend):
    """A model behind an HTTP address.

    Args:
        expert: with `model`, and `base_url` and `api_key_env` where they are needed.

    Raises:
        ExpertFailedError: the environment variable that should hold the key is not set.
    """

    def __init__(self, expert: Expert) -> None:
        import openai

        self.expert = expert
        self.client = openai.OpenAI(api_key=expert.api_key(), base_url=expert.base_url, timeout=_TIMEOUT, max_retries=2)

    def _options(self, generation: Generation) -> dict[str, Any]:
        options = {
            "model": self.expert.model,
            "max_tokens": generation.max_new_tokens,
            "temperature": generation.temperature,
            "top_p": generation.top_p,
        }
        return options if generation.seed is None else options | {"seed": generation.seed}

    def stream(self, messages: Sequence[Message], generation: Generation) -> Iterator[str]:
        """The answer in pieces."""
        import openai

        try:
            stream = self.client.chat.completions.create(
                messages=list(messages), stream=True, **self._options(generation)
            )
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except openai.APIStatusError as error:
            raise ExpertFailedError(f"the endpoint answered {error.status_code}") from error
        except Exception as error:  # in mid-stream the errors of the client's HTTP library come through as they are
            # Only the kind is told: messages of the client can quote requests, and with them headers.
            raise ExpertFailedError(f"the endpoint could not be used ({type(error).__name__})") from error
