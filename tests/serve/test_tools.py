"""Tool calls in text, the grammars that enforce them, prompts with tools, bytes of tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.errors import ApiError
from trimtab.serve.messages import TokenLogprob
from trimtab.serve.prompts import chat_prompt
from trimtab.serve.sampling import compile_grammar
from trimtab.serve.texts import TokenTexts
from trimtab.serve.tools import ToolParser, calls_grammar, parse_calls, tool_setup
from trimtab.serve.types.chat import ContentPart, Message
from trimtab.serve.types.common import FunctionCall, FunctionDefinition, NamedFunction, ToolCall, ToolChoice

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
ADD = FunctionDefinition(name="add", parameters=SCHEMA, strict=True)
NOW = FunctionDefinition(name="now")
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def parsed(pieces: list[str]) -> list[Any]:
    parser = ToolParser()
    found: list[Any] = [item for piece in pieces for item in parser.push(piece)] + parser.finish()
    out: list[Any] = []
    for item in found:
        item = item if isinstance(item, str) else (item.function.name, item.function.arguments)
        if isinstance(item, str) and out and isinstance(out[-1], str):
            out[-1] += item
        else:
            out.append(item)
    return out


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CALL, [("add", '{"a":1}')]),
        (f"Well.\n{CALL}\n{CALL}\n", ["Well.\n", ("add", '{"a":1}'), ("add", '{"a":1}')]),
        (
            '<tool_call>[{"name": "a"}, {"name": "b", "parameters": {"x": "</>"}}]</tool_call>',
            [("a", "{}"), ("b", '{"x":"</>"}')],
        ),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', [("add", '{"a": 1}')]),  # the closing tag was cut
        ("<tool_call>no call</tool_call> x", ["<tool_call>no call</tool_call> x"]),
        ("<tool_cal", ["<tool_cal"]),
        ("a < b <tool", ["a < b <tool"]),
        ('<tool_call>{"arguments": {}}</tool_call>', ['<tool_call>{"arguments": {}}</tool_call>']),
    ],
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cut_of_the_text_gives_the_same_calls(text: str, found: list[Any], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    assert parsed([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == found


def test_text_that_cannot_be_a_tag_is_not_held_back() -> None:
    parser = ToolParser()
    assert parser.push("a <b") == ["a <b"]
    assert parser.push("x <tool_") == ["x "]


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_no_text_breaks_the_parser(text: str) -> None:
    parse_calls(text)
    parsed([text])


def accepts(grammar: Any, text: str) -> bool:
    """Whether llguidance takes a text as a whole."""
    llguidance = pytest.importorskip("llguidance")
    source = {
        "lark": llguidance.LLMatcher.grammar_from_lark,
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
    }[grammar.kind](grammar.text)
    matcher = llguidance.LLMatcher(_byte_tokenizer(), source)
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def _byte_tokenizer() -> Any:
    import llguidance

    class Bytes:
        eos_token_id = 256
        bos_token_id = None
        tokens = [bytes([byte]) for byte in range(256)] + [b"<eos>"]
        special_token_ids = (256,)

        def __call__(self, text: Any) -> list[int]:
            return list(text if isinstance(text, bytes) else text.encode())

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("required", None, [CALL, f"{CALL}\n{CALL}", CALL.replace("add", "now").replace('{"a": 1}', "{}")], ["hello", CALL.replace('"a": 1', '"a": "x"'), CALL + " x"]),
        ("required", False, [CALL], [f"{CALL}\n{CALL}"]),
        (ToolChoice(type="function", function=NamedFunction(name="add")), None, [CALL], [CALL.replace("add", "now"), "hello", f"{CALL}\n{CALL}"]),
    ],
)  # fmt: skip
def test_a_choice_is_enforced(choice: Any, parallel: bool | None, good: list[str], bad: list[str]) -> None:
    found = tool_setup([ADD, NOW], choice, parallel)
    assert found.grammar is not None
    compile_grammar(found.grammar, "tools")
    assert [text for text in good if not accepts(found.grammar, text)] == []
    assert [text for text in bad if accepts(found.grammar, text)] == []


def test_strict_functions_are_enforced_where_a_call_is_made() -> None:
    grammar = tool_setup([ADD], "auto", None).grammar
    assert grammar is not None
    compile_grammar(grammar, "tools")
    assert accepts(grammar, CALL)
    assert accepts(grammar, "Just text.")
    assert not accepts(grammar, CALL.replace('"a": 1', '"b": 1'))
    assert tool_setup([ADD, NOW], "auto", None).grammar is None  # one is not strict


def test_none_shows_no_tools() -> None:
    assert tool_setup([ADD], "none", None).functions == ()
    with pytest.raises(ApiError, match="twice"):
        tool_setup([ADD, ADD], None, None)


def test_names_and_schemas_cannot_break_out_of_a_grammar() -> None:
    odd = FunctionDefinition(
        name="a.b-c_d",
        parameters={"type": "object", "properties": {'"x\\': {"type": "string"}}, "description": '"} | /.*/'},
    )
    compile_grammar(calls_grammar([odd], parallel=True), "tools")


def test_a_template_without_tools_gets_them_as_a_system_message(tiny_tokenizer: Tokenizer) -> None:
    ask = [Message(role="system", content="Be brief."), Message(role="user", content="1+1?")]
    text = tiny_tokenizer.decode(chat_prompt(tiny_tokenizer, ask, [ADD]))
    assert text.count("<|im_start|>system") == 1
    assert "Be brief." in text
    assert '<tools>\n{"type":"function","function":{"name":"add"' in text


def test_a_template_with_tools_gets_them_as_it_wants_them(tiny_tokenizer: Tokenizer) -> None:
    template = (
        "{% for t in tools %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}|{% endfor %}"
    )
    tokenizer = Tokenizer(tiny_tokenizer.backend, eos_id=257, chat_template=template)
    said = [
        Message(role="developer", content="Be brief."),
        Message(
            role="assistant", tool_calls=[ToolCall(id="1", function=FunctionCall(name="add", arguments='{"a": 7}'))]
        ),
        Message(role="tool", tool_call_id="1", content=[ContentPart(type="text", text="7")]),
    ]
    assert tokenizer.decode(chat_prompt(tokenizer, said, [ADD])) == "add;system:Be brief.|assistant:add(7)|tool:7|"


def test_earlier_calls_are_written_out_for_a_template_that_knows_none(tiny_tokenizer: Tokenizer) -> None:
    said = [
        Message(
            role="assistant", tool_calls=[ToolCall(id="1", function=FunctionCall(name="add", arguments='{"a": 7}'))]
        )
    ]
    text = tiny_tokenizer.decode(chat_prompt(tiny_tokenizer, said))
    assert '<tool_call>\n{"name":"add","arguments":{"a":7}}\n</tool_call>' in text


def test_a_users_text_is_the_templates_text(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ApiError, match="no chat template"):
        chat_prompt(Tokenizer(tiny_tokenizer.backend), [Message(role="user", content="x")])


def test_bytes_of_tokens(tiny_tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tiny_tokenizer)
    assert [texts.token(byte)[1] for byte in range(256)] == [(byte,) for byte in range(256)]
    assert texts.token(257) == ("<|im_end|>", tuple(b"<|im_end|>"))
    found = texts.logprob(TokenLogprob(97, -1.0, ((98, float("-inf")),)))
    assert (found.token, found.top_logprobs[0].logprob) == ("a", -9999.0)


def test_bytes_of_a_real_vocabulary(smollm2_path: Any) -> None:
    from trimtab.runtime.weights.load import read_tokenizer

    tokenizer = read_tokenizer(smollm2_path)
    texts = TokenTexts(tokenizer)
    text = "Naïve café — 漢字 🎈\n\tdef f(x): return x"
    ids = tokenizer.encode(text)
    assert b"".join(bytes(texts.token(index)[1]) for index in ids).decode() == text
    asked = chat_prompt(tokenizer, [Message(role="user", content="hi")], [ADD])
    assert tokenizer.decode(asked).startswith("<|im_start|>system\nYou can call functions.")
