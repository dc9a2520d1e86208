"""Seconds: every kernel by the form its class of op has on this stack, summed, since kernels run one after another.

The plain form is a roofline:

    time of a kernel = max(flops / (peak * ec), vector flops / (fp32 peak * ec), bytes / (bandwidth * eb)) + launches * t0

ec, eb and t0 belong to the stack and the class of op. Classes fitted to recorded kernels have richer forms (`predict.forms`).
Source: Yuan et al., arXiv 2402.16363, with the constants per class that recorded GPU kernels need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.graph.count import count_groups, expert_rows, experts_touched
from trimtab.graph.ops import Counts, Group, Kernel, Op, StepShape, group
from trimtab.predict.forms import Device
from trimtab.predict.kernels import ADAPTERS, constants_of, device_of, few_queries
from trimtab.predict.links import collective_s, link_of
from trimtab.spec.machine import GRAPH_SHARE, Efficiency, Machine, Stack
from trimtab.spec.model import ModelSpec

FloatArray = npt.NDArray[np.float64]

#: Rows up to which a product with a matrix is priced as a matrix-vector product.
GEMV_ROWS = 16

_CONSTANTS = ("compute_efficiency", "bandwidth_efficiency", "launch_s")

_LINEAR = frozenset({"linear", "router", "gated_linear", "expand", "absorb_q", "absorb_v", "score", "outliers"})

COLLECTIVES = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Priced:
    """Equal kernels and what one of them costs in each pass.

    Args:
        group: the kernels.
        counts: of one of them, arrays over passes.
        time_s: [passes] seconds of one of them.
        compute_s, memory_s, launch_s: [passes] the three parts by the plain form; the first two overlap.
        comm_s: [passes] time between devices.
        band: P10 and P90 of measured over predicted time of its class; None = nothing was recorded.
    """

    group: Group
    counts: Counts
    time_s: FloatArray
    compute_s: FloatArray
    memory_s: FloatArray
    launch_s: FloatArray
    comm_s: FloatArray
    band: tuple[float, float] | None = None

    @property
    def times(self) -> int:
        """Equal kernels in one pass."""
        return len(self.group.names)

    @property
    def bound(self) -> str:
        """What takes most of the time over all passes: ``compute``, ``memory``, ``launch`` or ``comm``."""
        parts = {
            "memory": self.memory_s.sum(),
            "compute": self.compute_s.sum(),
            "launch": self.launch_s.sum(),
            "comm": self.comm_s.sum(),
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of passes that run the same kernels.

    Args:
        kernels: what runs, with its share.
        time_s: [passes] everything: kernels, overheads and the host's floor.
        overhead_s: [passes] what the host adds to the kernels.
    """

    kernels: tuple[Priced, ...]
    time_s: FloatArray
    overhead_s: FloatArray

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
        stack: efficiencies, launch cost and overheads, with the machine's own constants put in (`Stack.on`).
    """
    # An observed count is looked up by name, so then every kernel stands alone.
    groups = tuple(Group(k, (k.name,)) for k in kernels) if step.observed else group(kernels)
    return price_groups(groups, num_layers(groups), step, machine, stack)


def price_groups(groups: Sequence[Group], layers: int, step: StepShape, machine: Machine, stack: Stack) -> Times:
    """As `price`, with the kernels grouped already; `layers` of them run in a pass."""
    counted = count_groups(groups, step, stack.attention, machine.llc_bytes)
    shape = np.shape(step.logits)
    # Weights and cache are streamed pass after pass: what counts for the cache level is all that one pass touches.
    streamed = sum((len(g.names) * _real(c.weight_read + c.kv_read, shape) for g, c in counted), np.zeros(shape))
    rates = _Rates(machine, stack, step, streamed, shape)
    priced = tuple(_inside(_price(g, c, rates), stack) for g, c in counted)
    sequences = _real(step.copies * step.new.shape[-1], shape)
    overhead = (
        stack.overhead_per_step_s + layers * stack.overhead_per_layer_s + stack.overhead_per_sequence_s * sequences
    )
    busy = sum((p.times * p.time_s for p in priced), np.zeros(shape))
    floor = layers * stack.floor_per_layer_s
    if stack.floor_per_collective_s:
        floor += stack.floor_per_collective_s * sum(
            p.times for p in priced if main_op(p.group.kernel).kind in COLLECTIVES
        )
    if floor:
        overhead = np.maximum(overhead, floor - busy)
    overhead = np.broadcast_to(np.asarray(overhead, np.float64), shape)
    return Times(priced, busy + overhead, overhead)


def _inside(priced: Priced, stack: Stack) -> Priced:
    """A kernel as the engine runs it: slower or faster than alone, and launched by a captured graph."""
    factor = stack.factors.get(factor_of(main_op(priced.group.kernel)), 1.0)
    if factor == 1.0 and not stack.graph_saving_s:
        return priced
    time = factor * priced.time_s
    return replace(priced, time_s=time - np.minimum(stack.graph_saving_s, GRAPH_SHARE * time))


def factor_of(op: Op) -> str:
    """The factor of `spec.machine.FACTORS` an op has, or its class."""
    found = op_class(op)
    return {"linear": "gemm", **dict.fromkeys(COLLECTIVES, "link")}.get(found, found)


def num_layers(groups: Iterable[Group]) -> int:
    """Distinct layers whose kernels these are."""
    return len({found.group(1) for g in groups for name in g.names if (found := _LAYER.search(name))})


@dataclass(frozen=True, slots=True)
class _Rates:
    """What all kernels of a pass share."""

    machine: Machine
    stack: Stack
    step: StepShape
    streamed: FloatArray
    shape: tuple[int, ...]


def _price(item: Group, counts: Counts, rates: _Rates) -> Priced:
    machine, stack, step, shape = rates.machine, rates.stack, rates.step, rates.shape
    main = main_op(item.kernel)
    if main.kind in COLLECTIVES:
        return _communicate(item, main, counts, rates)
    rows = _rows(main, step)
    constants, band = _efficiency(main, rows, step, stack, shape)
    compute_share, bandwidth_share, launch = constants
    peak = machine.peak(product_dtype(main))[0]
    compute = _real(counts.flops, shape) / (peak * compute_share)
    vector = _real(counts.vector_flops, shape) / (machine.peak("fp32")[0] * compute_share)
    resident = _real(counts.weight_read + counts.kv_read + counts.kv_written, shape)
    active = _real(counts.act_read + counts.act_written, shape)
    memory = resident / bandwidth(rates.streamed, machine, stack) + active / bandwidth(active, machine, stack)
    memory = memory / bandwidth_share
    runs = _real(_launches(item.kernel, counts, step), shape)
    launches = runs * launch
    compute = np.maximum(compute, vector)
    none = np.zeros(shape)
    fitted = _fitted(main, step, stack)
    if fitted is not None:
        device = device_of(machine, product_dtype(main))
        seconds = ADAPTERS[fitted.form](item.kernel, main, counts, step, device, constants_of(fitted), rates.streamed)
        if seconds is not None:
            seconds = _or_as_decode(seconds, main, step, stack, device)
            time = np.where(runs > 0, np.broadcast_to(np.maximum(seconds, vector), shape), 0.0)
            return Priced(item, counts, time, compute, memory, launches, none, fitted.band)
    return Priced(item, counts, np.maximum(compute, memory) + launches, compute, memory, launches, none, band)


def _communicate(item: Group, op: Op, counts: Counts, rates: _Rates) -> Priced:
    """A collective over the ranks of its node."""
    shape, ranks = rates.shape, op.node.ranks  # type: ignore[attr-defined]
    constants = rates.stack.efficiency(op.kind)
    nbytes = _real(counts.comm, shape)
    time = collective_s(op.kind, nbytes, ranks, link_of(rates.machine, ranks), constants)
    time = np.where(nbytes > 0, time, 0.0)
    none = np.zeros(shape)
    return Priced(item, counts, time, none, none, none, time, constants.band)


def bandwidth(working_set_bytes: FloatArray, machine: Machine, stack: Stack) -> FloatArray | float:
    """Bytes per second for a working set: the stack's table, linear in the logarithm of bytes, or the machine's datasheet."""
    if not stack.bandwidth_by_working_set:
        return machine.memory_bandwidth_bytes_per_s
    sizes, rates = zip(*stack.bandwidth_by_working_set, strict=True)
    return np.interp(np.log(np.maximum(working_set_bytes, 1.0)), np.log(sizes), rates)


def op_class(op: Op) -> str:
    """Class of an op: ``linear`` (gemm or gemv, by rows), ``moe``, ``attention``, ``embedding``, a collective, ``scan`` or
    ``elementwise``.
    """
    if op.kind in _LINEAR:
        return "linear"
    if op.kind == "expert":
        return "moe"
    if op.kind in COLLECTIVES or op.kind == "scan":
        return op.kind
    return "attention" if op.kind.startswith("attend") else "embedding" if op.kind == "embed" else "elementwise"


def class_of(op: Op, step: StepShape) -> str:
    """As `op_class`, with attention told apart by whether every row brings one token."""
    found = op_class(op)
    if found != "attention":
        return "gemm" if found == "linear" else found
    return "attention_decode" if np.max(step.new, initial=1) <= 1 else "attention_prefill"


def product_dtype(op: Op) -> str:
    """Dtype whose peak bounds the products of an op: that of the coded input where a linear codes it."""
    act = getattr(op.node, "act", None)
    return act if op.kind in ("linear", "expert") and act in _CODED else op.dtype


_CODED = frozenset({"fp8", "int8", "fp4", "int4"})


_ORDER = ("attention", "moe", "linear", "scan", "embedding", *sorted(COLLECTIVES), "elementwise")


def main_op(kernel: Kernel) -> Op:
    """The op whose class prices a kernel."""
    return min(kernel.ops, key=lambda op: _ORDER.index(op_class(op)))


def variants_of(op: Op) -> tuple[str, ...]:
    """A class may be given for a weight format (``gemv.q4_1``, ``gemv.int``) or a dtype; the format goes first."""
    if op.kind.startswith("attend"):
        return (op.node.cache.heads[0].k_format.kind,)  # type: ignore[attr-defined]
    dtype = product_dtype(op)
    if op.kind == "outliers":  # a product in the floats of the input, whatever the matrix is held in
        return (dtype,)
    if op.kind == "expert" and dtype == "fp8":  # published fp8 experts (Qwen3, DeepSeek-V3) are scaled by block
        return "fp8_block", dtype
    form = getattr(op.node, "format", None)
    kind = getattr(form, "kind", None)
    if form is not None and form.tiled:  # the native program: its speed depends on the width of a code
        return (f"int{form.bits}" if form.kind in ("int", "grid", "pair") else form.kind, dtype)
    return (dtype,) if kind in (None, "fp32", "bf16", "fp16", "fp8") or dtype != op.dtype else (kind, dtype)


def _efficiency(
    op: Op, rows: Any, step: StepShape, stack: Stack, shape: tuple[int, ...]
) -> tuple[tuple[FloatArray, FloatArray, FloatArray], tuple[float, float] | None]:
    """(compute efficiency, bandwidth efficiency, launch) of an op in each pass, and its band; linears change class with rows."""
    kind = class_of(op, step)
    variants = variants_of(op)
    many = stack.efficiency(kind, *variants)
    few = stack.efficiency("gemv", *variants) if kind in ("gemm", "moe") else many
    if few is many or few == many:
        found = tuple(np.broadcast_to(getattr(many, name), shape) for name in _CONSTANTS)
    else:
        small = np.broadcast_to(rows <= GEMV_ROWS, shape)
        found = tuple(np.where(small, getattr(few, name), getattr(many, name)) for name in _CONSTANTS)
    gathered = stack.op_classes.get("gathered")
    if op.kind == "gated_linear" and gathered is not None:  # rows picked one by one are read slower than a whole matrix
        owner: Any = op.owner
        picked = np.broadcast_to(rows <= owner.executor.max_tokens, shape)
        found = tuple(
            np.where(picked, getattr(gathered, name), all) for name, all in zip(_CONSTANTS, found, strict=True)
        )
    return found, many.band  # type: ignore[return-value]


def _fitted(op: Op, step: StepShape, stack: Stack) -> Efficiency | None:
    """Constants of a richer form than the roofline, if the stack has some for this op."""
    if op.kind in ("gated_linear", "score"):  # rows picked one by one, and a sum over the prompt: neither was recorded
        return None
    found = stack.efficiency(class_of(op, step), *variants_of(op))
    return found if found.form in ADAPTERS else None


def product_dtypes(spec: ModelSpec) -> tuple[str, ...]:
    """Dtypes whose peaks a model's products ask for."""
    distinct = replace(spec, layers=tuple({id(layer): layer for layer in spec.layers}.values()))
    coded = [node.act for _, node in distinct.linears() if node.act in _CODED]
    return tuple(dict.fromkeys([spec.act_dtype, *coded]))


