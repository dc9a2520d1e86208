"""Bipolar codes as planes of bits, and back: codes and scales of the grid in another order, nothing is rounded twice.

Legend: N rows, K columns of a matrix, G groups of a row.
"""

from __future__ import annotations

import numpy as np

from trimtab.runtime.numerics.grids import buffers_of, parts_of
from trimtab.runtime.numerics.grids import decode as decode_grid
from trimtab.runtime.numerics.grids import encode as encode_grid
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.bipolar import BipolarPlanes


def encode(values: np.ndarray, format: BipolarPlanes) -> dict[str, np.ndarray]:
    """Round float32 [N, K] to the grid, as its own codec does, and lay the codes out in planes.

    Raises:
        SpecError: a value is not finite, or a group does not fit the row.
    """
    grid = Packed(format.grid, (values.shape[0], values.shape[1]), encode_grid(values, format.grid))
    return dict(planes_of(grid, format).buffers)


def planes_of(packed: Packed, format: BipolarPlanes) -> Packed:
    """Lay codes and scales of the bipolar grid out in planes.

    Args:
        packed: in ``format.grid``.
        format: of the result.
    """
    codes, scale, _ = parts_of(packed)
    planes = pack_planes(codes, format.bits, format.group)
    return Packed(format, packed.shape, {"planes": planes, "scale": scale.astype(np.float16)})


def grid_of(packed: Packed) -> Packed:
    """Undo `planes_of`."""
    format = packed.format
    assert isinstance(format, BipolarPlanes)
    codes = unpack_planes(packed.buffers["planes"], format.bits, format.group, packed.shape[1])
    scale = packed.buffers["scale"].astype(np.float32)
    return Packed(format.grid, packed.shape, buffers_of(codes, scale, np.zeros(scale.shape, np.uint8), format.grid))


def decode(packed: Packed, out: np.ndarray) -> None:
    """Write the values of a matrix into `out`, float32 [N, K]."""
    decode_grid(grid_of(packed), out)


def pack_planes(codes: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Codes uint8 [N, K] as planes uint8 [N, bytes]; a group that is no whole number of words is padded with zeros."""
    from trimtab.runtime.kernels import _core

    rows, cols = codes.shape
    out = np.empty((rows, cols // group * -(-group // 32) * 4 * bits), np.uint8)
    _core.pack_bits(np.ascontiguousarray(codes), bits, group, out)
    return out


def unpack_planes(planes: np.ndarray, bits: int, group: int, cols: int) -> np.ndarray:
    """Undo `pack_planes`: uint8 [N, K]."""
    from trimtab.runtime.kernels import _core

    codes = np.empty((len(planes), cols), np.uint8)
    _core.unpack_bits(np.ascontiguousarray(planes), bits, group, codes)
    return codes
