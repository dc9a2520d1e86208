"""From a Plan to a Report: counts, figures, the operator table and what the reader should know."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from trimtab.graph.build import build
from trimtab.graph.count import active_rows, count_all, experts_touched
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Counts, StepShape
from trimtab.graph.passes import Pass, mean_decode_step, passes, prompt_held
from trimtab.predict.energy import energy
from trimtab.predict.memory import UNBOUNDED, Footprint, Memory
from trimtab.predict.money import usd_per_million_tokens
from trimtab.predict.price import Times, price
from trimtab.spec.machine import OP_CLASSES
from trimtab.spec.nodes import FFNSpec, GateFirst, LinearSpec, MoESpec, owned
from trimtab.spec.plan import Plan
from trimtab.spec.report import Figure, OpRow, Report
from trimtab.units import format_bytes, format_si

_LAYER = re.compile(r"layers\.\d+\.")


def predict(plan: Plan) -> Report:
    """Price a plan.

    Counts (integers): ``weight_bytes`` resident weights; ``kv_bytes`` cache of all sequences at prompt + gen tokens (what is
    kept of a filtered prompt), ``kv_reserved_bytes`` the same in whole pages; ``activation_bytes`` peak of live
    activations; ``reserve_bytes`` of the engine; ``peak_bytes`` their sum; ``capacity_bytes`` of the machine;
    ``prefill_flops`` the whole batch; ``decode_flops``, ``weight_read``, ``kv_read`` one decode step at mean context;
    ``prefill_weight_read``, ``prefill_kv_read`` the whole prefill.

    Figures: ``ttft_s`` prefill plus first token; ``tpot_s`` mean of the other gen - 1 steps; ``tokens_per_s`` batch /
    tpot_s; ``energy_j`` the whole request; ``usd_per_million_tokens`` of decoded tokens. One without a source is None.
    """
    done = tuple(
        (each, price(fuse(each.graph, plan.stack), each.step, plan.machine, plan.stack)) for each in passes(plan)
    )
    memory = Footprint(plan.model, plan.stack).at(plan.workload)
    mean = mean_decode_step(plan.model, plan.workload)
    return Report(
        source="predicted",
        plan=plan.to_dict(),
        counts=_counts(plan, done, memory, mean),
        figures=_figures(plan, done),
        observed=expected(plan, mean),
        ops=_rows(done),
        notes=_notes(plan, memory),
    )


def step_counts(plan: Plan, step: StepShape) -> Counts:
    """Counts of decode steps, summed over ops (and over the steps, if there are several)."""
    kernels = fuse(build(plan.model, "decode"), plan.stack)
    counted = count_all(kernels, step, plan.stack.attention, plan.machine.llc_bytes)
    return _sum((counts, len(same.names)) for same, counts in counted)


def expected(plan: Plan, step: StepShape) -> dict[str, float]:
    """Expectation of every count that data decides, by the name under which a run observes it."""
    found: dict[str, float] = {}
    tokens = step.tokens
    for index, layer in enumerate(plan.model.layers):
        path = f"layers.{index}.mlp"
        if isinstance(layer.mlp, MoESpec):
            found[f"{path}.experts_touched"] = float(experts_touched(layer.mlp, tokens))
        elif (
            isinstance(layer.mlp, FFNSpec)
            and isinstance(layer.mlp.executor, GateFirst)
            and tokens <= layer.mlp.executor.max_tokens
        ):
            found[f"{path}.active_rows"] = float(active_rows(layer.mlp, tokens))
            found[f"{path}.active_pairs"] = float(layer.mlp.executor.expected * layer.mlp.intermediate_size * tokens)
    return found


def _sum(counted: Iterable[tuple[Counts, int]]) -> Counts:
    """Total over kernels and passes in Python integers."""
    totals = dict.fromkeys(Counts.__slots__, 0)
    for counts, times in counted:
        for name in totals:
            totals[name] += counts.total(name, times)
    return Counts(**totals)


def _counts(plan: Plan, done: Iterable[tuple[Pass, Times]], memory: Memory, mean: StepShape) -> dict[str, int]:
    before = _sum((p.counts, p.times) for each, times in done if each.phase != "decode" for p in times.kernels)
    decode = step_counts(plan, mean)
    return {
        "parameters": plan.base.num_parameters(),
        "weight_bytes": memory.weights,
        "kv_bytes": memory.kv_held,
        "kv_reserved_bytes": memory.kv_reserved,
        "activation_bytes": memory.activations,
        "reserve_bytes": memory.reserve,
        "peak_bytes": memory.peak,
        "capacity_bytes": plan.machine.memory_bytes,
        "prefill_flops": int(before.flops),
        "decode_flops": int(decode.flops),
        "weight_read": int(decode.weight_read),
        "kv_read": int(decode.kv_read),
        "prefill_weight_read": int(before.weight_read),
        "prefill_kv_read": int(before.kv_read),
    }


def _figures(plan: Plan, done: Iterable[tuple[Pass, Times]]) -> dict[str, Figure]:
    work, stack, check = plan.workload, plan.stack, plan.command("measure")
    ttft = sum(times.total_s for each, times in done if each.phase != "decode")
    decode = [times for each, times in done if each.phase == "decode"]
    tpot = decode[0].total_s / (work.gen - 1) if decode else None
    rate = work.batch / tpot if tpot else None
    low, high = stack.band
    formula = _formula(plan)

    def figure(value: float | None, unit: str, why: str, *, inverse: bool = False) -> Figure:
        band = (1 / high, 1 / low) if inverse else (low, high)
        ends = (None, None) if value is None else (value * band[0], value * band[1])
        return Figure(value=value, p10=ends[0], p90=ends[1], unit=unit, kind=stack.kind, check=check, why=why)  # type: ignore[arg-type]

    none = "Nothing is decoded after the first token (gen=1)."
    found = {
        "ttft_s": figure(ttft, "s", f"Sum over the passes of the prompt. {formula}"),
        "tpot_s": figure(tpot, "s", f"Mean of {work.gen - 1} decode steps. {formula}" if decode else none),
        "tokens_per_s": figure(
            rate, "tokens/s", f"batch / tpot_s = {work.batch} / {tpot:.4g}" if tpot else none, inverse=True
        ),
        "energy_j": energy(plan.machine, ttft + (tpot or 0.0) * (work.gen - 1), stack.band),
        "usd_per_million_tokens": usd_per_million_tokens(plan.machine, rate, stack.band),
    }
    return {name: replace(value, check=check) for name, value in found.items()}


def _formula(plan: Plan) -> str:
    machine, stack, dtype = plan.machine, plan.stack, plan.model.act_dtype
    peak, priced_as = machine.peak(dtype)
    shares = "; ".join(
        f"{name} ec={e.compute_efficiency:g} eb={e.bandwidth_efficiency:g} t0={e.launch_s * 1e6:g} us"
        for name in OP_CLASSES
        for e in (stack.efficiency(name, dtype),)
    )
    if stack.bandwidth_by_working_set:
        slowest, fastest = (format_si(f(r for _, r in stack.bandwidth_by_working_set), "B/s") for f in (min, max))
        rate = f"bw = {slowest} to {fastest} by working set"
    else:
        rate = f"bw = {format_si(machine.memory_bandwidth_bytes_per_s, 'B/s')}"
    overhead = f" + {stack.overhead_per_step_s * 1e6:g} us per pass" if stack.overhead_per_step_s else ""
    return (
        f"Each pass: sum over kernels of max(flops / (peak ec), bytes / (bw eb)) + launches t0{overhead}, with "
        f"peak = {format_si(peak, 'FLOP/s')} ({priced_as}), {rate}; {shares}. "
        f"Machine {machine.id}: {machine.source} ({machine.confidence}). Stack {stack.name}: {stack.source}."
    )


def _rows(done: Iterable[tuple[Pass, Times]]) -> tuple[OpRow, ...]:
    """One row per phase and kernel, layers folded into ``layers.*``."""
    found: dict[tuple[str, str], list] = {}
    for each, times in done:
        for p in times.kernels:
            name = _LAYER.sub("layers.*.", p.group.names[0])
            kind = next(
                (op.kind for op in p.group.kernel.ops if op.kind == "attend" or op.kind == "linear"),
                p.group.kernel.ops[0].kind,
            )
            row = found.setdefault((each.phase, name), [kind, 0, 0, 0, 0.0, {}])
            row[1] += p.times * each.repeat
            row[2] += p.counts.total("flops", p.times)
            row[3] += p.counts.total("nbytes", p.times)
            seconds = p.times * float(p.time_s.sum())
            row[4] += seconds
            row[5][p.bound] = row[5].get(p.bound, 0.0) + seconds
    return tuple(
        OpRow(
            phase=phase,
            name=name,
            kind=kind,
            count=times,
            flops=flops,
            bytes=nbytes,
            time_s=time_s,
            bound=max(bounds, key=bounds.__getitem__),
        )
        for (phase, name), (kind, times, flops, nbytes, time_s, bounds) in found.items()
    )


def _notes(plan: Plan, memory: Memory) -> tuple[str, ...]:
    spec, work, machine = plan.model, plan.workload, plan.machine
    notes = []
    over = memory.peak - machine.memory_bytes
    if over > 0:
        notes.append(_too_big(plan, memory, over))
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
    _, priced_as = machine.peak(spec.act_dtype)
    if priced_as != spec.act_dtype:
        notes.append(f"No {spec.act_dtype} path on {machine.id}: arithmetic is priced as {priced_as}.")
    notes.extend(
        f"{text} is `auto`: the shipped default stands in for what `trimtab prepare {spec.name}` would find on this model."
        for text in plan.assumed
    )
    held = prompt_held(spec, work.prompt)
    if held < work.prompt:
        notes.append(f"The token filter (layer {spec.flow.filter.layer}) keeps {held} of {work.prompt} prompt tokens.")  # type: ignore[union-attr]
    if any(isinstance(layer.mlp, MoESpec) for layer in spec.layers):
        notes.append("Distinct experts per pass are an expectation under uniform routing.")
    if any(getattr(layer.self_attn, "window", None) for layer in spec.layers):
        notes.append("Sliding-window layers keep every token in the cache; the window limits what is read.")
    return tuple(notes)


def _too_big(plan: Plan, memory: Memory, over: int) -> str:
    """What does not fit, by how much, and what would."""
    work, machine = plan.workload, plan.machine
    total = (
        f"weights {format_bytes(memory.weights)} + cache {format_bytes(memory.kv_reserved)} + activations "
        f"{format_bytes(memory.activations)} + reserve {format_bytes(memory.reserve)} = {format_bytes(memory.peak)}"
    )
    text = f"Does not fit {machine.id} ({format_bytes(machine.memory_bytes)}) by {format_bytes(over)}: {total}."
    footprint = Footprint(plan.model, plan.stack)
    batch = footprint.largest_batch(work.prompt, work.gen, machine.memory_bytes)
    if batch:
        return f"{text} Batch {batch} fits." if batch < UNBOUNDED else text
    context = footprint.largest_context(work.batch, machine.memory_bytes, work.gen)
    if context > work.gen:
        return f"{text} No batch fits at {work.tokens} tokens; batch {work.batch} fits up to {context} tokens."
    # Owned matrices, experts included, but for the head; half a bit per element goes to a 2-byte scale in 32.
    matrices = [(n, times) for path, n, times in owned(plan.model) if isinstance(n, LinearSpec) and path != "lm_head"]
    elements = sum(times * node.n * node.k for node, times in matrices)
    room = machine.memory_bytes - memory.peak + sum(times * node.nbytes() for node, times in matrices)
    bits = min(8, int(8 * room / max(elements, 1) - 0.5))
    if bits >= 2:
        return f"{text} Weights of {bits} bits would: `-t rtn:bits={bits},group=32`."
    return f"{text} Nothing smaller fits either; name a larger machine (`trimtab machines`)."


def kinds_of_bound(report: Report) -> dict[str, tuple[str, float]]:
    """For each phase, what bounds most of its time and its share of it."""
    shares: dict[str, dict[str, float]] = {}
    for row in report.ops:
        phase = shares.setdefault(row.phase, {})
        phase[row.bound] = phase.get(row.bound, 0.0) + row.time_s
    return {
        phase: max(
            ((bound, part / max(sum(parts.values()), 1e-300)) for bound, part in parts.items()),
            key=lambda item: item[1],
        )
        for phase, parts in shares.items()
    }
