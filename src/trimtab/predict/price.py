"""Seconds: a roofline per kernel, summed over kernels, since they run one after another.

    time of a kernel = max(flops / (peak * ec), vector flops / (fp32 peak * ec), bytes / (bandwidth * eb)) + launches * t0

ec, eb and t0 belong to the stack and the class of op. Source: Yuan et al., arXiv 2402.16363, with the constants per class
that recorded GPU kernels need.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.graph.count import count_all, experts_touched
from trimtab.graph.ops import Counts, Group, Kernel, Op, StepShape
from trimtab.spec.machine import Machine, Stack

FloatArray = npt.NDArray[np.float64]

#: Rows up to which a product with a matrix is priced as a matrix-vector product.
GEMV_ROWS = 16

_CONSTANTS = ("compute_efficiency", "bandwidth_efficiency", "launch_s")

_LINEAR = frozenset({"linear", "router", "expert", "gated_linear", "expand", "absorb_q", "absorb_v", "score"})


@dataclass(frozen=True, slots=True)
class Priced:
    """Equal kernels and what one of them costs in each pass.

    Args:
        group: the kernels.
        counts: of one of them, arrays over passes.
        time_s: [passes] seconds of one of them.
        compute_s, memory_s, launch_s: [passes] the three parts; the first two overlap.
    """

    group: Group
    counts: Counts
    time_s: FloatArray
    compute_s: FloatArray
    memory_s: FloatArray
    launch_s: FloatArray

    @property
    def times(self) -> int:
        """Equal kernels in one pass."""
        return len(self.group.names)

    @property
    def bound(self) -> str:
        """What takes most of the time over all passes: ``compute``, ``memory`` or ``launch``."""
        parts = {"memory": self.memory_s.sum(), "compute": self.compute_s.sum(), "launch": self.launch_s.sum()}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of passes that run the same kernels."""

    kernels: tuple[Priced, ...]
    time_s: FloatArray

    @property
    def total_s(self) -> float:
        """Sum over passes."""
        return float(self.time_s.sum())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        parts: dict[str, float] = {}
        for priced in self.kernels:
            parts[priced.bound] = parts.get(priced.bound, 0.0) + priced.times * float(priced.time_s.sum())
        return max(parts, key=lambda name: parts[name])


def price(kernels: Iterable[Kernel], step: StepShape, machine: Machine, stack: Stack) -> Times:
    """Price passes of the same kernels.

    Args:
        kernels: what the stack launches (`graph.fuse`).
        step: the passes.
        machine: peaks and bandwidth.
        stack: efficiencies, launch cost and overhead per pass.
    """
    counted = count_all(kernels, step, stack.attention, machine.llc_bytes)
    shape = np.shape(step.logits)
    # Weights and cache are streamed pass after pass: what counts for the cache level is all that one pass touches.
    streamed = sum((len(g.names) * _real(c.weight_read + c.kv_read, shape) for g, c in counted), np.zeros(shape))
    priced = tuple(_price(g, c, step, streamed, machine, stack) for g, c in counted)
    overhead = np.full(shape, stack.overhead_per_step_s)
    return Times(priced, sum((p.times * p.time_s for p in priced), overhead))


def _price(
    item: Group, counts: Counts, step: StepShape, streamed: FloatArray, machine: Machine, stack: Stack
) -> Priced:
    shape = np.shape(step.logits)
    main = _main(item.kernel)
    rows = _rows(main, step)
    compute_share, bandwidth_share, launch = _efficiency(main, rows, stack, shape)
    compute = _real(counts.flops, shape) / (machine.peak(main.dtype)[0] * compute_share)
    vector = _real(counts.vector_flops, shape) / (machine.peak("fp32")[0] * compute_share)
    resident = _real(counts.weight_read + counts.kv_read + counts.kv_written, shape)
    active = _real(counts.act_read + counts.act_written, shape)
    memory = resident / bandwidth(streamed, machine, stack) + active / bandwidth(active, machine, stack)
    memory = memory / bandwidth_share
    launches = _real(_launches(item.kernel, step), shape) * launch
    compute = np.maximum(compute, vector)
    return Priced(item, counts, np.maximum(compute, memory) + launches, compute, memory, launches)


def bandwidth(working_set_bytes: FloatArray, machine: Machine, stack: Stack) -> FloatArray | float:
    """Bytes per second for a working set: the stack's table, linear in the logarithm of bytes, or the machine's datasheet."""
    if not stack.bandwidth_by_working_set:
        return machine.memory_bandwidth_bytes_per_s
    sizes, rates = zip(*stack.bandwidth_by_working_set, strict=True)
    return np.interp(np.log(np.maximum(working_set_bytes, 1.0)), np.log(sizes), rates)


def op_class(op: Op) -> str:
    """Class of an op: ``linear`` (gemm or gemv, by rows), ``attention``, ``embedding`` or ``elementwise``."""
    if op.kind in _LINEAR:
        return "linear"
    return "attention" if op.kind.startswith("attend") else "embedding" if op.kind == "embed" else "elementwise"


def _main(kernel: Kernel) -> Op:
    """The op whose class prices a kernel."""
    order = ("attention", "linear", "embedding", "elementwise")
    return min(kernel.ops, key=lambda op: order.index(op_class(op)))


def _efficiency(op: Op, rows: Any, stack: Stack, shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(compute efficiency, bandwidth efficiency, launch) of an op in each pass; linears change class with their rows."""
    kind = op_class(op)
    names = ("gemv", "gemm") if kind == "linear" else (kind, kind)
    few, many = (_constants(name, op, stack) for name in names)
    small = np.broadcast_to(rows <= GEMV_ROWS, shape)
    found = tuple(np.where(small, getattr(few, name), getattr(many, name)) for name in _CONSTANTS)
    gathered = stack.op_classes.get("gathered")
    if op.kind == "gated_linear" and gathered is not None:  # rows picked one by one are read slower than a whole matrix
        owner: Any = op.owner
        picked = np.broadcast_to(rows <= owner.executor.max_tokens, shape)
        found = tuple(
            np.where(picked, getattr(gathered, name), all) for name, all in zip(_CONSTANTS, found, strict=True)
        )
    return found  # type: ignore[return-value]


def _constants(name: str, op: Op, stack: Stack) -> Any:
    """A class may be given for a weight format (``gemv.q4_1``, ``gemv.int``) or a dtype; the format goes first."""
    format_kind = getattr(getattr(op.node, "format", None), "kind", None)
    return stack.op_classes.get(f"{name}.{format_kind}") or stack.efficiency(name, op.dtype)


def _rows(op: Op, step: StepShape) -> Any:
    """Rows that one matrix of the op sees."""
    if op.kind == "expert":
        owner: Any = op.owner
        return np.maximum(
            owner.num_experts_per_tok * step.tokens / np.maximum(experts_touched(owner, step.tokens), 1.0), 1.0
        )
    if op.kind == "score":
        return step.copies * step.new.shape[-1]  # one query each
    return step.rows(op.writes[0].rows) if op.writes else step.tokens


def _launches(kernel: Kernel, step: StepShape) -> Any:
    """Launches per pass; without grouping every expert that is touched is one."""
    runs = step.rows(kernel.writes[0].rows) > 0 if kernel.writes else step.tokens > 0
    if kernel.grouped or kernel.ops[0].kind != "expert":
        return runs
    return np.ceil(experts_touched(kernel.ops[0].owner, step.tokens))  # type: ignore[arg-type]


def _real(value: Any, shape: tuple[int, ...]) -> FloatArray:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), shape)
