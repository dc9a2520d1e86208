"""A sequence of a store, and a state of one to come back to."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.runtime.cache.placing import Steady
from trimtab.runtime.cache.rows import Row


@dataclass(frozen=True, slots=True)
class Mark:
    """A state of a sequence to come back to; free it by `KVStore.release`."""

    seq: int
    rows: tuple[tuple[Row, ...], ...]
    ended: bool


class Seq:
    """A sequence of one store.

    Attributes:
        ended: policies have been told that its prompt has ended.
    """

    __slots__ = ("_held", "_steady", "ended", "id", "spec_hash")

    def __init__(self, id: int, spec_hash: str, rows: list[list[Row]], ended: bool = False) -> None:
        self.id, self.spec_hash, self._held, self.ended = id, spec_hash, rows, ended
        self._steady: Steady | None = None

    @property
    def _rows(self) -> list[list[Row]]:
        """The rows of every layer, up to date."""
        if self._steady is not None:
            self._steady.catch_up(self._held)
            self._steady = None
        return self._held

    @_rows.setter
    def _rows(self, rows: list[list[Row]]) -> None:
        self._held, self._steady = rows, None

    @property
    def length(self) -> int:
        """Tokens every layer has seen."""
        return self._rows[-1][0].seen if self._held else 0
