"""The KV store: pages of keys and values, per sequence, layer and KV head.

Heads of a layer with one description form a group. A row (one sequence, one layer, one group) holds its pages in one
run, [heads, pages * page, size], so that attention reads a plain strided array and no step copies the past. Runs grow by
half and are moved when they do; a fork shares runs until one side writes. Freed runs go back to the operating system.

A row whose head has a tail holds two runs: new tokens land in the tail's format, and what leaves it is coded into the other.

Legend: T new tokens of all rows, s of one row, S keys in view, G heads of a group, H head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.cache.pages import Buffer, Parts, buffers, decode, encode
from trimtab.runtime.memory import mapped
from trimtab.runtime.step import IntArray, Step
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
        k, v: [G, S, H]: the pages' own floats (bf16 as uint16), views where nothing had to be moved, or what codes stand for.
        positions: int64 [S] of the keys in their sequence.
        nbytes: of the pages that were read.
    """

    heads: tuple[int, ...]
    k: np.ndarray
    v: np.ndarray
    positions: IntArray
    nbytes: int


class _Run:
    """Pages of one row: [G, capacity, H] for keys and for values; shared by forks until one of them writes.

    Coded pages hold codes there, followed in the same buffer by what scales them, see `pages.buffers`.
    """

    __slots__ = ("address", "capacity", "k", "owners", "v")

    def __init__(self, heads: int, forms: tuple[PageFormat, PageFormat], sizes: tuple[int, int], capacity: int) -> None:
        self.k, self.v = (
            _allocate(heads, capacity, buffers(form, size)) for form, size in zip(forms, sizes, strict=True)
        )
        self.owners, self.capacity = 1, capacity
        self.address = (self.k[0].ctypes.data, self.v[0].ctypes.data, capacity)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.k, *self.v))


