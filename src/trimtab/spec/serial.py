"""A ModelSpec, a format, any frozen value of `trimtab.spec`, as JSON and back.

Values are listed once each in a table, and what holds them names them by number: equal layers are one object again when
they are read. A class is named by the module below `trimtab.spec` that defines it, so a new node or a new kind of format
needs nothing here.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec.model import ModelSpec

#: Of the form written here. A reader refuses newer ones.
VERSION = 1
#: The file in a folder of Trimtab's own that holds the spec and the list of weights.
SPEC_FILE = "trimtab.spec.json"

_PACKAGE = "trimtab.spec"
_NAME = re.compile(r"[a-z_][a-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")


class Table:
    """Values as they are listed, to be written: `rows` is plain JSON."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}
        self._known: dict[int, tuple[object, int]] = {}

    def add(self, value: object) -> Any:
        """What stands for `value` in JSON: itself, a list, or ``{"at": row}``.

        Fields that take no part in equality are left out.

        Raises:
            SpecError: something that is no plain value, tuple or frozen value of `trimtab.spec`.
        """
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, tuple):
            return [self.add(item) for item in value]
        if id(value) not in self._known:
            self._known[id(value)] = value, self._row(value)  # the value is kept: its id stays its own
        return {"at": self._known[id(value)][1]}

    def _row(self, value: object) -> int:
        kind = type(value)
        if not _is_frozen(kind) or not kind.__module__.startswith(f"{_PACKAGE}."):
            raise SpecError(
                f"{kind.__module__}.{kind.__qualname__} cannot be saved. Allowed: frozen dataclasses of {_PACKAGE}, "
                "tuples, numbers and texts."
            )
        row: dict[str, Any] = {"is": f"{kind.__module__.removeprefix(_PACKAGE + '.')}:{kind.__qualname__}"}
        row |= {f.name: self.add(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare and f.init}  # type: ignore[arg-type]
        text = json.dumps(row)
        if text not in self._places:
            self._places[text] = len(self.rows)
            self.rows.append(row)
        return self._places[text]


class Values:
    """Values of a table that was read; each row becomes one object."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], where: str) -> None:
        self._rows, self._where = rows, where
        self._made: dict[int, object] = {}

    def get(self, found: Any) -> Any:
        """The value that `found` stands for.

        Raises:
            SpecError: a class or a field this version does not know, or a table that is broken.
        """
        if isinstance(found, list):
            return tuple(self.get(item) for item in found)
        if not isinstance(found, dict):
            return found
        if "float" in found:
            return float(found["float"])
        at = found.get("at")
        if not isinstance(at, int) or not 0 <= at < len(self._rows):
            raise self._broken(f"it names row {at!r} of {len(self._rows)}")
        if at not in self._made:
            self._made[at] = self._build(at)
        return self._made[at]

    def _build(self, at: int) -> object:
        row = dict(self._rows[at])
        kind = self._kind(str(row.pop("is", "")))
        known = {f.name for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
        if strange := sorted(row.keys() - known):
            raise SpecError(
                f"{self._where}: {kind.__name__} has no field '{strange[0]}' in this version. Use a newer Trimtab."
            )
        self._made[at] = None  # a row inside itself is then found to be no value
        try:
            return kind(**{name: self.get(value) for name, value in row.items()})
        except TypeError as error:
            raise self._broken(str(error)) from None

    def _kind(self, name: str) -> type:
        unknown = SpecError(f"{self._where} holds a '{name}', which this version does not know. Use a newer Trimtab.")
        if not _NAME.fullmatch(name):
            raise unknown
        module, _, kind = name.partition(":")
        try:
            found = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), kind)
        except (ImportError, AttributeError):
            raise unknown from None
        if not _is_frozen(found) or found.__module__ != f"{_PACKAGE}.{module}":
            raise unknown
        return found

    def _broken(self, why: str) -> SpecError:
        return SpecError(f"{self._where} is corrupt: {why}. Convert the model again.")


def _is_frozen(kind: object) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def to_json(value: object) -> dict[str, Any]:
    """A value alone, as plain JSON.

    Raises:
        SpecError: see `Table.add`.
    """
    table = Table()
    root = table.add(value)
    return {"version": VERSION, "root": root, "values": table.rows}


def from_json(data: Mapping[str, Any], where: str = "The JSON") -> Any:
    """The value `to_json` was given.

    Args:
        data: parsed JSON.
        where: the file, for messages.

    Raises:
        SpecError: a newer version, a class or field this version does not know, or a broken table.
    """
    return values_of(data, where).get(data.get("root"))


def values_of(data: Mapping[str, Any], where: str) -> Values:
    """The table of parsed JSON.

    Raises:
        SpecError: a newer version, or no table.
    """
    version, rows = data.get("version"), data.get("values")
    if not isinstance(version, int) or not isinstance(rows, list):
        raise SpecError(f"{where} is corrupt: no version and no table of values. Convert the model again.")
    if version > VERSION:
        raise SpecError(f"{where} is of version {version}; this Trimtab reads up to {VERSION}. Use a newer Trimtab.")
    return Values(rows, where)


def read_saved(folder: Path) -> tuple[ModelSpec, Mapping[str, Any], Values]:
    """The spec of a folder of Trimtab's own, the entries of its weights, and the table both are in.

    Raises:
        SpecError: not such a folder, or broken.
    """
    path = folder / SPEC_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read ({error}). Convert the model again.") from None
    if not isinstance(data, dict) or not isinstance(data.get("weights"), dict):
        raise SpecError(f"{path} is corrupt: no list of weights. Convert the model again.")
    values = values_of(data, str(path))
    spec = values.get(data.get("root"))
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"{path} is corrupt: it holds no model. Convert the model again.")
    return spec, data["weights"], values


def is_saved(path: Path) -> bool:
    """True for a folder of Trimtab's own."""
    return (path / SPEC_FILE).is_file()
