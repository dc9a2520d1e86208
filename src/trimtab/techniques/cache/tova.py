"""tova: after every pass, give up the tokens that the last query attends to least."""

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
class LastQuery:
    """A policy: the newest token, and those with the largest weight of the last query, averaged over all heads."""

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Slots to keep [G, count], ascending and the same for every head."""
        weights = seen.weights()[:, :, -1].mean(axis=(0, 1))
        chosen = newest_and_best(weights[None], count, newest=1)
        return np.repeat(chosen, len(seen.heads), axis=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tova(Technique):
    """A cache of fixed size: `cap` tokens per layer; the one that the last query attends to least makes room for a new one.

    Weights are averaged over all heads of the layer, so that its heads hold the same tokens. The newest token stays.

    Exact: bytes, and a sequence of at most `cap` tokens. Approximated: what was given up. Of a chunk of a prompt all
    but `cap` tokens go at once, by its last query; the paper goes through a prompt as one chunk too.

    Source: Oren et al., Transformers are Multi-State RNNs, EMNLP 2024, arXiv 2401.06104, section 3.2.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "cache of fixed size: the tokens that the last query attends to"
    stage: ClassVar[Stage] = Stage.RUN

    cap: int = param(1024, "tokens that stay, per layer", "1 or more")

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise SpecError(f"tova: cap={self.cap} is not possible. Allowed: 1 or more. Try cap=1024.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Budget and policy of every KV head."""
        policy = PolicySpec(f"{__name__}:{LastQuery.__name__}", queries=1, products=True)
        for at, _ in heads(attentions(self.name, spec, whole=True)):
            yield Edit(at, "keep", Budget(self.cap, "pass"))
            yield Edit(at, "policy", policy)
