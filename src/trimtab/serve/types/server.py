"""`/tokenize`, `/detokenize`, `/v1/models`, and what describes and steers the server."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from trimtab.serve.types.chat import Message
from trimtab.serve.types.common import ModelId, Reply, Request, TokenId, Tool


class TokenizeRequest(Request, kw_only=True):
    """A text, or a conversation as the chat template renders it."""

    model: ModelId | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class TokenizeReply(Reply, kw_only=True):
    """Token ids, how many, and how many the model takes."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Request, kw_only=True):
    """Token ids to turn into text."""

    tokens: list[TokenId]
    model: ModelId | None = None


class DetokenizeReply(Reply, kw_only=True):
    """Their text."""

    prompt: str


class ModelCard(msgspec.Struct, kw_only=True):
    """A model id that answers: a base, or a base with techniques on it."""

    id: str
    created: int
    owned_by: str
    max_model_len: int
    base: str
    techniques: list[str]
    runs: str
    object: Literal["model"] = "model"


class ModelList(Reply, kw_only=True):
    """All model ids that the caller's key may use."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class LoadRequest(Request, kw_only=True):
    """A model id to add: ``base@spec+spec``."""

    model: ModelId


class Removed(Reply, kw_only=True):
    """A model id, or a stored response, that is gone."""

    id: str
    deleted: bool = True
    object: str = "model"


class Health(Reply, kw_only=True):
    """``ok``, or why not."""

    status: str


class Version(Reply, kw_only=True):
    """Of Trimtab."""

    version: str


class Cancelled(Reply, kw_only=True):
    """A request that was told to end."""

    id: str
    cancelled: bool = True


class Draining(Reply, kw_only=True):
    """No new requests; the server ends when the open ones have."""

    draining: bool
    open_requests: int


class Document(Reply, kw_only=True):
    """An OpenAPI 3.1 document."""

    openapi: str
    info: dict[str, Any]
    paths: dict[str, Any]