def _allocate(heads: int, capacity: int, parts: tuple[Buffer, ...]) -> Parts:
    """One buffer for the arrays of a format [G, capacity, ...], one after the other."""
    shapes = [(heads, capacity // part.tokens, part.width) for part in parts]
    ends = list(
        itertools.accumulate(
            shape[0] * shape[1] * shape[2] * part.dtype.itemsize for shape, part in zip(shapes, parts, strict=True)
        )
    )
    whole = np.zeros(ends[-1], np.uint8) if ends[-1] < _MAPPED else mapped(ends[-1])
    return tuple(
        whole[start:end].view(part.dtype).reshape(shape)
        for start, end, part, shape in zip([0, *ends], ends, parts, shapes, strict=False)
    )


def _span(parts: Parts, form: PageFormat, first: int, end: int) -> Parts:
    """Tokens [first, end) of the arrays of a format, as views."""
    if not form.by_channel:
        return tuple(part[:, first:end] for part in parts)
    codes, *scales = parts
    return codes[:, first:end], *(part[:, first // form.group : end // form.group] for part in scales)


def _put(parts: Parts, form: PageFormat, first: int, values: Parts) -> int:
    """Write coded tokens from `first` on; returns their bytes."""
    count = values[0].shape[1]
    for to, value in zip(_span(parts, form, first, first + count), values, strict=True):
        to[...] = value
    return sum(value.nbytes for value in values)


def _nbytes(parts: Parts, form: PageFormat, tokens: int) -> int:
    return sum(part.nbytes for part in _span(parts, form, 0, tokens))


@dataclass(slots=True)
class _Row:
    """One sequence, one layer, one group: its run, the tokens seen, and where each held token stands.

    Where tokens leave a tail: the run they go to, and how many keys and values have gone; the tail starts behind them.
    """

    run: _Run
    seen: int = 0
    held: int = 0
    coded: _Run | None = None
    sealed: tuple[int, int] = (0, 0)
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

    Attributes:
        written: bytes of keys and values appended so far.
        handed_out: bytes of keys and values in views so far.
    """

    def __init__(self, spec: ModelSpec, capacity_bytes: int | None = None) -> None:
        check_runnable(spec)
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
            head.nbytes(reserve_tokens).reserved * len(heads) for groups in self._groups for heads, head in groups
        )
        self._admit(wanted, f"{reserve_tokens} tokens")
        rows = []
        for groups in self._groups:
            made = []
            for heads, head in groups:
                capacity = _pages(min(reserve_tokens, _bound(head)), head) * head.page
                run = self._take(len(heads), head, head.landing, capacity)
                coded = None
                if head.seals:
                    room = _pages(max(head.sealed(reserve_tokens)), head) * head.page
                    coded = self._take(len(heads), head, (head.k_format, head.v_format), room)
                room = max(capacity, reserve_tokens) if head.seals else capacity
                made.append(_Row(run, positions=np.zeros(room, np.int64), coded=coded))
            rows.append(made)
        seq = Seq(next(self._ids), self._hash, rows)
        self._seqs[seq.id] = seq
        return seq

    def free(self, seq: Seq) -> None:
        """End a sequence; runs nobody else uses are given back."""
        self._check(seq)
        del self._seqs[seq.id]
        for row in itertools.chain.from_iterable(seq._rows):
            self._drop_row(row)
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
            self._drop_row(row)
        seq._rows = [[_copy(row) for row in rows] for rows in mark.rows]

    def release(self, mark: Mark) -> None:
        """Give up a mark and the pages only it still holds."""
        for row in itertools.chain.from_iterable(mark.rows):
            self._drop_row(row)

    def truncate(self, seq: Seq, tokens: int) -> None:
        """Forget all but the first `tokens` tokens.

        Raises:
            NotRewindable: tokens that would be needed again were forgotten, or coded.
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
                if tokens < max(row.sealed):
                    raise NotRewindable(
                        f"The cache has coded its first {max(row.sealed)} tokens ({head.k_format}, {head.v_format}) and keeps only "
                        f"the last {head.residual} as they came; it cannot go back to {tokens}. "
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
                k, v = (
                    encode(form, values[first:end, chosen].transpose(1, 0, 2))
                    for form, values in zip(head.landing, (k_TGH, v_TGH), strict=True)
                )
                self.written += sum(part.nbytes for part in (*k, *v))
                ring = isinstance(head.keep, Ring)
                write = self._write_ring if ring else self._write_tail if head.seals else self._write_all
                view = write(seq._rows[layer][group], heads, head, k, v, at)
                self.handed_out += view.nbytes
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
        self, row: _Row, heads: tuple[int, ...], head: HeadSpec, k: Parts, v: Parts, at: IntArray
    ) -> GroupView:
        count = row.held + len(at)
        self._own(row, len(heads), head, count)
        _put(row.run.k, head.k_format, row.held, k)
        _put(row.run.v, head.v_format, row.held, v)
        row.positions[row.held : count] = at
        row.held, row.seen = count, row.seen + len(at)
        return self._view(row, heads, head)

    def _view(self, row: _Row, heads: tuple[int, ...], head: HeadSpec) -> GroupView:
        """Everything a row without a tail holds."""
        forms, sizes, sides = head.landing, (head.head_dim, head.v_head_dim), (row.run.k, row.run.v)
        k, v = (
            decode(form, _span(side, form, 0, row.held), size)
            for form, size, side in zip(forms, sizes, sides, strict=True)
        )
        read = sum(_nbytes(side, form, row.held) for form, side in zip(forms, sides, strict=True))
        return GroupView(heads, k, v, row.positions[: row.held], read)

    def _write_tail(
        self, row: _Row, heads: tuple[int, ...], head: HeadSpec, k: Parts, v: Parts, at: IntArray
    ) -> GroupView:
        """New tokens are read as they came; afterwards those that leave the tail are coded."""
        assert head.tail is not None and row.coded is not None
        count, tail = row.held + len(at), head.tail
        self._own(row, len(heads), head, count - min(row.sealed), shift=row.held - min(row.sealed))
        if len(row.positions) < count:
            row.positions = np.concatenate((row.positions[: row.held], np.zeros(count, np.int64)))
        row.positions[row.held : count] = at
        found, read = [], 0
        sizes, (k_sealed, v_sealed) = (head.head_dim, head.v_head_dim), head.sealed(count)
        sealed = max(k_sealed, row.sealed[0]), max(v_sealed, row.sealed[1])  # what is coded stays so when a row is cut
        for side, new in enumerate((k, v)):
            form, parts, coded = (head.k_format, head.v_format)[side], (row.run.k, row.run.v)[side], row.sealed[side]
            _put(parts, tail, row.held - coded, new)
            past = _span((row.coded.k, row.coded.v)[side], form, 0, coded)
            fresh = parts[0][:, : count - coded]
            read += sum(part.nbytes for part in past) + fresh.nbytes
            if coded:
                fresh = np.concatenate((decode(form, past, sizes[side]), _floats(fresh)), axis=1)
            elif sealed[side]:
                fresh = fresh.copy()  # what is read must outlive the move
            found.append(fresh)
        dtypes = {part.dtype for part in found}
        if len(dtypes) > 1:  # keys and values leave the tail at different times
            found = [_floats(part) for part in found]
        row.held, row.seen = count, row.seen + len(at)
        self._seal(row, len(heads), head, sealed)
        return GroupView(heads, found[0], found[1], row.positions[:count], read)

    def _seal(self, row: _Row, heads: int, head: HeadSpec, sealed: tuple[int, int]) -> None:
        """Code the keys and values before `sealed` and move what stays to the front of the tail."""
        assert row.coded is not None
        if sealed == row.sealed:
            return
        self._own_coded(row, heads, head, max(sealed))
        for side in range(2):
            form, tail = (head.k_format, head.v_format)[side], (row.run.k, row.run.v)[side][0]
            first, end = row.sealed[side], sealed[side]
            if end <= first:
                continue
            self.written += _put((row.coded.k, row.coded.v)[side], form, first, encode(form, tail[:, : end - first]))
            left = row.held - end
            tail[:, :left] = tail[:, end - first : end - first + left].copy()
        row.sealed = sealed
        bound = _pages(head.residual + 1, head) * head.page
        if row.run.capacity > bound:  # a chunk of a prompt made it longer
            self._move(row, heads, head, bound, row.held - min(row.sealed))

    def _write_ring(
        self, row: _Row, heads: tuple[int, ...], head: HeadSpec, k: Parts, v: Parts, at: IntArray
    ) -> GroupView:
        """One token overwrites the oldest slot in place; several are joined to what is still visible, then folded in."""
        keep: Any = head.keep
        before, after = row.seen, row.seen + len(at)
        if len(at) == 1:
            self._own(row, len(heads), head, keep.held(after))
            slot = self._slot(keep, before)
            for parts, new in ((row.run.k, k), (row.run.v, v)):
                for to, value in zip(parts, new, strict=True):
                    to[:, slot] = value[:, 0]
            row.positions[slot] = at[0]
            row.held, row.seen = keep.held(after), after
            return self._view(row, heads, head)
        # The oldest slot is out of sight of the first new token when the ring is full.
        seen = np.arange(row.held)
        if keep.visible(before) < row.held:
            seen = seen[seen != self._slot(keep, before)]
        joined = [
            tuple(np.concatenate((part[:, seen], value), axis=1) for part, value in zip(parts, new, strict=True))
            for parts, new in ((row.run.k, k), (row.run.v, v))
        ]
        k_all, v_all = (
            decode(form, parts, size)
            for form, parts, size in zip(head.landing, joined, (head.head_dim, head.v_head_dim), strict=True)
        )
        read = sum(part.nbytes for parts in joined for part in parts)
        view = GroupView(heads, k_all, v_all, np.concatenate((row.positions[seen], at)), read)
        self._own(row, len(heads), head, keep.held(after))
        order = np.arange(before, after)
        stays = (order < keep.sink) | (order >= after - keep.recent)
        slots = np.where(order < keep.sink, order, keep.sink + (order - keep.sink) % keep.recent)[stays]
        for parts, new in ((row.run.k, k), (row.run.v, v)):
            for to, value in zip(parts, new, strict=True):
                to[:, slots] = value[:, stays]
        row.positions[slots] = at[stays]
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
        reserved = 0
        held: dict[
            tuple[int, int], int
        ] = {}  # by run and side: a run that is shared counts once, as its longest row has it
        runs: dict[int, _Run] = {}
        for one in self._seqs.values() if seq is None else (seq,):
            for rows, groups in zip(one._rows, self._groups, strict=True):
                for row, (_, head) in zip(rows, groups, strict=True):
                    coded = ((row.coded, (head.k_format, head.v_format), row.sealed),) if row.coded else ()
                    left = row.held - row.sealed[0], row.held - row.sealed[1]
                    for run, forms, counts in ((row.run, head.landing, left), *coded):
                        runs[id(run)] = run
                        for side, parts in enumerate((run.k, run.v)):
                            key = id(run), side
                            held[key] = max(held.get(key, 0), _nbytes(parts, forms[side], counts[side]))
        reserved = sum(run.nbytes for run in runs.values())
        return KVBytes(sum(held.values()), reserved)

    @property
    def pages_bytes(self) -> int:
        """Bytes of all pages taken now, marks included."""
        return self._pages_bytes

    @property
    def peak_bytes(self) -> int:
        """Most bytes of pages taken at any time."""
        return self._peak_bytes

    # ------------------------------------------------------------------------------------------------- pages

    def _take(self, heads: int, head: HeadSpec, forms: tuple[PageFormat, PageFormat], capacity: int) -> _Run:
        run = _Run(heads, forms, (head.head_dim, head.v_head_dim), capacity)
        self._pages_bytes += run.nbytes
        self._peak_bytes = max(self._peak_bytes, self._pages_bytes)
        return run

    def _drop(self, run: _Run) -> None:
        run.owners -= 1
        if run.owners == 0:
            self._pages_bytes -= run.nbytes

    def _drop_row(self, row: _Row) -> None:
        self._drop(row.run)
        if row.coded is not None:
            self._drop(row.coded)

    def _own(self, row: _Row, heads: int, head: HeadSpec, tokens: int, shift: int | None = None) -> None:
        """Make sure the row alone owns a run with room for `tokens`; `shift`: tokens in it now, if not all that are held."""
        run = row.run
        if run.owners == 1 and tokens <= run.capacity:
            return
        self._move(row, heads, head, _grown(run.capacity, tokens, head), row.held if shift is None else shift)
        if len(row.positions) < row.run.capacity:
            more = np.zeros(row.run.capacity - len(row.positions), np.int64)
            row.positions = np.concatenate((row.positions, more))

    def _move(self, row: _Row, heads: int, head: HeadSpec, capacity: int, tokens: int) -> None:
        """Give a row a run of its own with another capacity and the same `tokens` tokens."""
        forms = head.landing
        self._admit(capacity * heads * head.landing_bytes(), f"{capacity} tokens")
        new = self._take(heads, head, forms, capacity)
        for form, to, source in zip(forms, (new.k, new.v), (row.run.k, row.run.v), strict=True):
            _put(to, form, 0, _span(source, form, 0, tokens))
        self._drop(row.run)
        row.run = new

    def _own_coded(self, row: _Row, heads: int, head: HeadSpec, tokens: int) -> None:
        """As `_own`, for the run that tokens leave the tail for."""
        old = row.coded
        assert old is not None
        if old.owners == 1 and tokens <= old.capacity:
            return
        capacity = _grown(old.capacity, tokens, head, bounded=False)
        forms = head.k_format, head.v_format
        self._admit(
            heads * (forms[0].nbytes(capacity, head.head_dim) + forms[1].nbytes(capacity, head.v_head_dim)),
            f"{tokens} tokens",
        )
        new = self._take(heads, head, forms, capacity)
        sides = zip(forms, (new.k, new.v), (old.k, old.v), row.sealed, strict=True)
        for form, to, source, count in sides:
            _put(to, form, 0, _span(source, form, 0, count))
        self._drop(old)
        row.coded = new

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
    if row.coded is not None:
        row.coded.owners += 1
    return _Row(row.run, row.seen, row.held, row.coded, row.sealed, row.positions.copy())


def _bound(head: HeadSpec) -> int:
    """Most tokens that stand in the landing run of a row between two passes."""
    if head.seals:
        return head.residual + 1
    return head.keep.sink + head.keep.recent if isinstance(head.keep, Ring) else 1 << 62


def _pages(tokens: int, head: HeadSpec) -> int:
    return -(-tokens // head.page)


def _grown(capacity: int, tokens: int, head: HeadSpec, bounded: bool = True) -> int:
    """Capacity of a run that has to hold `tokens`: as it is, or half as much again, in whole pages."""
    if tokens <= capacity:
        return capacity
    grown = max(tokens, capacity + capacity // 2 if capacity else tokens)
    most = max(tokens, _bound(head)) if bounded else grown
    return _pages(min(grown, most), head) * head.page


def _floats(values: np.ndarray) -> np.ndarray:
    """Float32 of what a floating page holds."""
    return decode(PageFormat("fp32"), encode(PageFormat("fp32"), values), values.shape[-1])
