"""tri-shape: as a-shape, and the last queries of a prompt see everything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import Prefill
from trimtab.spec.tree import Edit
from trimtab.techniques.attention.a_shape import check_shape
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions


@dataclass(frozen=True, slots=True, kw_only=True)
class TriShape(Technique):
    """Sparse prompts whose last `last` queries, where instructions and questions stand, see every key.

    Exact: a prompt of at most sink + local tokens, or of at most `last` in one pass. Approximated: what the other
    queries would have seen further back. A prompt is known to end only in the pass that ends it: of a last chunk
    shorter than `last` all queries see everything, and those before it are as sparse as any. Otherwise as a-shape.

    Source: Li et al., SCBench, ICLR 2025, arXiv 2412.10319, section 3, and its code
    (minference/ops/streaming_kernel.py).
    """

    name: ClassVar[str] = "tri-shape"
    summary: ClassVar[str] = "a-shape, with the last queries of a prompt seeing everything"
    stage: ClassVar[Stage] = Stage.RUN

    sink: int = param(128, "first tokens that every query sees", "0 or more")
    local: int = param(3968, "nearest tokens that a query sees, itself included", "1 or more")
    last: int = param(100, "last queries of a prompt, which see everything", "1 or more")

    def __post_init__(self) -> None:
        check_shape(self.name, self.sink, self.local)
        if self.last < 1:
            raise SpecError(f"tri-shape: last={self.last} is not possible. Allowed: 1 or more. Try last=100.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The shape of every layer."""
        for at, _ in attentions(self.name, spec, whole=True):
            yield Edit(at, "prefill", Prefill(self.sink, self.local, self.last))
