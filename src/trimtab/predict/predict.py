"""From a Plan to a Report: counts, figures, the operator table and what the reader should know."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.graph.attention import expected_moves
from trimtab.graph.count import active_rows, count_all, count_groups, experts_touched
from trimtab.graph.ops import Counts, Op, StepShape
from trimtab.graph.passes import Graphs, Pass, mean_decode_step
from trimtab.graph.shard import shard
from trimtab.predict.figures import figures
from trimtab.predict.memory import Memory
from trimtab.predict.notes import notes, usable_bytes
from trimtab.predict.price import Times, main_op, product_dtype
from trimtab.predict.request import Requests
from trimtab.predict.slices import Slices
from trimtab.spec.cache import Budget
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, GateFirst, MoESpec
from trimtab.spec.plan import Plan
from trimtab.spec.report import OpRow, Report

_LAYER = re.compile(r"layers\.\d+\.")


def predict(plan: Plan, slices: Slices | None = None) -> Report:
    """Price a plan; `slices` of the same model and stack, kept from an earlier call, spare building the graph again.

    Counts (integers): ``weight_bytes`` resident weights; ``kv_bytes`` cache of all sequences at prompt + gen tokens (what is
    kept of a filtered prompt), ``kv_reserved_bytes`` the same in whole pages, ``kv_peak_bytes`` the most pages at any
    time; ``activation_bytes`` peak of live activations; ``reserve_bytes`` of the engine; ``peak_bytes`` the sum of these
    peaks and the weights; ``capacity_bytes`` of the machine;
    ``prefill_flops`` the whole batch; ``decode_flops``, ``weight_read``, ``kv_read`` one decode step at mean context;
    ``prefill_weight_read``, ``prefill_kv_read`` the whole prefill.

    Figures: ``ttft_s`` prefill plus first token; ``tpot_s`` mean of the other gen - 1 steps; ``tokens_per_s`` batch /
    tpot_s; ``energy_j`` the whole request; ``usd_per_million_tokens`` of decoded tokens. One without a source is None.
    """
    slices = slices or Slices(plan.model, plan.stack)
    graphs = slices.graphs(plan.parallel)
    work = plan.workload
    requests = Requests(
        graphs, plan.machine, plan.stack, plan.parallel,
        prompt=work.prompt, gen=work.gen, concurrent=work.continuous, skew=work.skew,
        footprint=slices.footprint(plan.parallel),
    )  # fmt: skip
    costs = requests.costs(np.asarray(work.batch))
    memory = requests.footprint.at(work)
    mean = mean_decode_step(plan.model, replace(work, batch=-(-work.batch // plan.parallel.dp)))
    return Report(
        source="predicted",
        plan=plan.to_dict(),
        counts=_counts(plan, graphs, costs.passes, memory, mean),
        figures=figures(plan, costs),
        observed=expected(graphs.spec, mean),
        ops=_rows(costs.passes),
        notes=notes(plan, memory, slices),
    )


def step_counts(plan: Plan, step: StepShape, graphs: Graphs | None = None) -> Counts:
    """Counts of decode steps, summed over ops (and over the steps, if there are several)."""
    graphs = graphs or Graphs(shard(plan.model, plan.parallel))
    attention, cache = plan.stack.attention, plan.machine.llc_bytes
    if step.observed:  # looked up by name, so every kernel stands alone
        counted = count_all(graphs.kernels(graphs.decode, plan.stack), step, attention, cache)
    else:
        counted = count_groups(graphs.groups(graphs.decode, plan.stack), step, attention, cache)
    return _sum((counts, len(same.names), None) for same, counts in counted)


def expected(spec: ModelSpec, step: StepShape) -> dict[str, float]:
    """Expectation of every count that data decides, by the name under which a run observes it."""
    found: dict[str, float] = {}
    tokens = step.tokens
    for index, layer in enumerate(spec.layers):
        attn = layer.self_attn
        if isinstance(attn, AttentionSpec) and any(isinstance(head.keep, Budget) for head in attn.cache.heads):
            found[f"layers.{index}.self_attn.evict.moved"] = float(np.sum(expected_moves(attn, step)))
        path = f"layers.{index}.mlp"
        if isinstance(layer.mlp, MoESpec):
            found[f"{path}.experts_touched"] = float(experts_touched(layer.mlp, tokens, step.skew))
        elif (
            isinstance(layer.mlp, FFNSpec)
            and isinstance(layer.mlp.executor, GateFirst)
            and tokens <= layer.mlp.executor.max_tokens
        ):
            found[f"{path}.active_rows"] = float(active_rows(layer.mlp, tokens))
            found[f"{path}.active_pairs"] = float(layer.mlp.executor.expected * layer.mlp.intermediate_size * tokens)
    return found


def _sum(counted: Iterable[tuple[Counts, int, Any]]) -> Counts:
    """Total over kernels and (weighted) passes in Python integers."""
    totals = dict.fromkeys(Counts.__slots__, 0)
    for counts, times, weight in counted:
        for name in totals:
            totals[name] += counts.total(name, times, weight)
    return Counts(**totals)


def _counts(
    plan: Plan, graphs: Graphs, done: Iterable[tuple[Pass, Times]], memory: Memory, mean: StepShape
) -> dict[str, int]:
    before = _sum(
        (p.counts, p.times, each.weight) for each, times in done if each.phase != "decode" for p in times.kernels
    )
    decode = step_counts(plan, mean, graphs)
    return {
        "parameters": plan.base.num_parameters(),
        "weight_bytes": memory.weights,
        "kv_bytes": memory.kv_held,
        "kv_reserved_bytes": memory.kv_reserved,
        "kv_peak_bytes": memory.kv_peak,
        "state_bytes": -(-plan.workload.batch // plan.parallel.dp) * graphs.spec.state_nbytes(),
        "activation_bytes": memory.activations,
        "reserve_bytes": memory.reserve,
        "peak_bytes": memory.peak,
        "capacity_bytes": usable_bytes(plan),
        "prefill_flops": int(before.flops),
        "decode_flops": int(decode.flops),
        "weight_read": int(decode.weight_read),
        "kv_read": int(decode.kv_read),
        "prefill_weight_read": int(before.weight_read),
        "prefill_kv_read": int(before.kv_read),
        "comm_bytes": int(decode.comm),
        "prefill_comm_bytes": int(before.comm),
    }


def _rows(done: Iterable[tuple[Pass, Times]]) -> tuple[OpRow, ...]:
    """One row per phase and kernel, layers folded into ``layers.*``."""
    found: dict[tuple[str, str], list] = {}
    for each, times in done:
        for p in times.kernels:
            name = _LAYER.sub("layers.*.", p.group.names[0])
            main = main_op(p.group.kernel)
            kind = next(
                (op.kind for op in p.group.kernel.ops if op.kind == "attend" or op.kind == "linear"),
                p.group.kernel.ops[0].kind,
            )
            row = found.setdefault((each.phase, name), [kind, 0, 0, 0, 0.0, {}, shape_of(main), product_dtype(main)])
            row[1] += p.times * each.repeat
            row[2] += p.counts.total("flops", p.times, each.weight)
            row[3] += p.counts.total("nbytes", p.times, each.weight)
            seconds = p.times * float((p.time_s * each.weight).sum())
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
            shape=shape,
            dtype=dtype,
        )
        for (phase, name), (kind, times, flops, nbytes, time_s, bounds, shape, dtype) in found.items()
    )


def shape_of(op: Op) -> str:
    """What an op works with, without batch or context: ``4096 -> 14336`` of a matrix, ``32/8 heads x 128`` of attention."""
    node: Any = op.node
    if isinstance(node, LinearSpec):
        return f"{node.k} -> {node.n}"
    if isinstance(node, AttentionSpec):
        return f"{node.num_attention_heads}/{len(node.cache.heads)} heads x {node.head_dim}"
    return f"{op.writes[0].width} wide" if op.writes else ""


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
