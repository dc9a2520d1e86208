"""What `run` prints beside text: how fast a generation was, and what runs where."""

from __future__ import annotations

import sys
from typing import Any

from trimtab.spec.report import Report
from trimtab.ui.output import print_json, print_table
from trimtab.units import format_bytes, format_seconds


def print_timing(report: Report) -> None:
    """Write the figures of a timed generation."""
    plan, counts, figures = report.plan, report.counts, report.figures
    work = plan["workload"]
    where = f", {plan['threads']} threads, {plan['isa']}" if plan["threads"] else ""
    tpot, rate = figures["tpot_s"], figures["tokens_per_s"]
    out = [
        f"{plan['model']}: prompt {work['prompt']}, gen {work['gen']}, {plan['engine']}{where}",
        *([f"with {' '.join(plan['techniques'])}"] if plan["techniques"] else []),
        f"TTFT      {format_seconds(figures['ttft_s'].value or 0)}  ({figures['prefill_tokens_per_s'].value:.0f} tokens/s)",
    ]
    if tpot.value is not None and rate.value is not None:
        out.append(
            f"TPOT      {format_seconds(tpot.value)}  ({rate.value:.1f} tokens/s; P10 {rate.p10:.1f}, P90 {rate.p90:.1f} over steps)"
        )
        out.append(
            f"A step    reads {format_bytes(counts['weight_read'])} of weights and {format_bytes(counts['kv_read'])} of cache"
        )
    out.append(
        f"Memory    {format_bytes(counts['weight_bytes'])} of weights, {format_bytes(counts['kv_bytes'])} of cache, "
        f"resident {format_bytes(int(figures['rss_bytes'].value or 0))}, peak {format_bytes(int(figures['peak_rss_bytes'].value or 0))}"
    )
    sys.stdout.write("\n".join(out) + "\n")


def print_engine(model: Any, why: str, as_json: bool) -> None:
    """List the kernels of a native program, or why there is none."""
    program = getattr(model, "program", None)
    names = [name for name, *_ in program.metered()] if program else []
    if as_json:
        engine = {"engine": "native" if program else "torch", "why": why, "kernels": names}
        return print_json(
            {"schema": 1, **engine, **({"isa": program.isa, "threads": program.threads} if program else {})}
        )
    if not program:
        sys.stdout.write("Every op runs in PyTorch.\n")
        return None
    sys.stdout.write(f"Every op runs in the native program ({program.isa}, {program.threads} threads):\n")
    seen: dict[str, int] = {}
    for name in names:
        short = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        seen[short] = seen.get(short, 0) + 1
    print_table(("kernel", "times"), [(name, str(count)) for name, count in seen.items()])
    return None