def _or_as_decode(seconds: Any, op: Op, step: StepShape, stack: Stack, device: Device) -> Any:
    """Attention of a few new tokens over a long past (a chunk, speculative verification) may run as decoding does."""
    if class_of(op, step) != "attention_prefill" or not np.max(step.past, initial=0):
        return seconds
    found = stack.efficiency("attention_decode", *variants_of(op))
    if found.form != "decode_attention":
        return seconds
    return np.minimum(seconds, few_queries(constants_of(found), op, step, device))


def _rows(op: Op, step: StepShape) -> Any:
    """Rows that one matrix of the op sees."""
    if op.kind == "expert":
        owner: Any = op.owner
        touched = experts_touched(owner, step.tokens, step.skew)
        return np.maximum(expert_rows(owner, step.tokens, step.skew) / np.maximum(touched, 1.0), 1.0)
    if op.kind == "score":
        return step.copies * step.new.shape[-1]  # one query each
    return step.rows(op.writes[0].rows) if op.writes else step.tokens


def _launches(kernel: Kernel, counts: Counts, step: StepShape) -> Any:
    """Launches per pass; without grouping every expert that is touched is one."""
    if kernel.ops[0].kind == "evict":  # most passes give up nothing
        return np.not_equal(counts.kv_read + counts.kv_written, 0)
    runs = step.rows(kernel.writes[0].rows) > 0 if kernel.writes else step.tokens > 0
    if kernel.grouped or kernel.ops[0].kind != "expert":
        return runs
    return np.ceil(experts_touched(kernel.ops[0].owner, step.tokens, step.skew))  # type: ignore[arg-type]


def _real(value: Any, shape: tuple[int, ...]) -> FloatArray:
    return np.broadcast_to(np.asarray(value, dtype=np.float64), shape)
