"""streaming-llm: keep the first tokens (attention sinks) and the most recent ones; the cache stops growing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.cache import Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(Technique):
    """A fixed-size ring per KV head: `sink` first tokens and `recent` last ones.

    Exact: cache bytes are bounded by sink + recent tokens per sequence. Approximated: everything between is forgotten.
    The paper re-numbers positions inside the cache; here tokens keep their original positions, so a sequence still ends
    at the model's context.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    name: ClassVar[str] = "streaming-llm"
    summary: ClassVar[str] = "cache of fixed size: the first tokens and the most recent ones"
    stage: ClassVar[Stage] = Stage.RUN

    sink: int = param(4, "first tokens that stay", "0 or more")
    recent: int = param(508, "most recent tokens that stay", "1 or more")

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise SpecError(
                f"streaming-llm: sink={self.sink}, recent={self.recent} is not possible. Allowed: sink >= 0, recent >= 1."
            )

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, whose one cached vector serves every head at every position, and layers without a cache."""
        if not all(isinstance(layer.self_attn, AttentionSpec) for layer in spec.layers):
            raise SpecError(
                f"streaming-llm: {spec.name} has layers without keys and values per head (latent attention or a recurrent "
                "state); a ring over these is not supported."
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every KV head of every layer."""
        yield Edit("layers.*.self_attn.cache.heads.*", "keep", Ring(self.sink, self.recent))
