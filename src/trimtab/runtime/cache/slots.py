"""Sequences in slots: contiguous addresses for as many tokens as a sequence may ever have, and memory mapped under them as it grows.

The bookkeeping and the calls of the system are in ``kernels/cpp/native/slots.cpp``; a row here differs from one over pages only in who
makes room for it. Kernels read a slot as one page of the longest sequence.

Legend: G heads of a row, s new tokens, W elements of a token.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from trimtab.errors import CapacityError, SpecError
from trimtab.runtime.cache import rows as _rows
from trimtab.runtime.cache.arena import machine_bytes
from trimtab.runtime.cache.pages import _converted, widen
from trimtab.runtime.cache.rows import LANDING, Layout, Row
from trimtab.runtime.kernels import _core
from trimtab.spec.cache import HeadSpec, KVBytes
from trimtab.spec.model import ModelSpec
from trimtab.spec.slots import Slots
from trimtab.units import format_bytes

#: Mappings a slot has of one tensor: what is mapped, and what is not.
_MAPPINGS = 2
#: Most mappings of a process.
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")


class SlotPool:
    """The slots of all sequences of a store.

    Args:
        spec: a model whose heads all lie in the same slots.
        slots: these.
        capacity_bytes: most bytes of pages; None = what the machine has.

    Attributes:
        slots: as given.
        tensors: that sequences lie in, half of them of keys.
        group_bytes: of one page of every tensor.
        pool_groups: most groups.
        peak_bytes: most bytes of pages that sequences had.

    Raises:
        SpecError: a page that is none, or heads that differ.
        CapacityError: a pool too small for one sequence, or too few mappings for the slots.
    """

    def __init__(self, spec: ModelSpec, slots: Slots, capacity_bytes: int | None) -> None:
        cached = [index for index, layer in enumerate(spec.layers) if layer.cache.heads]
        every = [head for index in cached for head in spec.layers[index].cache.heads]
        head, per_layer = every[0], len(spec.layers[cached[0]].cache.heads)
        if any(other != head for other in every) or any(len(spec.layers[i].cache.heads) != per_layer for i in cached):
            raise SpecError(
                f"{spec.name} has KV heads that differ; slots hold heads of one size and format. Allowed: the same cache for "
                "every head of every layer. Keep this one in pages."
            )
        self.slots, self.own = slots, int(head.k_format.nbytes(1, head.head_dim))
        layers = slots.heads // per_layer
        self._places = {
            index: (place // layers, place % layers * per_layer * self.own) for place, index in enumerate(cached)
        }
        self.tensors = 2 * -(-len(cached) // layers)
        token_bytes = slots.token_bytes(self.own)
        self.group_bytes = self.tensors * slots.page
        groups = -(-slots.tokens * token_bytes // slots.page)
        capacity = machine_bytes() if capacity_bytes is None else capacity_bytes
        self.pool_groups = min(capacity // self.group_bytes, 2 * slots.batch * groups)
        if self.pool_groups < groups:
            raise CapacityError(
                f"A pool of {format_bytes(capacity)} cannot hold one sequence of max_len={slots.tokens} tokens of {spec.name}: it "
                f"takes {format_bytes(groups * self.group_bytes)}. Give the cache at least that, or lower max_len."
            )
        self._ahead = slots.eager_steps if slots.background and slots.kind == "vattn" else 0
        _check_mappings(slots.batch * self.tensors * _MAPPINGS, slots.batch)
        try:
            self.core = _core.SlotMemory(
                [token_bytes] * self.tensors, slots.batch, slots.tokens, slots.page, self.pool_groups, self._ahead > 0, slots.eager_steps,
                slots.eager_groups, slots.deferred, slots.kind == "static", slots.secure,
            )  # fmt: skip
        except MemoryError as error:
            raise CapacityError(str(error)) from None
        self.slot_bytes = self.core.slot_bytes
        self.bases = [self.core.address(tensor) for tensor in range(self.tensors)]
        self.peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that sequences, forks and marks have."""
        return self.core.used_groups * self.group_bytes

    def counts(self) -> dict[str, int]:
        """What the slots have cost: calls, mappings, groups, bytes the system has given."""
        return self.core.counts()

    def offset(self, layer: int, head: int, side: int, slot: int) -> tuple[int, int]:
        """(tensor, bytes into it) at which a head of a layer begins in a slot; side 0 = keys, 1 = values."""
        tensor, inside = self._places[layer]
        return 2 * tensor + side, slot * self.slot_bytes + inside + head * self.own

    def step(self, wanted: Sequence[tuple[Place, int, int]]) -> None:
        """Make tokens [first, end) of several sequences writable in one call, if any of them lacks room now or soon.

        Raises:
            CapacityError: no page, slot or mapping is left.
        """
        if not any(place.first > first or end + self._ahead > place.room for place, first, end in wanted):
            return
        numbers = np.array([(place.id, first, end) for place, first, end in wanted], np.int64).T.copy()
        found = np.empty((len(wanted), 2), np.int64)
        try:
            self.core.step(numbers[0], numbers[1], numbers[2], found)
        except MemoryError as error:
            for place, _, _ in wanted:
                place.forget()
            raise CapacityError(str(error)) from None
        for (place, first, end), (slot, room) in zip(wanted, found.tolist(), strict=True):
            place.slot, place.first, place.room, place.tokens = slot, first, first + room, max(place.tokens, end)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)


