"""Weights as planes of bits, each plane a matrix of -1 and 1 that is worth a power of two: what bit-serial products read.

Source: Ma et al., Efficient Arbitrary Precision Acceleration for Large Language Models, arXiv 2409.17870, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec.formats import Buffer, WeightFormat
from trimtab.spec.grids import GridFormat

#: Columns of a word, and words of a block: a plane of a block is one register.
WORD_COLS, BLOCK_WORDS = 32, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BipolarPlanes(WeightFormat):
    """``w = scale of the group * sum of (2 bit_i - 1) 2**i``: odd integers from ``-(2**bits - 1)``, without 0.

    Holds the codes and scales of `grid` in another order: bits of 32 columns are a word, words stand in blocks of 16, and in a
    block one plane follows the other, so that a row is read from its first byte to its last. The last block may be shorter.

    Args:
        bits: 1..8.
        group: columns that share a scale: a multiple of 32 that divides the row, or the whole row.

    Raises:
        SpecError: other bits, a group below 1, the layout of the native program.
    """

    kind: str = "bipolar"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(
                f"bipolar planes: bits={self.bits} is not possible. Allowed: 1..8. Try bits={min(max(self.bits, 1), 8)}."
            )
        if self.group < 1:
            raise SpecError(f"bipolar planes: group={self.group} is not possible. Allowed: 1 or more. Try group=64.")
        if self.tiled:
            raise SpecError("Bipolar planes have no tiled layout: their product is not one of the native program.")

    @property
    def grid(self) -> GridFormat:
        """The format of the same codes and scales by rows."""
        return GridFormat(grid="bipolar", bits=self.bits, group=self.group)

    @property
    def is_rounded(self) -> bool:
        return True

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``planes`` u8 [rows, bytes of all planes of a row], ``scale`` fp16 [rows, groups].

        Raises:
            SpecError: the group is neither the row nor a multiple of 32 that divides it.
        """
        check_word_group(self.group, cols)
        words = cols // self.group * -(-self.group // WORD_COLS)
        return (
            Buffer("planes", "u8", (rows, words * self.bits * WORD_COLS // 8)),
            Buffer("scale", "fp16", (rows, cols // self.group)),
        )

    def __str__(self) -> str:
        return f"bipolar{self.bits}-g{self.group}-planes"


def word_groups(cols: int) -> list[int]:
    """Groups that are whole words and divide rows of `cols`, below the row itself.

    >>> word_groups(576)
    [32, 64, 96, 192, 288]
    """
    return [group for group in range(WORD_COLS, cols, WORD_COLS) if cols % group == 0]


def check_word_group(group: int, cols: int) -> None:
    """Refuse a group that is neither the row nor one of `word_groups`.

    Raises:
        SpecError: names those that are.
    """
    fit = word_groups(cols)
    if group != cols and group not in fit:
        near = min([*fit, cols], key=lambda g: abs(g - group))
        shown = ", ".join(map(str, fit))
        raise SpecError(
            f"group={group} is not possible for rows of {cols}. Allowed: {shown + ', ' if fit else ''}0 (the whole row). "
            f"Try group={0 if near == cols else near}."
        )
