"""Tables of the LLM-Viewer comparison: its operators, and what each of its faults does."""

from __future__ import annotations

from typing import Any

from trimtab.predict.compat import ABSENT, ALL, Case, Fault, analyze, faults, request_faults
from trimtab.spec.machine import Machine
from trimtab.spec.model import ModelSpec
from trimtab.ui.output import print_table
from trimtab.units import format_seconds, format_si

PHASES = ("prefill", "decode")


def print_viewer(spec: ModelSpec, machine: Machine, case: Case) -> None:
    """Print the operator table of prefill and decode as LLM-Viewer has it."""
    for phase in PHASES:
        stage = analyze(spec, machine, case, phase)
        rows = [
            (
                row.name,
                str(row.times),
                format_si(row.traffic.ops, "OP"),
                format_si(row.traffic.nbytes, "B"),
                f"{row.arithmetic_intensity:,.4g}",
                row.bound,
                format_seconds(row.time_s),
            )
            for row in stage.rows
        ]
        total = stage.total
        rows.append(
            (
                "total",
                "",
                format_si(total.ops, "OP"),
                format_si(total.nbytes, "B"),
                "",
                "",
                format_seconds(stage.time_s),
            )
        )
        columns = ("operator", ">times", ">operations", ">bytes", ">OP/B", "bound", ">time of one")
        print_table(columns, rows, title=f"LLM-Viewer (commit 472f71f): {phase}")


def print_faults(spec: ModelSpec, machine: Machine, case: Case, gen: int = 128) -> None:
    """Print every fault that changes a figure, and the totals they lead from and to.

    Args:
        gen: tokens generated after the prompt, for the faults that concern a whole request.
    """
    for phase in PHASES:
        theirs, ours = (analyze(spec, machine, case, phase, present) for present in (ALL, ()))
        rows = [("LLM-Viewer", *_figures(theirs.total.ops, theirs.total.nbytes, theirs.time_s), "")]
        rows += [
            (fault.name, *_figures(-fault.ops, -fault.nbytes, -fault.time_s, sign="+"), fault.sentence)
            for fault in faults(spec, machine, case, phase)
            if fault.ops or fault.nbytes or fault.time_s
        ]
        rows.append(
            ("Trimtab's count", *_figures(ours.total.ops, ours.total.nbytes, ours.time_s), "same roofline, no stack")
        )
        columns = ("fault, mended", ">operations", ">bytes", ">time", "what is wrong")
        print_table(columns, rows, title=f"From LLM-Viewer to Trimtab, one fault after the other: {phase}")
    rows = [
        (fault.name, *_figures(0.0, -fault.nbytes, -fault.time_s, sign="+")[1:], fault.sentence)
        for fault in request_faults(spec, machine, case, gen)
    ]
    print_table(("fault, mended", ">memory", ">time", "what is wrong"), rows, title=f"A request of {gen} tokens")
    for sentence in ABSENT:
        print(sentence)


def compat_json(spec: ModelSpec, machine: Machine, case: Case, gen: int = 128) -> dict[str, Any]:
    """Operators, totals and faults of both phases, and the faults of a request of `gen` tokens, as JSON."""
    found: dict[str, Any] = {"schema": 1, "tool": "llm-viewer 472f71f", "model": spec.name, "machine": machine.id}
    for phase in PHASES:
        theirs, ours = (analyze(spec, machine, case, phase, present) for present in (ALL, ()))
        found[phase] = {
            "operators": [
                {
                    "name": row.name,
                    "times": row.times,
                    "ops": row.traffic.ops,
                    "bytes": row.traffic.nbytes,
                    "time_s": row.time_s,
                    "bound": row.bound,
                }
                for row in theirs.rows
            ],
            "total": {"ops": theirs.total.ops, "bytes": theirs.total.nbytes, "time_s": theirs.time_s},
            "trimtab": {"ops": ours.total.ops, "bytes": ours.total.nbytes, "time_s": ours.time_s},
            "faults": [_fault_json(fault) for fault in faults(spec, machine, case, phase)],
        }
    found["request"] = {"gen": gen, "faults": [_fault_json(f) for f in request_faults(spec, machine, case, gen)]}
    return found


def _fault_json(fault: Fault) -> dict[str, Any]:
    return {
        "name": fault.name,
        "sentence": fault.sentence,
        "ops": fault.ops,
        "bytes": fault.nbytes,
        "time_s": fault.time_s,
    }


def _figures(ops: float, nbytes: float, time_s: float, sign: str = "") -> tuple[str, str, str]:
    """Three figures as text; with `sign`, changes: a plus before what grows and nothing where nothing changes."""

    def signed(value: float, text: str) -> str:
        if not sign:
            return text
        return "" if not value else f"{'-' if value < 0 else '+'}{text}"

    return (
        signed(ops, format_si(abs(ops), "OP")),
        signed(nbytes, format_si(abs(nbytes), "B")),
        signed(time_s, format_seconds(abs(time_s))),
    )
