"""The OpenAPI 3.1 document, made from the route table and the msgspec types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from trimtab import __version__
from trimtab.serve.routes import Route, types_of
from trimtab.serve.types.common import ErrorReply

_REASONS = {
    400: "The request is not possible as asked.", 401: "No API key, or an unknown one.", 403: "This key may not.",
    404: "Nothing of that name.", 408: "The body came too slowly.", 413: "The body is too long.", 415: "The body is not JSON.",
    429: "Too much waits, or the key's limit is reached; see Retry-After.", 431: "The headers are too long.",
    409: "Another one is under way.",
    499: "The request was cancelled.", 500: "Something broke; the log has it.", 501: "An optional package is missing.",
    503: "Starting, restarting or shutting down; see Retry-After.", 504: "It took longer than allowed.",
}  # fmt: skip


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document of a route table."""
    routes = [route for route in routes if route.listed]
    kinds = [*types_of(tuple(routes)), ErrorReply]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    named = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trimtab",
            "version": __version__,
            "description": "An OpenAI-compatible server. Unknown request fields are ignored.",
        },
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(route: Route, path: str, named: dict[type, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if route.reply is not None:
        content = {"application/json": {"schema": named[route.reply]}}
    if route.event is not None:
        content["text/event-stream"] = {"schema": _event(route.event)}
    statuses = {
        400,
        *route.errors,
        *(() if route.access == "open" else (401, 403)),
        *((408, 413, 415, 429) if route.request else ()),
    }
    answers: dict[str, Any] = {str(route.status): {"description": "Done.", "content": content}}
    for status in sorted(statuses):
        answers[str(status)] = {
            "description": _REASONS[status],
            "content": {"application/json": {"schema": named[ErrorReply]}},
        }
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-z0-9]+', '_', path.lower()).rstrip('_')}",
        "summary": route.told,
        "responses": answers,
    }
    if names := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": named[route.request]}}}
    if route.access != "open":
        operation["security"] = [{"key": []}, {}]
    return operation


def _event(kind: type) -> dict[str, Any]:
    """The schema of one server-sent event, as tools for version 3.1 read it: its fields as an object."""
    told = f"JSON of a {kind.__name__} or an ErrorReply; the last of a chat or completion is [DONE]."
    fields = {"event": {"type": "string"}, "data": {"type": "string", "description": told}}
    return {"type": "object", "properties": fields, "required": ["data"]}
