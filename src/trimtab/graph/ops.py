"""The records of the graph: values that flow, ops that read and write them, passes as numbers, and what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from trimtab.spec.formats import ITEM_BYTES
from trimtab.spec.tree import Node

IntArray = npt.NDArray[np.int64]

#: Above these, products of counts may pass 2^63, and a step is held in Python integers instead of int64.
_MOST_TOKENS, _MOST_PAIRS = 1 << 30, 1 << 40


@dataclass(frozen=True, slots=True)
class StepShape:
    """Forward passes as numbers; leading axes hold many passes at once.

    Args:
        new: [..., B] new tokens of each row.
        past: [..., B] tokens seen before; what a head still holds of them follows from its `keep`.
        logits: [...] rows of logits wanted, over all rows and copies.
        copies: every row stands for this many equal ones; an array of the leading axes where passes differ in it.
        skew: how unevenly tokens choose experts: the chance of the r-th most popular one falls as r^-skew; 0 = evenly.
        observed: counts that data decides (``layers.3.mlp.active_rows``); absent ones are taken at their expectation.
        prompt: [..., B] tokens of each row that come before its first answer; None: what was seen before, or the new tokens
            of a row that saw none.
    """

    new: IntArray
    past: IntArray
    logits: IntArray
    copies: IntArray | int = 1
    observed: Mapping[str, int] = field(default_factory=dict)
    skew: float = 0.0
    prompt: IntArray | None = None

    @staticmethod
    def of(
        new: npt.ArrayLike | Sequence[int],
        past: npt.ArrayLike | Sequence[int],
        logits: npt.ArrayLike = 0,
        copies: npt.ArrayLike = 1,
        observed: Mapping[str, int] | None = None,
        skew: float = 0.0,
        prompt: npt.ArrayLike | Sequence[int] | None = None,
    ) -> StepShape:
        """Build a step from array-likes: int64, or Python integers where int64 could overflow.

        >>> int(StepShape.of(new=[2, 3], past=[0, 0], logits=2).tokens)
        5
        """
        a, b = np.broadcast_arrays(np.asarray(new, np.int64), np.asarray(past, np.int64))
        many = np.asarray(copies, np.int64)
        tokens = float((a.sum(-1) * many).max(initial=0))
        longest = float((a + b).max(initial=0))
        kind = object if tokens > _MOST_TOKENS or tokens * longest > _MOST_PAIRS else np.int64
        rows = np.broadcast_to(np.asarray(logits, np.int64), a.shape[:-1])
        times = many.astype(kind) if many.ndim else int(many)
        before = None if prompt is None else np.broadcast_to(np.asarray(prompt, np.int64), a.shape).astype(kind)
        return StepShape(a.astype(kind), b.astype(kind), rows.astype(kind), times, dict(observed or {}), skew, before)

    @property
    def tokens(self) -> IntArray:
        """[...] new tokens of a pass, all rows."""
        return self.copies * self.new.sum(-1)

    @property
    def prompts(self) -> IntArray:
        """[..., B] tokens of each row that come before its first answer."""
        return np.where(self.past > 0, self.past, self.new) if self.prompt is None else self.prompt

    @property
    def ends_prompt(self) -> IntArray:
        """[..., B] 1 where the pass brings the last token of a row's prompt, else 0."""
        prompts = self.prompts
        return ((self.past < prompts) & (prompts <= self.past + self.new)).astype(np.int64)

    @property
    def keys(self) -> IntArray:
        """[...] tokens a pass could attend to, summed over rows."""
        return self.copies * (self.new + self.past).sum(-1)

    def rows(self, kind: str) -> IntArray:
        """[...] rows of a value: one per new token, per row of logits, or per key."""
        return {"tokens": self.tokens, "logits": self.logits, "keys": self.keys}[kind]


