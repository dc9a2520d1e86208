"""The ASGI application: the route table over one front."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from trimtab.serve.call import Call
from trimtab.serve.endpoint import Endpoint
from trimtab.serve.errors import ApiError
from trimtab.serve.front import Answer, HttpFront, Plain
from trimtab.serve.openapi import document
from trimtab.serve.routes import ROUTES, Route


def build_app(front: HttpFront, more: Sequence[Route] = (), table: Sequence[Route] = ROUTES) -> Starlette:
    """Make the application.

    Args:
        front: what the handlers need.
        more: endpoints beside those of `table`.
        table: default: the endpoints of a server of models.
    """
    table = (*table, *more)
    schema = msgspec.json.encode(document(table))

    async def openapi(front: HttpFront, call: Call) -> Answer:
        return Plain(schema, "application/json")

    def endpoint(route: Route) -> Endpoint:
        return Endpoint(front, route if route.handler else dataclasses.replace(route, handler=openapi))

    routes = [StarletteRoute(route.path, endpoint(route), methods=[route.method]) for route in table]
    return Starlette(routes=routes, exception_handlers={HTTPException: _not_routed})


async def _not_routed(request: Request, error: Exception) -> Response:
    """What no route answers."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    told = {
        404: f"There is no {path}. See /openapi.json.",
        405: f"{request.method} is not possible for {path}. See /openapi.json.",
    }
    failed = ApiError(error.status_code, told.get(error.status_code, str(error.detail)), code="unknown_url")
    call = Call(request.scope)
    call.write_log(error.status_code)
    headers = {"x-request-id": call.id, **(error.headers or {})}
    return Response(failed.encoded(), error.status_code, headers, "application/json")
