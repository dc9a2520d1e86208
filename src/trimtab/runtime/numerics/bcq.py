"""Binary coding of groups of weights, and its codec.

Legend: R groups, g weights of a group, q bits, N rows, K columns of a matrix.
Source: You et al., ShiftAddLLM, arXiv 2406.05981, sections 3 and 4.1.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.rotation import rotation_of
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.bcq import CHUNK, BcqFormat
from trimtab.spec.formats import TILE_ROWS, WeightFormat

#: Exponents a scale can have: 7 bits, and code 0 is no term.
_BIAS, _LEAST, _MOST = 64, -63, 63
#: Groups coded at a time, in weights.
_PART = 1 << 18
#: Shares of the range that even levels to begin with may span.
EVEN = (0.95, 0.8)


def bcq(
    w_Rg: np.ndarray,
    bits: int,
    apot: int = 3,
    rounds: int = 50,
    *,
    nearest: bool = True,
    cost_Rg: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Code groups of weights, see `binary_scales`.

    Returns:
        signs bool [R, g, q] (True = +1) and scales float32 [R, q], descending.

    Raises:
        SpecError: a weight that is not finite.
    """
    scales = binary_scales(w_Rg, bits, apot, rounds, nearest=nearest, cost_Rg=cost_Rg)
    signs = np.empty((*w_Rg.shape, bits), bool)
    step = max(1, _PART // w_Rg.shape[1])
    for start in range(0, len(w_Rg), step):
        part = slice(start, start + step)
        signs[part] = (signs_of if nearest else greedy_signs)(w_Rg[part], scales[part])
    return signs, scales


def binary_scales(
    w_Rg: np.ndarray,
    bits: int,
    apot: int = 3,
    rounds: int = 50,
    *,
    nearest: bool = True,
    cost_Rg: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """Scales float32 [R, q], descending, that code groups of weights best; the best of all rounds and starts is kept.

    Args:
        w_Rg: float32.
        bits: q, 1..4.
        apot: powers of two of a scale; 0 leaves scales as they are (plain binary coding).
        rounds: of refitting scales and choosing signs anew.
        nearest: signs of the nearest level; False: greedily, one bit after the other.
        cost_Rg: what a squared error costs; None = all alike.
        threads: workers.

    Raises:
        SpecError: a weight that is not finite.
    """
    from trimtab.runtime.kernels import _core

    if not np.isfinite(w_Rg).all():
        raise SpecError("a weight is not finite. The weights of this model are broken.")
    scales = np.empty((len(w_Rg), bits), np.float32)
    cost = None if cost_Rg is None else np.ascontiguousarray(cost_Rg, np.float32)
    _core.binary_fit(np.ascontiguousarray(w_Rg, np.float32), cost, bits, apot, rounds, nearest, EVEN, threads, scales)
    return scales


def powers_of_two(scales: np.ndarray, terms: int) -> np.ndarray:
    """Scales as sums of `terms` signed powers of two, each the nearest (of logarithms) to what is left; 0 terms: unchanged."""
    return terms_of(scales, terms)[1] if terms else scales


def terms_of(scales: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray]:
    """The terms of scales as codes uint8 [..., terms] (see `BcqFormat.buffers`) and their sum float32 [...].

    Largest terms first; a term that has nothing left to stand for is code 0.
    """
    left = scales.astype(np.float64)
    codes = np.zeros((*scales.shape, terms), np.uint8)
    total = np.zeros_like(left)
    for t in range(terms):
        size = np.abs(left)
        exponent = np.rint(np.log2(np.maximum(size, 2.0 ** (_LEAST - 2)))).astype(int)
        none = (size == 0) | (exponent < _LEAST)
        exponent = np.clip(exponent, _LEAST, _MOST)
        term = np.where(none, 0.0, np.copysign(np.ldexp(1.0, exponent), left))
        codes[..., t] = np.where(none, 0, (exponent + _BIAS) | (np.signbit(left) << 7))
        left, total = left - term, total + term
    return codes, total.astype(np.float32)


def scales_of(codes: np.ndarray) -> np.ndarray:
    """The scales that codes of terms [..., terms] stand for, float32 [...]."""
    exponent = (codes & 127).astype(int) - _BIAS
    values = np.where(codes & 127, np.ldexp(1.0, exponent), 0.0) * np.where(codes >> 7, -1.0, 1.0)
    return values.sum(-1).astype(np.float32)


def levels_of(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending levels float32 [R, 2^q] of scales [R, q], and the signs of each, bool [R, 2^q, q]."""
    patterns = np.array(list(itertools.product((False, True), repeat=scales.shape[1])))
    values = np.where(patterns, 1, -1).astype(np.float32) @ scales.T  # [2^q, R]
    order = values.argsort(0, kind="stable").T
    return np.take_along_axis(values.T, order, 1), patterns[order]


def signs_of(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Signs of the level nearest to every weight, bool [R, g, q]."""
    levels, patterns = levels_of(scales)
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    index = (w[:, :, None] > middle[:, None, :]).sum(-1)
    return np.take_along_axis(patterns, index[..., None], 1)


def greedy_signs(w: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Signs chosen one plane after the other, bool [R, g, q]."""
    rest = w.copy()
    signs = np.empty((*w.shape, scales.shape[1]), bool)
    for i in range(scales.shape[1]):
        signs[..., i] = rest >= 0
        rest = rest - np.where(signs[..., i], 1, -1) * scales[:, None, i]
    return signs


def values_of(signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Weights that signs [R, g, q] and scales [R, q] stand for, float32 [R, g]."""
    return np.einsum("rgi,ri->rg", np.where(signs, np.float32(1), np.float32(-1)), scales)


# ------------------------------------------------------------------------------------------------------------ the codec


def encode(values: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    """Code float32 [N, K] group by group, without looking at inputs."""
    assert isinstance(format, BcqFormat)
    rows, cols = values.shape
    values = rotation_of(cols).apply(values) if format.rotated else values
    step, wide = format.scale_rows(rows), format.scale_cols
    signs = np.empty((rows, cols, format.bits), bool)
    codes = np.empty(format.buffers(rows, cols)[1].shape, np.uint8)
    for block, first in enumerate(range(0, rows, step)):
        part = values[first : first + step]  # [n, K] -> one group per column block
        groups = part.reshape(len(part), cols // wide, wide).transpose(1, 0, 2).reshape(cols // wide, -1)
        found, scales = bcq(groups, format.bits, format.apot)
        codes[block] = terms_of(scales, format.apot)[0]
        by_row = found.reshape(cols // wide, len(part), wide, format.bits).transpose(1, 0, 2, 3)
        signs[first : first + step] = by_row.reshape(len(part), cols, format.bits)
    return {"signs": pack_signs(signs), "scales": codes}


def pack_signs(signs: np.ndarray) -> np.ndarray:
    """Signs bool [N, K, q] as planes of bits, uint8 [q, N, K / 8]."""
    return np.packbits(signs.transpose(2, 0, 1), axis=-1, bitorder="little")


def decode(packed: Packed, out: np.ndarray) -> None:
    """Values into `out`, float32 [N, K]."""
    format = packed.format
    assert isinstance(format, BcqFormat)
    rows, cols = packed.shape
    scales = scales_of(packed.buffers["scales"])  # [row blocks, column blocks, q]
    wide = np.repeat(np.repeat(scales, format.scale_rows(rows), 0)[:rows], format.scale_cols, 1)
    out[...] = 0
    planes = packed.buffers["signs"]
    if format.tiled:  # [tiles, K / 8, q, 16] -> [q, N, K / 8]
        planes = planes.transpose(2, 0, 3, 1).reshape(format.bits, -1, cols // CHUNK)[:, :rows]
    for i in range(format.bits):
        bits = np.unpackbits(planes[i], axis=-1, bitorder="little")
        out += np.where(bits, wide[..., i], -wide[..., i])
    if format.rotated:
        out[...] = rotation_of(cols).undo(out)


def tile(packed: Packed, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """The same signs with 16 rows side by side, as the kernels of the native program read them."""
    format = packed.format
    rows, cols = packed.shape
    found = dataclasses.replace(format, tiled=True)
    out = {b.name: np.empty(b.shape, np.uint8) for b in found.buffers(rows, cols)} if buffers is None else buffers
    tiles = -(-rows // TILE_ROWS)
    padded = np.zeros((format.bits, tiles * TILE_ROWS, cols // CHUNK), np.uint8)
    padded[:, :rows] = packed.buffers["signs"]
    out["signs"][...] = padded.reshape(format.bits, tiles, TILE_ROWS, -1).transpose(1, 3, 0, 2)
    out["scales"][...] = packed.buffers["scales"]
    return Packed(found, packed.shape, out)


assert CHUNK == 8, "a chunk of signs is a byte"
