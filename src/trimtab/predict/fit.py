"""What fits: the largest context for a batch, the largest batch for a context."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard
from trimtab.predict.memory import UNBOUNDED, Footprint
from trimtab.predict.notes import usable_bytes
from trimtab.spec.plan import Plan
from trimtab.spec.report import SCHEMA
from trimtab.spec.workload import Workload

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One case that fits, with the sum; `context` or `batch` 0 means that nothing fits, `unbounded` that it never ends."""

    batch: int
    context: int
    weights: int
    kv: int
    activations: int
    reserve: int
    peak: int
    unbounded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """The answer of `fit`.

    Args:
        plan: the plan as JSON.
        capacity_bytes: memory that was asked to hold everything.
        rows: one per batch with the largest context, or one with the largest batch for the context asked for.
        notes: sentences for the reader.
    """

    plan: dict[str, Any]
    capacity_bytes: int
    rows: tuple[FitRow, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, schema 1."""
        return {
            "schema": SCHEMA,
            "plan": self.plan,
            "capacity_bytes": self.capacity_bytes,
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def fit(plan: Plan, memory_bytes: int | None = None, context: int | None = None) -> FitResult:
    """Find what fits.

    Args:
        plan: model, machine, stack and techniques; its workload gives the generated tokens.
        memory_bytes: capacity of one device; None = what the engine may use of the machine's.
        context: tokens per sequence (prompt and generated). None: largest context for the plan's batch and for powers of two.
            Given: the largest batch at this context.
    """
    capacity = usable_bytes(plan) if memory_bytes is None else memory_bytes
    graphs = Graphs(shard(plan.model, plan.parallel))
    footprint, gen = Footprint(graphs, plan.stack, plan.parallel), plan.workload.gen
    if context is not None:
        prompt, gen = max(context - gen, 1), min(gen, max(context - 1, 1))
        batch = footprint.largest_batch(prompt, gen, capacity)
        rows = [_row(footprint, batch, prompt, gen, batch >= UNBOUNDED)]
    else:
        rows = []
        for batch in sorted({*_BATCHES, plan.workload.batch}):
            longest = footprint.largest_context(batch, capacity, gen)
            rows.append(_row(footprint, batch, max(longest - gen, 0), gen, longest >= UNBOUNDED))
            if longest == 0:
                break
    return FitResult(plan=plan.to_dict(), capacity_bytes=capacity, rows=tuple(rows), notes=_notes(plan, rows))


def _row(footprint: Footprint, batch: int, prompt: int, gen: int, unbounded: bool) -> FitRow:
    """The sum of a case; where nothing fits, that of the smallest one."""
    memory = footprint.at(Workload(batch=max(batch, 1), prompt=max(prompt, 1), gen=gen))
    return FitRow(
        batch=batch,
        context=prompt + gen if prompt else 0,
        weights=memory.weights,
        kv=memory.kv_peak,
        activations=memory.activations,
        reserve=memory.reserve,
        peak=memory.peak,
        unbounded=unbounded,
    )


def _notes(plan: Plan, rows: list[FitRow]) -> tuple[str, ...]:
    notes = []
    limit = plan.model.max_position_embeddings
    if limit and any(row.context > limit for row in rows):
        notes.append(f"{plan.model.name} was made for {limit} positions; memory is not what ends a longer context.")
    if any(row.unbounded for row in rows):
        notes.append("The cache does not grow with the context, so memory sets no end.")
    return tuple(notes)
