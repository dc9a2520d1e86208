"""`POST /v1/embeddings`, `/tokenize`, `/detokenize`, and what describes the server."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from trimtab.serve.types.chat import Message
from trimtab.serve.types.common import Label, ModelId, Priority, Reply, Request, TokenId, Tool
from trimtab.serve.types.completions import Prompts


class EmbeddingRequest(Request, kw_only=True):
    """Texts to turn into vectors of unit length."""

    model: ModelId
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    pooling: Literal["mean", "last"] | None = None
    user: str | None = None
    priority: Priority | None = None
    cache_salt: Label | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """A vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Reply, kw_only=True):
    """One vector for each input, in order."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


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
