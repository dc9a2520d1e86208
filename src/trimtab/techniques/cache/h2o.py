"""h2o: after every pass, keep the newest tokens and those that were attended to most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.runtime.cache.policy import Evidence, newest_and_best
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Budget, PolicySpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads


@dataclass(frozen=True, slots=True)
class HeavyHitters:
    """A policy: `recent` newest tokens, and those with the largest sum of attention weights over all queries so far."""

    recent: int

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Slots to keep [G, count], ascending; what the queries of the pass add is written to the scores."""
        assert seen.score is not None
        seen.score[...] += seen.weights().sum(axis=(1, 2))
        return newest_and_best(seen.score, count, self.recent)


@dataclass(frozen=True, slots=True, kw_only=True)
class H2O(Technique):
    """A cache of fixed size: `cap` tokens per KV head, a share `recent` of them the newest, the others heavy hitters.

    A token's score is the attention weight it got, summed over every query since it came and over the queries that
    share its KV head; it is kept beside the token, four bytes. After every pass the tokens with the smallest scores are
    given up, so that memory is bounded in a prompt that comes in chunks too.

    Exact: bytes, and a sequence of at most `cap` tokens. Approximated: what was given up. The paper drops tokens one by
    one within a prompt; here once after every chunk, whose queries saw all of it.

    Source: Zhang et al., H2O: Heavy-Hitter Oracle, NeurIPS 2023, arXiv 2306.14048, algorithm 1.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "cache of fixed size: the newest tokens and those attended to most"
    stage: ClassVar[Stage] = Stage.RUN

    cap: int = param(1024, "tokens that stay, per KV head", "1 or more")
    recent: float = param(0.5, "share of them that are the newest", "0..1")

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise SpecError(f"h2o: cap={self.cap} is not possible. Allowed: 1 or more. Try cap=1024.")
        if not 0 <= self.recent <= 1:
            nearest = 0 if self.recent < 0 else 1
            raise SpecError(f"h2o: recent={self.recent} is not possible. Allowed: 0..1. Try recent={nearest}.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Budget and policy of every KV head."""
        params = (("recent", int(self.cap * self.recent + 0.5)),)
        policy = PolicySpec(f"{__name__}:{HeavyHitters.__name__}", params, queries=-1, products=True, score=True)
        for at, _ in heads(attentions(self.name, spec, whole=True)):
            yield Edit(at, "keep", Budget(self.cap, "pass"))
            yield Edit(at, "policy", policy)
