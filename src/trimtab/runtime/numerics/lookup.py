"""Formats that products by table lookup read: planes of bits, and ternary weights; to and from floats and other layouts.

Legend: N rows, K columns of a matrix, G groups of a row.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.grid import nearest_points
from trimtab.runtime.numerics.tiles import PLAIN_BLOCKS, allocate, by_column, grid_of, to_tiles
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import PLANE_KINDS, TILE_ROWS, UNIT_COLS, WeightFormat
from trimtab.spec.grids import GridFormat


def grid_format(format: WeightFormat, kind: str) -> WeightFormat | None:
    """The format of the same codes and scales as ``int`` tiles or planes (`kind`), or None if `format` is no such grid.

    Ternary weights are the codes 1, 2, 3 of two bits.
    """
    bits, group, sym = format.bits, format.group, format.sym
    if format.kind == "ternary":
        return WeightFormat(kind="int", bits=2, group=group, tiled=True) if kind == "int" else None
    if format.kind in PLAIN_BLOCKS:
        (bits, sym), group = PLAIN_BLOCKS[format.kind], 32
    elif isinstance(format, GridFormat) and format.grid == "int" and format.scale == "fp16":
        sym = True
    elif format.kind != "int" and format.kind not in PLANE_KINDS:
        return None
    if kind in PLANE_KINDS and bits > 4:
        return None
    return WeightFormat(kind=kind, bits=bits, group=group, sym=sym, tiled=True)


def lay_out(packed: Packed, kind: str, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """Store a matrix on an integer grid as ``int`` tiles, ``bitplane`` or ``bitlane``: codes and scales stay what they are.

    Args:
        packed: integer rows, integer tiles, planes, ternary, symmetric integers of `spec.grids`, or simple ggml blocks, not
            transposed.
        kind: of the result.
        buffers: where to write; None allocates.

    Raises:
        SpecError: no such grid, or groups that the layout cannot hold.
    """
    format = grid_format(packed.format, kind)
    if format is None or packed.layout != "row":
        raise SpecError(
            f"A matrix in {packed.format} ({packed.layout}) holds no codes that could be laid out as {kind}."
        )
    if format == packed.format and buffers is None:
        return packed
    if packed.format.kind == "ternary":
        weights, scale = ternary_of(packed)
        return _packed((weights + 2).astype(np.uint8), scale, None, format, buffers)
    codes, scale, minimum = grid_of(packed)
    return _packed(codes, scale, minimum, format, buffers)


def _packed(
    codes: np.ndarray,
    scale: np.ndarray,
    minimum: np.ndarray | None,
    format: WeightFormat,
    buffers: dict[str, np.ndarray] | None,
) -> Packed:
    from trimtab.runtime.kernels import _core

    rows, cols = codes.shape
    out = allocate(format, (rows, cols)) if buffers is None else buffers
    padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, -(-cols // UNIT_COLS) * UNIT_COLS), np.uint8)
    padded[:rows, :cols] = codes
    if format.kind in PLANE_KINDS:
        _core.pack_planes(padded, format.bits, format.kind == "bitlane", out["codes"].reshape(-1))
    else:
        _core.pack_tiles(padded, format.bits, out["codes"].reshape(-1))
    out["scale"][...] = to_tiles(scale)
    if minimum is not None:
        out["minimum"][...] = to_tiles(minimum)
    return Packed(format, (rows, cols), out)


def encode_planes(values: np.ndarray, format: WeightFormat) -> Packed:
    """Round float32 [N, K] to the nearest points of the grid, as ``int`` rows do; the last group of a row may be shorter.

    Raises:
        SpecError: a group that the layout cannot hold, or a scale that is not finite in fp16.
    """
    rows, cols = values.shape
    format.buffers(rows, cols)
    whole = cols // format.group * format.group
    parts = [values[:, :whole].reshape(rows, -1, format.group)] if whole else []
    if whole < cols:
        parts.append(values[:, whole:].reshape(rows, 1, -1))
    found = [nearest_points(part, format) for part in parts]
    codes = np.concatenate([points.reshape(rows, -1) for points, _, _ in found], axis=1)
    scale = np.concatenate([scale for _, scale, _ in found], axis=1)
    lows = [low for _, _, low in found if low is not None]
    return _packed(codes, scale, np.concatenate(lows, axis=1) if lows else None, format, None)


def encode_ternary(values: np.ndarray, format: WeightFormat, *, one_scale: bool = False) -> Packed:
    """Round float32 [N, K] to -1, 0 or 1 times the mean magnitude of the group.

    Where all values of a group that are not zero have one magnitude, that is its scale: ternary weights stay what they are.

    Args:
        values: the matrix.
        format: ``ternary``.
        one_scale: a single scale for the whole matrix.

    Raises:
        SpecError: a scale is not finite in fp16.

    Source: BitNet b1.58, arXiv 2402.17764, section 2 (absmean quantization).
    """
    cols, group = values.shape[1], format.group
    size = np.abs(values)
    counts = np.minimum(group, cols - np.arange(0, cols, group)).astype(np.float32)
    starts = np.arange(0, cols, group)
    mean = np.add.reduceat(size, starts, axis=1, dtype=np.float64) / counts
    largest = np.maximum.reduceat(size, starts, axis=1)
    smallest = np.minimum.reduceat(np.where(size > 0, size, np.float32(np.inf)), starts, axis=1)
    if one_scale:
        mean = np.full_like(mean, size.mean(dtype=np.float64))
        largest, smallest = np.full_like(largest, largest.max()), np.full_like(smallest, smallest.min())
    with np.errstate(over="ignore"):  # told below, in words
        scale = np.where(largest == smallest, largest, mean).astype(np.float16)
    if not np.isfinite(scale).all():
        raise SpecError(f"{format}: a group of weights is not finite, or beyond what an fp16 scale can express.")
    wide = by_column(scale.astype(np.float32), group, cols)
    inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)
    return pack_ternary(np.clip(np.rint(values * inverse), -1, 1).astype(np.int8), scale, format)


def pack_ternary(weights: np.ndarray, scale: np.ndarray, format: WeightFormat) -> Packed:
    """A ternary matrix of weights int8 [N, K] in -1, 0, 1 and scale fp16 [N, G]: what `ternary_of` undoes."""
    from trimtab.runtime.kernels import _core

    rows, cols = weights.shape
    padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, cols), np.int8)
    padded[:rows] = weights
    out = allocate(format, (rows, cols))
    _core.pack_ternary(padded, format.group, out["codes"].reshape(-1))
    out["scale"][...] = to_tiles(scale)
    return Packed(format, (rows, cols), out)


def ternary_of(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Weights int8 [N, K] in -1, 0, 1 and scale fp16 [N, G] of a ternary matrix."""
    from trimtab.runtime.kernels import _core

    rows, cols = packed.shape
    tiles, groups = packed.buffers["scale"].shape[:2]
    weights = np.empty((tiles * TILE_ROWS, cols), np.int8)
    _core.unpack_ternary(packed.buffers["codes"].reshape(-1), packed.format.group, weights)
    return weights[:rows], packed.buffers["scale"].transpose(0, 2, 1).reshape(-1, groups)[:rows]


def decode_lookup(packed: Packed, out: np.ndarray) -> None:
    """Values of a matrix in planes or ternary into `out`, float32 [N, K]."""
    format, cols = packed.format, packed.shape[1]
    if format.kind == "ternary":
        weights, scale = ternary_of(packed)
        out[...] = weights * by_column(scale.astype(np.float32), format.group, cols)
        return
    codes, scale, minimum = grid_of(packed)
    wide = by_column(scale.astype(np.float32), format.group, cols)
    if minimum is None:
        out[...] = (codes - np.float32(1 << (format.bits - 1))) * wide
    else:
        out[...] = codes * wide + by_column(minimum.astype(np.float32), format.group, cols)
