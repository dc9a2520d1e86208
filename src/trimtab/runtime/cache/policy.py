"""Policies: which tokens of a row stay, and which channels of its keys. They return lists; the store acts on them.

A row is some KV heads of one layer of one sequence that hold equally many tokens. A slot is the place of a token in its head.

Legend: G heads of the row, P queries that share a head, s newest queries, S tokens held, H head size, m tokens or channels kept.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from trimtab.runtime.step import IntArray
from trimtab.spec.cache import PolicySpec

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a policy may look at, after a pass.

    Args:
        layer: index.
        heads: KV heads of the row [G].
        q: [G, P, s, H], the newest queries as they were multiplied with the keys, as many as the policy asks for; s may be 0.
        k, v: [G, S, H], what is held, as floats.
        positions: [G, S] of the tokens in their sequence.
        q_positions: [s] of the queries.
        scale: what the model multiplies products of queries and keys with.
        score: [G, S], what the policy keeps of every token, 0 for new ones; None where it keeps nothing. It may be written to.
    """

    layer: int
    heads: tuple[int, ...]
    q: Floats
    k: Floats
    v: Floats
    positions: IntArray
    q_positions: IntArray
    scale: float
    score: Floats | None = None

    def weights(self) -> Floats:
        """Softmax over the tokens held that each query may see: [G, P, s, S]."""
        scores = np.matmul(self.q, self.k[:, None].swapaxes(2, 3)) * np.float32(self.scale)
        hidden = self.positions[:, None, None, :] > self.q_positions[None, None, :, None]
        scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores


class Policy(Protocol):
    """The small thing a paper becomes. It holds parameters, never what belongs to a sequence."""

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Slots to keep [G, count], each row ascending; or channels of keys, for a policy that thins them."""
        ...


def policy_of(spec: PolicySpec) -> Policy:
    """Import and make the policy a spec names."""
    module, _, name = spec.name.partition(":")
    return cast(Policy, getattr(importlib.import_module(module), name)(**dict(spec.params)))


def newest_and_best(score: Floats, count: int, newest: int) -> IntArray:
    """The `newest` last slots, and of those before them the ones with the largest score: [G, count], ascending.

    Args:
        score: [G, S]; of equal ones the earlier slot is taken.
        count: slots to keep, at most S.
        newest: at most `count`.
    """
    slots = score.shape[1]
    newest = min(newest, count)
    older = slots - newest
    best = np.argsort(-score[:, :older], axis=1, kind="stable")[:, : count - newest]
    last = np.broadcast_to(np.arange(older, slots), (len(score), newest))
    return np.concatenate((np.sort(best, axis=1), last), axis=1).astype(np.int64)
