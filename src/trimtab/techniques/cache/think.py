"""think: thinner keys; each head keeps the channels in which its queries and keys are large."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.policy import Evidence
from trimtab.runtime.step import IntArray
from trimtab.spec.cache import HeadSpec, PolicySpec, Ring, Thin
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads

#: The index of a channel is one byte.
_WIDEST = 256


@dataclass(frozen=True, slots=True)
class LargeChannels:
    """A policy of channels: those with the largest mean square of the queries times mean square of the keys.

    Args:
        by: ``query``: as said; ``key``: of the keys alone; ``random``: any, other ones in every head and layer.
        obs: queries that were asked for; a shorter prompt has fewer, and is warned of.
    """

    by: str
    obs: int

    def keep(self, seen: Evidence, count: int) -> IntArray:
        """Channels to keep [G, count], ascending."""
        if self.by == "random":
            score = np.stack([np.random.default_rng((seen.layer, head)).random(seen.k.shape[2]) for head in seen.heads])
        else:
            score = np.square(seen.k).mean(axis=1)
            if self.by == "query":
                there = seen.q.shape[2]
                if there < self.obs:
                    warnings.warn(
                        f"think: the prompt has {there} tokens, fewer than obs={self.obs}. All are used.", stacklevel=2
                    )
                score = score * np.square(seen.q).mean(axis=(1, 2))
        return np.sort(np.argsort(-score, axis=1, kind="stable")[:, :count], axis=1).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinK(Technique):
    """Keys without a share `ratio` of their channels, chosen once per KV head, when the prompt has ended.

    A channel's score is mean(Q_i^2) mean(K_i^2) over the last `obs` queries and all keys of the prompt: the greedy
    choice that keeps Q K' in the Frobenius norm. Queries that share the head are averaged, so that it is stored once.
    The channels that stay are stored, n x kept numbers and one byte each for their indices; the newest `recent` keys of
    the prompt and all that follow keep every channel. After kivi the newest are those of its tail, and keys are thinned
    before they are coded.

    Exact: bytes, values, and a prompt of at most `recent` tokens. Approximated: products with thinned keys. Scores are
    scaled by the whole head size. A prompt shorter than `obs` is scored by all its queries, with a warning. The paper's
    code repeats keys for every query head and so gives the saving of shared heads away. ``by=key`` and ``by=random``
    are there to be compared with.

    Source: Xu et al., ThinK: Thinner Key Cache by Query-Driven Pruning, ICLR 2025, arXiv 2407.21018, section 3.
    """

    name: ClassVar[str] = "think"
    summary: ClassVar[str] = "keys keep the channels in which queries and keys are large"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 66

    ratio: float = param(0.4, "share of the key channels that go", "0 or more, below 1")
    obs: int = param(32, "last queries of the prompt that the score is taken from", "1 or more")
    recent: int = param(32, "newest keys of the prompt that keep every channel", "0 or more")
    value_ratio: float = param(0.0, "share of the value channels that go", "0")
    by: Literal["query", "key", "random"] = param("query", "what channels are chosen by", "query, key, random")

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise SpecError(f"think: ratio={self.ratio} is not possible. Allowed: 0 <= ratio < 1. Try ratio=0.4.")
        if self.obs < 1:
            raise SpecError(f"think: obs={self.obs} is not possible. Allowed: 1 or more. Try obs=32.")
        if self.recent < 0:
            raise SpecError(f"think: recent={self.recent} is not possible. Allowed: 0 or more. Try recent=32.")
        if self.value_ratio != 0:
            raise SpecError(
                f"think: value_ratio={self.value_ratio}: thinner values are an experiment of the paper's appendix and not "
                "built. Allowed: 0. Try value_ratio=0."
            )

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, keys that are coded as they come, and heads too wide for an index of a byte."""
        chosen = self._chosen(spec)
        if not chosen:
            raise SpecError(
                f"think: every head of {spec.name} keeps a ring, in which nothing grows old. "
                "Allowed: heads that keep their tokens. Use one of the two."
            )
        for _, head in chosen:
            if head.head_dim > _WIDEST:
                raise SpecError(
                    f"think: heads of {head.head_dim} ({spec.name}) are too wide. Allowed: up to {_WIDEST} elements."
                )
            if head.tail is None and not head.k_format.is_float:
                raise SpecError(
                    f"think: the keys of {spec.name} are coded as {head.k_format} when they come, before channels are "
                    "chosen. Allowed: a cache in float32, bfloat16 or float16, or kivi."
                )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Channels of every KV head; none where no channel goes."""
        params = (("by", self.by), ("obs", self.obs))
        queries = self.obs if self.by == "query" else 0
        policy = PolicySpec(f"{__name__}:{LargeChannels.__name__}", params, queries=queries)
        for at, head in self._chosen(spec):
            # A ratio that divides the head but for rounding counts as one that does.
            gone = math.floor(self.ratio * head.head_dim + 1e-9)
            if gone:
                yield Edit(at, "thin", Thin(head.head_dim - gone, self.recent, policy))

    def _chosen(self, spec: ModelSpec) -> list[tuple[str, HeadSpec]]:
        found = heads(attentions(self.name, spec))
        return [(at, head) for at, head in found if not isinstance(head.keep, Ring)]
