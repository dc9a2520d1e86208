"""knorm: of the prompt, keep the tokens whose keys are short."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.policy import Evidence, newest_and_best
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Budget, PolicySpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads


@dataclass(frozen=True, slots=True)
class ShortKeys:
    """A policy: the tokens with the smallest norm of their keys, and the first `sink` of the sequence."""

    sink: int

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Slots to keep [G, count], ascending."""
        score = -np.square(seen.k).sum(axis=2)
        score[seen.positions < self.sink] = np.inf
        return newest_and_best(score, count, newest=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knorm(Technique):
    """A cache of fixed size for the prompt: `cap` tokens per KV head, chosen once and without any query.

    Keys of tokens that are attended to much are short, so the L2 norm of a key says what its token is worth. What comes
    after the prompt stays.

    Exact: a prompt of at most `cap` tokens. Approximated: what was given up. The paper leaves the first two layers
    whole; here all are treated alike. Layers with a window of their own are left alone. While the prompt runs, all of
    it is held.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024, arXiv
    2406.11430.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "of the prompt, the tokens whose keys are short"
    stage: ClassVar[Stage] = Stage.RUN

    cap: int = param(1024, "tokens of the prompt that stay, per KV head", "1 or more")
    sink: int = param(0, "first tokens that stay whatever their keys", "0..cap")

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise SpecError(f"knorm: cap={self.cap} is not possible. Allowed: 1 or more. Try cap=1024.")
        if not 0 <= self.sink <= self.cap:
            nearest = min(max(self.sink, 0), self.cap)
            raise SpecError(f"knorm: sink={self.sink} is not possible. Allowed: 0..{self.cap}. Try sink={nearest}.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Budget and policy of every KV head."""
        policy = PolicySpec(f"{__name__}:{ShortKeys.__name__}", (("sink", self.sink),))
        for at, _ in heads(attentions(self.name, spec, whole=True)):
            yield Edit(at, "keep", Budget(self.cap))
            yield Edit(at, "policy", policy)
