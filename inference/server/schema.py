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

# Fields that several APIs share. Four megabytes of wrong items would give a million errors, so validation of a list
# stops at the first.
Model = Annotated[
    str,
    StringConstraints(max_length=300),
    Field(description="Name of the composite, or `composite/expert` for one of its experts."),
]
Messages = Annotated[
    list[dict[str, Any]],
    Field(min_length=1, fail_fast=True, description="Conversation, with its oldest message first."),
]
Stream = Annotated[bool, Field(description="If true, the answer is sent as server-sent events while it is written.")]
MaxTokens = Annotated[
    int | None,
    Field(ge=1, description="Maximum length of the answer in tokens. Default: what the expert's context leaves."),
]
Temperature = Annotated[
    float | None, Field(ge=0, le=2, description="Sampling temperature. 0: greedy. Default: the expert's own.")
]
TopP = Annotated[
    float | None,
    Field(gt=0, le=1, description="Probability mass of the tokens to sample from. Default: the expert's own."),
]
Tools = Annotated[
    Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None,
    Field(description="Functions that the expert may call. Experts that can't call any are skipped."),
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | dict[str, Any] | None,
    Field(description="Whether the expert calls a function, or which one."),
]
ParallelCalls = Annotated[
    bool | None, Field(description="If false, the expert calls one function at a time, where its server supports that.")
]
Metadata = Annotated[
    dict[str, Any] | None, Field(description="Values of the client. `user_id` identifies the session.")
]
CacheKey = Annotated[
    Annotated[str, StringConstraints(max_length=300)] | None,
    Field(description="Id of the session, whose chats stay with an expert where that is cheaper."),
]


_UNCHANGED = "Forwarded to endpoints unchanged. Experts in the server's own process ignore it."


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

    include_usage: bool = Field(default=False, description="If true, the stream ends with the counts of tokens.")


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


OURS = "Options of the composite, beyond the API."


class ChatRequest(RequestBody):
    """Body of `POST /v1/chat/completions`. Unknown fields are ignored, as other servers do."""

    model_config = ConfigDict(extra="ignore")

    model: Model
    messages: Messages
    stream: Stream = False
    stream_options: StreamOptions | None = Field(None, description="Options of a streamed answer.")
    n: int = Field(1, ge=1, le=8, description="Number of answers, all by the expert of one decision.")
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Seed for sampling. Default: random.")
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = Field(
        None, description="Texts that end the answer before them."
    )
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description=_UNCHANGED)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description=_UNCHANGED)
    logit_bias: dict[str, Any] | None = Field(None, max_length=4096, description=_UNCHANGED)
    logprobs: bool | None = Field(None, description=_UNCHANGED)
    top_logprobs: int | None = Field(None, ge=0, le=20, description=_UNCHANGED)
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: ParallelCalls = None
    response_format: dict[str, Any] | None = Field(
        None, description="Format of the answer. Experts that can't keep to a JSON schema are skipped."
    )
    reasoning_effort: str | None = Field(None, description=_UNCHANGED)
    metadata: Metadata = None
    prompt_cache_key: CacheKey = None
    expertoken: Extension = Field(default_factory=Extension, description=OURS)

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
