"""From messages to a prompt: roles, content parts, tools and earlier calls, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from trimtab.errors import SpecError
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.decode import unsupported
from trimtab.serve.errors import bad
from trimtab.serve.types.chat import ContentPart, Message
from trimtab.serve.types.common import FunctionDefinition

_RESERVED = {"messages", "add_generation_prompt", "tools", "documents"}
_TOOLS = """You can call functions. Their signatures are in <tools></tools>:
<tools>
{signatures}
</tools>
To call one, answer with its name and arguments as JSON between tags, one pair of tags for each call:
<tool_call>
{{"name": <function name>, "arguments": <arguments as a JSON object>}}
</tool_call>"""


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    functions: Sequence[FunctionDefinition] = (),
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Render and encode a conversation.

    A template that knows no tools gets them as a system message in the form Hermes models were trained on.

    Args:
        tokenizer: with a chat template.
        messages: in order.
        functions: what the model may call.
        variables: what else the template may ask for.
        add_generation_prompt: end with the header of the answer to come.

    Raises:
        ApiError: 400: content that is not text, no template, or the template refuses the messages.
    """
    template = tokenizer.chat_template or ""
    turns = [_turn(message, place, template) for place, message in enumerate(messages)]
    extra = {name: value for name, value in (variables or {}).items() if name not in _RESERVED}
    if functions:
        described = [_described(function) for function in functions]
        if "tools" in template:
            extra["tools"] = described
        else:
            _add_to_system(
                turns, _TOOLS.format(signatures="\n".join(msgspec.json.encode(d).decode() for d in described))
            )
    try:
        return tokenizer.encode_chat(turns, add_generation_prompt=add_generation_prompt, **extra)
    except SpecError as error:
        raise bad(str(error), "messages") from None


def _turn(message: Message, place: int, template: str) -> dict[str, Any]:
    """A message as templates expect it."""
    if message.audio is not None:
        raise unsupported(f"messages[{place}].audio", "Only text is understood and made")
    if message.function_call is not None:
        raise unsupported(f"messages[{place}].function_call", "It was replaced; use tool_calls")
    role = "system" if message.role == "developer" and "developer" not in template else message.role
    turn: dict[str, Any] = {"role": role, "content": _text(message, place)}
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning_content:
        turn["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        calls = [
            {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
            for call in message.tool_calls
        ]
        if "tool_calls" in template:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": made}
                for call, made in zip(message.tool_calls, calls, strict=True)
            ]
        else:
            written = [f"<tool_call>\n{msgspec.json.encode(call).decode()}\n</tool_call>" for call in calls]
            turn["content"] = "\n".join([turn["content"], *written] if turn["content"] else written)
    return turn


def _text(message: Message, place: int) -> str:
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise bad(
                f"'messages[{place}].content' is missing. Only an assistant's message may have none.",
                f"messages[{place}].content",
            )
        return message.refusal or ""
    if isinstance(content, str):
        return content
    return "\n".join(part_text(part, f"messages[{place}].content[{index}]") for index, part in enumerate(content))


def part_text(part: ContentPart, field: str) -> str:
    """Text of a content part.

    Raises:
        ApiError: 400: an image, audio, a file, or no text.
    """
    if part.type not in ("text", "input_text", "output_text", "refusal"):
        raise unsupported(field, f"Its type is {part.type[:40]!r}; only text parts are understood")
    found = part.refusal if part.type == "refusal" else part.text
    if found is None:
        raise bad(f"'{field}.text' is missing. A part of type {part.type} needs it.", f"{field}.text")
    return found


def _arguments(text: str) -> Any:
    """Templates want an object; what does not parse stays text."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text


def _described(function: FunctionDefinition) -> dict[str, Any]:
    found: dict[str, Any] = {"name": function.name, "description": function.description or ""}
    found["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": found}


def _add_to_system(turns: list[dict[str, Any]], text: str) -> None:
    if turns and turns[0]["role"] == "system":
        turns[0]["content"] = f"{turns[0]['content']}\n\n{text}"
    else:
        turns.insert(0, {"role": "system", "content": text})


def text_prompts(tokenizer: Tokenizer, asked: Any, vocab_size: int, field: str) -> list[list[int]]:
    """Token ids of `prompt` or `input`: a text, ids, or several of either.

    Raises:
        ApiError: 400: a mixture, an id out of range, nothing.
    """
    rows: list[Any] = asked if isinstance(asked, list) else [asked]
    if all(isinstance(item, int) for item in rows):
        rows = [rows]
    found: list[list[int]]
    if all(isinstance(row, str) for row in rows):
        found = [tokenizer.encode(str(text), add_special_tokens=True) for text in rows]
    elif all(isinstance(row, list) for row in rows):
        found = rows
    else:
        raise bad(f"'{field}' mixes texts and token ids. Send all texts or all ids.", field)
    for place, ids in enumerate(found):
        if not ids:
            raise bad(f"'{field}' has no token at place {place}. Send at least one character or one id.", field)
        if max(ids) >= vocab_size:
            raise bad(f"'{field}' holds the token id {max(ids)}. Allowed: 0..{vocab_size - 1}.", field)
    return found
