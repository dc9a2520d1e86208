"""Weight formats whose codes are places in a small table of values, and the tables themselves.

A grid of b bits is a tuple of 2**b values by code, in units of the group's scale. Small floats and integers are coded as sign and
magnitude: bit b-1 is the sign, the rest counts magnitudes upwards. What would be a negative zero is free for one more value, and
that is all that BitMoD's candidates differ in; OliVe marks with it that the other half of a pair is an outlier.

Source: Chen et al., BitMoD, arXiv 2411.11745; Guo et al., ANT (flint), MICRO 2022, and OliVe, arXiv 2304.07493; Ma et al.,
bipolar-INT, arXiv 2409.17870.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import TILE_ROWS, UNIT_COLS, Buffer, WeightFormat, check_group

Values = tuple[float, ...]


def signed(magnitudes: Sequence[float], special: float = 0.0) -> Values:
    """Values by code of a sign-and-magnitude grid: the magnitudes from 0 up, then `special` and the negative magnitudes.

    >>> signed((0, 1, 2, 4), special=3)
    (0, 1, 2, 4, 3, -1, -2, -4)
    """
    return (*magnitudes, special, *(-m for m in magnitudes[1:]))


def _float_magnitudes(exponent_bits: int, mantissa_bits: int) -> Values:
    """Magnitudes of a small float in units of its smallest one: integers."""
    steps, binades = 1 << mantissa_bits, 1 << exponent_bits
    return (*range(steps), *(((steps + m) << e) for e in range(binades - 1) for m in range(steps)))


_FP3, _FP4 = (0, 1, 2, 4), (0, 1, 2, 3, 4, 6, 8, 12)
_FLINT4 = (0, 1, 2, 3, 4, 6, 8, 16)
#: The one value more of BitMoD's candidates, in the order in which equal errors are decided: extra resolution, extra asymmetry.
EXTRA = {3: {"er": (3, -3), "ea": (6, -6)}, 4: {"er": (10, -10), "ea": (16, -16)}}


def _int(bits: int) -> Values:
    return signed(range(1 << (bits - 1)))


@functools.cache
def grid_tables(name: str, bits: int) -> tuple[Values, ...]:
    """The grids a group of weights may choose from: 1, 2 or 4 tables of 2**bits values by code.

    Args:
        name: of `GRIDS`.
        bits: of a code.

    Raises:
        SpecError: no such grid, or not at these bits.

    >>> grid_tables("bipolar", 2)
    ((-3, -1, 1, 3),)
    """
    base = {3: _FP3, 4: _FP4}.get(bits, ())
    extra = EXTRA.get(bits, {})
    found: dict[str, tuple[Values, ...]] = {
        "int": (_int(bits),) if bits in GRIDS["int"] else (),
        "bipolar": (tuple(2 * code - (1 << bits) + 1 for code in range(1 << bits)),)
        if bits in GRIDS["bipolar"]
        else (),
        "fp": (signed(base),) if base else {6: (signed(_float_magnitudes(2, 3)),)}.get(bits, ()),
        "flint": (signed(_FLINT4),) if bits == 4 else (),
        "ant": {3: (_int(3), signed(_FP3)), 4: (_int(4), signed(_FLINT4))}.get(bits, ()),
        "er": tuple(signed(base, s) for s in extra.get("er", ())),
        "ea": tuple(signed(base, s) for s in extra.get("ea", ())),
        "bitmod": tuple(signed(base, s) for kind in ("er", "ea") for s in extra.get(kind, ())),
    }
    if name not in found:
        raise unknown("grid", name, GRIDS)
    if not found[name]:
        raise SpecError(f"grid {name} has no {bits} bits. Allowed: {', '.join(map(str, GRIDS[name]))}.")
    return found[name]


#: Bits that each grid comes in. ``fp``: 0 1 2 4 in 3 bits, e2m1 in 4, e2m3 in 6. ``int``: symmetric, without -2**(bits-1).
GRIDS = {
    "int": (2, 3, 4, 5, 6, 7, 8), "bipolar": (1, 2, 3, 4, 5, 6, 7, 8), "fp": (3, 4, 6), "flint": (4,), "ant": (3, 4),
    "er": (3, 4), "ea": (3, 4), "bitmod": (3, 4),
}  # fmt: skip


#: How the scales of groups are kept. ``int8``: unsigned 8-bit multiples of one fp16 step per row. ``e8m0``: powers of two.
SCALES = ("fp16", "int8", "e8m0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridFormat(WeightFormat):
    """``w = scale of the group * table of the group [code]``.

    Args:
        grid: of `GRIDS`; where it holds several tables, every group stores which one is its own (1 or 2 bits).
        bits: of a code.
        group: columns that share a scale and a table; must divide the row.
        scale: of `SCALES`.
        tiled: the layout of the native program; a group is a multiple of 16, or the whole row.

    Raises:
        SpecError: no such grid at these bits, or a group below 1.
    """

    kind: str = "grid"
    grid: str = "int"
    scale: str = "fp16"

    def __post_init__(self) -> None:
        grid_tables(self.grid, self.bits)
        if self.scale not in SCALES:
            raise unknown("scale format", self.scale, SCALES)
        if self.group < 1:
            raise SpecError(
                f"{self.grid} weights: group={self.group} is not possible. Allowed: 1 or more. Try group=64."
            )

    @property
    def tables(self) -> tuple[Values, ...]:
        """The grids a group chooses from."""
        return grid_tables(self.grid, self.bits)

    @property
    def choice_bits(self) -> int:
        """Bits in which a group stores its table."""
        return (len(self.tables) - 1).bit_length()

    @property
    def is_rounded(self) -> bool:
        return True

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """By rows: ``codes`` packed little-endian, ``scale`` [rows, groups] (with ``step`` fp16 [rows, 1] for int8), ``choice``.

        In tiles: ``codes`` as those of ``int`` tiles, scales [tiles, groups, 16], ``step`` [tiles, 16], ``choice`` [tiles,
        groups, 2 * choice_bits]: row r of a tile at bit ``r * choice_bits``, little-endian.

        Raises:
            SpecError: the group does not divide the row, or has no tiles.
        """
        check_group(self.group, cols)
        groups = cols // self.group
        coded = "fp16" if self.scale == "fp16" else "u8"
        if self.tiled:
            check_tiled_group(self, cols)
            tiles = -(-rows // TILE_ROWS)
            shape: tuple[int, ...] = (tiles, groups, TILE_ROWS)
            found = [
                Buffer("codes", "u8", (tiles, -(-cols // UNIT_COLS), 64 * self.bits)),
                Buffer("scale", coded, shape),
            ]
            step, choice = (tiles, TILE_ROWS), (tiles, groups, 2 * self.choice_bits)
        else:
            found = [
                Buffer("codes", "u8", (rows, (cols * self.bits + 7) // 8)),
                Buffer("scale", coded, (rows, groups)),
            ]
            step, choice = (rows, 1), (rows, (groups * self.choice_bits + 7) // 8)
        if self.scale == "int8":
            found.append(Buffer("step", "fp16", step))
        if self.choice_bits:
            found.append(Buffer("choice", "u8", choice))
        return tuple(found)

    def __str__(self) -> str:
        scale = "" if self.scale == "fp16" else f"-{self.scale}"
        return f"{self.grid}{self.bits}-g{self.group}{scale}{'-tiled' if self.tiled else ''}"


#: Normal values of a pair's halves by (name, bits), and of its outliers: abfloat whose range begins above the normal one.
PAIR_NORMALS = {("int", 4): _int(4), ("flint", 4): signed(_FLINT4), ("int", 8): _int(8)}
#: (exponent bits, mantissa bits, bias) of the abfloat: value = sign * ((2**mantissa_bits + m) << (e + bias)).
ABFLOATS = {("int", 4): (2, 1, 2), ("flint", 4): (2, 1, 3), ("int", 8): (4, 3, 4)}


@functools.cache
def outliers(name: str, bits: int) -> Values:
    """Outlier values by code; exponent and mantissa both zero are unused and read as 0.

    >>> outliers("int", 4)[:8]
    (0, 12, 16, 24, 32, 48, 64, 96)
    """
    exponent_bits, mantissa_bits, bias = ABFLOATS[name, bits]
    steps = 1 << mantissa_bits
    values = [(steps + m) << (e + bias) for e in range(1 << exponent_bits) for m in range(steps)]
    return signed((0, *values[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFormat(WeightFormat):
    """Outlier-victim pairs: two neighbours along the row, where one may be an outlier at the cost of the other, which is 0.

    The code ``2**(bits-1)`` says: this half is 0 and the other half is an outlier. Both halves so is 0, 0.

    Args:
        normal: ``int`` or ``flint`` (4 bits only).
        bits: 4 or 8.
        group: columns that share a scale, even; must divide the row. The paper: the whole row.

    Raises:
        SpecError: other bits, no such normal type, an odd group.
    """

    kind: str = "pair"
    normal: str = "int"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SpecError(f"OliVe pairs need 4 or 8 bits; bits={self.bits} is not possible. Try bits=4.")
        if (self.normal, self.bits) not in PAIR_NORMALS:
            raise SpecError(f"OliVe pairs of {self.bits} bits are of int: normal={self.normal} is not possible.")
        if self.group < 2 or self.group % 2:
            raise SpecError(f"OliVe pairs: group={self.group} cuts a pair. Allowed: even numbers.")

    @property
    def identifier(self) -> int:
        """The code of a victim."""
        return 1 << (self.bits - 1)

    @property
    def abfloat(self) -> tuple[int, int, int]:
        """Exponent bits, mantissa bits and bias of an outlier; see `ABFLOATS`."""
        return ABFLOATS[self.normal, self.bits]

    @property
    def tables(self) -> tuple[Values, Values]:
        """(normal, outlier) values by code."""
        return PAIR_NORMALS[self.normal, self.bits], outliers(self.normal, self.bits)

    @property
    def is_rounded(self) -> bool:
        return True

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """``codes`` and ``scale`` fp16, by rows or in tiles as those of ``int``.

        Raises:
            SpecError: the group does not divide the row, or has no tiles.
        """
        if cols % 2:
            raise SpecError(f"OliVe codes pairs along the row: a row of {cols} has an odd number of weights.")
        check_group(self.group, cols)
        groups = cols // self.group
        if self.tiled:
            check_tiled_group(self, cols)
            tiles = -(-rows // TILE_ROWS)
            return (
                Buffer("codes", "u8", (tiles, -(-cols // UNIT_COLS), 64 * self.bits)),
                Buffer("scale", "fp16", (tiles, groups, TILE_ROWS)),
            )
        return Buffer("codes", "u8", (rows, (cols * self.bits + 7) // 8)), Buffer("scale", "fp16", (rows, groups))

    def __str__(self) -> str:
        return f"pair-{self.normal}{self.bits}-g{self.group}{'-tiled' if self.tiled else ''}"


def check_tiled_group(format: WeightFormat, cols: int) -> None:
    """Refuse groups that the tiled layout cannot hold.

    Raises:
        SpecError: neither a multiple of 16 nor the whole row.
    """
    if format.group != cols and format.group % 16:
        raise SpecError(f"{format} on rows of {cols}: tiles need groups of 16, 32, 48, ... or one group.")
