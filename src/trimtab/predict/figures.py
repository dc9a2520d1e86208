"""The real numbers of a report: seconds, rates, joules and dollars, each with its band, formula and sources."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.predict.energy import energy, joules_per_token
from trimtab.predict.money import usd_per_million_tokens
from trimtab.predict.request import Costs
from trimtab.spec.machine import Stack
from trimtab.spec.plan import Plan
from trimtab.spec.report import Figure
from trimtab.units import format_si


def figures(plan: Plan, costs: Costs) -> dict[str, Figure]:
    """Figures of a plan from its costs (one case): see `predict.predict` for their names."""
    work, stack = plan.workload, plan.stack
    # What runs on one machine is measured there; servers are checked against recorded ones.
    server = work.continuous or plan.parallel.devices > 1
    check = "trimtab validate --table e2e_serving" if server else plan.command("measure")
    ttft, tpot, rate = (_number(getattr(costs, name)) for name in ("ttft_s", "tpot_s", "tokens_per_s"))
    request = _number(costs.request_s)
    assert ttft is not None and request is not None
    formula = _formula(plan)
    first, further = _band(costs.ttft_band), _band(costs.tpot_band)

    def figure(value: float | None, unit: str, why: str, band: tuple[float, float], *, inverse: bool = False) -> Figure:
        ends = (None, None)
        if value is not None:
            ends = (value / band[1], value / band[0]) if inverse else (value * band[0], value * band[1])
        return Figure(value=value, p10=ends[0], p90=ends[1], unit=unit, kind=stack.kind, check=check, why=why)  # type: ignore[arg-type]

    none = "Nothing is decoded after the first token (gen=1)."
    devices = plan.parallel.devices
    if work.continuous:
        serving = stack.serving
        begin = f"Mean of a request among {work.batch}: its prefill x (1 + {serving.queue:g} x ({work.batch} - 1)) + half a step. "
        step = (
            f"A decode step of all {work.batch}, and the prefill of each of the others spread over {work.gen} steps x "
            f"{serving.interference:g}. "
        )
        per_s = f"concurrency x gen / (ttft_s + (gen - 1) tpot_s) = {work.batch} x {work.gen} / {request:.4g}"
    else:
        begin, step = "Sum over the passes of the prompt. ", f"Mean of {work.gen - 1} decode steps. "
        per_s = f"batch / tpot_s = {work.batch} / {tpot:.4g}" if tpot else none
    found = {
        "ttft_s": figure(ttft, "s", f"{begin}{formula}", first),
        "tpot_s": figure(tpot, "s", f"{step}{formula}" if tpot is not None else none, further),
        "tokens_per_s": figure(rate, "tokens/s", per_s if tpot is not None else none, further, inverse=True),
        "energy_j": energy(plan.machine, request, further, devices),
        "energy_j_per_token": joules_per_token(plan.machine, rate, further, devices),
        "usd_per_million_tokens": usd_per_million_tokens(plan.machine, rate, further, devices),
    }
    return {name: replace(value, check=check) for name, value in found.items()}


def _number(value: Any) -> float | None:
    return None if value is None else float(np.asarray(value))


def _band(band: tuple[Any, Any]) -> tuple[float, float]:
    return float(np.asarray(band[0])), float(np.asarray(band[1]))


def _formula(plan: Plan) -> str:
    machine, stack = plan.machine, plan.stack
    peak, priced_as = machine.peak(plan.model.act_dtype)
    if stack.bandwidth_by_working_set:
        slowest, fastest = (format_si(f(r for _, r in stack.bandwidth_by_working_set), "B/s") for f in (min, max))
        rate = f"bw = {slowest} to {fastest} by working set"
    else:
        rate = f"bw = {format_si(machine.memory_bandwidth_bytes_per_s, 'B/s')}"
    form = "max(flops / (peak ec), bytes / (bw eb)) + launches t0"
    if any(found.form != "roofline" for found in stack.op_classes.values()):
        form = f"the form of its class (plain: {form})"
    factor = "".join(f", {name} x {value:.3g}" for name, value in stack.factors.items())
    if stack.graph_saving_s:
        factor += f", less up to {stack.graph_saving_s * 1e6:.3g} us each (captured graph)"
    return (
        f"Each pass: sum over kernels of {form}{factor}{_overheads(stack)}, with "
        f"peak = {format_si(peak, 'FLOP/s')} ({priced_as}), {rate}. "
        f"Machine {machine.id}: {machine.source} ({machine.confidence}). Stack {stack.name}: {stack.source}."
    )


def _overheads(stack: Stack) -> str:
    parts = [
        f" + {value * 1e6:.3g} us {per}"
        for value, per in (
            (stack.overhead_per_step_s, "per pass"),
            (stack.overhead_per_layer_s, "per layer"),
            (stack.overhead_per_sequence_s, "per sequence"),
            (stack.overhead_per_prefill_s, "per request"),
        )
        if value
    ]
    floor = f", at least {stack.floor_per_layer_s * 1e6:.3g} us per layer" if stack.floor_per_layer_s else ""
    return "".join(parts) + floor


def constants(stack: Stack) -> list[str]:
    """One line per class of op: its form, numbers, band and what they were fitted to."""
    lines = []
    for name, found in stack.op_classes.items():
        plain = (
            f"ec={found.compute_efficiency:.3g} eb={found.bandwidth_efficiency:.3g} t0={found.launch_s * 1e6:.3g} us"
        )
        more = "".join(f" {key}={value:.3g}" for key, value in found.constants.items())
        band = f"; P10 {found.band[0]:.2f}, P90 {found.band[1]:.2f}" if found.band else ""
        fit = f"; MAPE {found.mape:.1%} of {found.rows} rows" if found.mape is not None else ""
        source = f"; {found.source}" if found.source else ""
        lines.append(f"{name}: {found.form} {plain}{more}{band}{fit}{source}")
    return lines
