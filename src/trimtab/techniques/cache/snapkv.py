"""snapkv: of the prompt, keep the tokens that its last queries looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.policy import Evidence, Floats, newest_and_best
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Budget, PolicySpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads


@dataclass(frozen=True, slots=True)
class LastQueries:
    """A policy: the last `window` queries vote by their attention weights, neighbours are pooled, the window stays.

    Args:
        window: queries that vote.
        kernel: tokens that are pooled, odd.
        pool: ``avg`` or ``max``.
    """

    window: int
    kernel: int
    pool: str

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Slots to keep [G, count], ascending."""
        weights = seen.weights()
        slots = weights.shape[3]
        newest = min(self.window, count)
        score = np.zeros((len(weights), slots), np.float32)
        score[:, : slots - newest] = pooled(
            weights[..., : slots - newest].sum(axis=2).mean(axis=1), self.kernel, self.pool
        )
        return newest_and_best(score, count, newest)


def pooled(score_GS: Floats, kernel: int, pool: str) -> Floats:
    """The average, or the largest, of the `kernel` scores around each; beyond the ends an average counts zeros."""
    side = kernel // 2
    padded = np.pad(score_GS, ((0, 0), (side, side)), constant_values=0 if pool == "avg" else -np.inf)
    around = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)
    return around.mean(axis=2) if pool == "avg" else around.max(axis=2)


def check_votes(name: str, cap: int, window: int, kernel: int) -> None:
    """Refuse numbers that `LastQueries` cannot work with.

    Raises:
        SpecError: in the name of the technique.
    """
    if window < 1:
        raise SpecError(f"{name}: window={window} is not possible. Allowed: 1 or more. Try window=32.")
    if cap <= window:
        raise SpecError(
            f"{name}: cap={cap} is not more than window={window}, whose tokens always stay. "
            f"Allowed: {window + 1} or more. Try cap={window + 1}."
        )
    if kernel < 1 or kernel % 2 == 0:
        raise SpecError(
            f"{name}: kernel={kernel} is not possible. Allowed: an odd number, 1 or more. "
            f"Try kernel={max(kernel + 1, 1)}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(Technique):
    """A cache of fixed size for the prompt: `cap` tokens per KV head, chosen once, when the prompt has ended.

    A token's score is the attention weight that the last `window` queries of the prompt give it, summed over these,
    averaged over the queries that share the KV head, and pooled over `kernel` neighbours. The tokens of the window
    stay. Every KV head chooses its own; what comes after the prompt stays.

    Exact: a prompt of at most `cap` tokens. Approximated: what was given up. The paper chooses per query head and keeps
    a copy of the cache for each; here the queries of a group decide together, which keeps the saving of shared heads.
    Layers with a window of their own are left alone. While the prompt runs, all of it is held.

    Source: Li et al., SnapKV, NeurIPS 2024, arXiv 2404.14469, section 4.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "of the prompt, the tokens that its last queries looked at"
    stage: ClassVar[Stage] = Stage.RUN

    cap: int = param(1024, "tokens of the prompt that stay, per KV head", "more than window")
    window: int = param(32, "last queries of the prompt, which vote and whose tokens stay", "1 or more")
    kernel: int = param(5, "neighbours whose votes are pooled", "an odd number, 1 or more")
    pool: Literal["avg", "max"] = param("avg", "how they are pooled", "avg, max")

    def __post_init__(self) -> None:
        check_votes(self.name, self.cap, self.window, self.kernel)

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Budget and policy of every KV head."""
        policy = last_queries(self.window, self.kernel, self.pool)
        for at, _ in heads(attentions(self.name, spec, whole=True)):
            yield Edit(at, "keep", Budget(self.cap))
            yield Edit(at, "policy", policy)


def last_queries(window: int, kernel: int, pool: str) -> PolicySpec:
    """How a spec names `LastQueries`."""
    params = (("window", window), ("kernel", kernel), ("pool", pool))
    return PolicySpec(f"{__name__}:{LastQueries.__name__}", params, queries=window, products=True)
