"""Weight formats that are not a code times a scale: a table of values for a matrix, and a bit mask with the values it keeps."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import ITEM_BYTES, Buffer, WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class PaletteFormat(WeightFormat):
    """``w = table of the rows [code]``: 2**bits values in fp16, chosen for the weights at hand.

    Args:
        bits: of a code, 1..8.
        rows: rows that share a table; 0 = the whole matrix.

    Raises:
        SpecError: other bits, fewer rows than none, or a tiled layout.

    Source: Cho et al., eDKM, arXiv 2309.00964, section 2.
    """

    kind: str = "palette"
    rows: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"palette weights: bits={self.bits} is not possible. Allowed: 1..8. Try bits=4.")
        if self.rows < 0:
            raise SpecError(
                f"palette weights: rows={self.rows} is not possible. Allowed: 1 or more, or 0 for one table."
            )
        if self.tiled:
            raise SpecError("palette weights have no tiled layout.")

    @property
    def is_rounded(self) -> bool:
        return True

    def tables(self, rows: int) -> int:
        """Tables of a matrix of `rows` rows; the last may serve fewer of them."""
        return -(-rows // self.rows) if self.rows else 1

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``codes`` packed little-endian by rows, ``table`` fp16 [tables, 2**bits]."""
        return (
            Buffer("codes", "u8", (rows, (cols * self.bits + 7) // 8)),
            Buffer("table", "fp16", (self.tables(rows), 1 << self.bits)),
        )

    def __str__(self) -> str:
        return f"palette{self.bits}{f'-r{self.rows}' if self.rows else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmaskFormat(WeightFormat):
    """One bit for every weight, and the weights whose bit is set, row after row.

    Args:
        kept: weights of the matrix whose bit is set.
        value: ``fp32 | fp16 | bf16``, of a kept weight.

    Raises:
        SpecError: another value type, fewer kept than none, a tiled layout.

    Source: Kurtic et al., arXiv 2310.06927, section 4.
    """

    kind: str = "bitmask"
    kept: int
    value: str = "fp16"

    def __post_init__(self) -> None:
        if self.value not in ("fp32", "fp16", "bf16"):
            raise unknown("value format", self.value, ("fp32", "fp16", "bf16"))
        if self.kept < 0:
            raise SpecError(f"bitmask weights: kept={self.kept} is not possible. Allowed: 0 or more.")
        if self.tiled:
            raise SpecError("bitmask weights have no tiled layout.")

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``mask`` packed little-endian by rows, ``values`` [kept], ``start`` int32 [rows + 1]: where the values of a row begin.

        Raises:
            SpecError: more kept than there are, or so many that the matrix is smaller without a mask.
        """
        found = (
            Buffer("mask", "u8", (rows, (cols + 7) // 8)),
            Buffer("values", self.value, (self.kept,)),
            Buffer("start", "int32", (rows + 1,)),
        )
        dense = rows * cols * ITEM_BYTES[self.value]
        if sum(buffer.nbytes for buffer in found) >= dense:
            room = (dense - found[0].nbytes - found[2].nbytes - 1) // ITEM_BYTES[self.value]
            raise SpecError(
                f"A {rows} x {cols} matrix that keeps {self.kept} weights is smaller in {self.value} without a mask. "
                f"Allowed: at most {max(room, 0)} kept."
            )
        return found

    def __str__(self) -> str:
        return f"bitmask-{self.value}-{self.kept}"
