"""Every request field: what reaches the engine, and what is refused and how."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from trimtab.serve.decode import UNSUPPORTED, decode
from trimtab.serve.errors import ApiError
from trimtab.serve.types.chat import ChatRequest

ASK = [{"role": "user", "content": "hi"}]


def chat(server: Any, **fields: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **fields})


def submitted(server: Any, **fields: Any) -> dict[str, Any]:
    answer = chat(server, **fields)
    assert answer.status_code == 200, answer.text
    return server.messages("Submit", answer.json()["id"])[0]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        (
            {"temperature": 2, "top_p": 0.5, "top_k": 7, "min_p": 0.1},
            {"temperature": 2.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1},
        ),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": ["x", "y", "x"], "stop_token_ids": [1]}, {"stop": ["x", "y"], "stop_token_ids": [1]}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6, "min_tokens": 2}, {"max_tokens": 6, "min_tokens": 2}),
        ({"ignore_eos": True, "skip_special_tokens": False}, {"ignore_eos": True, "skip_special_tokens": False}),
        ({"n": 3}, {"n": 3, "best_of": 3}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": [[5, -100.0], [7, 1.5]]}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
        ({}, {"temperature": 1.0, "top_p": 1.0, "logprobs": None, "seed": None}),
    ],
)
def test_sampling_fields_reach_the_engine(server: Any, fields: dict[str, Any], told: dict[str, Any]) -> None:
    got = submitted(server, **fields)["sampling"]
    assert {name: got[name] for name in told} == told


def test_without_a_limit_the_answer_may_fill_the_context(server: Any) -> None:
    got = submitted(server)
    assert got["sampling"]["max_tokens"] == 4096 - 21


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"priority": 5}, 5),
        ({"service_tier": "flex"}, 10),
        ({"service_tier": "priority"}, -10),
        ({"service_tier": "auto"}, 0),
    ],
)
def test_priority(server: Any, fields: dict[str, Any], told: int) -> None:
    assert submitted(server, **fields)["priority"] == told


def test_prefixes_are_shared_within_a_salt_only(server: Any) -> None:
    plain, again = submitted(server)["salt"], submitted(server)["salt"]
    mine, other = submitted(server, cache_salt="me")["salt"], submitted(server, prompt_cache_key="you")["salt"]
    assert plain == again
    assert len({plain, mine, other}) == 3


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark"),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, "lark"),
    ],
)
def test_grammars(server: Any, fields: dict[str, Any], kind: str) -> None:
    assert submitted(server, **fields)["grammar"][0] == kind


def test_plain_formats_have_no_grammar(server: Any) -> None:
    assert submitted(server, response_format={"type": "text"})["grammar"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "safety_identifier": "x", "verbosity": "low", "reasoning_effort": "low"},
        {"modalities": ["text"], "audio": None, "functions": [], "prediction": {"type": "content", "content": "x"}},
        {"something": {"unknown": 1}},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "2"}]},
    ],
)  # fmt: skip
def test_taken(server: Any, fields: dict[str, Any]) -> None:
    assert chat(server, **fields).status_code == 200


def test_unknown_fields_are_named_in_the_debug_log_without_their_values(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trimtab.serve"):
        decode(b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "wobble": "secret"}', ChatRequest)
    assert "wobble" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 3}, "temperature", "<= 2.0"),
        ({"temperature": "hot"}, "temperature", "got str"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"n": 0}, "n", ">= 1"),
        ({"stop": [""]}, "stop", "empty"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "0..258"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"max_tokens": 0}, "max_tokens", "1 or more"),
        ({"max_tokens": 5000}, "max_tokens", "at most"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "more than"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"messages": []}, "messages", ">= 1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages[0].content[0]", "image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0]", "input_audio"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"web_search_options": {"a": 1}}, "web_search_options", "network"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "functions"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "Allowed: f"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}}, "response_format", "cannot be enforced"),
        ({"structured_outputs": {"regex": "a("}}, "response_format", "cannot be enforced"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence_that_names_the_field(
    server: Any, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = chat(server, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": [300]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a" * 5000}, "prompt"),
        ("/v1/responses", {"input": "a" * 5000}, "input"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5000}, "max_output_tokens"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, "dimensions"),
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/responses", {"input": "a", "background": True}, "background"),
        ("/v1/responses", {"input": "a", "conversation": "c"}, "conversation"),
        ("/v1/responses", {"input": "a", "prompt": {"id": "p"}}, "prompt"),
        ("/v1/responses", {"input": "a", "truncation": "auto"}, "truncation"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
    ],
)
def test_refused_elsewhere(server: Any, path: str, fields: dict[str, Any], param: str) -> None:
    with server.client() as client:
        answer = client.post(path, json={"model": "tiny", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_every_unsupported_field_has_an_endpoint_that_names_it(field: str) -> None:
    from trimtab.serve.routes import ROUTES

    kinds = [route.request for route in ROUTES if route.request and field in route.request.__struct_fields__]
    if field == "prompt":  # the text itself, elsewhere
        kinds = [kind for kind in kinds if "instructions" in kind.__struct_fields__]
    assert kinds
    bodies = {"messages": '[{"role": "user", "content": "x"}]', "input": '"x"', "prompt": '"x"'}
    for kind in kinds:
        bodies = {
            name: value
            for name, value in bodies.items()
            if name != "prompt" or "instructions" not in kind.__struct_fields__
        }
        needed = ", ".join(
            f'"{name}": {value}' for name, value in bodies.items() if name in kind.__struct_fields__ and name != field
        )
        value = '"x"' if field == "suffix" else "true"
        with pytest.raises(ApiError, match=f"'{field}' is not supported"):
            decode(f'{{"model": "m", {needed}, "{field}": {value}}}'.encode(), kind)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": "\\ud800"}', b"[" * 100_000, b'{"messages": ' + b"[" * 100_000]
)
def test_bodies_that_are_no_request(server: Any, body: bytes) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_tokens_and_back(server: Any) -> None:
    with server.client() as client:
        found = client.post("/tokenize", json={"model": "tiny", "prompt": "aé", "return_token_strs": True}).json()
        assert (found["tokens"], found["count"], found["max_model_len"]) == ([97, 0xC3, 0xA9], 3, 4096)
        assert found["token_strs"][0] == "a"
        assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "aé"}
        chat_ids = client.post("/tokenize", json={"messages": ASK}).json()["tokens"]
        assert chat_ids[0] == 256
