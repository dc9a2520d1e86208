"""What happens to a row after a pass: its policy looks, chooses, and the row gives up the rest.

Legend: G heads of the row, P queries that share a head, s newest queries, S tokens held, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.runtime.cache.pages import widen
from trimtab.runtime.cache.policy import Evidence, Policy
from trimtab.runtime.cache.rows import Row
from trimtab.runtime.numerics import bfloat16_to_float32
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Budget, Pieces, PolicySpec


@dataclass(slots=True)
class Attended:
    """What policies did after a pass.

    Args:
        flops: of products of queries with keys.
        read: bytes of keys they looked at, and of tokens that moved.
        written: bytes of tokens that moved or were coded.
        moved: tokens that went to another slot, over all heads.
    """

    flops: int = 0
    read: int = 0
    written: int = 0
    moved: int = 0

    def __iadd__(self, other: Attended) -> Attended:
        self.flops += other.flops
        self.read += other.read
        self.written += other.written
        self.moved += other.moved
        return self


def attended(
    row: Row, layer: int, q_GPsH: np.ndarray, scale: float, ends: bool, policies: Mapping[PolicySpec, Policy]
) -> Attended:
    """Let the policies of a row act.

    Args:
        q_GPsH: queries of the pass.
        scale: on products of queries and keys.
        ends: the pass ended the prompt.
        policies: by their specs.
    """
    head, done = row.head, Attended()
    if isinstance(head.keep, Budget) and head.keep.when == "pass":
        assert head.policy is not None
        if row.held > head.keep.tokens or row.score is not None:
            _choose_tokens(row, layer, _newest(q_GPsH, head.policy.queries), scale, policies, done)
        row.ended |= ends
        return done
    if row.ended:
        return done
    named = [one for one in (head.policy, head.thin.policy if head.thin else None) if one is not None]
    wanted = max(one.queries for one in named)
    if wanted:
        gathered = q_GPsH if row.queries is None else np.concatenate((row.queries, q_GPsH), axis=2)
        row.queries = _newest(gathered, wanted).copy()
    if not ends:
        return done
    queries = q_GPsH[:, :, :0] if row.queries is None else row.queries
    row.ended, row.queries = True, None
    if isinstance(head.keep, Budget) and head.policy is not None and row.held > head.keep.tokens:
        _choose_tokens(row, layer, _newest(queries, head.policy.queries), scale, policies, done)
    if head.thin is not None:
        seen = _evidence(row, layer, _newest(queries, head.thin.policy.queries), scale)
        looked = row.nbytes_of(0, 0, row.held)
        written = row.thin(policies[head.thin.policy].keep(seen, head.thin.channels)) + row.seal()
        done.written += written
        if row.sealed[0]:
            done.read += looked
        return done
    done.written += row.seal()
    return done


def choose_pieces(pieces: Pieces, q_GP1H: np.ndarray, bounds: np.ndarray, held: int) -> IntArray:
    """Slots a pass of one token reads: [G, m], ascending.

    The newest piece is always among them; of the others those whose bounds allow the largest product with one of the
    queries that share a head: what a single one of them looks for is not outvoted. Source: Tang et al., Quest, arXiv 2406.10774,
    section 3; there no queries share one.

    Args:
        q_GP1H: queries.
        bounds: uint16 [G, pieces, 2, H], see `Row`.
        held: tokens.
    """
    count = -(-held // pieces.piece)
    most = pieces.tokens // pieces.piece
    heads = len(bounds)
    if count <= most:
        return np.broadcast_to(np.arange(held), (heads, held)).copy()
    low, high = (bfloat16_to_float32(np.ascontiguousarray(bounds[:, : count - 1, side])) for side in range(2))
    q = q_GP1H[:, :, 0]
    best = np.matmul(np.maximum(q, 0), high.swapaxes(1, 2)) + np.matmul(
        np.minimum(q, 0), low.swapaxes(1, 2)
    )  # [G, P, pieces]
    order = np.argsort(-best.max(axis=1), axis=1, kind="stable")[:, : most - 1]
    chosen = np.concatenate((np.sort(order, axis=1), np.full((heads, 1), count - 1)), axis=1)
    slots = (chosen[:, :, None] * pieces.piece + np.arange(pieces.piece)).reshape(heads, -1)
    return slots[:, : pieces.read(held)]


def _choose_tokens(
    row: Row, layer: int, queries: np.ndarray, scale: float, policies: Mapping[PolicySpec, Policy], done: Attended
) -> None:
    head = row.head
    assert isinstance(head.keep, Budget) and head.policy is not None
    seen = _evidence(row, layer, queries, scale)
    done.read += row.nbytes_of(0, 0, row.held)
    if head.policy.products:
        g, p, s, h = queries.shape
        done.flops += 2 * g * p * s * h * row.held
    keep = policies[head.policy].keep(seen, min(head.keep.tokens, row.held))
    moved = row.compact(keep)
    done.moved += moved
    done.read += moved * head.landing_bytes()
    done.written += moved * head.landing_bytes()


def _evidence(row: Row, layer: int, queries: np.ndarray, scale: float) -> Evidence:
    k, v = (widen(row.read(side)) for side in range(2))
    at = np.broadcast_to(row.token_positions(), (len(row.heads), row.held))
    score = None if row.score is None else row.score[:, : row.held]
    last = np.arange(row.seen - queries.shape[2], row.seen)
    return Evidence(layer, row.heads, queries, k, v, at, last, scale, score)


def _newest(q_GPsH: np.ndarray, count: int) -> np.ndarray:
    """The last `count` queries; all for a negative count."""
    return q_GPsH if count < 0 else q_GPsH[:, :, max(q_GPsH.shape[2] - count, 0) :]
