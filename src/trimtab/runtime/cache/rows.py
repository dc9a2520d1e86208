"""One row of the cache: KV heads of one layer of one sequence that hold equally many tokens, and the pages these lie in.

Tokens stand in slots. New ones are written to landing pages; those a head seals are coded into other pages, keys and values each
at their own pace, and the landing pages behind them are freed. A page holds the keys, or the values, of one head.

Legend: G heads of the row, s new tokens, S tokens held, M pages, W elements of a token that are stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.arena import Arena
from trimtab.runtime.cache.pages import Code, Page, bounds_of, read_pages, widen, write_pages
from trimtab.runtime.cache.rings import ring_positions
from trimtab.runtime.kernels import _core
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import All, Budget, HeadSpec, Ring, page_nbytes
from trimtab.spec.slots import Slots

#: The columns of a row: keys and values as they land, then as they are coded.
LANDING, CODED = (0, 1), (2, 3)
#: Numbers of a head that the native kernels read, see `Row.record`.
RECORD = 16
#: Whether this system can map pages of a file in memory to fixed addresses.
SLOTS = sys.platform == "linux"


class Merge(NamedTuple):
    """Before slot `source` is given up, a share of it goes into `target`: (1 - w) * target + w * source."""

    source: int
    target: int
    k_share: float
    v_share: float


@dataclass(frozen=True, slots=True)
class Layout:
    """What the rows of one head description have in common.

    Args:
        head: the description.
        pages: of the four columns; those of coded tokens are absent where nothing is sealed.
        arenas: where these pages are taken from.
        admit: refuses bytes there is no room for.
    """

    head: HeadSpec
    pages: tuple[Page, ...]
    arenas: tuple[Arena, ...]
    admit: Callable[[int], None]

    @staticmethod
    def of(head: HeadSpec, arena: Callable[[int], Arena], admit: Callable[[int], None]) -> Layout:
        """Lay out a head over the arenas of a store; slots need none."""
        pages = pages_of(head)
        if slots_of(head) is not None:
            return Layout(head, pages, (), admit)
        sizes = (page_nbytes(page.form, page.width, page.tokens) for page in pages)
        return Layout(head, pages, tuple(arena(size) for size in sizes), admit)


def slots_of(head: HeadSpec) -> Slots | None:
    """The slots a head lies in; None = pages of its own, which stand in where the system has no slots."""
    return head.slots if SLOTS else None


def pages_of(head: HeadSpec) -> tuple[Page, ...]:
    """Kinds of page of the columns of a head: landing keys and values, and where tokens are sealed, coded ones."""
    if (slots := slots_of(head)) is not None:  # one page of the longest sequence, the other heads of a token between
        own = int(head.k_format.nbytes(1, head.head_dim))
        return (Page(head.k_format, head.head_dim, slots.tokens, stride=slots.token_bytes(own)),) * 2
    forms = list(zip(head.landing, (head.head_dim, head.v_head_dim), strict=True))
    if head.seals:
        forms += [(head.k_format, head.k_width), (head.v_format, head.v_head_dim)]
    return tuple(
        Page(
            form,
            width,
            head.page_tokens(form) if index in CODED else head.landing_page,
            turned=index == CODED[0] and head.thin is not None,
        )
        for index, (form, width) in enumerate(forms)
    )


def head_forms(head: HeadSpec) -> tuple[Code, Code, Code | None, Code | None, int, int]:
    """What the kernels know of a head: its kinds of page (coded ones or None, None), then sink and recent of a ring, or 0, 0."""
    codes = [page.code for page in pages_of(head)]
    k_coded, v_coded = codes[2:] or (None, None)
    sink, recent = (head.keep.sink, head.keep.recent) if isinstance(head.keep, Ring) else (0, 0)
    return codes[0], codes[1], k_coded, v_coded, sink, recent


class Row:
    """Some KV heads of one layer of one sequence.

    Args:
        heads: indices in the layer.
        layout: of their description.

    Attributes:
        seen: tokens that came.
        held: tokens that are held, in slots 0 to held - 1.
        sealed: keys and values, counted from slot 0, that lie in coded pages.
        tables: of each column, page index by page number [G, M]; -1 = none.
        positions: int32 [G, room] of the tokens; None where slots tell them.
        score: float32 [G, room], kept for a policy.
        bounds: uint16 [G, room / piece, 2, H], bf16 bits of the least and the largest of each channel.
        channels: uint8 [G, channels] that thin keys keep, once they are chosen.
        queries: [G, P, s, H] newest queries, gathered while a prompt runs.
        ring_at: int32 positions of a ring and of the tokens behind it, while a pass of several tokens runs.
        ended: the prompt has ended.
        shared: pages may have other owners.
    """

    __slots__ = (
        "addresses", "bounds", "channels", "ended", "heads", "held", "layout", "positions", "queries", "ring_at", "score", "sealed",
        "seen", "shared", "tables",
    )  # fmt: skip

    def __init__(self, heads: tuple[int, ...], layout: Layout) -> None:
        self.heads, self.layout = heads, layout
        self.seen = self.held = 0
        self.sealed = (0, 0)
        self.tables = [np.zeros((len(heads), 0), np.int64) for _ in layout.pages]
        self.addresses = list(self.tables)
        head = layout.head
        chosen = isinstance(head.keep, Budget)
        self.positions = np.zeros((len(heads), 0), np.int32) if chosen else None
        self.score = np.zeros((len(heads), 0), np.float32) if chosen and head.policy and head.policy.score else None
        self.bounds = np.zeros((len(heads), 0, 2, head.head_dim), np.uint16) if head.select else None
        self.channels: np.ndarray | None = None
        self.queries: np.ndarray | None = None
        self.ring_at: np.ndarray | None = None
        self.ended = self.shared = False

    @property
    def head(self) -> HeadSpec:
        """The description."""
        return self.layout.head

    # ------------------------------------------------------------------------------------------------- pages

    def reserve(self, tokens: int) -> None:
        """Take landing pages for so many tokens now, one head's behind another's."""
        for column in LANDING:
            self._grow(column, 0, tokens)

    def room(self, column: int, first: int) -> int:
        """Slots from `first` on that have pages of this row alone."""
        tokens = self.layout.pages[column].tokens
        part = self.tables[column][:, first // tokens :]
        absent = part < 0
        if self.shared:
            absent |= self.layout.arenas[column].owners[np.where(absent, 0, part)] > 1
        found = np.flatnonzero(absent.any(axis=0))
        pages = int(found[0]) if len(found) else part.shape[1]
        return pages * tokens - first % tokens

    def _grow(self, column: int, first: int, end: int) -> None:
        """Make sure slots [first, end) have pages that only this row holds."""
        if end <= first:
            return
        page, arena, table = self.layout.pages[column], self.layout.arenas[column], self.tables[column]
        low, high = first // page.tokens, -(-end // page.tokens)
        if high > table.shape[1]:
            more = np.full((len(self.heads), high - table.shape[1]), -1, np.int64)
            self.tables[column] = table = np.concatenate((table, more), axis=1)
        part = table[:, low:high]
        absent = part < 0
        lacking = int(absent.sum())
        borrowed = np.zeros_like(absent)
        if self.shared:
            borrowed = ~absent & (arena.owners[np.where(absent, 0, part)] > 1)
        if not lacking and not borrowed.any():
            if self.addresses[column].shape != table.shape:
                self.addresses[column] = arena.addresses(table)
            return
        wanted = absent | borrowed
        self.layout.admit(int(wanted.sum()) * arena.page_bytes)
        taken = arena.take(int(wanted.sum()))
        if borrowed.any():
            old = part[borrowed]
            new = taken[borrowed[wanted]]
            arena.data[new] = arena.data[old]
            arena.drop(old)
        part[wanted] = taken
        self.addresses[column] = arena.addresses(table)

    def _drop(self, column: int, low: int, high: int | None = None) -> None:
        """Give up pages [low, high)."""
        table = self.tables[column]
        part = table[:, low:high]
        found = part[part >= 0]
        if len(found):
            self.layout.arenas[column].drop(found)
            part[...] = -1
            self.addresses[column] = self.layout.arenas[column].addresses(table)

    def free(self) -> None:
        """Give up everything."""
        for column in range(len(self.tables)):
            self._drop(column, 0)

    def copy(self) -> Row:
        """A row that shares the pages of this one until one of the two writes."""
        other = Row(self.heads, self.layout)
        for name in ("seen", "held", "sealed", "queries", "ended"):
            setattr(other, name, getattr(self, name))
        for name in ("positions", "score", "bounds", "channels"):
            value = getattr(self, name)
            setattr(other, name, None if value is None else value.copy())
        for column, table in enumerate(self.tables):
            self.layout.arenas[column].share(table[table >= 0])
        other.tables = [table.copy() for table in self.tables]
        other.addresses = [table.copy() for table in self.addresses]
        self.shared = other.shared = True
        return other

    def split(self) -> Iterator[Row]:
        """One row for each head, in place of this one, which must not be used again."""
        for index, head in enumerate(self.heads):
            one = Row((head,), self.layout)
            for name in ("seen", "held", "sealed", "ended", "shared"):
                setattr(one, name, getattr(self, name))
            for name in ("positions", "score", "bounds", "channels", "queries"):
                value = getattr(self, name)
                setattr(one, name, None if value is None else value[index : index + 1].copy())
            one.tables = [table[index : index + 1].copy() for table in self.tables]
            one.addresses = [table[index : index + 1].copy() for table in self.addresses]
            yield one

    # ------------------------------------------------------------------------------------------------ tokens

    def write(self, values: Sequence[np.ndarray]) -> None:
        """Write keys and values [G, s, H] of new tokens behind those that are held."""
        count = values[0].shape[1]
        self.advance(count)
        for column, value in zip(LANDING, values, strict=True):
            self._put(column, self.held - count, value)
        self._bound(self.held - count, self.held)

    def advance(self, count: int) -> None:
        """Make room for `count` new tokens, whose keys and values are written to it by whoever asks."""
        first, end = self.held, self.held + count
        for column in LANDING:
            self._grow(column, first, end)
        self._room(end)
        if self.positions is not None:
            self.positions[:, first:end] = np.arange(self.seen, self.seen + count)
        self.held, self.seen = end, self.seen + count

    def skip(self, count: int, sealed: int) -> None:
        """Count tokens that came, and values that were coded, where pages had room for them."""
        if self.positions is not None:
            self.positions[:, self.held : self.held + count] = np.arange(self.seen, self.seen + count)
        self.held, self.seen = self.held + count, self.seen + count
        self.sealed = self.sealed[0], self.sealed[1] + sealed

    def overwrite(self, slot: int, values: Sequence[np.ndarray] | None = None) -> None:
        """Write one new token of a full ring [G, 1, H] to a slot; without values, the slot is made ready for it."""
        for column in LANDING:
            self._grow(column, slot, slot + 1)
            if values is not None:
                self._put(column, slot, values[column])
        self.seen += 1

    def move(self, sources: IntArray, targets: IntArray) -> None:
        """Copy tokens from slots to other slots, in this order; no target is a later source."""
        runs = np.split(np.arange(len(targets)), np.flatnonzero(np.diff(targets) != 1) + 1)
        for column in LANDING:
            page, arena, table = self.layout.pages[column], self.layout.arenas[column], self.tables[column]
            for run in runs:
                if len(run):
                    self._grow(column, int(targets[run[0]]), int(targets[run[-1]]) + 1)
            if page.plain:
                floats, size = page.floats(arena), page.tokens
                moved = floats[table[:, sources // size], sources % size]
                floats[table[:, targets // size], targets % size] = moved
                continue
            for run in runs:
                if len(run):
                    slots = np.ascontiguousarray(np.broadcast_to(sources[run], (len(self.heads), len(run))))
                    at = self.addresses[column]
                    _core.move_pages(page.code, at, at, slots, int(targets[run[0]]))

    def read(self, side: int, first: int = 0, end: int | None = None) -> np.ndarray:
        """Keys (side 0) or values (1) of slots [first, end), [G, n, H], in the landing's own floats where none is coded.

        Channels that thin keys lack are 0. May be a view of the pages.
        """
        end = self.held if end is None else end
        coded = min(max(self.sealed[side], first), end)
        fresh = self._take(LANDING[side], coded, end)
        if coded == first:
            return fresh
        old = self._take(CODED[side], first, coded)
        if side == 0 and self.channels is not None:
            whole = np.zeros((*old.shape[:2], self.head.head_dim), np.float32)
            np.put_along_axis(
                whole, np.broadcast_to(self.channels[:, None].astype(np.int64), old.shape), widen(old), axis=2
            )
            old = whole
        return np.concatenate((widen(old), widen(fresh)), axis=1) if coded < end else old

    def nbytes_of(self, side: int, first: int, end: int) -> int:
        """Bytes that slots [first, end) of keys or values take, scales included."""
        coded = min(max(self.sealed[side], first), end)
        found = self.layout.pages[LANDING[side]].nbytes(end - coded)
        if coded > first:
            page = self.layout.pages[CODED[side]]
            every = page.form.group if page.form.by_channel else 1
            found += page.nbytes(coded - first // every * every)
        return found * len(self.heads)

    def _take(self, column: int, first: int, end: int) -> np.ndarray:
        page = self.layout.pages[column]
        return read_pages(page, self.layout.arenas[column], self.tables[column], self.addresses[column], first, end)

    def _put(self, column: int, first: int, values: np.ndarray) -> None:
        page = self.layout.pages[column]
        write_pages(page, self.layout.arenas[column], self.tables[column], self.addresses[column], first, values)

    def _room(self, tokens: int) -> None:
        """Grow what is kept beside the pages, in whole pages."""
        room = -(-tokens // self.head.page) * self.head.page
        for name in ("positions", "score"):
            value = getattr(self, name)
            if value is not None and value.shape[1] < room:
                setattr(self, name, _resized(value, room))
        if self.bounds is not None and self.head.select is not None:
            pieces = -(-room // self.head.select.piece)
            if self.bounds.shape[1] < pieces:
                self.bounds = _resized(self.bounds, pieces)

    def _bound(self, first: int, end: int) -> None:
        """Bring the bounds of the pieces that hold slots [first, end) up to date."""
        if self.bounds is None or self.head.select is None or end <= first:
            return
        piece = self.head.select.piece
        start = first // piece * piece
        self.bounds[:, start // piece : -(-end // piece)] = bounds_of(widen(self.read(0, start, end)), piece)

    # ------------------------------------------------------------------------------------- sealing and thinning

    @property
    def due(self) -> tuple[int, int]:
        """Keys and values that should lie in coded pages by now."""
        head = self.head
        if not head.seals or (head.waits and not self.ended):
            return self.sealed
        if head.tail is None:
            return self.sealed  # thin keys: chosen when the prompt ends, not token by token
        k, v = self.held // head.residual * head.residual, max(self.held - head.residual, 0)
        return max(k, self.sealed[0]), max(v, self.sealed[1])  # what is coded stays so when a row is cut

    def seal(self, due: tuple[int, int] | None = None) -> int:
        """Code what is due and free the landing pages behind it; returns the bytes written."""
        before = self.prepare_seal(self.due if due is None else due)
        written = 0
        for side in range(2):
            first, end = before[side], self.sealed[side]
            if end == first:
                continue
            values = widen(self._take(LANDING[side], first, end))
            if side == 0 and self.channels is not None:
                index = np.broadcast_to(
                    self.channels[:, None].astype(np.int64), (*values.shape[:2], self.channels.shape[1])
                )
                values = np.take_along_axis(values, index, axis=2)
            self._put(CODED[side], first, values)
            written += self.layout.pages[CODED[side]].nbytes(end - first) * len(self.heads)
        self.release()
        return written

    def prepare_seal(self, due: tuple[int, int]) -> tuple[int, int]:
        """Take pages for what is due to be coded, count it as coded, and return what was before."""
        before = self.sealed
        if due != before:
            for side, column in enumerate(CODED):
                self._grow(column, before[side], due[side])
            self.sealed = due
        return before

    def release(self) -> None:
        """Free landing pages all of whose tokens are coded."""
        for side, column in enumerate(LANDING):
            self._drop(column, 0, self.sealed[side] // self.head.landing_page)

    def thin(self, channels: IntArray) -> int:
        """Choose the channels [G, m] that keys keep, and thin those the description says; returns the bytes written."""
        assert self.head.thin is not None
        self.channels = channels.astype(np.uint8)
        if self.head.tail is not None:
            return 0  # thinned as they are sealed
        return self.seal((max(self.held - self.head.thin.recent, self.sealed[0]), self.sealed[1]))

    # ----------------------------------------------------------------------------------------------- fewer tokens

    def cut(self, tokens: int) -> None:
        """Forget all but the first `tokens`; the caller has made sure that this is possible."""
        self.shrink(min(tokens, self.held))
        self.seen = tokens
        self._bound(max(self.held - 1, 0), self.held)

    def shrink(self, held: int) -> None:
        """Give up the slots from `held` on."""
        for column in LANDING:
            self._drop(column, -(-held // self.head.landing_page))
        self.held = held

    def compact(self, keep: IntArray, merges: Sequence[Merge] = ()) -> int:
        """Keep only some slots [G, m], each row ascending; returns how many tokens moved, over all heads.

        Raises:
            SpecError: tokens are coded already, or merges ask for slots that are not there.
        """
        if any(self.sealed):
            raise SpecError(
                f"{max(self.sealed)} tokens have left the tail ({self.head.k_format}, {self.head.v_format}); tokens can be given up "
                "only before. Let the policy act before the prompt ends."
            )
        if merges:
            self._merge(keep, merges)
        count = keep.shape[1]
        moved = int((keep != np.arange(count)).sum())
        if moved:
            for column in LANDING:
                self._grow(column, 0, count)
                page, arena, table = self.layout.pages[column], self.layout.arenas[column], self.tables[column]
                if page.plain:
                    parts = page.floats(arena)
                    slots = table[np.arange(len(keep))[:, None], keep // page.tokens], keep % page.tokens
                    write_pages(page, arena, table, self.addresses[column], 0, parts[slots])
                else:
                    at = self.addresses[column]
                    _core.move_pages(page.code, at, at, np.ascontiguousarray(keep), 0)
            for name in ("positions", "score"):
                value = getattr(self, name)
                if value is not None:
                    value[:, :count] = np.take_along_axis(value, keep, axis=1)
        self.shrink(count)
        room = -(-count // self.head.page) * self.head.page
        for name in ("positions", "score"):
            value = getattr(self, name)
            if value is not None:
                value[:, count:] = 0
                setattr(self, name, value[:, :room].copy())
        self._bound(0, count)
        return moved

    def _merge(self, keep: IntArray, merges: Sequence[Merge]) -> None:
        for side, column in enumerate(LANDING):
            if not self.layout.pages[column].plain:
                raise SpecError(
                    f"Tokens in {self.layout.pages[column].form} pages cannot be merged. Allowed: fp32, bf16, fp16."
                )
            values = widen(self.read(side)).copy()
            for merge in merges:
                if not (0 <= merge.source < self.held and bool((keep == merge.target).any(axis=1).all())):
                    raise SpecError(
                        f"{merge}: not possible. Allowed: a source of 0..{self.held - 1}, a target that is kept."
                    )
                share = np.float32(merge.v_share if side else merge.k_share)
                values[:, merge.target] += share * (values[:, merge.source] - values[:, merge.target])
            targets = sorted({merge.target for merge in merges})
            for target in targets:
                self._grow(column, target, target + 1)
                self._put(column, target, values[:, target : target + 1])

    # ------------------------------------------------------------------------------------------------- what it says

    def token_positions(self) -> IntArray:
        """Position of each token held [G, S], or [S] where the heads agree."""
        if self.positions is not None:
            return self.positions[:, : self.held].astype(np.int64)
        keep = self.head.keep
        if isinstance(keep, All):
            return np.arange(self.held)
        assert isinstance(keep, Ring)
        return ring_positions(keep, self.seen, self.held)

    @property
    def side_nbytes(self) -> tuple[int, int]:
        """Bytes beside the pages: of what is held, and all that is taken."""
        held = sum(4 * self.held * len(self.heads) for value in (self.positions, self.score) if value is not None)
        taken = sum(value.nbytes for value in (self.positions, self.score, self.bounds) if value is not None)
        if self.head.select is not None:
            held += self.head.select.bounds_bytes(self.held, self.head.head_dim) * len(self.heads)
        chosen = 0 if self.channels is None or not self.sealed[0] else self.channels.nbytes
        return held + chosen, taken + chosen


def _resized(value: np.ndarray, room: int) -> np.ndarray:
    larger = np.zeros((value.shape[0], room, *value.shape[2:]), value.dtype)
    larger[:, : value.shape[1]] = value
    return larger
