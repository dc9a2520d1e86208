"""The one table of endpoints: the router, the OpenAPI document and the tests are made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.serve.front import Answer
from trimtab.serve.handlers import chat, completions, embeddings, responses, server
from trimtab.serve.types.chat import ChatChunk, ChatReply, ChatRequest
from trimtab.serve.types.common import Reply, Request
from trimtab.serve.types.completions import CompletionReply, CompletionRequest
from trimtab.serve.types.embeddings import EmbeddingReply, EmbeddingRequest
from trimtab.serve.types.responses import Response, ResponseEvent, ResponsesRequest
from trimtab.serve.types.server import (
    Cancelled,
    DetokenizeReply,
    DetokenizeRequest,
    Document,
    Draining,
    Health,
    LoadRequest,
    ModelCard,
    ModelList,
    Removed,
    TokenizeReply,
    TokenizeRequest,
    Version,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An endpoint.

    Args:
        method, path: of HTTP; ``{name}`` is a part of the path, ``{name:path}`` may hold slashes.
        handler: ``handler(front, call[, request])``.
        reply: type of the JSON answer; None = plain text.
        request: type of the JSON body; None = no body.
        event: type of one streamed event, if it can stream.
        access: ``open`` to all, needs a ``key``, or an ``admin`` key.
        status: of the answer.
        errors: statuses beyond those every route may give.
        engine: whether its work is the engine's; such a request is refused while there is none.
        listed: whether the OpenAPI document has it.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Callable[..., Awaitable[Answer]] | None
    reply: type | None
    request: type[Request] | None = None
    event: type[Reply] | None = None
    access: Literal["open", "key", "admin"] = "key"
    status: int = 200
    errors: tuple[int, ...] = ()
    summary: str = ""
    engine: bool = True
    listed: bool = True

    @property
    def told(self) -> str:
        """One line of what it does."""
        return self.summary or (self.handler.__doc__ or "").strip().splitlines()[0]


#: Statuses of routes that make the engine work.
_WORK = (404, 429, 499, 500, 501, 503, 504)

ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/chat/completions", handler=chat.chat, request=ChatRequest, reply=ChatReply,
        event=ChatChunk, errors=_WORK,
    ),
    Route(
        method="POST", path="/v1/completions", handler=completions.completions, request=CompletionRequest,
        reply=CompletionReply, event=CompletionReply, errors=_WORK,
    ),
    Route(
        method="POST", path="/v1/responses", handler=responses.responses, request=ResponsesRequest, reply=Response,
        event=ResponseEvent, errors=_WORK,
    ),
    Route(method="GET", path="/v1/responses/{id}", handler=responses.stored, reply=Response, errors=(404,)),
    Route(method="DELETE", path="/v1/responses/{id}", handler=responses.forget, reply=Removed, errors=(404,)),
    Route(
        method="POST", path="/v1/embeddings", handler=embeddings.embeddings, request=EmbeddingRequest,
        reply=EmbeddingReply, errors=_WORK,
    ),
    Route(method="GET", path="/v1/models", handler=server.models, reply=ModelList, errors=(503,)),
    Route(method="GET", path="/v1/models/{model:path}", handler=server.model, reply=ModelCard, errors=(404, 503)),
    Route(method="POST", path="/v1/requests/{id}/cancel", handler=server.cancel, reply=Cancelled, errors=(404,)),
    Route(
        method="POST", path="/tokenize", handler=server.tokenize, request=TokenizeRequest, reply=TokenizeReply,
        errors=(404, 503),
    ),
    Route(
        method="POST", path="/detokenize", handler=server.detokenize, request=DetokenizeRequest, reply=DetokenizeReply,
        errors=(404, 503),
    ),
    Route(method="GET", path="/health", handler=server.ready, reply=Health, access="open", errors=(503,)),
    Route(method="GET", path="/health/ready", handler=server.ready, reply=Health, access="open", errors=(503,)),
    Route(method="GET", path="/health/live", handler=server.live, reply=Health, access="open"),
    Route(method="GET", path="/version", handler=server.version, reply=Version, access="open"),
    Route(method="GET", path="/metrics", handler=server.metrics, reply=None),
    Route(method="POST", path="/admin/drain", handler=server.drain, reply=Draining, access="admin"),
    Route(
        method="POST", path="/admin/models", handler=server.load, request=LoadRequest, reply=ModelCard, access="admin",
        status=201, errors=(404, 413, 429, 503),
    ),
    Route(
        method="DELETE", path="/admin/models/{model:path}", handler=server.unload, reply=Removed, access="admin",
        errors=(404, 503),
    ),
    Route(method="GET", path="/openapi.json", handler=None, reply=Document, access="open", summary="This document."),
)  # fmt: skip


def types_of(routes: tuple[Route, ...]) -> list[Any]:
    """Every type that the table names."""
    found = [kind for route in routes for kind in (route.request, route.reply, route.event) if kind is not None]
    return list(dict.fromkeys(found))
