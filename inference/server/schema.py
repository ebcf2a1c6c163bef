"""Requests of OpenAI's API, as far as a composite can answer them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ...modeling.backend import Generation, stop_texts

_PASSED = (
    "frequency_penalty", "logit_bias", "logprobs", "parallel_tool_calls", "presence_penalty", "reasoning_effort",
    "response_format", "tool_choice", "tools", "top_logprobs",
)  # fmt: skip
"""Fields that are passed to endpoints unchanged. Local models use at most the tools, and ignore the other fields."""


StopText = Annotated[str, StringConstraints(max_length=200)]


class RequestBody(BaseModel):
    """Body of a request. Null fields count as missing, since clients send missing fields as null."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class RenderRequest(RequestBody):
    """Texts of answers for the page to show as HTML."""

    texts: list[Annotated[str, StringConstraints(max_length=50_000)]] = Field(max_length=2, fail_fast=True)


class StreamOptions(RequestBody):
    """Options of a streamed answer."""

    include_usage: bool = False


class Extension(RequestBody):
    """Options of a composite beyond OpenAI's API, under the key `expertoken`."""

    model_config = ConfigDict(extra="forbid")

    show: bool = Field(
        default=False,
        description="If true, the response holds the expert, probabilities, failures, cost and seconds of each answer.",
    )
    policy: dict[str, Any] | None = Field(
        default=None, description="Fields of the composite's policy to override for this request."
    )
    remember: bool = Field(
        default=False,
        description="If true, /v1/route keeps its decision as the conversation's last expert, for a caller that sends "
        "the conversation there. The next decision may then stay with that expert.",
    )


class ChatRequest(RequestBody):
    """Body of `POST /v1/chat/completions`. Unknown fields are ignored, as other servers do."""

    model_config = ConfigDict(extra="ignore")

    model: Annotated[str, StringConstraints(max_length=300)]
    # Four megabytes of wrong items would give a million errors, so validation stops at the first.
    messages: list[dict[str, Any]] = Field(min_length=1, fail_fast=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=8)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = Field(None, max_length=4096)  # experts check its content
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: Annotated[str, StringConstraints(max_length=300)] | None = None
    expertoken: Extension = Field(default_factory=Extension)

    @property
    def session(self) -> str | None:
        """Session that the request names, or None."""
        user = (self.metadata or {}).get("user_id")
        return self.prompt_cache_key or (user if isinstance(user, str) and user else None)

    @property
    def include_usage(self) -> bool:
        """True if a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def generation(self, most: int | None, number: int = 0) -> Generation:
        """Return the options of the `number`-th answer, which may have at most `most` tokens."""
        limits = [limit for limit in (self.max_completion_tokens or self.max_tokens, most) if limit is not None]
        extra = {name: value for name in _PASSED if (value := getattr(self, name)) is not None}
        return Generation(
            max_new_tokens=min(limits, default=None),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else (self.seed + number) % 2**63,
            stop=stop_texts(self.stop),
            extra=extra,
        )
