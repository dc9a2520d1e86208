"""What several endpoints share: errors, usage, sampling fields, response formats, tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

#: Whole numbers that travel as 64 bits.
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
Probability = Annotated[float, Meta(gt=0.0, le=1.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Repetition = Annotated[float, Meta(gt=0.0, le=100.0)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
Top = Annotated[int, Meta(ge=0, le=20)]
Stop = (
    Annotated[str, Meta(max_length=1024)] | Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=16)]
)
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Priority = Annotated[int, Meta(ge=-100, le=100)]
Label = Annotated[str, Meta(max_length=512)]
ModelId = Annotated[str, Meta(min_length=1, max_length=1024)]
Metadata = Annotated[dict[str, Label], Meta(max_length=16)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority", "fast", "standard_only"]


class Reply(msgspec.Struct, kw_only=True):
    """Base of answers."""


class Request(msgspec.Struct, kw_only=True):
    """Base of requests; unknown fields are ignored."""


class ErrorBody(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    """Every answer with a status of 400 or more."""

    error: ErrorBody


class PromptDetails(msgspec.Struct):
    """`cached_tokens` came from the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = msgspec.field(default_factory=PromptDetails)


class StreamOptions(msgspec.Struct, kw_only=True):
    """`include_usage`: a last chunk with the usage; `continuous_usage_stats`: in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True):
    """A named JSON schema; it is enforced, `strict` or not."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """``text``, ``json_object``, or ``json_schema`` with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's field: exactly one of a JSON schema, a regex, a Lark grammar or a list of answers."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool: only functions are known."""

    type: str
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    """The name of a function."""

    name: str


class ToolChoice(msgspec.Struct, kw_only=True):
    """Make the model call this function."""

    type: str
    function: NamedFunction | None = None
    name: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """A call: arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A function call in a message."""

    id: str
    function: FunctionCall
    type: str = "function"


class SamplingFields(Request, kw_only=True):
    """Fields of chat and completion requests that decide how tokens are drawn."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    seed: Int64 | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Priority | None = None
    service_tier: ServiceTier | None = None
    cache_salt: Label | None = None
    prompt_cache_key: Label | None = None
    metadata: Metadata | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None


class TopLogprob(msgspec.Struct):
    """One likely token in the place of another."""

    token: str
    logprob: float
    bytes: list[int] | None


class Logprob(msgspec.Struct):
    """A token, the log of its probability, and the likeliest in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]
