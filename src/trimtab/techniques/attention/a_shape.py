"""a-shape: the queries of a prompt see its first tokens and the nearest ones; the cache stays whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import Prefill
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions


def check_shape(name: str, sink: int, local: int) -> None:
    """Refuse numbers of tokens that are not possible.

    Raises:
        SpecError: in the name of the technique.
    """
    if sink < 0 or local < 1:
        raise SpecError(
            f"{name}: sink={sink}, local={local} is not possible. Allowed: sink >= 0, local >= 1. "
            f"Try sink={max(sink, 0)},local={max(local, 1)}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AShape(Technique):
    """Sparse prompts of one fixed shape: a query sees the first `sink` keys and the `local` newest, itself included.

    Every key is cached, and a step of one token reads them all; a later turn of several tokens is as sparse as a
    prompt. Pairs grow with the prompt, not with its square, where attention skips what is hidden.

    Exact: a prompt of at most sink + local tokens, in any chunks. Approximated: what queries further back would have
    seen. The authors' kernel rounds the shape to blocks of 64 keys; here it is cut to the token. Layers with a window
    are left alone.

    Source: Li et al., SCBench, ICLR 2025, arXiv 2412.10319, and its code (minference/ops/streaming_kernel.py).
    """

    name: ClassVar[str] = "a-shape"
    summary: ClassVar[str] = "queries of a prompt see the first and the nearest tokens; every token is cached"
    stage: ClassVar[Stage] = Stage.RUN

    sink: int = param(128, "first tokens that every query sees", "0 or more")
    local: int = param(3968, "nearest tokens that a query sees, itself included", "1 or more")

    def __post_init__(self) -> None:
        check_shape(self.name, self.sink, self.local)

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The shape of every layer."""
        for at, _ in attentions(self.name, spec, whole=True):
            yield Edit(at, "prefill", Prefill(self.sink, self.local))
