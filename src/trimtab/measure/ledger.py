"""The ledger: every measurement with the prediction made before it, in one SQLite file that survives a killed process.

A row is written, prediction included, before anything runs, and completed when it is done; a row of a process that died
reads as interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec.machine import home
from trimtab.spec.report import Report

SCHEMA = 1
_CREATE = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    started_utc TEXT NOT NULL,
    finished_utc TEXT,
    pid INTEGER NOT NULL,
    boot TEXT NOT NULL,
    version TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed')),
    model TEXT NOT NULL,
    techniques TEXT NOT NULL,
    plan TEXT NOT NULL,
    predicted TEXT NOT NULL,
    measured TEXT,
    error TEXT
)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row.

    Args:
        state: ``running``, ``done``, ``failed`` or ``interrupted`` (its process is gone).
        predicted, measured: reports as JSON; measured is None until done.
        version: of the Trimtab that made it.
    """

    id: int
    started_utc: str
    finished_utc: str | None
    state: str
    model: str
    techniques: str
    plan: Mapping[str, Any]
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any] | None
    error: str | None
    version: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Ledger:
    """The runs of this user.

    Args:
        path: of the file; default: ``ledger.sqlite`` in `home()`.

    Raises:
        SpecError: the file is not a ledger, or of a newer version of Trimtab.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or home() / "ledger.sqlite"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as database:
                version = database.execute("PRAGMA user_version").fetchone()[0]
                if version > SCHEMA:
                    raise SpecError(f"{self.path} was written by a newer Trimtab (schema {version}). Update Trimtab.")
                database.execute(_CREATE)
                database.execute(f"PRAGMA user_version = {SCHEMA}")
        except sqlite3.DatabaseError as error:
            raise SpecError(f"{self.path} is not a ledger ({error}). Move it away; a new one is made.") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=30)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            with database:
                yield database
        finally:
            database.close()

    def start(self, predicted: Report) -> int:
        """Write a row before its run and return its id."""
        from trimtab import __version__

        plan = dict(predicted.plan)
        row = (
            _now(), os.getpid(), _boot(), __version__, "running", str(plan["model"]),
            " ".join(plan["techniques"]), json.dumps(plan), json.dumps(predicted.to_dict()),
        )  # fmt: skip
        columns = "started_utc, pid, boot, version, state, model, techniques, plan, predicted"
        with self._open() as database:
            cursor = database.execute(f"INSERT INTO runs ({columns}) VALUES ({', '.join('?' * len(row))})", row)
            return int(cursor.lastrowid or 0)

    def finish(self, run: int, measured: Report) -> None:
        """Complete a row."""
        with self._open() as database:
            database.execute(
                "UPDATE runs SET state = 'done', finished_utc = ?, measured = ? WHERE id = ?",
                (_now(), json.dumps(measured.to_dict()), run),
            )

    def fail(self, run: int, error: BaseException) -> None:
        """Say why a row has no measurement."""
        with self._open() as database:
            database.execute(
                "UPDATE runs SET state = 'failed', finished_utc = ?, error = ? WHERE id = ?",
                (_now(), f"{type(error).__name__}: {error}", run),
            )

    def runs(self) -> list[Run]:
        """Every row, newest first."""
        columns = "id, started_utc, finished_utc, state, model, techniques, plan, predicted, measured, error, version, pid, boot"
        with self._open() as database:
            rows = database.execute(f"SELECT {columns} FROM runs ORDER BY id DESC").fetchall()
        return [_run(row) for row in rows]


def _run(row: tuple[Any, ...]) -> Run:
    *facts, pid, boot = row
    state = facts[3]
    if state == "running" and (boot != _boot() or not Path(f"/proc/{pid}").exists()):
        state = "interrupted"
    return Run(
        id=facts[0],
        started_utc=facts[1],
        finished_utc=facts[2],
        state=state,
        model=facts[4],
        techniques=facts[5],
        plan=json.loads(facts[6]),
        predicted=json.loads(facts[7]),
        measured=json.loads(facts[8]) if facts[8] else None,
        error=facts[9],
        version=facts[10],
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _boot() -> str:
    """Tells boots apart, so that a process id of yesterday is not taken for a live one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
