"""Every endpoint through OpenAI's own client, blocking and asyncio."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import openai
import pytest

Run = Callable[[Callable[[Any], Any]], Any]
ASK = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}  # fmt: skip


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, server: Any) -> Run:
    """Call with a client; a stream comes back as a list."""

    def blocking(work: Callable[[Any], Any]) -> Any:
        plain = openai.DefaultHttpxClient(verify=False)  # reading certificates takes 0.1 s
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=plain) as client:
            found = work(client)
            return list(found) if isinstance(found, openai.Stream) else found

    async def awaiting(work: Callable[[Any], Any]) -> Any:
        plain = openai.DefaultAsyncHttpxClient(verify=False)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=plain
        ) as client:
            found = await work(client)
            return [part async for part in found] if isinstance(found, openai.AsyncStream) else found

    return blocking if request.param == "sync" else lambda work: asyncio.run(awaiting(work))


def test_chat(ask: Run) -> None:
    answer = ask(lambda c: c.chat.completions.create(model="tiny", messages=ASK))
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 15  # 14 bytes and the end token
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 15


def test_chat_stream(ask: Run) -> None:
    chunks = ask(
        lambda c: c.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello, wörld!"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 15
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_continuous_usage(ask: Run) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = ask(lambda c: c.chat.completions.create(model="tiny", messages=ASK, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 15


def test_several_choices_in_one_stream(ask: Run, order: Any) -> None:
    ask_two = [{"role": "user", "content": order(say=["one", "two"])}]
    whole = ask(lambda c: c.chat.completions.create(model="tiny", messages=ask_two, n=2))
    assert [choice.message.content for choice in whole.choices] == ["one", "two"]
    assert whole.usage.completion_tokens == 8
    texts = {0: "", 1: ""}
    for chunk in ask(lambda c: c.chat.completions.create(model="tiny", messages=ask_two, n=2, stream=True)):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "one", 1: "two"}


def test_a_stop_text_across_tokens_never_shows(ask: Run, order: Any) -> None:
    said = [{"role": "user", "content": order(say="abc STOP def")}]
    answer = ask(lambda c: c.chat.completions.create(model="tiny", messages=said, stop=["STOP", "zzz"]))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abc ", "stop")
    chunks = ask(lambda c: c.chat.completions.create(model="tiny", messages=said, stop="STOP", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abc "


def test_log_probabilities(ask: Run, order: Any) -> None:
    said = [{"role": "user", "content": order(say="aé")}]
    answer = ask(lambda c: c.chat.completions.create(model="tiny", messages=said, logprobs=True, top_logprobs=2))
    first, half, _, end = answer.choices[0].logprobs.content
    assert (first.token, first.bytes, first.logprob) == ("a", [97], -0.5)
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("a", -0.5), ("b", -1.5)]
    assert half.bytes == [0xC3]  # half a character: the bytes say what the text cannot
    assert end.token == "<|im_end|>"
    chunks = ask(lambda c: c.chat.completions.create(model="tiny", messages=said, logprobs=True, stream=True))
    streamed = [
        entry.token for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert len(streamed) == 4


def test_length_ends_an_answer(ask: Run) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(lambda c, field=field: c.chat.completions.create(model="tiny", messages=ASK, **{field: 5}))
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(ask: Run, order: Any, stream: bool) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    said = [{"role": "user", "content": order(say=f"Well.\n{call}\n{call}")}]
    found = ask(lambda c: c.chat.completions.create(model="tiny", messages=said, tools=[TOOL], stream=stream))
    if not stream:
        message = found.choices[0].message
        assert message.content == "Well.\n"
        calls = [(made.function.name, made.function.arguments) for made in message.tool_calls]
        assert found.choices[0].finish_reason == "tool_calls"
        assert len({made.id for made in message.tool_calls}) == 2
    else:
        parts: dict[int, list[str]] = {}
        for chunk in found:
            for made in chunk.choices[0].delta.tool_calls or ():
                parts.setdefault(made.index, ["", ""])
                parts[made.index][0] += made.function.name or ""
                parts[made.index][1] += made.function.arguments or ""
        calls = [tuple(part) for part in parts.values()]
        assert found[-1].choices[0].finish_reason == "tool_calls"
    assert calls == [("add", '{"a":1}')] * 2


def test_without_tools_the_same_text_is_text(ask: Run, order: Any) -> None:
    text = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    answer = ask(
        lambda c: c.chat.completions.create(model="tiny", messages=[{"role": "user", "content": order(say=text)}])
    )
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.tool_calls is None


def test_completions(ask: Run) -> None:
    answer = ask(lambda c: c.completions.create(model="tiny", prompt="abc"))
    assert answer.choices[0].text == "Hello, wörld!"
    chunks = ask(
        lambda c: c.completions.create(
            model="tiny", prompt="abc", stream=True, echo=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "abcHello, wörld!"
    assert chunks[-1].usage.prompt_tokens == 3


@pytest.mark.parametrize("prompt", [["a", "b"], [[97], [98, 99]]])
def test_several_prompts(ask: Run, prompt: Any) -> None:
    answer = ask(lambda c: c.completions.create(model="tiny", prompt=prompt, n=2, max_tokens=2, echo=True))
    first, second = (row if isinstance(row, str) else bytes(row).decode() for row in prompt)
    assert [choice.text for choice in answer.choices] == [f"{first}He"] * 2 + [f"{second}He"] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 8


def test_scoring_a_prompt(ask: Run) -> None:
    answer = ask(lambda c: c.completions.create(model="tiny", prompt=[97, 98, 99], max_tokens=0, echo=True, logprobs=1))
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == "abc"
    assert found.tokens == ["a", "b", "c"]
    assert found.token_logprobs == [None, -0.5, -0.5]
    assert found.text_offset == [0, 1, 2]


def test_best_of_counts_what_was_drawn(ask: Run) -> None:
    answer = ask(lambda c: c.completions.create(model="tiny", prompt="abc", best_of=3, max_tokens=4))
    assert len(answer.choices) == 1
    assert answer.usage.completion_tokens == 12


def test_embeddings_come_as_base64_by_default_and_are_of_unit_length(ask: Run) -> None:
    answer = ask(lambda c: c.embeddings.create(model="tiny", input=["abc", "d"]))
    assert [round(sum(x * x for x in row.embedding), 5) for row in answer.data] == [1.0, 1.0]
    assert answer.usage.prompt_tokens == 4
    plain = ask(lambda c: c.embeddings.create(model="tiny", input="abc", encoding_format="float", dimensions=2))
    assert plain.data[0].embedding == [1.0, 0.0]
    coded = ask(lambda c: c.embeddings.create(model="tiny", input=[97, 98, 99], encoding_format="base64"))
    assert len(struct.unpack("<8f", base64.b64decode(coded.data[0].embedding))) == 8


def test_models(ask: Run) -> None:
    found = ask(lambda c: c.models.list()).data
    assert [card.id for card in found] == ["tiny", "tiny@kivi:bits=4"]
    card = ask(lambda c: c.models.retrieve("tiny@kivi:bits=4"))
    assert card.techniques == ["kivi:bits=4"]
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        ask(lambda c: c.models.retrieve("tinny"))


def test_a_technique_is_a_model(ask: Run, server: Any) -> None:
    answer = ask(lambda c: c.chat.completions.create(model="tiny@kivi:bits=4", messages=ASK))
    assert server.messages("Submit", answer.id)[0]["model"] == "tiny@kivi:bits=4"


def test_responses(ask: Run) -> None:
    answer = ask(lambda c: c.responses.create(model="tiny", input="hi", instructions="Be brief.", metadata={"a": "b"}))
    assert (answer.output_text, answer.status, answer.metadata) == ("Hello, wörld!", "completed", {"a": "b"})
    assert answer.usage.output_tokens == 15
    assert answer.usage.input_tokens_details.cached_tokens == 3
    assert ask(lambda c: c.responses.retrieve(answer.id)).output_text == "Hello, wörld!"
    more = ask(lambda c: c.responses.create(model="tiny", input="and?", previous_response_id=answer.id))
    assert more.usage.input_tokens > answer.usage.input_tokens
    ask(lambda c: c.responses.delete(answer.id))
    with pytest.raises(openai.NotFoundError, match="No response"):
        ask(lambda c: c.responses.create(model="tiny", input="and?", previous_response_id=answer.id))


def test_a_response_as_events(ask: Run, order: Any) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    tool = {"type": "function", "name": "add", "parameters": TOOL["function"]["parameters"], "strict": False}
    events = ask(
        lambda c: c.responses.create(model="tiny", input=order(say=f"Well. {call}"), tools=[tool], stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Well. "
    assert kinds[-5:] == [
        "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    done = events[-1].response
    assert [item.type for item in done.output] == ["message", "function_call"]
    assert done.output[1].arguments == '{"a":1}'


def test_a_response_that_was_cut_is_incomplete(ask: Run) -> None:
    answer = ask(lambda c: c.responses.create(model="tiny", input="hi", max_output_tokens=5))
    assert (answer.status, answer.incomplete_details.reason, answer.output_text) == (
        "incomplete",
        "max_output_tokens",
        "Hello",
    )
    events = ask(lambda c: c.responses.create(model="tiny", input="hi", max_output_tokens=5, stream=True))
    assert events[-1].type == "response.incomplete"


def test_a_function_output_goes_back(ask: Run, server: Any) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ]
    assert ask(lambda c: c.responses.create(model="tiny", input=items)).status == "completed"


def test_structured_output_reaches_the_engine(ask: Run, server: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = ask(lambda c: c.chat.completions.create(model="tiny", messages=ASK, response_format=form))
    kind, text = server.messages("Submit", answer.id)[0]["grammar"]
    assert (kind, json.loads(text)) == ("json_schema", schema)
    text_form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    made = ask(lambda c: c.responses.create(model="tiny", input="hi", text=text_form))
    assert server.messages("Submit", made.id)[0]["grammar"][0] == "json_schema"
    chosen = {"type": "function", "function": {"name": "add"}}
    answer = ask(lambda c: c.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], tool_choice=chosen))
    assert server.messages("Submit", answer.id)[0]["grammar"][0] == "lark"


def test_errors_are_openais(ask: Run, order: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs") as caught:
        ask(lambda c: c.chat.completions.create(model="tiny", messages=ASK, top_logprobs=3))
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.RateLimitError, match="full") as limited:
        ask(
            lambda c: c.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": order(refuse=[429, "It is full.", 7.2])}]
            )
        )
    assert limited.value.response.headers["retry-after"] == "8"
    with pytest.raises(openai.InternalServerError, match="broke"):
        ask(
            lambda c: c.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": order(fail="It broke.")}]
            )
        )
    with pytest.raises(openai.NotFoundError):
        ask(lambda c: c.chat.completions.create(model="gpt-4", messages=ASK))


def test_the_clients_own_accumulators_understand_our_streams(server: Any, order: Any) -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    said = order(say=f"Well. {call}")
    plain = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=plain) as client:
        strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
        ask = [{"role": "user", "content": said}]
        with client.chat.completions.stream(model="tiny", messages=ask, tools=[strict], logprobs=True) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.content == "Well. "
        assert message.tool_calls[0].function.parsed_arguments == {"a": 1}
        tool = {"type": "function", "strict": True, **TOOL["function"]}
        with client.responses.stream(model="tiny", input=said, tools=[tool]) as stream:
            final = stream.get_final_response()
        assert final.output_text == "Well. "
        assert final.output[1].parsed_arguments == {"a": 1}
        with client.responses.stream(model="tiny", input="hi") as stream:
            assert (
                "".join(event.delta for event in stream if event.type == "response.output_text.delta")
                == "Hello, wörld!"
            )


def test_parsing_into_a_model(server: Any, order: Any) -> None:
    import pydantic

    class Point(pydantic.BaseModel):
        x: int

    ask = [{"role": "user", "content": order(say='{"x": 3}')}]
    plain = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=plain) as client:
        found = client.chat.completions.parse(model="tiny", messages=ask, response_format=Point)
        assert found.choices[0].message.parsed == Point(x=3)
        made = client.responses.parse(model="tiny", input=order(say='{"x": 3}'), text_format=Point)
        assert made.output_parsed == Point(x=3)
