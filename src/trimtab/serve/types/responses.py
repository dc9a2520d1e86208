"""`POST /v1/responses`: text and function tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from trimtab.serve.types.common import (
    Label,
    Logprob,
    Metadata,
    ModelId,
    Priority,
    Probability,
    Reply,
    Request,
    ServiceTier,
    Temperature,
    ToolChoice,
    Top,
)


class InputPart(msgspec.Struct, kw_only=True):
    """``input_text``, ``output_text`` or ``refusal``."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """A message, a function call of the model, or what a function returned."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function the model may call."""

    type: str
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    """``text``, ``json_object``, or ``json_schema`` with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, kw_only=True):
    """How text comes out."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Request, kw_only=True):
    """Input to answer."""

    model: ModelId
    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Top | None = None
    include: list[str] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None
    priority: Priority | None = None
    service_tier: ServiceTier | None = None
    prompt_cache_key: Label | None = None
    cache_salt: Label | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    image: Any = None
    moderation: Any = None
    context_management: Any = None


class OutputText(msgspec.Struct, kw_only=True):
    """Text of the model."""

    text: str
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[Logprob] = msgspec.field(default_factory=list)
    type: Literal["output_text"] = "output_text"


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """The assistant's message."""

    id: str
    content: list[OutputText]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A function call of the model."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(msgspec.Struct, kw_only=True):
    """Where input tokens came from."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct, kw_only=True):
    """What output tokens were."""

    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class Incomplete(msgspec.Struct, kw_only=True):
    """Why a response is not whole."""

    reason: str


class Response(Reply, kw_only=True):
    """A response, whole or on its way."""

    id: str
    created_at: float
    model: str
    output: list[OutputMessage | OutputCall]
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    tool_choice: Any
    tools: list[FunctionTool]
    parallel_tool_calls: bool
    text: TextConfig
    completed_at: float | None = None
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    previous_response_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    truncation: str = "disabled"
    service_tier: str | None = None
    usage: ResponsesUsage | None = None
    user: str | None = None
    store: bool = True
    background: bool = False
    object: Literal["response"] = "response"


class ResponseEvent(Reply, kw_only=True, omit_defaults=True):
    """One event of a streamed response; which fields it has follows from `type`, as OpenAI defines them."""

    type: str
    sequence_number: int
    response: Response | None = None
    item: OutputMessage | OutputCall | None = None
    part: OutputText | None = None
    item_id: str | None = None
    output_index: int | None = None
    content_index: int | None = None
    delta: str | None = None
    text: str | None = None
    arguments: str | None = None
    name: str | None = None
    logprobs: list[Logprob] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None
