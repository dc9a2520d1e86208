"""What the reader of a prediction should know: what does not fit, what was assumed, what nobody measured."""

from __future__ import annotations

import datetime
from dataclasses import replace

import numpy as np

from trimtab.errors import SpecError
from trimtab.graph.build import Phase
from trimtab.graph.ops import StepShape
from trimtab.graph.passes import prompt_held
from trimtab.predict.energy import multiply_add_pj, operation_energy, product_pj, technology
from trimtab.predict.memory import UNBOUNDED, Memory
from trimtab.predict.slices import Slices
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.machine import Machine, kernel_machines
from trimtab.spec.model import ModelSpec, owned
from trimtab.spec.nodes import MoESpec
from trimtab.spec.plan import Plan
from trimtab.spec.product import EXACT, Lmul
from trimtab.units import format_bytes

#: A price older than this is called old.
_PRICE_AGE = datetime.timedelta(days=365)


def notes(plan: Plan, memory: Memory, slices: Slices) -> tuple[str, ...]:
    """Sentences about a plan, the most important first."""
    spec, work, machine = plan.model, plan.workload, plan.machine
    notes: list[str] = []
    usable = usable_bytes(plan)
    over = memory.peak - usable
    if over > 0:
        notes.append(_too_big(plan, memory, over, slices))
    longest = prompt_held(spec, work.prompt) + work.gen
    if spec.max_position_embeddings and longest > spec.max_position_embeddings:
        notes.append(
            f"Warning: {longest} tokens are beyond the {spec.max_position_embeddings} positions {spec.name} was made for. "
            "`run` and `measure` refuse this."
        )
    elif spec.max_position_embeddings and work.prompt > spec.max_position_embeddings:
        notes.append(
            f"Warning: the filter pass reads {work.prompt} tokens, beyond the {spec.max_position_embeddings} positions of {spec.name}."
        )
    for dtype in slices.dtypes:
        _, priced_as = machine.peak(dtype)
        if priced_as != dtype:
            notes.append(f"No {dtype} path on {machine.id}: arithmetic is priced as {priced_as}.")
    notes.extend(_unmeasured(plan))
    notes.extend(
        f"{text} is `auto`: the shipped default stands in for what `trimtab prepare {spec.name}` would find on this model."
        for text in plan.assumed
    )
    held = prompt_held(spec, work.prompt)
    if held < work.prompt:
        notes.append(f"The token filter (layer {spec.flow.filter.layer}) keeps {held} of {work.prompt} prompt tokens.")  # type: ignore[union-attr]
    if any(isinstance(layer.mlp, MoESpec) for layer in spec.layers):
        routing = f"routing of skew {work.skew:g}" if work.skew else "uniform routing"
        notes.append(f"Distinct experts per pass are an expectation under {routing}.")
    if any(getattr(layer.self_attn, "window", None) for layer in spec.layers):
        notes.append("Sliding-window layers keep every token in the cache; the window limits what is read.")
    added = _added_bits(plan, slices.with_plain_products)
    if added:
        notes.append(added)
    return tuple(notes)


