"""What the queries of a pass may read of a row, as arrays: the reference that kernels over pages are held to.

Legend: s new tokens, S keys in view, G heads of a row, P queries that share a head, H head size, N query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.runtime.cache.eviction import choose_pieces
from trimtab.runtime.cache.pages import widen
from trimtab.runtime.cache.placing import fold
from trimtab.runtime.cache.rings import ring_slot
from trimtab.runtime.cache.rows import Row
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Ring


@dataclass(frozen=True, slots=True)
class GroupView:
    """What the new tokens of one sequence may read from some heads.

    Args:
        heads: KV heads of the layer, in order.
        k, v: [G, S, H]: the pages' own floats (bf16 as uint16), views where nothing had to be moved, or what codes stand for.
        positions: int64 of the keys in their sequence, [S], or [G, S] where heads keep different tokens.
        nbytes: of the pages that were read.
    """

    heads: tuple[int, ...]
    k: np.ndarray
    v: np.ndarray
    positions: IntArray
    nbytes: int


def queries_of(row: Row, q_sNH: np.ndarray, kv_heads: int) -> np.ndarray:
    """Queries [s, N, H] of the heads of a row, float32 [G, P, s, H]."""
    s, n, h = q_sNH.shape
    return widen(q_sNH).reshape(s, kv_heads, n // kv_heads, h)[:, list(row.heads)].transpose(1, 2, 0, 3)


def view(row: Row, queries: np.ndarray | None) -> GroupView:
    """All a row holds, or with `queries` [G, P, 1, H] the pieces they choose."""
    read = sum(row.nbytes_of(side, 0, row.held) for side in range(2))
    at = row.token_positions()
    if queries is None or row.head.select is None or row.bounds is None:
        k, v = row.read(0), row.read(1)
        due = row.due
        if due != row.sealed:  # what is read must outlive the move
            k, v = k.copy(), v.copy()
        return GroupView(row.heads, k, v, at, read)
    slots = choose_pieces(row.head.select, queries, row.bounds, row.held)
    heads = np.arange(len(row.heads))[:, None]
    read = row.head.landing_bytes() * slots.size + row.head.select.bounds_bytes(row.held, row.head.head_dim) * len(
        row.heads
    )
    return GroupView(row.heads, row.read(0)[heads, slots], row.read(1)[heads, slots], slots, read)


def through_ring(row: Row, values: Sequence[np.ndarray]) -> GroupView:
    """One token overwrites the oldest slot in place; several are joined to what is still visible, then folded in."""
    keep = row.head.keep
    assert isinstance(keep, Ring)
    count = values[0].shape[1]
    if count == 1:
        slot = int(ring_slot(keep, row.seen))
        if slot >= row.held:
            row.write(values)
        else:
            row.overwrite(slot, values)
        return view(row, None)
    seen, held, past = row.seen, row.held, row.token_positions()
    visible = np.arange(held)
    if keep.visible(seen) < held:  # the oldest slot is out of sight of the first new token
        visible = visible[visible != int(ring_slot(keep, seen))]
    row.write(values)
    kept = np.concatenate((visible, np.arange(held, row.held)))
    k, v = (row.read(side)[:, kept] for side in range(2))  # copies: the slots are folded below
    read = row.head.landing_bytes() * len(kept) * len(row.heads)
    at = np.concatenate((past[visible], np.arange(seen, row.seen)))
    fold(row, count)
    return GroupView(row.heads, k, v, at, read)
