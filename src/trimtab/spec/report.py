"""What every verb returns: exact counts and real figures, predicted and measured in the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["exact", "measured", "calibrated", "table", "datasheet"]

SCHEMA = 1

#: Unit of every count and figure by name; a name that ends in a unit suffix needs no entry.
UNITS = {
    "kl_nats": "nats",
    "ppl": "",
    "top1_agreement": "",
    "answer_nll_nats": "nats",
    "tokens_per_s": "tokens/s",
    "usd_per_million_tokens": "USD/Mtoken",
    "energy_j_per_token": "J/token",
    "mfu": "",
    "hfu": "",
    "bubble_fraction": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A real number with its band and its origin.

    Args:
        value: P50, or None when there is no source for it; `why` then says so.
        p10, p90: the band; None when there is none.
        unit: unit as printed.
        kind: ``exact | measured | calibrated | table | datasheet``.
        check: the command that checks it.
        why: the reason a value is missing, or the formula and sources.
    """

    value: float | None
    unit: str
    kind: Kind
    p10: float | None = None
    p90: float | None = None
    check: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "value": self.value, "p10": self.p10, "p90": self.p90, "unit": self.unit,
            "kind": self.kind, "check": self.check, "why": self.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRow:
    """One row of the operator table: totals of one op over the phase it is named for.

    `shape` is what it works with (``4096 -> 14336``) and `dtype` the format whose peak bounds it.
    """

    phase: str
    name: str
    kind: str
    count: int
    flops: int
    bytes: int
    time_s: float
    bound: str
    shape: str = ""
    dtype: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `predict` and of `measure`.

    Args:
        source: ``predicted`` or ``measured``.
        plan: the plan as JSON.
        counts: integers, comparable to the unit.
        figures: reals with unit, band and origin.
        observed: counts that depend on data (active neurons, experts touched); apart from `counts`.
        ops: the operator table (predicted only).
        notes: sentences for the reader: what was assumed, what does not fit.
    """

    source: Literal["predicted", "measured"]
    plan: Mapping[str, Any]
    counts: Mapping[str, int]
    figures: Mapping[str, Figure]
    observed: Mapping[str, float] = field(default_factory=dict)
    ops: tuple[OpRow, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, schema 1."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "plan": dict(self.plan),
            "counts": dict(self.counts),
            "figures": {name: figure.to_dict() for name, figure in self.figures.items()},
            "observed": dict(self.observed),
            "ops": [op.to_dict() for op in self.ops],
            "notes": list(self.notes),
        }
