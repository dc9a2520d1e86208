"""Tool calls in the text of a model: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, as Hermes, Qwen and
SmolLM2 write them, and the grammars that make a model write them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from trimtab.serve.decode import unsupported
from trimtab.serve.errors import bad
from trimtab.serve.messages import Grammar
from trimtab.serve.sampling import checked
from trimtab.serve.types.common import FunctionCall, FunctionDefinition, ToolCall, ToolChoice

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
#: Longest text of one call in characters; beyond, it is shown as text.
_LONGEST = 256 << 10


@dataclass(frozen=True, slots=True)
class ToolSetup:
    """What a request says about tools.

    Attributes:
        functions: shown to the model; empty where `tool_choice` is none.
        grammar: what the engine must enforce.
        parse: look for calls in the text.
    """

    functions: tuple[FunctionDefinition, ...] = ()
    grammar: Grammar | None = None
    parse: bool = False


def tool_setup(
    functions: Sequence[FunctionDefinition], choice: str | ToolChoice | None, parallel: bool | None
) -> ToolSetup:
    """Decide what is shown, parsed and enforced.

    ``required`` and a named function are enforced: the answer is calls and nothing else. ``auto`` is enforced where every
    function is strict: the answer is calls from its first character on, or text that does not begin with ``<``.

    Raises:
        ApiError: 400: a choice without tools, an unknown function, two of one name.
    """
    names = [function.name for function in functions]
    if len(set(names)) != len(names):
        raise bad("'tools' names a function twice. Names must differ.", "tools")
    if isinstance(choice, ToolChoice):
        if choice.type != "function":
            raise unsupported("tool_choice.type", "Only functions can be chosen")
        name = choice.function.name if choice.function else choice.name
        if name not in names:
            raise bad(
                f"'tool_choice' names the function {str(name)[:80]!r}. Allowed: {', '.join(names) or 'none, for there are no tools'}.",
                "tool_choice",
            )
        chosen = tuple(function for function in functions if function.name == name)
        return ToolSetup(tuple(functions), calls_grammar(chosen, parallel=False), parse=True)
    if not functions:
        if choice == "required":
            raise bad("'tool_choice' is required, but there are no tools. Send tools.", "tool_choice")
        return ToolSetup()
    if choice == "none":
        return ToolSetup()
    every = parallel is not False
    if choice == "required":
        return ToolSetup(tuple(functions), calls_grammar(functions, parallel=every), parse=True)
    strict = all(function.strict for function in functions)
    grammar = calls_grammar(functions, parallel=every, or_text=True) if strict else None
    return ToolSetup(tuple(functions), grammar, parse=True)


def calls_grammar(functions: Sequence[FunctionDefinition], *, parallel: bool, or_text: bool = False) -> Grammar:
    """A Lark grammar (llguidance's dialect) for calls of `functions`, one after another if `parallel`."""
    many = "(call more*)" if parallel else "call"
    lines = [f"start: {many}" + (" | TEXT" if or_text else "")]
    lines += [f'call: "{_OPEN}\\n" body "\\n{_CLOSE}"', 'more: "\\n" call']
    lines.append("body: " + " | ".join(f"body_{place}" for place in range(len(functions))))
    for place, function in enumerate(functions):
        head = msgspec.json.encode(f'{{"name": "{function.name}", "arguments": ').decode()
        schema = msgspec.json.encode(function.parameters or {"type": "object"}).decode()
        lines.append(f'body_{place}: {head} args_{place} "}}"')
        lines.append(f"args_{place}: %json {schema}")
    if or_text:
        lines.append(r"TEXT: /[^<](.|\n)*/")
    return checked(Grammar("lark", "\n".join(lines) + "\n"), "tools")


def new_call(name: str, arguments: str) -> ToolCall:
    """A call with an id of its own."""
    return ToolCall(id=f"call_{secrets.token_hex(12)}", function=FunctionCall(name=name, arguments=arguments))


class ToolParser:
    """Finds calls in text that comes in pieces; text outside them passes through.

    What may be the beginning of a tag is held back. Between tags stands an object or a list of objects; what is neither
    is passed through as text, tags included.

    Attributes:
        found: whether any call was found.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self.found = False

    def push(self, text: str) -> list[str | ToolCall]:
        """Take a piece, return texts and calls that are now certain, in order."""
        self._held += text
        out: list[str | ToolCall] = []
        while True:
            tag = _CLOSE if self._inside else _OPEN
            place = self._held.find(tag, 0)
            if place < 0:
                break
            before, self._held = self._held[:place], self._held[place + len(tag) :]
            out += self._call(before, closed=True) if self._inside else self._text(before)
            self._inside = not self._inside
        if self._inside:
            if len(self._held) > _LONGEST:
                out.append(_OPEN + self._held)
                self._held, self._inside = "", False
        else:
            keep = next(
                (n for n in range(min(len(self._held), len(_OPEN) - 1), 0, -1) if _OPEN.startswith(self._held[-n:])), 0
            )
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            out += self._text(ready)
        return out

    def finish(self) -> list[str | ToolCall]:
        """Return what was held back: a call without its closing tag, or text."""
        held, self._held = self._held, ""
        if self._inside:
            self._inside = False
            return self._call(held, closed=False)
        return [held] if held else []

    def _text(self, text: str) -> list[str | ToolCall]:
        # Line breaks between calls are layout, not an answer.
        return [text] if text and not (self.found and not text.strip()) else []

    def _call(self, body: str, *, closed: bool) -> list[str | ToolCall]:
        calls = parse_calls(body)
        if calls is None:
            return [_OPEN + body + (_CLOSE if closed else "")]
        self.found = True
        return [new_call(name, arguments) for name, arguments in calls]


def parse_calls(body: str) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON text) of each call between two tags; None if it is no call."""
    try:
        value = msgspec.json.decode(body.strip())
    except (msgspec.DecodeError, RecursionError):
        return None
    found = [_one(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in found if call] if found and all(found) else None


def _one(item: Any) -> tuple[str, str] | None:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    arguments = item.get("arguments", item.get("parameters", {}))
    return item["name"], arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
