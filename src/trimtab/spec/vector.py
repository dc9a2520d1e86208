"""Weights in int8, one scale for every output: the form in which products of int8 with int8 read them.

Source: Dettmers et al., LLM.int8(), arXiv 2208.07339 (vector-wise quantization).
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import Buffer, WeightFormat

#: Weights that share a scale: a row, or the whole matrix.
SHARED = ("row", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowInt8Format(WeightFormat):
    """``w = scale of the row * code``, codes -127..127. Rows of zeros have scale 0. Kernels read the rows as they lie.

    Args:
        shared: of `SHARED`; ``tensor`` is what the method is compared with.

    Raises:
        SpecError: another value, or tiles, which it has none of.
    """

    kind: str = "int8"
    shared: str = "row"

    def __post_init__(self) -> None:
        if self.shared not in SHARED:
            raise unknown("share of a scale", self.shared, SHARED)
        if self.tiled:
            raise SpecError("int8 weights have no tiled layout: they are multiplied as their rows lie.")

    @property
    def is_rounded(self) -> bool:
        return True

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``data`` i8 [rows, cols] and ``scale`` fp32 [rows, 1], or [1, 1]."""
        return Buffer("data", "i8", (rows, cols)), Buffer("scale", "fp32", (rows if self.shared == "row" else 1, 1))

    def __str__(self) -> str:
        return "int8" if self.shared == "row" else "int8-tensor"
