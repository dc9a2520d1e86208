"""Room for the tokens of a pass that a kernel writes itself, and what the kernel needs to know of each head.

A record of a head is 16 numbers, see ``kernels/cpp/native/attend_heads.cpp``: addresses of its page tables, slots to read and to write,
and how much is coded before and after the pass.

Most passes add one token to rows whose pages have room for it: then a few numbers of every record grow by one, and the rows
themselves are brought up to date when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.runtime.cache.rings import ring_positions, ring_slot
from trimtab.runtime.cache.rows import CODED, LANDING, RECORD, Row
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Ring

#: Fields of a record: page tables stand in the first four.
READABLE, K_BEFORE, V_BEFORE, K_AFTER, V_AFTER, CHANNELS, POSITIONS, PIECES, PIECE, WRITE, BOUNDS = (
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    12,
    13,
    14,
    15,
)


def place(row: Row, count: int, records: IntArray) -> None:
    """Make room for the tokens of one pass in a row and fill in the records [KV heads, 16] of its heads."""
    keep, head = row.head.keep, row.head
    before, slot, positions = row.held, row.held, 0
    if isinstance(keep, Ring) and count == 1 and (at := int(ring_slot(keep, row.seen))) < row.held:
        slot = at
        row.overwrite(slot)
    else:
        row.advance(count)
        if isinstance(keep, Ring) and count > 1:
            at_slots = (
                ring_positions(keep, row.seen - count, before),
                np.arange(row.seen - count, row.seen),
            )
            row.ring_at = np.concatenate(at_slots).astype(np.int32)
            positions = row.ring_at.ctypes.data
    sealed = row.sealed
    due = row.due if head.seals else sealed
    row.prepare_seal(due)
    for index, g in enumerate(row.heads):
        record = records[g]
        for column, addresses in enumerate(row.addresses):
            record[column] = addresses[index].ctypes.data
        record[READABLE : V_AFTER + 1] = row.held, *sealed, *due
        record[CHANNELS] = 0 if row.channels is None else row.channels[index].ctypes.data
        record[POSITIONS] = positions if row.positions is None else row.positions[index].ctypes.data
        record[WRITE] = slot
        if row.bounds is not None and head.select is not None:
            record[PIECES], record[PIECE] = head.select.tokens // head.select.piece, head.select.piece
            record[BOUNDS] = row.bounds[index].ctypes.data


def fold(row: Row, count: int) -> None:
    """Bring the last `count` tokens, which stand behind the ring, to the slots where they belong."""
    keep = row.head.keep
    assert isinstance(keep, Ring)
    before = row.held - count
    came = np.arange(row.seen - count, row.seen)
    stays = (came < keep.sink) | (came >= row.seen - keep.recent)
    row.move(before + np.flatnonzero(stays), np.asarray(ring_slot(keep, came[stays])))
    row.shrink(keep.held(row.seen))


@dataclass(slots=True)
class Steady:
    """Passes of one token that need no page, no sealing of keys and no policy.

    Args:
        records: [layers, KV heads, 16] of the next such pass.
        grows: what it adds to them.
        left: how many there are.
        done: how many have been, since the rows were brought up to date.
    """

    records: IntArray
    grows: IntArray
    left: int
    done: int = 0

    @staticmethod
    def after(rows: Sequence[Sequence[Row]], records: IntArray) -> Steady:
        """What follows a pass that had `records`, with the rows as it left them."""
        following, grows = records.copy(), np.zeros_like(records)
        left = min((_steady_passes(row) for layer in rows for row in layer), default=0)
        if left:
            for layer, some in enumerate(rows):
                for row in some:
                    heads = list(row.heads)
                    sliding = int(
                        row.head.tail is not None
                        and row.head.seals
                        and row.held >= row.head.residual
                        and not _waits(row)
                    )
                    following[layer, heads, READABLE] = row.held + 1
                    following[layer, heads, WRITE] = row.held
                    following[layer, heads, K_BEFORE] = following[layer, heads, K_AFTER] = row.sealed[0]
                    following[layer, heads, V_BEFORE] = row.sealed[1]
                    following[layer, heads, V_AFTER] = row.sealed[1] + sliding
                    grows[layer, heads, READABLE] = grows[layer, heads, WRITE] = 1
                    grows[layer, heads, V_BEFORE] = grows[layer, heads, V_AFTER] = sliding
        return Steady(following, grows, left)

    def step(self) -> IntArray:
        """Records of one such pass."""
        found = self.records.copy()
        self.records += self.grows
        self.left -= 1
        self.done += 1
        return found

    def catch_up(self, rows: Sequence[Sequence[Row]]) -> None:
        """Bring the rows up to date."""
        if self.done:
            for layer, some in enumerate(rows):
                for row in some:
                    row.skip(self.done, int(self.grows[layer, row.heads[0], V_AFTER]) * self.done)
        self.done = self.left = 0


def _waits(row: Row) -> bool:
    return row.head.waits and not row.ended


def _steady_passes(row: Row) -> int:
    """How many tokens can follow one by one before something else than counting has to be done."""
    head = row.head
    if isinstance(head.keep, Ring) or row.score is not None:
        return 0
    if head.policy is not None and not (head.waits and row.ended):
        return 0
    rooms = [row.room(column, row.held) for column in LANDING]
    if row.positions is not None:
        rooms.append(row.positions.shape[1] - row.held)
    if row.bounds is not None and head.select is not None:
        rooms.append(row.bounds.shape[1] * head.select.piece - row.held)
    if head.seals and head.tail is not None and not _waits(row):
        rooms.append(head.residual - row.held % head.residual - 1)
        if row.held >= head.residual:
            if row.sealed[1] != row.held - head.residual:
                return 0
            rooms += [row.room(CODED[1], row.sealed[1]), head.landing_page - row.sealed[1] % head.landing_page - 1]
        else:
            rooms.append(head.residual - row.held)
    return max(0, min(rooms))


def empty_records(layers: int, sequences: int, heads: int) -> IntArray:
    """Records to be filled in [layers, B, KV heads, 16]."""
    return np.zeros((layers, sequences, heads, RECORD), np.int64)
