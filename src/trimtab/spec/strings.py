"""Spec strings: ``name[:key=value{,key=value}]``, lists ``1|16|32``, anything else in quotes, ``spec+spec`` composed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.errors import SpecError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")
_PLAIN = re.compile(r"[A-Za-z0-9_.|:/@~-]*\Z")


@dataclass(frozen=True, slots=True)
class PartString:
    """A parsed spec string: the part's name and its parameters as text."""

    name: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        if not self.values:
            return self.name
        return f"{self.name}:{','.join(f'{key}={quote(value)}' for key, value in self.values.items())}"


def quote(value: str) -> str:
    """Quote a value if it holds anything a plain value may not.

    >>> quote("4"), quote("a,b")
    ('4', '"a,b"')
    """
    if _PLAIN.match(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _split(text: str, separator: str) -> list[str]:
    """Split at `separator` outside quotes."""
    parts, current, quoted, escaped = [], [], False, False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\" and quoted:
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == separator and not quoted:
            parts.append("".join(current))
            current = []
            continue
        current.append(char)
    if quoted:
        raise SpecError(f"'{text}': a quote is not closed. Write key=\"value\".")
    parts.append("".join(current))
    return parts


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


def parse(text: str) -> PartString:
    """Parse one spec string; ``_`` and ``-`` in the name are the same.

    Raises:
        SpecError: it is not ``name[:key=value{,key=value}]``.

    >>> parse("kivi:bits=2,group=32")
    PartString(name='kivi', values={'bits': '2', 'group': '32'})
    """
    name, colon, rest = text.strip().partition(":")
    if not _NAME.match(name):
        raise SpecError(
            f"'{text}' is not a spec string. Write name:key=value,key=value, for example rtn:bits=4,group=32."
        )
    values: dict[str, str] = {}
    for item in _split(rest, ",") if colon else []:
        key, equals, value = item.strip().partition("=")
        if not equals or not key:
            raise SpecError(f"'{text}': '{item}' is not key=value. Write for example {name}:bits=4.")
        if key in values:
            raise SpecError(f"'{text}': {key} is given twice. Give it once.")
        values[key.replace("-", "_")] = _unquote(value.strip())
    return PartString(name.replace("_", "-"), values)


def parse_composition(text: str) -> tuple[PartString, ...]:
    """Parse ``spec+spec`` into its parts.

    Raises:
        SpecError: a part is not a spec string.
    """
    return tuple(parse(part) for part in _split(text, "+"))
