"""Weights as the terms that a bit-serial processing element adds, one a cycle, and the dot product it computes from them.

A term is ``(-1)**sign * mantissa * 2**(exponent + significance)``, mantissa 0, 1 or 2. Values of small floats, special ones
included, have at most two set bits: two terms, found by the leading one. Integers, and mantissas of 4 bits, are recoded in
digits -2..2 of radix 4 (Booth): 2 terms for 4 bits, 3 for 6, 4 for 8. Terms are exact, so the products of a group with float16
activations sum to what multiplying by the values gives. Sums of a group are exact integers in units of 2**-24, the least
float16, and are rounded to float32 once.

Legend: T tokens, N rows, K columns of a matrix, G groups of a row.

Source: Chen et al., BitMoD, arXiv 2411.11745, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.grids import parts_of
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.grids import GridFormat

#: Fraction bits of a float16: every one is a multiple of 2**-24.
_FRACTION = 24
#: Sums of products are held in int64.
_MOST_SUM = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """Terms of every code, [tables, codes, terms] each; a term with mantissa 0 adds nothing.

    Args:
        sign: uint8, 1 for minus.
        mantissa: uint8, 0..2.
        shift: int8, exponent and significance of the bit together.
    """

    sign: np.ndarray
    mantissa: np.ndarray
    shift: np.ndarray

    @property
    def cycles(self) -> int:
        """Terms of a weight: cycles a lane spends on it."""
        return self.sign.shape[-1]

    @property
    def values(self) -> np.ndarray:
        """What the terms of each code sum to, int64 [tables, codes]."""
        size = self.mantissa.astype(np.int64) << self.shift
        return np.where(self.sign, -size, size).sum(axis=-1)


def grid_terms(format: GridFormat) -> Terms:
    """Expand every code of a format's tables.

    Raises:
        SpecError: a grid that has no terms here: bipolar integers run as planes of bits.
    """
    if format.grid == "bipolar":
        raise SpecError("bipolar weights are planes of bits; they have no bit-serial terms.")
    found = [_expand(np.array(table, np.int64), format.grid == "int") for table in format.tables]
    most = max(shift.shape[-1] for _, _, shift in found)
    padded = [[np.pad(part, ((0, 0), (0, most - part.shape[-1]))) for part in parts] for parts in found]
    return Terms(*(np.stack(parts) for parts in zip(*padded, strict=True)))


def _expand(values: np.ndarray, is_integer: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms [codes, terms] of one table."""
    signs, mantissas, shifts = _leading_ones(values)
    if shifts.shape[-1] <= 2:
        return signs, mantissas, shifts
    # A small float is a mantissa of 4 bits, shifted.
    exponent = 0 if is_integer else (np.frexp(np.abs(values))[1] - 4).clip(0)
    signs, mantissas, shifts = _booth(values >> exponent)
    return signs, mantissas, (shifts + np.reshape(exponent, (-1, 1))).astype(np.int8)


def _booth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digits -2..2 of radix 4 of two's complement integers, as many as the largest magnitude needs."""
    width = int(np.abs(values).max()).bit_length() + 1
    places = 2 * np.arange((width + 1) // 2)
    bits = [values[:, None] >> np.maximum(places + offset, 0) & 1 for offset in (-1, 0, 1)]
    digit = np.where(places == 0, 0, bits[0]) + bits[1] - 2 * bits[2]
    shift = np.broadcast_to(places, digit.shape)
    return (digit < 0).astype(np.uint8), np.abs(digit).astype(np.uint8), shift.astype(np.int8)


def _leading_ones(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The set bits of magnitudes, from the top; as many as the value with most of them has."""
    left, mantissas, shifts = np.abs(values), [], []
    while left.any():
        shift = np.frexp(left)[1] - 1  # of the leading one
        found = left > 0
        mantissas.append(found)
        shifts.append(np.where(found, shift, 0))
        left = np.where(found, left - (1 << np.maximum(shift, 0)), 0)
    sign = np.repeat((values < 0)[..., None], len(shifts), axis=-1)
    return sign.astype(np.uint8), np.stack(mantissas, -1).astype(np.uint8), np.stack(shifts, -1).astype(np.int8)


def bitserial_dot(x: np.ndarray, packed: Packed) -> np.ndarray:
    """Return float32 [T, N]: float16 [T, K] times the matrix as its terms, cycle by cycle.

    Every cycle adds one term of every weight, shifted into place; after its cycles the sum of a group is rounded to float32, and
    ``sum * scale`` is added to that of the groups before it, in float32.

    Args:
        x: activations, finite.
        packed: W [N, K], a grid by rows or in tiles.

    Raises:
        SpecError: a value is not finite, or groups so long that a sum may not fit 64 bits.
    """
    codes, scale, choice = parts_of(packed)
    assert isinstance(packed.format, GridFormat)
    terms = grid_terms(packed.format)
    groups, group = scale.shape[1], packed.format.group
    fixed = fixed_point(x).reshape(len(x), groups, group)
    if float(np.abs(fixed).max(initial=0)) * float(np.abs(terms.values).max()) * group > _MOST_SUM:
        raise SpecError(f"{packed.format}: {group} products of these inputs may not fit 64 bits. Use shorter groups.")
    table = np.repeat(choice, group, axis=1)
    sums = np.zeros((len(x), len(codes), groups), np.int64)
    for cycle in range(terms.cycles):
        sign, mantissa, shift = (part[..., cycle][table, codes] for part in (terms.sign, terms.mantissa, terms.shift))
        added = mantissa.astype(np.int64) << shift
        added = np.where(sign, -added, added).reshape(len(codes), groups, group)
        sums += np.einsum("tgk,ngk->tng", fixed, added)
    return scaled_sums(sums, scale)


def fixed_point(x: np.ndarray) -> np.ndarray:
    """float16 of any shape as int64 in units of 2**-24: exact.

    Raises:
        SpecError: a value is not finite.
    """
    if not np.isfinite(x).all():
        raise SpecError("bit-serial products need finite inputs.")
    return np.ldexp(x.astype(np.float64), _FRACTION).astype(np.int64)


def scaled_sums(sums: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Sums int64 [T, N, G] in units of 2**-24, rounded to float32, times the scales float32 [N, G], added group by group."""
    parts = np.ldexp(sums.astype(np.float32), -_FRACTION) * scale
    total = np.zeros(parts.shape[:2], np.float32)
    for index in range(parts.shape[2]):
        total += parts[:, :, index]
    return total
