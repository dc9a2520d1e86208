"""The one table: baseline and techniques, predicted | measured for every column, then quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimtab.spec.report import Report
from trimtab.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One row: what was run, what was expected of it and what came out."""

    label: str
    predicted: Report
    measured: Report


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    source: str  # count or figure
    name: str
    show: Callable[[float], str]


#: Columns that are both predicted and measured.
PAIRED = (
    _Column("TTFT", "figures", "ttft_s", format_seconds),
    _Column("TPOT", "figures", "tpot_s", format_seconds),
    _Column("weights", "counts", "weight_bytes", format_bytes),
    _Column("cache", "counts", "kv_bytes", format_bytes),
)
#: Columns that are only measured.
QUALITY = (("KL", "kl_nats"), ("perplexity", "ppl"))


def value_of(report: Report, source: str, name: str) -> float | None:
    """A count or a figure's value; None when the report has none."""
    if source == "counts":
        return report.counts.get(name)
    figure = report.figures.get(name)
    return None if figure is None else figure.value


def table_cells(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Return (titles, rows of texts)."""
    titles = (
        [""] + [f">{column.title} predicted | measured" for column in PAIRED] + [f">{title}" for title, _ in QUALITY]
    )
    body = []
    for row in rows:
        cells = [row.label]
        for column in PAIRED:
            pair = [value_of(report, column.source, column.name) for report in (row.predicted, row.measured)]
            cells.append(" | ".join("-" if value is None else column.show(value) for value in pair))
        for _, name in QUALITY:
            figure = row.measured.figures.get(name)
            cells.append(
                "-"
                if figure is None or figure.value is None
                else f"{figure.value:.3f}"
                if name == "kl_nats"
                else f"{figure.value:.2f}"
            )
        body.append(cells)
    return titles, body
