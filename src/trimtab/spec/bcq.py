"""Binary-coded weights: sums of signs times scales that are themselves sums of powers of two.

``w = sum over bits i of alpha_i * b_i``, b_i in {-1, 1}; each alpha_i is a sum of `apot` signed powers of two. A product then needs
tables of sums of inputs, additions and shifts, and no multiplication.

Source: You et al., ShiftAddLLM, arXiv 2406.05981; Xu et al., Alternating Multi-bit Quantization, arXiv 1802.00150.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import TILE_ROWS, Buffer, WeightFormat

#: Columns whose signs of one row are a byte, and one index of a table of sums.
CHUNK = 8
#: ``lat``: `CHUNK` columns of group / CHUNK rows share scales; ``acc``: `group` rows of one column do.
MODES = ("lat", "acc")


def rotation_factor(cols: int) -> int:
    """The largest divisor of `cols` that is not above its root: rows of the table that a rotation lays columns out in."""
    return next(a for a in range(math.isqrt(cols), 0, -1) if cols % a == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BcqFormat(WeightFormat):
    """Signs in planes of bits, scales as powers of two.

    Args:
        bits: planes, 1..4.
        group: weights that share scales, a multiple of 8; 0: as many as a row has (``lat``) or a whole column (``acc``).
        apot: powers of two of a scale, 1..4.
        mode: of `MODES`.
        rotated: coded in the basis of a fixed random rotation of the columns, which every input is brought into before the product.

    Raises:
        SpecError: a value outside of these.
    """

    kind: str = "bcq"
    apot: int = 3
    mode: str = "lat"
    rotated: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 4:
            raise SpecError(f"bits={self.bits} is not possible. Allowed: 1..4. Try bits=3.")
        if self.group < 0 or self.group % CHUNK:
            near = max(CHUNK, round(self.group / CHUNK) * CHUNK)
            raise SpecError(
                f"group={self.group} is not possible. Allowed: multiples of {CHUNK}, or -1. Try group={near}."
            )
        if not 1 <= self.apot <= 4:
            raise SpecError(f"apot={self.apot} is not possible. Allowed: 1..4. Try apot=3.")
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)

    @property
    def is_rounded(self) -> bool:
        return True

    def scale_rows(self, rows: int) -> int:
        """Rows that share scales."""
        if self.mode == "acc":
            return min(self.group or rows, rows)
        return min(self.group // CHUNK if self.group else max(1, -(-rows // CHUNK)), rows)

    @property
    def scale_cols(self) -> int:
        """Columns that share scales."""
        return CHUNK if self.mode == "lat" else 1

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``signs`` u8 [bits, rows, cols / 8], in tiles [tiles, cols / 8, bits, 16]: bit s of a byte is column 8 c + s, 1 for +1.
        ``scales`` u8 [row blocks, column blocks, bits, apot]: a sign (bit 7) and an exponent plus 64 (bits 0..6); 0 is no term.
        The last block of rows may be shorter.

        Raises:
            SpecError: the row is no multiple of 8.
        """
        if cols % CHUNK:
            raise SpecError(f"{self} codes {CHUNK} columns at a time: a row of {cols} is no multiple of {CHUNK}.")
        blocks = -(-rows // self.scale_rows(rows))
        signs = (self.bits, rows, cols // CHUNK)
        if self.tiled:
            signs = (-(-rows // TILE_ROWS), cols // CHUNK, self.bits, TILE_ROWS)
        return (
            Buffer("signs", "u8", signs),
            Buffer("scales", "u8", (blocks, cols // self.scale_cols, self.bits, self.apot)),
        )

    def input_flops(self, cols: int) -> int:
        left = rotation_factor(cols)
        return 2 * cols * (left + cols // left) if self.rotated else 0

    def __str__(self) -> str:
        ends = ("-rotated" if self.rotated else "") + ("-tiled" if self.tiled else "")
        return f"bcq{self.bits}-g{self.group or 'row'}-{self.mode}-apot{self.apot}{ends}"
