"""`POST /v1/embeddings`."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from trimtab.serve.types.common import Label, ModelId, Priority, Reply, Request
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
