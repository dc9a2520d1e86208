"""The KV store: pages of keys and values, per sequence, layer and KV head.

Heads of a layer with one description form a group. A row (one sequence, one layer, one group) holds its pages in one
run, [heads, pages * page, size], so that attention reads a plain strided array and no step copies the past. Runs grow by
half and are moved when they do; a fork shares runs until one side writes. Freed runs go back to the operating system.

Legend: T new tokens of all rows, s of one row, S keys in view, G heads of a group, H head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.memory import mapped
from trimtab.runtime.numerics import bfloat16_bits, bfloat16_to_float32
from trimtab.runtime.step import IntArray, Step
from trimtab.runtime.weights.packed import NUMPY_DTYPES
from trimtab.spec.cache import HeadSpec, KVBytes, PageFormat, Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.runnable import check_runnable
from trimtab.units import format_bytes

#: Runs of this many bytes or more are mapped on their own, so that freeing one lowers the process's memory at once.
_MAPPED = 1 << 20


@dataclass(frozen=True, slots=True)
class GroupView:
    """What the new tokens of one row may read from one group of heads.

    Args:
        heads: KV heads of the layer, in order.
        k, v: [G, S, H] in the page's dtype (bf16 as uint16); views of the pages where nothing had to be moved.
        positions: int64 [S] of the keys in their sequence.
    """

    heads: tuple[int, ...]
    k: np.ndarray
    v: np.ndarray
    positions: IntArray


class _Run:
    """Pages of one row: [G, capacity, H] for keys and for values; shared by forks until one of them writes.

    Integer pages hold codes there, followed in the same buffer by scales and minima [G, capacity, groups]; `parts` lists all
    arrays of keys and values.
    """

    __slots__ = ("address", "k", "owners", "parts", "v")

    def __init__(self, heads: int, head: HeadSpec, capacity: int) -> None:
        k = _allocate((heads, capacity, head.head_dim), head.k_format)
        v = _allocate((heads, capacity, head.v_head_dim), head.v_format)
        self.k, self.v, self.parts = k[0], v[0], (*k, *v)
        self.owners = 1
        self.address = (self.k.ctypes.data, self.v.ctypes.data, capacity)

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def _allocate(shape: tuple[int, int, int], form: PageFormat) -> tuple[np.ndarray, ...]:
    """One buffer for elements [G, capacity, H], or for codes, scales and minima one after the other."""
    heads, capacity, size = shape
    if form.is_float:
        dtypes, widths = (NUMPY_DTYPES[form.kind],), (size,)
    else:
        groups = -(-size // form.group)
        dtypes, widths = (NUMPY_DTYPES["u8"], NUMPY_DTYPES["fp16"], NUMPY_DTYPES["fp16"]), (size, groups, groups)
    ends = list(itertools.accumulate(heads * capacity * w * d.itemsize for d, w in zip(dtypes, widths, strict=True)))
    whole = np.zeros(ends[-1], np.uint8) if ends[-1] < _MAPPED else mapped(ends[-1])
    return tuple(
        whole[start:end].view(dtype).reshape(heads, capacity, width)
        for start, end, dtype, width in zip([0, *ends], ends, dtypes, widths, strict=False)
    )


@dataclass(slots=True)
class _Row:
    """One sequence, one layer, one group: its run, the tokens seen, and where each held token stands."""

    run: _Run
    seen: int = 0
    held: int = 0
    positions: IntArray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  # [capacity]; only the first `held` count


@dataclass(frozen=True, slots=True)
class Mark:
    """A state of a sequence to come back to; free it by `KVStore.release` or by resetting to it."""

    seq: int
    rows: tuple[tuple[_Row, ...], ...]


class Seq:
    """A sequence of one store."""

    __slots__ = ("_rows", "id", "spec_hash")

    def __init__(self, id: int, spec_hash: str, rows: list[list[_Row]]) -> None:
        self.id, self.spec_hash, self._rows = id, spec_hash, rows

    @property
    def length(self) -> int:
        """Tokens every layer has seen."""
        return self._rows[-1][0].seen if self._rows else 0


class KVStore:
    """Keys and values of any number of sequences of one model.

    Args:
        spec: the model; a sequence is bound to its hash.
        capacity_bytes: most bytes of pages; None = what the machine has.
        int_pages: the caller codes and reads int8 pages itself (`place`).

    Attributes:
        written: bytes of keys and values appended so far.
        handed_out: bytes of keys and values in views so far.
    """

    def __init__(self, spec: ModelSpec, capacity_bytes: int | None = None, *, int_pages: bool = False) -> None:
        check_runnable(spec, int_pages=int_pages)
        self.spec, self.capacity_bytes = spec, capacity_bytes
        self._groups = [_groups(layer.cache.heads) for layer in spec.layers]
        self._hash = spec.hash
        self._seqs: dict[int, Seq] = {}
        self._ids = itertools.count()
        self._pages_bytes = self._peak_bytes = 0
        self.written = self.handed_out = 0

    # ---------------------------------------------------------------------------------------------- sequences

    def open(self, reserve_tokens: int = 0) -> Seq:
        """Start a sequence with room for `reserve_tokens`.

        Raises:
            CapacityError: its pages do not fit, before any is taken.
        """
        wanted = sum(
            _pages(_slots(head, reserve_tokens), head) * head.page * head.token_bytes() * len(heads)
            for groups in self._groups
            for heads, head in groups
        )
        self._admit(wanted, f"{reserve_tokens} tokens")
        rows = []
        for groups in self._groups:
            made = []
            for heads, head in groups:
                capacity = _pages(_slots(head, reserve_tokens), head) * head.page
                run = self._take(len(heads), head, capacity)
                made.append(_Row(run, positions=np.zeros(capacity, np.int64)))
            rows.append(made)
        seq = Seq(next(self._ids), self._hash, rows)
        self._seqs[seq.id] = seq
        return seq

    def free(self, seq: Seq) -> None:
        """End a sequence; runs nobody else uses are given back."""
        self._check(seq)
        del self._seqs[seq.id]
        for row in itertools.chain.from_iterable(seq._rows):
            self._drop(row.run)
        seq._rows = []

    def fork(self, seq: Seq) -> Seq:
        """Return a sequence that continues like this one; pages are shared until one of the two writes."""
        self._check(seq)
        other = Seq(next(self._ids), seq.spec_hash, [list(rows) for rows in self._share(seq)])
        self._seqs[other.id] = other
        return other

    def mark(self, seq: Seq) -> Mark:
        """Remember this state of a sequence."""
        self._check(seq)
        return Mark(seq.id, tuple(tuple(rows) for rows in self._share(seq)))

    def reset(self, seq: Seq, mark: Mark) -> None:
        """Bring a sequence back to a mark, which stays usable.

        Raises:
            SpecError: the mark belongs to another sequence.
        """
        self._check(seq)
        if mark.seq != seq.id:
            raise SpecError(f"The mark was made on sequence {mark.seq}, not on {seq.id}.")
        for row in itertools.chain.from_iterable(seq._rows):
            self._drop(row.run)
        seq._rows = [[_copy(row) for row in rows] for rows in mark.rows]

    def release(self, mark: Mark) -> None:
        """Give up a mark and the pages only it still holds."""
        for row in itertools.chain.from_iterable(mark.rows):
            self._drop(row.run)

    def truncate(self, seq: Seq, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            NotRewindable: a ring has overwritten tokens that would be needed again.
            SpecError: more tokens than the sequence has.
        """
        self._check(seq)
        if not 0 <= tokens <= seq.length:
            raise SpecError(
                f"The sequence has {seq.length} tokens; it cannot be cut to {tokens}. Allowed: 0..{seq.length}."
            )
        for rows, groups in zip(seq._rows, self._groups, strict=True):
            for row, (_, head) in zip(rows, groups, strict=True):
                if row.held != row.seen and tokens < row.seen:
                    raise NotRewindable(
                        f"The cache keeps {head.keep} and has forgotten tokens; it cannot go back to {tokens}. "
                        "Mark the sequence before and reset to the mark."
                    )
        for rows, groups in zip(seq._rows, self._groups, strict=True):
            for row, (_, head) in zip(rows, groups, strict=True):
                row.seen, row.held = tokens, head.keep.held(tokens)

    # ---------------------------------------------------------------------------------------- keys and values

    def append(self, layer: int, k_TGH: np.ndarray, v_TGH: np.ndarray, step: Step) -> list[list[GroupView]]:
        """Write the new tokens of every row and return what their queries may read.

        Args:
            layer: index.
            k_TGH, v_TGH: new keys and values of all heads; float32, float16 or bf16 as uint16.
            step: offsets, positions and sequences.

        Returns:
            For each row its groups of heads.

        Raises:
            CapacityError: the pages do not fit.
        """
        views = []
        for row, seq in enumerate(step.seqs):
            self._check(seq)
            first, end = int(step.cu[row]), int(step.cu[row + 1])
            at = step.positions[first:end]
            found = []
            for group, (heads, head) in enumerate(self._groups[layer]):
                chosen = slice(None) if len(heads) == k_TGH.shape[1] else list(heads)
                k = _convert(k_TGH[first:end, chosen], head.k_format.kind).transpose(1, 0, 2)
                v = _convert(v_TGH[first:end, chosen], head.v_format.kind).transpose(1, 0, 2)
                self.written += k.nbytes + v.nbytes
                write = self._write_ring if isinstance(head.keep, Ring) else self._write_all
                view = write(seq._rows[layer][group], heads, head, k, v, at)
                self.handed_out += view.k.nbytes + view.v.nbytes
                found.append(view)
            views.append(found)
        return views

    def place(self, step: Step) -> IntArray:
        """Make room for the new tokens of every row; the caller writes their keys and values itself.

        Only for layers whose heads are alike and keep every token.

        Returns:
            int64 [layers, B, 3]: address of the keys, of the values, tokens a head has room for; both are [G, room, H].

        Raises:
            CapacityError: the pages do not fit.
        """
        table = np.empty((len(self._groups), len(step.seqs), 3), np.int64)
        for index, seq in enumerate(step.seqs):
            self._check(seq)
            first, end = int(step.cu[index]), int(step.cu[index + 1])
            at = step.positions[first:end]
            for layer, (rows, groups) in enumerate(zip(seq._rows, self._groups, strict=True)):
                row, (heads, head) = rows[0], groups[0]
                count = row.held + end - first
                if row.run.owners != 1 or count > row.run.capacity:
                    self._own(row, len(heads), head, count)
                row.positions[row.held : count] = at
                row.held, row.seen = count, row.seen + end - first
                table[layer, index] = row.run.address
        return table

    def _write_all(
        self, row: _Row, heads: tuple[int, ...], head: HeadSpec, k: np.ndarray, v: np.ndarray, at: IntArray
    ) -> GroupView:
        count = row.held + len(at)
        self._own(row, len(heads), head, count)
        row.run.k[:, row.held : count], row.run.v[:, row.held : count] = k, v
        row.positions[row.held : count] = at
        row.held, row.seen = count, row.seen + len(at)
        return GroupView(heads, row.run.k[:, :count], row.run.v[:, :count], row.positions[:count])

    def _write_ring(
        self, row: _Row, heads: tuple[int, ...], head: HeadSpec, k: np.ndarray, v: np.ndarray, at: IntArray
    ) -> GroupView:
        """One token overwrites the oldest slot in place; several are joined to what is still visible, then folded in."""
        keep: Any = head.keep
        before, after = row.seen, row.seen + len(at)
        if len(at) == 1:
            self._own(row, len(heads), head, keep.held(after))
            slot = self._slot(keep, before)
            row.run.k[:, slot], row.run.v[:, slot], row.positions[slot] = k[:, 0], v[:, 0], at[0]
            row.held, row.seen = keep.held(after), after
            held = row.held
            return GroupView(heads, row.run.k[:, :held], row.run.v[:, :held], row.positions[:held])
        # The oldest slot is out of sight of the first new token when the ring is full.
        seen = np.arange(row.held)
        if keep.visible(before) < row.held:
            seen = seen[seen != self._slot(keep, before)]
        view = GroupView(
            heads,
            np.concatenate((row.run.k[:, seen], k), axis=1),
            np.concatenate((row.run.v[:, seen], v), axis=1),
            np.concatenate((row.positions[seen], at)),
        )
        self._own(row, len(heads), head, keep.held(after))
        order = np.arange(before, after)
        stays = (order < keep.sink) | (order >= after - keep.recent)
        slots = np.where(order < keep.sink, order, keep.sink + (order - keep.sink) % keep.recent)[stays]
        row.run.k[:, slots], row.run.v[:, slots], row.positions[slots] = k[:, stays], v[:, stays], at[stays]
        row.held, row.seen = keep.held(after), after
        return view

    @staticmethod
    def _slot(keep: Ring, index: int) -> int:
        """Slot of the token that came as number `index`."""
        return index if index < keep.sink else keep.sink + (index - keep.sink) % keep.recent

    # ---------------------------------------------------------------------------------------------- accounting

    def nbytes(self, seq: Seq | None = None) -> KVBytes:
        """Bytes that hold tokens, and bytes of all pages taken; shared pages count once.

        Args:
            seq: of one sequence; None = of all.
        """
        held = reserved = 0
        runs: dict[int, _Run] = {}
        tokens: dict[int, int] = {}
        for one in self._seqs.values() if seq is None else (seq,):
            for row in itertools.chain.from_iterable(one._rows):
                runs[id(row.run)] = row.run
                tokens[id(row.run)] = max(tokens.get(id(row.run), 0), row.held)
        for key, run in runs.items():
            held += sum(part[:, : tokens[key]].nbytes for part in run.parts)
            reserved += run.nbytes
        return KVBytes(held, reserved)

    @property
    def pages_bytes(self) -> int:
        """Bytes of all pages taken now, marks included."""
        return self._pages_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes of pages taken at any time."""
        return self._peak_bytes

    # ------------------------------------------------------------------------------------------------- pages

    def _take(self, heads: int, head: HeadSpec, capacity: int) -> _Run:
        run = _Run(heads, head, capacity)
        self._pages_bytes += run.nbytes
        self._peak_bytes = max(self._peak_bytes, self._pages_bytes)
        return run

    def _drop(self, run: _Run) -> None:
        run.owners -= 1
        if run.owners == 0:
            self._pages_bytes -= run.nbytes

    def _own(self, row: _Row, heads: int, head: HeadSpec, tokens: int) -> None:
        """Make sure the row alone owns a run with room for `tokens`."""
        run = row.run
        if run.owners == 1 and tokens <= run.capacity:
            return
        capacity = run.capacity
        if tokens > capacity:
            grown = max(tokens, capacity + capacity // 2 if capacity else tokens)
            capacity = _pages(min(grown, _bound(head)), head) * head.page
        self._admit(capacity * heads * head.token_bytes(), f"{tokens} tokens")
        new = self._take(heads, head, capacity)
        for to, source in zip(new.parts, run.parts, strict=True):
            to[:, : row.held] = source[:, : row.held]
        row.positions = np.concatenate((row.positions[: row.held], np.zeros(capacity - row.held, np.int64)))
        row.run = new
        self._drop(run)

    def _share(self, seq: Seq) -> list[list[_Row]]:
        return [[_copy(row) for row in rows] for rows in seq._rows]

    def _admit(self, nbytes: int, what: str) -> None:
        if self.capacity_bytes is None or self._pages_bytes + nbytes <= self.capacity_bytes:
            return
        per_token = self.spec.kv_nbytes(1)
        fits = max(0, (self.capacity_bytes - self._pages_bytes) // per_token)
        raise CapacityError(
            f"The cache has no room for {what}: {format_bytes(nbytes)} wanted, {format_bytes(self._pages_bytes)} of "
            f"{format_bytes(self.capacity_bytes)} taken. About {fits} tokens of {self.spec.name} still fit."
        )

    def _check(self, seq: Seq) -> None:
        if seq.spec_hash != self._hash or self._seqs.get(seq.id) is not seq:
            raise SpecError("The sequence belongs to another model or store, or was freed. Open one on this store.")


def _groups(heads: Sequence[HeadSpec]) -> list[tuple[tuple[int, ...], HeadSpec]]:
    """Heads with one description, in order of first appearance."""
    found: dict[HeadSpec, list[int]] = {}
    for index, head in enumerate(heads):
        found.setdefault(head, []).append(index)
    return [(tuple(indices), head) for head, indices in found.items()]


def _copy(row: _Row) -> _Row:
    row.run.owners += 1
    return _Row(row.run, row.seen, row.held, row.positions.copy())


def _bound(head: HeadSpec) -> int:
    return head.keep.sink + head.keep.recent if isinstance(head.keep, Ring) else 1 << 62


def _slots(head: HeadSpec, tokens: int) -> int:
    return min(tokens, _bound(head))


def _pages(tokens: int, head: HeadSpec) -> int:
    return -(-tokens // head.page)


def _convert(values: np.ndarray, kind: str) -> np.ndarray:
    """Bring keys or values to the dtype of a page; uint16 is bf16."""
    if values.dtype == NUMPY_DTYPES[kind]:
        return values
    wide = bfloat16_to_float32(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)
    return bfloat16_bits(wide) if kind == "bf16" else wide.astype(NUMPY_DTYPES[kind])
