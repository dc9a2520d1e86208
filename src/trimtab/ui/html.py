"""The report as one HTML file: charts inline, no script, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from trimtab.spec.machine import Machine
from trimtab.spec.report import Report
from trimtab.ui.comparison import PAIRED, Compared, table_cells, value_of
from trimtab.ui.svg import Dot, roofline, scatter
from trimtab.units import format_bytes, format_seconds, format_si


def write_report(
    path: Path,
    *,
    title: str,
    facts: Sequence[str],
    rows: Sequence[Compared],
    machine: Machine,
    elsewhere: Sequence[Report],
    band: float,
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: of the HTML file.
        title: heading.
        facts: sentences under the heading: model, dtype, workload, machine, threads.
        rows: baseline first, then the techniques.
        machine: whose roof is drawn.
        elsewhere: predictions of the baseline on other machines.
        band: the band the predictions claim, as a share.
    """
    from jinja2 import Environment

    from trimtab.runtime.files import write_atomically

    titles, body = table_cells(rows)
    template = Environment(autoescape=True).from_string(
        (resources.files("trimtab.ui") / "report.html.j2").read_text("utf-8")
    )
    page = template.render(
        title=title,
        facts=facts,
        titles=[name.removeprefix(">") for name in titles],
        rows=body,
        series=[(f"s{index}", row.label) for index, row in enumerate(rows)],
        roofline=_roofline(rows[0].predicted, machine),
        operators=_operators(rows[0].predicted),
        times=_scatter(rows, "figures", ("ttft_s", "tpot_s"), "s", band),
        band=f"{band * 100:.0f}",
        machine=machine.name,
        elsewhere=[_elsewhere(report) for report in elsewhere],
        notes=list(
            dict.fromkeys(note for row in rows for report in (row.predicted, row.measured) for note in report.notes)
        ),
    )
    write_atomically(path, page)


def _roofline(report: Report, machine: Machine) -> str:
    total = sum(op.time_s for op in report.ops) or 1.0
    dots = [
        Dot(
            x=op.flops / op.bytes,
            y=op.flops / op.time_s,
            series=op.phase,
            title=f"{op.phase} {op.name}: {format_si(op.flops, 'FLOP')}, {format_bytes(op.bytes)}, {format_seconds(op.time_s)}, {op.bound}",
            radius=2.5 + 9 * (op.time_s / total) ** 0.5,
        )
        for op in report.ops
        if op.flops and op.bytes and op.time_s
    ]
    peak, _ = machine.peak(str(report.plan["dtype"]))
    return roofline(f"Roofline of {machine.name}", dots, peak, machine.memory_bandwidth_bytes_per_s)


def _operators(report: Report) -> list[tuple[str, ...]]:
    largest = sorted(report.ops, key=lambda op: -op.time_s)[:16]
    return [
        (
            op.phase,
            op.name,
            str(op.count),
            format_si(op.flops, "FLOP"),
            format_bytes(op.bytes),
            format_seconds(op.time_s),
            op.bound,
        )
        for op in largest
    ]


def _scatter(rows: Sequence[Compared], source: str, names: Sequence[str], unit: str, band: float) -> str:
    dots = []
    for index, row in enumerate(rows):
        for column in PAIRED:
            predicted, measured = (value_of(report, source, column.name) for report in (row.predicted, row.measured))
            if column.name in names and predicted and measured:
                shown = (
                    f"{row.label} {column.title}: predicted {column.show(predicted)}, measured {column.show(measured)}"
                )
                dots.append(Dot(x=predicted, y=measured, series=f"s{index}", title=shown, radius=5))
    return scatter(
        "Measured against predicted times", dots, unit=unit, x_label="predicted", y_label="measured", band=band
    )


def _elsewhere(report: Report) -> tuple[str, ...]:
    def shown(name: str) -> str:
        value = report.figures[name].value
        return "-" if value is None else format_seconds(value)

    usd = report.figures["usd_per_million_tokens"].value
    return (
        str(report.plan["machine"]),
        shown("ttft_s"),
        shown("tpot_s"),
        format_bytes(report.counts["peak_bytes"]),
        "-" if usd is None else f"${usd:.3f}",
    )
