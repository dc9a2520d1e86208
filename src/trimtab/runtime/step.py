"""Everything that varies in one forward pass, and the recorder that meters it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import Seq

IntArray = npt.NDArray[np.int64]


@dataclass(slots=True)
class Metered:
    """What one op really did, summed over its calls in a pass."""

    flops: int = 0
    weight_read: int = 0
    kv_read: int = 0
    kv_written: int = 0

    def add(self, other: Metered) -> None:
        """Add another record."""
        self.flops += other.flops
        self.weight_read += other.weight_read
        self.kv_read += other.kv_read
        self.kv_written += other.kv_written


@dataclass(slots=True)
class Recorder:
    """Collects ops in the order they first ran.

    The meter never calls a formula of `spec` or `graph`: modules report the shapes of the operands they multiplied and
    the bytes of the buffers they touched.

    Args:
        ops: what each op did.
        observed: data-dependent counts by name, such as ``layers.3.mlp.active_rows``.
    """

    ops: dict[str, Metered] = field(default_factory=dict)
    observed: dict[str, int] = field(default_factory=dict)

    def op(self, name: str, *, flops: int = 0, weight_read: int = 0, kv_read: int = 0, kv_written: int = 0) -> None:
        """Add one call of an op."""
        self.ops.setdefault(name, Metered()).add(Metered(flops, weight_read, kv_read, kv_written))

    def observe(self, name: str, count: int) -> None:
        """Add a data-dependent count."""
        self.observed[name] = self.observed.get(name, 0) + int(count)

    def total(self, count: str) -> int:
        """Sum of one count over all ops."""
        return sum(getattr(metered, count) for metered in self.ops.values())


#: A tap sees (path, value) at a named point; it returns a replacement or None to leave the value as it is.
Tap = Callable[[str, Any], Any]


@dataclass(slots=True)
class Step:
    """One forward pass over `T` new tokens of `B` rows, packed without padding.

    Args:
        seqs: [B] sequences of the KV store; empty when the pass runs without a cache.
        cu: [B+1] offsets of each row's new tokens in the packed T.
        positions: [T] position of each new token in its sequence.
        record: meter, or None.
        taps: by point name (``mlp.gate``, ``self_attn.qk``, ...); empty costs nothing.
        reach: [B] tokens each sequence will have in the end, as far as that is known; None = those of this pass.
        ends: [B] whether this pass ends the prompt of a sequence: policies of the cache act then; None = it ends none.
    """

    seqs: Sequence[Seq]
    cu: IntArray
    positions: IntArray
    record: Recorder | None = None
    taps: Mapping[str, Tap] = field(default_factory=dict)
    reach: IntArray | None = None
    ends: npt.NDArray[np.bool_] | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.cu) - 1

    @property
    def reaches(self) -> IntArray:
        """Tokens each sequence will have in the end [B]; at least those of this pass and before it."""
        now = self.positions[self.cu[1:] - 1] + 1
        return now if self.reach is None else np.maximum(now, self.reach)

    @staticmethod
    def of(
        new: Sequence[int],
        past: Sequence[int],
        seqs: Sequence[Seq] = (),
        record: Recorder | None = None,
        reach: Sequence[int] | None = None,
        ends: Sequence[bool] | None = None,
    ) -> Step:
        """Build a step from the new and the earlier token count of each row, each with at least one new token."""
        cu = np.concatenate([[0], np.cumsum(new)]).astype(np.int64)
        positions = np.concatenate([np.arange(p, p + n) for n, p in zip(new, past, strict=True)]).astype(np.int64)
        return Step(
            seqs=seqs,
            cu=cu,
            positions=positions,
            record=record,
            reach=None if reach is None else np.asarray(reach, dtype=np.int64),
            ends=None if ends is None else np.asarray(ends, dtype=np.bool_),
        )
