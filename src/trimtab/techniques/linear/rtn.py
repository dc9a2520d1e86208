"""rtn: round every weight to the nearest point of a group-wise integer grid, and really pack the codes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn(Technique):
    """Round-to-nearest weight quantization: the baseline every quantizer is compared with.

    Exact: bytes (codes at `bits` per weight plus one fp16 scale per group, and a minimum if `sym` is false). Approximated:
    the weights; activations stay in floating point. The embedding is left alone, and lm_head unless `head` is true.
    """

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "weights of the layers on a group-wise integer grid, 2 to 8 bits, packed"
    stage: ClassVar[Stage] = Stage.WEIGHTS

    bits: int = param(4, "bits of one code", "2..8")
    group: int = param(
        32, "weights along the input that share a scale; must divide every row", "a divisor of the row length"
    )
    sym: bool = param(True, "true: scale only; false: scale and minimum", "true, false")
    head: bool = param(False, "true: lm_head too, where it is not tied to the embedding", "true, false")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(
                f"rtn: bits={self.bits} is not possible. Allowed: 2..8. Try bits={min(max(self.bits, 2), 8)}."
            )
        if self.group < 1:
            raise SpecError(f"rtn: group={self.group} is not possible. Allowed: 1 or more. Try group=32.")

    @property
    def format(self) -> WeightFormat:
        """The format every linear of the layers gets."""
        return WeightFormat(kind="int", bits=self.bits, group=self.group, sym=self.sym)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a group that divides no row, naming the layer and the allowed groups, and a head that is the embedding."""
        if self.head and spec.tie_word_embeddings:
            raise SpecError(f"rtn: head=true: the head of {spec.name} is its embedding. Try head=false.")
        for path, node in self._linears(spec):
            try:
                self.format.buffers(*node.stored_shape)
            except SpecError as error:
                raise SpecError(f"rtn: {path} of {spec.name}: {error}") from None

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every linear inside the layers; re-encoding follows from the format alone."""
        for path, _ in self._linears(spec):
            yield Edit(path, "format", self.format)

    def _linears(self, spec: ModelSpec) -> Iterable[tuple[str, LinearSpec]]:
        return (
            (path, node)
            for path, node in spec.linears()
            if (path.startswith("layers.") and not path.endswith("router")) or (self.head and path == "lm_head")
        )
