"""The KV store: pages of keys and values, per sequence, layer and KV head.

Heads of a layer with one description start as one row; see `rows`. Pages are counted by owners: a fork, or a mark to come back to,
shares them until one side writes. What policies decide is carried out here.

Legend: T new tokens of all rows, s of one sequence, S keys in view, G heads of a row, H head size, N query heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.cache.arena import Arena, machine_bytes
from trimtab.runtime.cache.eviction import Attended, attended
from trimtab.runtime.cache.placing import Steady, empty_records, fold, place
from trimtab.runtime.cache.policy import Policy, policy_of
from trimtab.runtime.cache.rows import CODED, LANDING, Layout, Merge, Row
from trimtab.runtime.cache.sequences import Mark, Seq
from trimtab.runtime.cache.slots import Place, SlotPool, SlotRow, slots_nbytes, slots_of_model
from trimtab.runtime.cache.views import GroupView, queries_of, through_ring, view
from trimtab.runtime.step import IntArray, Step
from trimtab.spec.cache import All, Budget, HeadSpec, KVBytes, Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.runnable import check_runnable
from trimtab.units import format_bytes

if TYPE_CHECKING:
    from trimtab.spec.cache import PolicySpec


class KVStore:
    """Keys and values of any number of sequences of one model.

    Args:
        spec: the model; a sequence is bound to its hash.
        capacity_bytes: most bytes of pages; None = what the machine has.

    Attributes:
        slots: that all sequences lie in; None = pages of each head.
        written: bytes of keys and values appended or coded so far.
        handed_out: bytes of keys and values in views so far.
    """

    def __init__(self, spec: ModelSpec, capacity_bytes: int | None = None) -> None:
        check_runnable(spec)
        self.spec, self.capacity_bytes = spec, capacity_bytes
        self._arenas: dict[int, Arena] = {}
        self._most = machine_bytes() if capacity_bytes is None else capacity_bytes
        slots = slots_of_model(spec)
        self.slots = None if slots is None else SlotPool(spec, slots, capacity_bytes)
        layouts: dict[HeadSpec, Layout] = {}
        self._groups: list[list[tuple[tuple[int, ...], Layout]]] = []
        for layer in spec.layers:
            made = []
            for heads, head in _groups(layer.cache.heads):
                if head not in layouts:
                    layouts[head] = Layout.of(head, self._arena, self._take)
                made.append((heads, layouts[head]))
            self._groups.append(made)
        self._policies: dict[PolicySpec, Policy] = {}
        for head in layouts:
            for named in (head.policy, head.thin.policy if head.thin else None):
                if named is not None:
                    self._policies[named] = policy_of(named)
        budgets = (head.keep for head in layouts if head.policy is not None)
        self._every_pass = any(isinstance(keep, Budget) and keep.when == "pass" for keep in budgets)
        self._acts = bool(self._policies)
        self._leaves = any(head.seals or not isinstance(head.keep, All) for head in layouts)
        self._hash = spec.hash
        self._seqs: dict[int, Seq] = {}
        self._ids = itertools.count()
        self._peak_bytes = 0
        self.written = self.handed_out = 0

    # ---------------------------------------------------------------------------------------------- sequences

    def open(self, reserve_tokens: int = 0) -> Seq:
        """Start a sequence with room for `reserve_tokens`.

        Raises:
            CapacityError: its pages do not fit, before any is taken.
        """
        self._admit(self._wanted(reserve_tokens), f"{reserve_tokens} tokens")
        rows, where = [], None if self.slots is None else Place.new(self.slots)
        for layer, groups in enumerate(self._groups):
            made = []
            for heads, layout in groups:
                row = Row(heads, layout) if where is None else SlotRow(heads, layout, layer, where)
                head = layout.head
                if not head.seals and isinstance(head.keep, All | Ring):  # what else is held changes on the way
                    row.reserve(head.keep.held(reserve_tokens))
                made.append(row)
            rows.append(made)
        seq = Seq(next(self._ids), self._hash, rows)
        self._seqs[seq.id] = seq
        return seq

    def free(self, seq: Seq) -> None:
        """End a sequence; pages nobody else owns are given back."""
        self._check(seq)
        del self._seqs[seq.id]
        for row in itertools.chain.from_iterable(seq._rows):
            row.free()
        seq._rows = []

    def fork(self, seq: Seq) -> Seq:
        """Return a sequence that continues like this one; pages are shared until one of the two writes."""
        self._check(seq)
        rows = [[row.copy() for row in some] for some in seq._rows]
        other = Seq(next(self._ids), seq.spec_hash, rows, seq.ended)
        self._seqs[other.id] = other
        return other

    def mark(self, seq: Seq) -> Mark:
        """Remember this state of a sequence."""
        self._check(seq)
        return Mark(seq.id, tuple(tuple(row.copy() for row in rows) for rows in seq._rows), seq.ended)

    def reset(self, seq: Seq, mark: Mark) -> None:
        """Bring a sequence back to a mark, which stays usable.

        Raises:
            SpecError: the mark belongs to another sequence.
        """
        self._check(seq)
        if mark.seq != seq.id:
            raise SpecError(f"The mark was made on sequence {mark.seq}, not on {seq.id}.")
        rows = [[row.copy() for row in rows] for rows in mark.rows]
        for row in itertools.chain.from_iterable(seq._rows):
            row.free()
        seq._rows, seq.ended = rows, mark.ended

    def release(self, mark: Mark) -> None:
        """Give up a mark and the pages only it still holds."""
        for row in itertools.chain.from_iterable(mark.rows):
            row.free()

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
        rows = list(itertools.chain.from_iterable(seq._rows))
        for row in rows:
            if row.held != row.seen and tokens < row.seen:
                by = "" if row.head.policy is None else f" ({row.head.policy.name.rpartition(':')[2]})"
                raise NotRewindable(
                    f"The cache keeps {row.head.keep}{by} and has forgotten tokens; it cannot go back to {tokens}. "
                    "Mark the sequence before and reset to the mark."
                )
            if tokens < max(row.sealed):
                raise NotRewindable(
                    f"The cache has coded its first {max(row.sealed)} tokens ({row.head.k_format}, {row.head.v_format}) and keeps "
                    f"only the last ones as they came; it cannot go back to {tokens}. "
                    "Mark the sequence before and reset to the mark."
                )
        for row in rows:
            row.cut(tokens)

    def evict(self, seq: Seq, layer: int, head: int, keep: IntArray, merges: Sequence[Merge] = ()) -> int:
        """Keep only some tokens of one KV head; the heads of a layer may come to hold different numbers.

        Args:
            keep: slots, ascending; slot i holds the i-th of the tokens held so far.
            merges: what goes into others before it is given up.

        Returns:
            Pages freed.

        Raises:
            SpecError: slots that are not held, not ascending, or coded already.
        """
        self._check(seq)
        if self.slots is not None:
            raise SpecError(f"The cache lies in slots ({self.slots.slots}), which keep every token. Allowed: pages.")
        index, row = next((i, row) for i, row in enumerate(seq._rows[layer]) if head in row.heads)
        keep = np.asarray(keep, np.int64)
        if keep.ndim != 1 or (len(keep) and (keep[0] < 0 or keep[-1] >= row.held or bool((np.diff(keep) <= 0).any()))):
            raise SpecError(f"Slots to keep must ascend within 0..{row.held - 1}.")
        if not isinstance(row.head.keep, All) and row.positions is None:
            raise SpecError(f"The cache keeps {row.head.keep}; it chooses for itself what goes.")
        if len(row.heads) > 1:
            alone = list(row.split())
            seq._rows[layer][index : index + 1] = alone
            row = alone[row.heads.index(head)]
        if row.positions is None:
            row.positions = np.arange(-(-row.held // row.head.page) * row.head.page, dtype=np.int32)[None].repeat(
                1, axis=0
            )
        before = self._live_pages()
        row.compact(keep[None], merges)
        return before - self._live_pages()

    def end_turn(self, seq: Seq) -> None:
        """Tell that an answer is complete: keys that came since the prompt ended are thinned like its own."""
        self._check(seq)
        for row in itertools.chain.from_iterable(seq._rows):
            if row.head.thin is not None and row.head.tail is None and row.channels is not None:
                self.written += row.seal((max(row.held - row.head.thin.recent, row.sealed[0]), row.sealed[1]))

    # ---------------------------------------------------------------------------------------- keys and values

    def append(
        self, layer: int, k_TGH: np.ndarray, v_TGH: np.ndarray, step: Step, q_TNH: np.ndarray | None = None
    ) -> list[list[GroupView]]:
        """Write the new tokens of every row and return what their queries may read.

        Args:
            layer: index.
            k_TGH, v_TGH: new keys and values of all heads; float32, float16 or bf16 as uint16.
            step: offsets, positions and sequences.
            q_TNH: queries, which heads that read only some pieces choose these by.

        Returns:
            For each sequence its groups of heads.

        Raises:
            CapacityError: the pages do not fit.
        """
        views = []
        self._make_room(step, layer)
        for index, seq in enumerate(step.seqs):
            self._check(seq)
            first, end = int(step.cu[index]), int(step.cu[index + 1])
            found = []
            for row in seq._rows[layer]:
                chosen = slice(None) if len(row.heads) == k_TGH.shape[1] else list(row.heads)
                values = [x[first:end, chosen].transpose(1, 0, 2) for x in (k_TGH, v_TGH)]
                self.written += row.head.landing_bytes() * len(row.heads) * (end - first)
                if isinstance(row.head.keep, Ring):
                    seen = through_ring(row, values)
                else:
                    row.write(values)
                    queries = None
                    if row.head.select is not None and q_TNH is not None and end - first == 1:
                        queries = queries_of(row, q_TNH[first:end], k_TGH.shape[1])
                    seen = view(row, queries)
                    self.written += row.seal()
                self.handed_out += seen.nbytes
                found.append(seen)
            views.append(found)
        return views

    def watches(self, layer: int) -> int:
        """How many of the newest queries of a layer policies want to see: 0 = there is none, -1 = all of a pass."""
        wanted = [
            named.queries
            for _, layout in self._groups[layer]
            for named in (layout.head.policy, layout.head.thin.policy if layout.head.thin else None)
            if named is not None
        ]
        return -1 if -1 in wanted else max(wanted, default=0)

    def acts(self, layer: int) -> bool:
        """Whether a head of this layer has a policy."""
        return any(layout.head.policy or layout.head.thin for _, layout in self._groups[layer])

    def attended(self, layer: int, queries: Sequence[np.ndarray], step: Step) -> Attended:
        """Tell the policies of a layer that a pass has attended; returns what they did.

        Args:
            queries: of each sequence, [s, N, H] as multiplied with the keys: all of the pass, or as many of the newest as `watches`
                says.
            step: the pass.
        """
        done = Attended()
        for index, seq in enumerate(step.seqs):
            ends = step.ends is not None and bool(step.ends[index])
            for row in seq._rows[layer]:
                if row.head.policy is None and row.head.thin is None:
                    row.ended |= ends
                    continue
                q = queries_of(row, queries[index], len(self.spec.layers[layer].cache.heads))
                done += attended(row, layer, q, self._scale(layer), ends, self._policies)
            if ends and layer == len(self._groups) - 1:
                seq.ended = True
        self.written += done.written
        return done

    def layered(self, step: Step) -> bool:
        """Whether a pass should go through `place` and `settle` layer by layer: it brings many tokens, and not all of their bytes stay."""
        return self._leaves and int(step.cu[-1]) > len(step.seqs)

    def place(self, step: Step) -> IntArray:
        """Make room for the new tokens of every row; the caller writes and codes their keys and values itself, then calls `settle`.

        Returns:
            int64 [layers, B, KV heads, 16], see ``native/attend_heads.cpp``: addresses of page tables, tokens to read, counts of
            coded tokens before and after.

        Raises:
            CapacityError: the pages do not fit.
        """
        records = self.records(step)
        self._make_room(step, 0)
        for index, seq in enumerate(step.seqs):
            self._check(seq)
            count = int(step.cu[index + 1] - step.cu[index])
            if count == 1 and seq._steady is not None and seq._steady.left:
                records[:, index] = seq._steady.step()
                continue
            rows = seq._rows
            for layer, some in enumerate(rows):
                for row in some:
                    place(row, count, records[layer, index])
            seq._steady = Steady.after(rows, records[:, index]) if count == 1 else None
        return records

    def _make_room(self, step: Step, layer: int) -> None:
        """Map what the sequences of a pass need, in one call for all of them."""
        if self.slots is None:
            return
        wanted = []
        for seq, count in zip(step.seqs, np.diff(step.cu).tolist(), strict=True):
            for row in seq._held[layer][:1]:
                assert isinstance(row, SlotRow)
                seen = row.seen + (0 if seq._steady is None else seq._steady.done)
                wanted.append((row.place, seen, seen + count))
        self.slots.step(wanted)
        self._peak_bytes = self.slots.peak_bytes

    def records(self, step: Step) -> IntArray:
        """The records of a pass, yet to be filled in."""
        most = max(len(layer.cache.heads) for layer in self.spec.layers)
        return empty_records(len(self._groups), len(step.seqs), most)

    def place_layer(self, layer: int, step: Step, records: IntArray) -> None:
        """As `place`, for one layer; `settle` may follow before the next one's turn.

        Raises:
            CapacityError: the pages do not fit.
        """
        for index, seq in enumerate(step.seqs):
            self._check(seq)
            for row in seq._rows[layer]:
                place(row, int(step.cu[index + 1] - step.cu[index]), records[layer, index])

    def settle(self, step: Step, layer: int | None = None) -> None:
        """After a pass that `place` made room for, or one layer of it: free what is no longer needed."""
        for index, seq in enumerate(step.seqs):
            if seq._steady is not None and seq._steady.done:
                continue
            count = int(step.cu[index + 1] - step.cu[index])
            for row in itertools.chain.from_iterable(seq._held if layer is None else seq._held[layer : layer + 1]):
                if row.head.seals:
                    row.release()
                elif isinstance(row.head.keep, Ring) and row.held > row.head.keep.held(row.seen):
                    fold(row, count)

    def idle(self, step: Step) -> bool:
        """Whether no policy will act after this pass."""
        if self._every_pass:
            return False
        return not self._acts or (all(seq.ended for seq in step.seqs) and (step.ends is None or not step.ends.any()))

    # ---------------------------------------------------------------------------------------------- accounting

    def nbytes(self, seq: Seq | None = None) -> KVBytes:
        """Bytes that hold tokens, and bytes of all pages taken; shared pages count once.

        Args:
            seq: of one sequence; None = of all.
        """
        rows = [
            row
            for one in (self._seqs.values() if seq is None else (seq,))
            for row in itertools.chain.from_iterable(one._rows)
        ]
        if self.slots is not None:
            return slots_nbytes(self.slots, rows, seq is None)
        held = reserved = 0
        filled: dict[
            tuple[int, Layout, int], np.ndarray
        ] = {}  # tokens in each page of an arena, by what the pages hold
        for row in rows:
            beside = row.side_nbytes
            held, reserved = held + beside[0], reserved + beside[1]
            for side, (landing, coded) in enumerate(zip(LANDING, CODED, strict=True)):
                self._fill(filled, row, landing, row.sealed[side], row.held)
                if row.layout.head.seals:
                    self._fill(filled, row, coded, 0, row.sealed[side])
        for (_, layout, column), counts in filled.items():
            taken = counts[counts >= 0]
            held += int(layout.pages[column].nbytes(taken.astype(np.int64)).sum())
            reserved += len(taken) * layout.arenas[column].page_bytes
        return KVBytes(held, reserved)

    @staticmethod
    def _fill(filled: dict[tuple[int, Layout, int], np.ndarray], row: Row, column: int, first: int, end: int) -> None:
        """Note how many tokens each page of a column of a row holds; a shared page as its fullest owner has it."""
        layout, table = row.layout, row.tables[column]
        arena, tokens = layout.arenas[column], layout.pages[column].tokens
        counts = filled.setdefault((id(layout), layout, column), np.full(0, -1, np.int64))
        if len(counts) < len(arena.owners):
            counts = np.concatenate((counts, np.full(len(arena.owners) - len(counts), -1, np.int64)))
            filled[id(layout), layout, column] = counts
        starts = np.arange(table.shape[1]) * tokens
        inside = np.clip(end - starts, 0, tokens) - np.clip(first - starts, 0, tokens)
        taken = table >= 0
        np.maximum.at(counts, table[taken], np.broadcast_to(np.maximum(inside, 0), table.shape)[taken])

    @property
    def pages_bytes(self) -> int:
        """Bytes of all pages taken now, marks included."""
        if self.slots is not None:
            return self.slots.used_bytes
        return sum(arena.nbytes for arena in self._arenas.values())

    @property
    def peak_bytes(self) -> int:
        """Most bytes of pages taken at any time."""
        return self._peak_bytes

    def _live_pages(self) -> int:
        return sum(arena.live for arena in self._arenas.values())

    def _arena(self, page_bytes: int) -> Arena:
        if page_bytes not in self._arenas:
            self._arenas[page_bytes] = Arena(page_bytes, self._most)
        return self._arenas[page_bytes]

    def _wanted(self, tokens: int) -> int:
        return sum(
            layout.head.nbytes(tokens, tokens).reserved * len(heads)
            for groups in self._groups
            for heads, layout in groups
        )

    def _take(self, nbytes: int) -> None:
        """Note that pages are about to be taken, if there is room for them."""
        self._admit(nbytes)
        self._peak_bytes = max(self._peak_bytes, self.pages_bytes + nbytes)

    def _admit(self, nbytes: int, what: str = "more tokens") -> None:
        if self.capacity_bytes is None or self.pages_bytes + nbytes <= self.capacity_bytes:
            return
        free = self.capacity_bytes - self.pages_bytes
        fits, most = 0, self.spec.max_position_embeddings
        while fits < most:  # the largest number of tokens whose pages fit
            middle = (fits + most + 1) // 2
            fits, most = (middle, most) if self._wanted(middle) <= free else (fits, middle - 1)
        raise CapacityError(
            f"The cache has no room for {what}: {format_bytes(nbytes)} wanted, {format_bytes(self.pages_bytes)} of "
            f"{format_bytes(self.capacity_bytes)} taken. {fits} tokens of {self.spec.name} still fit."
        )

    def _check(self, seq: Seq) -> None:
        if seq.spec_hash != self._hash or self._seqs.get(seq.id) is not seq:
            raise SpecError("The sequence belongs to another model or store, or was freed. Open one on this store.")

    def _scale(self, layer: int) -> float:
        return float(getattr(self.spec.layers[layer].self_attn, "scale", 1.0))


def _groups(heads: Sequence[HeadSpec]) -> Iterator[tuple[tuple[int, ...], HeadSpec]]:
    """Heads with one description, in order of first appearance."""
    found: dict[HeadSpec, list[int]] = {}
    for index, head in enumerate(heads):
        found.setdefault(head, []).append(index)
    return ((tuple(indices), head) for head, indices in found.items())