@dataclass(frozen=True, slots=True)
class Value:
    """An activation between two ops: `width` elements per row; rows are ``tokens``, ``logits`` or ``keys``."""

    name: str
    width: int
    dtype: str
    rows: str = "tokens"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Op:
    """One operator: structure only, without batch, context or repeat count.

    Args:
        name: path of the node, or of weightless work below it.
        kind: key of the count table.
        node: what is described (a linear, a norm, an attention, an FFN).
        owner: the block the node belongs to where its count depends on it (experts, gate-first FFNs).
        reads, writes: activations.
        device: where it runs.
    """

    name: str
    kind: str
    node: Node
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    owner: Node | None = None
    device: str = "0"

    @property
    def dtype(self) -> str:
        """Dtype the op computes in; one that touches the cache alone computes in floats of four bytes."""
        values = self.writes or self.reads
        return values[0].dtype if values else "fp32"


@dataclass(frozen=True, slots=True)
class Kernel:
    """Ops that run as one launch; values between them never reach memory."""

    ops: tuple[Op, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    grouped: bool = True  # experts run in one launch; False: one launch each

    @property
    def name(self) -> str:
        """Name of its first op, with the last segments of the others: ``layers.0.self_attn.q_proj+k_proj+v_proj``."""
        return "+".join([self.ops[0].name, *(op.name.rpartition(".")[2] for op in self.ops[1:])])


@dataclass(frozen=True, slots=True)
class Graph:
    """The ops of one pass in order."""

    ops: tuple[Op, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(op.name for op in self.ops)


@dataclass(frozen=True, slots=True)
class Counts:
    """What an op does in each pass of a step: integers or arrays of the step's leading axes.

    Args:
        flops: of matrix multiplications, 2 per multiply-add.
        vector_flops: everything else (norms, softmax, activations, dequantisation), an estimate.
        weight_read: bytes of weights.
        kv_read, kv_written: bytes of cache.
        act_read, act_written: bytes of activations.
        comm: bytes of the values that collectives sum, gather or exchange over ranks.
    """

    flops: IntArray | int = 0
    vector_flops: IntArray | int = 0
    weight_read: IntArray | int = 0
    kv_read: IntArray | int = 0
    kv_written: IntArray | int = 0
    act_read: IntArray | int = 0
    act_written: IntArray | int = 0
    comm: IntArray | int = 0

    @property
    def nbytes(self) -> IntArray | int:
        """Bytes moved in this device's memory in all; what travels between devices is `comm`."""
        return self.weight_read + self.kv_read + self.kv_written + self.act_read + self.act_written

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def total(self, name: str, times: int = 1, weight: npt.NDArray[np.float64] | None = None) -> int:
        """One count summed over passes and multiplied by `times`, without overflow; `weight`: passes each stands for."""
        value = np.asarray(getattr(self, name))
        if weight is None:
            return times * sum(int(part) for part in np.atleast_1d(value).ravel())
        parts = np.broadcast_to(value, weight.shape).ravel()
        # Weights are whole numbers, or the same fraction for samples that are symmetric: whole in the sum.
        shares = [Fraction(float(w)).limit_denominator(1 << 20) for w in weight.ravel()]
        return times * round(sum(int(part) * share for part, share in zip(parts, shares, strict=True)))


@dataclass(frozen=True, slots=True)
class Group:
    """Kernels equal but for their names: counted once."""

    kernel: Kernel
    names: tuple[str, ...]


def group(kernels: Iterable[Kernel]) -> tuple[Group, ...]:
    """Gather kernels that count alike, in order of first appearance. Nodes are compared by identity (see `build`)."""
    found: dict[tuple, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault(_key(kernel), []).append(kernel)
    return tuple(Group(same[0], tuple(kernel.name for kernel in same)) for same in found.values())


def _key(kernel: Kernel) -> tuple:
    return (
        tuple((op.name.rpartition(".")[2], op.kind, id(op.node), id(op.owner), op.device) for op in kernel.ops),
        tuple((value.width, value.rows, value.dtype) for value in kernel.reads),
        tuple((value.width, value.rows, value.dtype) for value in kernel.writes),
        kernel.grouped,
    )
