"""Catalogues and the ledger as the page reads them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from trimtab.measure.ledger import Ledger, Run
from trimtab.papers.catalogue import load_papers
from trimtab.papers.verify import CHECKS
from trimtab.spec.configs import catalogue_entry, model_ids
from trimtab.spec.machine import THIS, load_machine, machine_ids, stack_names
from trimtab.techniques.registry import technique_class, technique_names
from trimtab.ui.catalogues import parameter_kinds, technique_row
from trimtab.ui.explorer.types import (
    Claim,
    MachineRow,
    Machines,
    ModelRow,
    Models,
    Pair,
    PaperRow,
    Papers,
    Parameter,
    RunRow,
    Runs,
    TechniqueRow,
    Techniques,
)

#: Counts of a run that are shown beside their prediction.
_COUNTS = ("weight_bytes", "kv_bytes", "kv_peak_bytes", "activation_bytes", "peak_bytes", "weight_read", "kv_read",
           "prefill_flops", "decode_flops")  # fmt: skip
_FIGURES = ("ttft_s", "tpot_s", "tokens_per_s", "energy_j")
_QUALITY = ("kl_nats", "ppl", "top1_agreement", "answer_nll_nats")


@functools.cache
def models(paths: bool) -> Models:
    """Every model of the catalogue."""
    rows = []
    for name in model_ids():  # their files alone: building every spec would take seconds
        entry = catalogue_entry(name)
        rows.append(
            ModelRow(
                id=name, aliases=list(entry.get("_aliases", ())), architecture=str(entry.get("model_type", "")),
                source=str(entry.get("_source", "")),
            )
        )  # fmt: skip
    return Models(models=rows, paths=paths)


def machines() -> Machines:
    """Every machine, and this one if it is calibrated."""
    names = machine_ids()
    rows = []
    for name in names:
        found = load_machine(name)
        rows.append(
            MachineRow(
                id=found.id, name=found.name, vendor=found.vendor, kind=found.kind, year=found.year, aliases=list(found.aliases),
                memory_bytes=float(found.memory_bytes), memory_bandwidth_bytes_per_s=found.memory_bandwidth_bytes_per_s,
                flops_per_s=dict(found.flops_per_s), usd_per_h=found.usd_per_h, tdp_w=found.tdp_w, confidence=found.confidence,
                source=found.source,
            )
        )  # fmt: skip
    return Machines(machines=rows, stacks=list(stack_names()), calibrated=THIS in names)


@functools.cache
def techniques() -> Techniques:
    """Every technique, its parameters as a form asks for them."""
    rows = []
    for name in technique_names():
        row, kinds = technique_row(name), parameter_kinds(name)
        parameters = [
            Parameter(
                name=p["name"], kind=kinds[p["name"]][0], choices=kinds[p["name"]][1], default=_text(p["default"]),
                allowed=p.get("allowed", ""), help=p.get("help", ""),
            )
            for p in row.pop("parameters")
        ]  # fmt: skip
        rows.append(TechniqueRow(**{**row, "doc": row["doc"] or ""}, parameters=parameters))
    return Techniques(techniques=rows)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "|".join(map(_text, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def papers() -> Papers:
    """The ninety papers, with the claims that are checked and the techniques that are built of them."""
    built: dict[int, list[str]] = {}
    for name in technique_names():
        if (number := technique_class(name).paper) is not None:
            built.setdefault(number, []).append(name)
    rows = []
    for row in load_papers():
        number = row["number"]
        facts = {
            key: row[key] for key in ("number", "title", "short", "year", "arxiv", "family", "kinds", "seams", "state")
        }
        rows.append(PaperRow(**facts, parts=sorted({*row["parts"], *built.get(number, ())}), claims=_claims(number)))
    return Papers(papers=rows)


def _claims(number: int) -> list[Claim]:
    if number not in CHECKS:
        return []
    lines = importlib.import_module(CHECKS[number]).LINES
    return [
        Claim(
            id=line.id, text=line.text, needed=line.needed, documented=line.documented.figure if line.documented else ""
        )
        for line in lines
    ]


def runs(ledger: Ledger | None = None) -> Runs:
    """The ledger; empty where nothing was ever measured."""
    return Runs(runs=[_run(run) for run in (ledger or Ledger()).runs()])


def _run(run: Run) -> RunRow:
    plan, work = run.plan, run.plan["workload"]
    measured: Mapping[str, Any] = run.measured or {}
    figures = measured.get("figures", {})
    return RunRow(
        id=run.id, started_utc=run.started_utc, state=run.state, model=run.model, machine=str(plan["machine"]),
        stack=str(plan.get("stack", "")), version=run.version, techniques=list(plan["techniques"]), dtype=str(plan.get("dtype", "")),
        kv_dtype=str(plan.get("kv_dtype", "")), batch=work["batch"], prompt=work["prompt"], gen=work["gen"],
        pairs=_pairs(run.predicted, measured),
        quality={name: figures[name]["value"] for name in _QUALITY if figures.get(name, {}).get("value") is not None},
        notes=[*measured.get("notes", ())], error=run.error or "",
    )  # fmt: skip


def _pairs(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Pair]:
    found = []
    for name in _FIGURES:
        a, b = ((report.get("figures", {}).get(name) or {}) for report in (predicted, measured))
        if a.get("value") is not None and b.get("value") is not None:
            found.append(
                Pair(
                    name=name, unit=a["unit"], predicted=a["value"], p10=a["p10"], p90=a["p90"], measured=b["value"],
                    low=b["p10"], high=b["p90"], exact=False,
                )
            )  # fmt: skip
    for name in _COUNTS:
        a, b = (report.get("counts", {}).get(name) for report in (predicted, measured))
        if a is not None and b is not None:
            unit = "FLOP" if name.endswith("flops") else "B"
            found.append(
                Pair(
                    name=name, unit=unit, predicted=float(a), p10=None, p90=None, measured=float(b), low=None, high=None, exact=True
                )
            )  # fmt: skip
    return found