def _added_bits(plan: Plan, plain: ModelSpec) -> str:
    """What products by addition of bit patterns (L-Mul) save, the memory included; empty for a model without them."""
    spec, work = plan.model, plan.workload
    if plain is spec:
        return ""
    past = np.asarray([max(work.prompt - 1, 0) + work.gen // 2])
    passes: dict[Phase, StepShape] = {
        "decode": StepShape.of([1], past, 1, work.batch),
        "prefill": StepShape.of([work.prompt], [0], 1, work.batch),
    }
    table, dtype = technology(), spec.act_dtype
    product = 1 - product_pj(Lmul(), dtype, table) / product_pj(EXACT, dtype, table)
    term = 1 - multiply_add_pj(Lmul(), dtype, table) / multiply_add_pj(EXACT, dtype, table)
    try:
        saved = {
            phase: 1 - operation_energy(spec, phase, step).total_j / operation_energy(plain, phase, step).total_j
            for phase, step in passes.items()
        }
    except SpecError as error:
        return f"Products by L-Mul: the energy is not known. {error}"
    return (
        f"Products by L-Mul: {product:.0%} less energy each in {dtype} ({table.name} hardware made for it), {term:.0%} less with "
        f"the addition; of the whole model, DRAM included, {saved['decode']:.1%} of a decode step and {saved['prefill']:.1%} of "
        "the prefill. No processor of today has it, so no time is saved."
    )


def usable_bytes(plan: Plan) -> int:
    """Memory of one device that the engine may use."""
    return int(plan.machine.memory_bytes * plan.stack.memory_share)


def _unmeasured(plan: Plan) -> list[str]:
    """What stands on a datasheet alone."""
    machine, stack, found = plan.machine, plan.stack, []
    generic = stack.kernels or stack.kind == "datasheet"
    if generic and not stack.measured and stack.band != (1.0, 1.0):
        low, high = stack.band
        found.append(
            f"No measured stack for {machine.id} (recorded: {', '.join(kernel_machines())}): generic constants on its "
            f"datasheet, band x {low:.2g} to x {high:.2g}."
        )
    price = price_age(machine, datetime.date.today())
    if price:
        found.append(price)
    return found


def price_age(machine: Machine, today: datetime.date) -> str:
    """A sentence about an hourly price that is over a year old or undated; empty for a fresh one or none."""
    if machine.usd_per_h is None:
        return ""
    if machine.price_date is None:
        basis = machine.price_basis or "no basis given"
        return f"The price of {machine.id} ({machine.usd_per_h:g} USD/h, {basis}) has no date: give today's with --usd-per-h."
    date = datetime.date.fromisoformat(machine.price_date)
    if today - date <= _PRICE_AGE:
        return ""
    return (
        f"The price of {machine.id} ({machine.usd_per_h:g} USD/h, {machine.price_basis or 'no basis given'}) is from "
        f"{date:%Y-%m}, over a year ago: give today's with --usd-per-h."
    )


def _too_big(plan: Plan, memory: Memory, over: int, slices: Slices) -> str:
    """What does not fit, by how much, and what would."""
    work, machine, footprint = plan.workload, plan.machine, slices.footprint(plan.parallel)
    total = (
        f"weights {format_bytes(memory.weights)} + cache {format_bytes(memory.kv_peak)} + activations "
        f"{format_bytes(memory.activations)} + reserve {format_bytes(memory.reserve)} = {format_bytes(memory.peak)}"
    )
    usable = usable_bytes(plan)
    text = f"Does not fit {machine.id} ({format_bytes(usable)}) by {format_bytes(over)}: {total}."
    batch = footprint.largest_batch(work.prompt, work.gen, usable)
    if batch:
        return f"{text} Batch {batch} fits." if batch < UNBOUNDED else text
    context = footprint.largest_context(work.batch, usable, work.gen)
    if context > work.gen:
        return f"{text} No batch fits at {work.tokens} tokens; batch {work.batch} fits up to {context} tokens."
    ways = []
    # Owned matrices, experts included, but for the head; half a bit per element goes to a 2-byte scale in 32.
    matrices = [(n, times) for path, n, times in owned(plan.model) if isinstance(n, LinearSpec) and path != "lm_head"]
    elements = sum(times * node.n * node.k for node, times in matrices)
    room = usable - memory.peak + sum(times * node.nbytes() for node, times in matrices) // plan.parallel.devices
    bits = min(8, int(8 * room * plan.parallel.devices / max(elements, 1) - 0.5))
    if bits >= 2:
        ways.append(f"Weights of {bits} bits would: `-t rtn:bits={bits},group=32`.")
    tp = _smallest_tp(plan, slices)
    if tp:
        ways.append(f"Cut over {tp} devices it would: `--tp {tp}`.")
    if not ways:
        ways.append("Nothing smaller fits either; name a larger machine (`trimtab machines`).")
    return " ".join((text, *ways))


def _smallest_tp(plan: Plan, slices: Slices) -> int | None:
    """The smallest tensor-parallel degree inside a node that fits, on a machine with links."""
    if plan.machine.link_bytes_per_s_per_dir is None:
        return None
    for tp in slices.tp_degrees:
        if plan.parallel.tp < tp <= plan.machine.node_devices:
            parallel = replace(plan.parallel, tp=tp, ep=1)
            if slices.footprint(parallel).at(plan.workload).peak <= usable_bytes(plan):
                return tp
    return None
