"""Recorded tables: timings other people measured, as columns, from the package or from a folder.

What ships is the CSV itself, compressed, so that unpacking gives the file back to the byte. `data/recorded/tables.toml`
names every table, its origin, its licence and its traps.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import lzma
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.data import root
from trimtab.errors import SpecError, unknown

#: Name of a column -> its values: whole numbers where all are, else floats (an empty cell is nan), else text.
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What is known of a recorded table.

    Args:
        path: its place in a data folder.
        ships: whether it is part of the package.
        what, traps: what the columns mean and what misleads.
        origin: who published it; `copyright`, `licence` and `licence_text` hold for it, `changes` says what was done to it.
    """

    name: str
    path: str
    ships: bool
    what: str
    traps: str
    origin: str
    copyright: str
    licence: str
    licence_text: str
    changes: str


def tables(folder: str | Path | None = None) -> dict[str, Table]:
    """Tables that can be read: those of the package, or those a folder holds.

    Args:
        folder: a data folder laid out as `Table.path` says; None = the package.

    Raises:
        SpecError: the folder does not exist or holds no known table.
    """
    if folder is None:
        return {name: table for name, table in known_tables().items() if table.ships}
    base = Path(folder).expanduser()
    found = {name: table for name, table in known_tables().items() if (base / table.path).is_file()}
    if not found:
        raise SpecError(
            f"{base} holds no recorded table. A data folder has files such as "
            f"{', '.join(table.path for table in list(known_tables().values())[:3])}."
        )
    return found


def load_table(name: str, folder: str | Path | None = None) -> Columns:
    """Read a table.

    Args:
        name: one of `tables(folder)`.
        folder: a data folder; None = the package.

    Raises:
        SpecError: no such table there, or its rows are not a table.
    """
    at_hand = tables(folder)
    if name not in at_hand:
        hint = "" if name not in known_tables() else "It does not ship: give the folder that holds it as `--data`."
        raise unknown("recorded table", name, at_hand, hint)
    if folder is not None:
        path = Path(folder).expanduser() / at_hand[name].path
        return read_columns(path.read_text("utf-8"), str(path))
    return dict(_packed_columns(name))


def load_json(name: str, folder: str | Path) -> Any:
    """Read a table of a data folder that is JSON.

    Raises:
        SpecError: no such table there, or it is not JSON.
    """
    at_hand = tables(folder)
    if name not in at_hand:
        raise unknown("recorded table", name, at_hand)
    path = Path(folder).expanduser() / at_hand[name].path
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SpecError(f"{path} is not JSON: {error}.") from None


def packed_path(name: str) -> Path:
    """File of a table in the package."""
    return root() / "recorded" / f"{name}.csv.xz"


def pack(text: bytes) -> bytes:
    """Compress a CSV; the same bytes come out every time."""
    return lzma.compress(text, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)


def unpack(name: str) -> bytes:
    """The CSV of a table of the package, to the byte."""
    return lzma.decompress(packed_path(name).read_bytes())


def machine_id(device: str) -> str:
    """Machine id of the catalogue for a device name of the tables; a name that is no such name is returned as it is."""
    return _facts()["machines"].get(device, device)


def device_name(machine: str) -> str:
    """Device name the aiconfigurator tables use for a machine id; a name they do not know is returned as it is."""
    return next((name for name, key in _facts()["machines"].items() if key == machine), machine)


def select(columns: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[Any]) -> Columns:
    """The rows a mask or an index picks, of every column."""
    return {name: values[rows] for name, values in columns.items()}


@functools.cache
def known_tables() -> dict[str, Table]:
    """Every table Trimtab knows how to read, whether it ships or not."""
    facts = _facts()
    found = {}
    for name, table in facts["table"].items():
        origin = facts["origin"][table["origin"]]
        found[name] = Table(
            name=name,
            path=table["path"],
            ships=table["ships"],
            what=table["what"],
            traps=table["traps"],
            origin=origin["name"],
            copyright=origin["copyright"],
            licence=origin["licence"],
            licence_text=origin["text"],
            changes=origin["changes"],
        )
    return found


@functools.cache
def _facts() -> dict[str, Any]:
    return tomllib.loads((root() / "recorded" / "tables.toml").read_text("utf-8"))


@functools.cache
def _packed_columns(name: str) -> Columns:
    columns = read_columns(unpack(name).decode("utf-8"), name)
    for values in columns.values():
        values.setflags(write=False)  # shared by all who ask
    return columns


def read_columns(text: str, origin: str) -> Columns:
    """The columns of a CSV with a header.

    Raises:
        SpecError: rows of different lengths, or none; `origin` is named.
    """
    rows = list(csv.reader(io.StringIO(text)))
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise SpecError(
            f"{origin} is not a table: every row needs as many cells as the header, and there must be rows."
        )
    return {name: _column(cells) for name, cells in zip(rows[0], zip(*rows[1:], strict=True), strict=True)}


def _column(cells: tuple[str, ...]) -> npt.NDArray[Any]:
    for convert in (int, _real):
        try:
            return np.array([convert(cell) for cell in cells])
        except ValueError:
            continue
    return np.array(cells)


def _real(cell: str) -> float:
    return float(cell) if cell else float("nan")