class Place:
    """Where one sequence lies: its pages, and from its first step on its slot.

    Attributes:
        slot: -1 = none yet.
        first, room: tokens [first, room) can be written without asking again.
        tokens: that have pages.
        rows: of the sequence, that hold this place.
    """

    __slots__ = ("_copy", "first", "id", "pool", "room", "rows", "slot", "tokens")

    def __init__(self, pool: SlotPool, id: int, tokens: int = 0) -> None:
        self.pool, self.id, self.tokens = pool, id, tokens
        self.slot, self.rows = -1, 0
        self.first = self.room = 0
        self._copy: Place | None = None

    @staticmethod
    def new(pool: SlotPool) -> Place:
        """A place without tokens."""
        return Place(pool, pool.core.open())

    def forget(self) -> None:
        """Whatever is written next may be shared, or have no page: ask again."""
        self.first = self.room = 0

    def copy(self, tokens: int) -> Place:
        """A place that shares these tokens; the rows of a sequence, copied one after the other, get one together."""
        if self._copy is None or self._copy.rows == self.rows:
            self._copy = Place(self.pool, self.pool.core.fork(self.id, tokens), tokens)
            self.forget()
        found = self._copy
        if found.rows + 1 == self.rows:
            self._copy = None
        return found

    def cut(self, tokens: int) -> None:
        """Give up what lies behind."""
        if tokens < self.tokens:
            self.tokens = tokens
            self.forget()
            self.pool.core.cut(self.id, tokens)

    def leave(self) -> None:
        """One row less; the last one gives up the pages."""
        self.rows -= 1
        if self.rows == 0:
            self.pool.core.close(self.id)


