"""Reports as text: what fits, how fast, what bounds it, and the operators that take the time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from trimtab.predict.fit import FitResult
from trimtab.predict.predict import kinds_of_bound
from trimtab.spec.report import Figure, Report
from trimtab.ui.output import print_table
from trimtab.units import format_bytes, format_seconds, format_si

_BAR = 40
_PARTS = (
    ("weights", "weight_bytes", "█"),
    ("cache", "kv_peak_bytes", "▓"),
    ("activations", "activation_bytes", "▒"),
    ("reserve", "reserve_bytes", "░"),
)


def print_report(report: Report, rows: int = 12) -> None:
    """Write a prediction to stdout: the answer first, then the operators, last the command that checks it."""
    plan, counts, figures = report.plan, report.counts, report.figures
    work = plan["workload"]
    many = f"{work['batch']} requests at a time" if work["continuous"] else f"batch {work['batch']}"
    out = [
        f"{plan['model']} on {_devices(plan)} (stack {plan['stack']}), {plan['dtype']}, cache {plan['kv_dtype']}: "
        f"{many}, prompt {work['prompt']}, gen {work['gen']}",
        *([f"with {' '.join(plan['techniques'])}"] if plan["techniques"] else []),
        "",
        f"Fits        {_fits(report)}",
        f"Memory      {memory_bar(report)}",
        f"TTFT        {_seconds(figures['ttft_s'])}",
        f"TPOT        {_seconds(figures['tpot_s'])}",
        f"Tokens/s    {_number(figures['tokens_per_s'])}",
        f"Bound by    {_bound(report)}",
        f"Energy      {_number(figures['energy_j'])}",
        f"Price       {_number(figures['usd_per_million_tokens'])}",
        f"FLOPs       prefill {format_si(counts['prefill_flops'], 'FLOP')}, one decode step {format_si(counts['decode_flops'], 'FLOP')}",
        f"Decode      reads {format_bytes(counts['weight_read'])} of weights and {format_bytes(counts['kv_read'])} of cache per step",
        *(f"Note        {note}" for note in report.notes),
        "",
    ]
    sys.stdout.write("\n".join(out))
    print_ops(report, rows)
    sys.stdout.write(f"Check it: {figures['ttft_s'].check}\n")


#: What of a training layout is shown.
_LAYOUT = ("tp", "pp", "dp", "zero", "micro_batch", "global_batch", "seq_len", "recompute", "dtype")


def print_training(report: Report, rows: int = 12) -> None:
    """Write the prediction of a training step to stdout."""
    counts, figures = report.counts, report.figures
    training = report.plan["training"]
    devices = training["tp"] * training["pp"] * training["dp"]
    layout = ", ".join(f"{name} {training[name]}" for name in _LAYOUT)
    out = [
        f"{report.plan['model']} on {devices} x {report.plan['machine']} (stack {report.plan['stack']}), one training step:",
        f"  {layout}",
        "",
    ]
    for name, figure in figures.items():
        show = _seconds if figure.unit == "s" else _number
        out.append(f"{name:<24}{show(figure)}")
    out += [
        f"{'peak_bytes':<24}{format_bytes(counts['peak_bytes'])} of the fullest stage",
        f"{'model_flops':<24}{format_si(counts['model_flops'], 'FLOP')} a step, {format_si(counts['hardware_flops'], 'FLOP')} with "
        "recomputation",
        *(f"Note        {note}" for note in report.notes),
        "",
    ]
    sys.stdout.write("\n".join(out))
    print_ops(report, rows)


def _devices(plan: Mapping[str, Any]) -> str:
    """``h100-sxm5-80gb``, or how many of them and how the model is spread."""
    degrees = {name: value for name, value in plan["parallel"].items() if value > 1}
    count = plan["parallel"]["tp"] * plan["parallel"]["pp"] * plan["parallel"]["dp"]
    if not degrees:
        return plan["machine"]
    return f"{count} x {plan['machine']} ({' '.join(f'{name}{value}' for name, value in degrees.items())})"


def print_ops(report: Report, rows: int = 12) -> None:
    """Write the operators that take most of each phase."""
    totals: dict[str, float] = {}
    for op in report.ops:
        totals[op.phase] = totals.get(op.phase, 0.0) + op.time_s
    chosen = []
    for phase, total in totals.items():
        ops = sorted((op for op in report.ops if op.phase == phase), key=lambda op: -op.time_s)
        chosen.extend((op, op.time_s / total if total else 0.0) for op in ops[: max(rows // len(totals), 3)])
    print_table(
        ("phase", "operator", ">runs", ">FLOPs", ">bytes", ">time", ">share", "bound"),
        [
            (
                op.phase,
                op.name,
                str(op.count),
                format_si(op.flops),
                format_bytes(op.bytes),
                format_seconds(op.time_s),
                f"{share:.0%}",
                op.bound,
            )
            for op, share in chosen
        ],
    )


def memory_bar(report: Report) -> str:
    """One line: a bar of weights, cache, activations and reserve against the capacity, and the bytes of each."""
    counts = report.counts
    scale = _BAR / max(counts["capacity_bytes"], counts["peak_bytes"], 1)
    bar = "".join(mark * round(counts[name] * scale) for _, name, mark in _PARTS)[:_BAR]
    legend = ", ".join(f"{mark} {label} {format_bytes(counts[name])}" for label, name, mark in _PARTS if counts[name])
    return f"[{bar:·<{_BAR}}] {legend}"


def print_fit(result: FitResult) -> None:
    """Write what fits as a table."""
    plan = result.plan
    techniques = f" with {' '.join(plan['techniques'])}" if plan["techniques"] else ""
    title = f"{plan['model']} on {plan['machine']}{techniques}: what fits {format_bytes(result.capacity_bytes)}"
    rows = [
        (
            str(row.batch) if row.batch else "none",
            "no end" if row.unbounded and row.batch else str(row.context) if row.context and row.batch else "none",
            *(format_bytes(value) for value in (row.weights, row.kv, row.activations, row.reserve, row.peak)),
        )
        for row in result.rows
    ]
    print_table((">batch", ">context", ">weights", ">cache", ">activations", ">reserve", ">sum"), rows, title)
    for note in result.notes:
        sys.stdout.write(f"Note: {note}\n")


def _fits(report: Report) -> str:
    peak, capacity = report.counts["peak_bytes"], report.counts["capacity_bytes"]
    share = f"{format_bytes(peak)} of {format_bytes(capacity)} ({peak / capacity:.0%})"
    return f"yes: {share}" if peak <= capacity else f"NO, {format_bytes(peak - capacity)} too much: {share}"


def _bound(report: Report) -> str:
    return ", ".join(
        f"{phase}: {bound} ({share:.0%} of the time)" for phase, (bound, share) in kinds_of_bound(report).items()
    )


def _seconds(figure: Figure) -> str:
    if figure.value is None:
        return f"unknown: {figure.why}"
    band = (
        f"  (P10 {format_seconds(figure.p10)}, P90 {format_seconds(figure.p90)})"
        if figure.p10 is not None and figure.p90 is not None
        else ""
    )
    return f"{format_seconds(figure.value)}{band}  {figure.kind}"


def _number(figure: Figure) -> str:
    if figure.value is None:
        return f"unknown: {figure.why}"
    band = (
        f"  (P10 {figure.p10:.3g}, P90 {figure.p90:.3g})" if figure.p10 is not None and figure.p90 is not None else ""
    )
    return f"{figure.value:.4g} {figure.unit}{band}  {figure.kind}"
