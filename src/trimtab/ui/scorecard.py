"""A scorecard as text: one table per column, families in order, and who dominates whom."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.measure.pareto import Front
from trimtab.measure.scorecard import Column, Metric, RunReports, Scorecard, Value, read_run, scorecard
from trimtab.spec.report import Report
from trimtab.ui.output import print_table
from trimtab.units import format_bytes, format_seconds, format_si

COLUMNS: tuple[Column, ...] = ("predicted", "measured")


def print_scorecard(
    reports: Sequence[Path | Report | Mapping[str, Any] | RunReports],
    front: Sequence[str] = (),
    **options: Any,
) -> Scorecard:
    """Write the scorecard of runs to stdout and return it.

    Args:
        reports: reports, their JSON, or files of it.
        front: names of two or more metrics to draw the Pareto front over.
        options: of `scorecard`: baseline, cross_machine, grid, price_usd_per_h, devices.

    Raises:
        SpecError, Conflict: see `read_run` and `scorecard`.
    """
    card = scorecard([each if isinstance(each, RunReports) else read_run(each) for each in reports], **options)
    print_card(card, front)
    return card


def print_card(card: Scorecard, front: Sequence[str] = ()) -> None:
    """Write a scorecard: a row per metric, a column per run and kind of figure; a cell without a number says `-`."""
    kinds = [kind for kind in COLUMNS if any(v.value is not None for m in card.metrics for v in getattr(m, kind))]
    heads = [f">{label} {kind}" for label in card.labels for kind in kinds]
    rows = []
    for metric in card.metrics:
        cells = [_cell(metric, getattr(metric, kind)[index]) for index in range(len(card.labels)) for kind in kinds]
        rows.append((metric.family, metric.name, *cells))
    machines = ", ".join(dict.fromkeys(card.machines))
    print_table(("family", "metric", *heads), rows, f"{machines}; speed-up against {card.baseline}")
    for metric in card.metrics:
        missing = {v.why for kind in kinds for v in getattr(metric, kind) if v.value is None and v.why}
        if missing:
            sys.stdout.write(f"{metric.name} is missing: {'; '.join(sorted(missing))}\n")
    for note in card.notes:
        sys.stdout.write(f"Note: {note}\n")
    if front:
        sys.stdout.write(f"Pareto front over {', '.join(front)}:\n")
        for line in front_lines(card.labels, card.front(front)):
            sys.stdout.write(f"  {line}\n")


def front_lines(labels: Sequence[str], front: Front) -> list[str]:
    """One sentence per run: on the front, dominated by which, or not comparable."""
    found = []
    for index, label in enumerate(labels):
        dominator = front.by[index]
        if index in front.incomplete:
            found.append(f"{label}: a metric is missing, not comparable")
        elif dominator is not None:
            found.append(f"{label}: dominated by {labels[dominator]}")
        else:
            found.append(f"{label}: on the front")
    return found


def _cell(metric: Metric, cell: Value) -> str:
    if cell.value is None:
        return "-"
    text = _number(cell.value, metric.unit)
    if cell.p10 is None or cell.p90 is None or cell.p10 == cell.p90:
        return text
    return f"{text} ({_number(cell.p10, metric.unit)}..{_number(cell.p90, metric.unit)})"


def _number(value: float, unit: str) -> str:
    if unit == "s":
        return format_seconds(value)
    if unit in ("B", "B/step"):
        return format_bytes(value) + unit[1:]
    if unit.startswith("FLOP"):
        return format_si(value, unit)
    text = format_si(value) if abs(value) >= 1e6 else f"{value:.4g}"
    return f"{text} {unit}".rstrip()
