"""Claims of a paper as data: what is stated, where, how it is checked and what came out."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError, TrimtabError

if TYPE_CHECKING:
    from trimtab.model.variant import Model


class Needs(TrimtabError):
    """A check cannot run here: a peer, data, a GPU or a later part is missing. The message is its name."""


#: Pause before a timed product: threads of the other library look out for work for a while after theirs, on the same cores.
SETTLE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one check found: texts for the table, and whether the line holds."""

    predicted: str = ""
    measured: str = ""
    met: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """Why a line is known not to hold: the figure, at least three approaches tried, and the date."""

    figure: str
    tried: tuple[str, ...]
    date: datetime.date

    def __post_init__(self) -> None:
        if len(self.tried) < 3:
            raise SpecError(f"A documented miss names at least three approaches tried; {len(self.tried)} are given.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of what a paper must do here.

    Args:
        id: as ``a1``.
        text: what is claimed.
        needed: the bar.
        check: runs the check; raises `Needs` when something is missing.
        documented: set when the line is known not to hold.
    """

    id: str
    text: str
    needed: str
    check: Callable[[Bench], Outcome]
    documented: Documented | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One printed row of `verify`."""

    paper: int
    id: str
    text: str
    needed: str
    predicted: str
    measured: str
    status: str
    time_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(kw_only=True)
class Bench:
    """What checks share: the built-in model, the texts, and results one check leaves for the next.

    Args:
        data: folder of optional texts (`cfi_calib.txt`, ...), or None.
    """

    data: Path | None = None
    _memory: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Compute a value once and keep it for the other lines."""
        if name not in self._memory:
            self._memory[name] = compute()
        return self._memory[name]

    @property
    def model(self) -> Model:
        """The built-in model in fp32."""
        from trimtab.techniques.apply import load

        return self.once("model", lambda: load("smollm2-135m"))

    @property
    def tables(self) -> Path:
        """The folder of recorded tables: the data folder itself, or ``analyze`` in it or beside it.

        Raises:
            Needs: none of them holds recorded tables.
        """
        from trimtab.measure.recorded.tables import known_tables

        for folder in (self.data, self.data / "analyze", self.data.parent / "analyze") if self.data else ():
            if any((folder / table.path).is_file() for table in known_tables().values()):
                return folder
        raise Needs("data")

    def text(self, name: str) -> str:
        """A text of the optional data folder.

        Raises:
            Needs: the folder or the file is not there.
        """
        path = self.data / f"{name}.txt" if self.data else None
        if path is None or not path.exists():
            raise Needs("data")
        return path.read_text("utf-8")


def run_lines(paper: int, lines: Sequence[Line], bench: Bench) -> Iterator[Row]:
    """Run the checks one after the other and yield their rows as they come."""
    for line in lines:
        start = time.perf_counter()
        outcome = Outcome(met=False)
        try:
            outcome = line.check(bench)
            status = "met" if outcome.met else "not met (documented)" if line.documented else "not met"
        except Needs as missing:
            status = f"needs {missing}"
        yield Row(
            paper=paper,
            id=line.id,
            text=line.text,
            needed=line.needed,
            predicted=outcome.predicted,
            measured=outcome.measured,
            status=status,
            time_s=time.perf_counter() - start,
        )


def summary(rows: Sequence[Row]) -> str:
    """The last line: ``N met, M not met (K documented), J not run``."""
    met = sum(row.status == "met" for row in rows)
    missed = sum(row.status.startswith("not met") for row in rows)
    documented = sum(row.status == "not met (documented)" for row in rows)
    return f"{met} met, {missed} not met ({documented} documented), {len(rows) - met - missed} not run"


def failed(rows: Sequence[Row], *, strict: bool) -> bool:
    """True if verification fails: any plain miss, or with `strict` anything that is not met."""
    return any(row.status != "met" for row in rows) if strict else any(row.status == "not met" for row in rows)
