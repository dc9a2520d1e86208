"""The document and the router come from one table, and requests made from the document never break the server."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from trimtab.serve.openapi import document
from trimtab.serve.routes import ROUTES, Route

#: Draining ends the server; tested elsewhere.
_EXCLUDED = ("/admin/drain",)
_QUICK = settings(
    max_examples=3, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
_LONG = settings(_QUICK, max_examples=150, derandomize=False)


def test_every_route_is_documented_and_answers(server: Any) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        described = {(method.upper(), path) for path, operations in paths.items() for method in operations}
        assert described == {(route.method, route.path.replace(":path}", "}")) for route in ROUTES}
        for route in ROUTES:
            if route.path in _EXCLUDED:
                continue
            path = re.sub(r"{\w+(:path)?}", "nothing", route.path)
            answer = client.request(route.method, path, json={} if route.request else None)
            assert answer.status_code != 405
            assert answer.headers["x-request-id"]
            assert (
                str(answer.status_code) in paths[route.path.replace(":path}", "}")][route.method.lower()]["responses"]
            )


def test_every_reference_of_the_document_leads_somewhere() -> None:
    text = document(ROUTES)
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                found.add(node["$ref"].removeprefix("#/components/schemas/"))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(text)
    assert found
    assert found <= set(text["components"]["schemas"])


@pytest.fixture(scope="module")
def api(server: Any) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def _check(case: Any) -> None:
    # An invented model is a 404 and no more; this one leads into the handlers.
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"
    case.validate_response(case.call(timeout=20), checks=_CHECKS)


def _run(api: Any, route: Route, mode: GenerationMode, chosen: settings) -> None:
    operation = api[route.path.replace(":path}", "}")][route.method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @chosen
    def check(case: Any) -> None:
        _check(case)

    check()


_PAIRS = [
    pytest.param(route, mode, id=f"{route.method} {route.path} {mode.value}")
    for route in ROUTES
    if route.path not in _EXCLUDED
    for mode in ([GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if route.request else [GenerationMode.POSITIVE])
]


@pytest.mark.parametrize(("route", "mode"), _PAIRS)
def test_requests_made_from_the_document(api: Any, route: Route, mode: GenerationMode) -> None:
    _run(api, route, mode, _QUICK)


@pytest.mark.parametrize("path", [route.path for route in ROUTES if route.event])
def test_streams_are_what_the_document_says(api: Any, path: str) -> None:
    body = {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
    }
    if path == "/v1/responses":
        del body["prompt"]
    case = api[path]["POST"].Case(body=body, media_type="application/json")
    answer = case.call(timeout=20)
    assert answer.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(answer, checks=_CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("route", "mode"), _PAIRS)
def test_many_requests_made_from_the_document(api: Any, route: Route, mode: GenerationMode) -> None:
    _run(api, route, mode, _LONG)