class SlotRow(Row):
    """A row of a sequence in a slot.

    Args:
        heads, layout: as of a `Row`.
        layer: index.
        place: of the sequence.
    """

    __slots__ = ("_slot", "layer", "place")

    def __init__(self, heads: tuple[int, ...], layout: Layout, layer: int, place: Place) -> None:
        super().__init__(heads, layout)
        self.layer, self.place, self._slot = layer, place, -1
        place.rows += 1

    def reserve(self, tokens: int) -> None:
        """Nothing: addresses are there for every token, and memory comes with the tokens."""

    def room(self, column: int, first: int) -> int:
        return max(self.place.room - first, 0) if first >= self.place.first else 0

    def copy(self) -> SlotRow:
        place = self.place.copy(self.seen)
        other = SlotRow(self.heads, self.layout, self.layer, place)
        other.seen, other.held, other.ended = self.seen, self.held, self.ended
        return other

    def free(self) -> None:
        self.place.leave()

    def shrink(self, held: int) -> None:
        self.held = held
        self.place.cut(held)

    def array(self, side: int) -> np.ndarray:
        """All of the slot as floats [G, longest, W], mapped or not; bf16 as uint16, fp8 as uint8."""
        from trimtab.runtime.weights.packed import NUMPY_DTYPES

        page, pool = self.layout.pages[side], self.place.pool
        dtype = np.dtype(np.uint8) if page.form.kind == "fp8" else NUMPY_DTYPES[page.form.kind]
        tensor, first = pool.offset(self.layer, self.heads[0], side, self.place.slot)
        apart = (self.heads[1] - self.heads[0]) * pool.own if len(self.heads) > 1 else pool.own
        span = (page.tokens - 1) * page.stride + (len(self.heads) - 1) * apart + pool.own
        memory = (ctypes.c_uint8 * span).from_address(pool.bases[tensor] + first)
        memory.pool = pool  # type: ignore[attr-defined]  # addresses are valid for as long as it lives
        return np.ndarray(
            (len(self.heads), page.tokens, page.width),
            dtype,
            np.frombuffer(memoryview(memory), np.uint8),
            0,
            (apart, page.stride, dtype.itemsize),
        )

    def _grow(self, column: int, first: int, end: int) -> None:
        if end <= first:
            return
        place = self.place
        if place.first > first or end > place.room:
            place.pool.step([(place, first, end)])
        self._addressed()

    def _addressed(self) -> None:
        """Bring addresses up to date; a sequence has them from its first step on."""
        place = self.place
        if place.slot < 0:  # a fork that is read before it is written to
            place.pool.step([(place, self.held, self.held)])
        if self._slot == place.slot:
            return
        self._slot = place.slot
        for side in LANDING:
            self.tables[side] = np.zeros((len(self.heads), 1), np.int64)
            at = [place.pool.offset(self.layer, head, side, place.slot) for head in self.heads]
            self.addresses[side] = np.array([[place.pool.bases[tensor] + inside] for tensor, inside in at], np.int64)

    def _take(self, column: int, first: int, end: int) -> np.ndarray:
        page, count = self.layout.pages[column], end - first
        if count == 0:
            return np.empty((len(self.heads), 0, page.width), np.float32)
        self._addressed()
        if page.plain:
            return self.array(column)[:, first:end]
        found = np.empty((len(self.heads), count, page.width), np.float32)
        _core.decode_pages(page.code, self.addresses[column], first, count, found)
        return found

    def _put(self, column: int, first: int, values: np.ndarray) -> None:
        page = self.layout.pages[column]
        if page.plain:
            self.array(column)[:, first : first + values.shape[1]] = _converted(values, page.form.kind)
        elif not _core.encode_pages(page.code, self.addresses[column], first, np.ascontiguousarray(widen(values))):
            raise SpecError(f"A value is not finite, or beyond what {page.form} can express.")


def slots_of_model(spec: ModelSpec) -> Slots | None:
    """The slots that all heads of a model lie in; None = pages.

    Raises:
        SpecError: only some heads do.
    """
    heads: set[HeadSpec] = {head for layer in spec.layers for head in layer.cache.heads}
    found = {head.slots for head in heads}
    if found <= {None}:
        return None
    if len(found) > 1:
        raise SpecError(
            f"Some KV heads of {spec.name} lie in slots and some in pages. Allowed: all in the same slots, or none."
        )
    slots = found.pop()
    if not _rows.SLOTS:
        warnings.warn(
            f"{slots}: this system cannot map pages to fixed addresses (Linux can); the cache is kept in pages.",
            stacklevel=3,
        )
        return None
    return slots


def slots_nbytes(pool: SlotPool, rows: Iterable[Row], every: bool) -> KVBytes:
    """Bytes of tokens and of the pages they lie in; of `every` sequence, shared pages count once."""
    held = reserved = 0
    for row in rows:
        of_all = len(row.heads)
        held += 2 * of_all * pool.own * row.held
        reserved += 2 * of_all * pool.slots.mapped(row.held, pool.own)
    if every:
        reserved = min(reserved, pool.used_bytes)
        held = min(held, reserved)
    return KVBytes(held, reserved)


def _check_mappings(wanted: int, batch: int) -> None:
    """Refuse slots for which the process may run out of mappings."""
    try:
        most, now = int(MAX_MAP_COUNT.read_text()), Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return
    if now + wanted > most:
        raise CapacityError(
            f"{batch} slots may take {wanted} mappings beside the {now} of this process; vm.max_map_count is {most}. Raise it "
            f"(sysctl -w vm.max_map_count={2 * (now + wanted)}), lower max_batch, or use layout=mega."
        )
