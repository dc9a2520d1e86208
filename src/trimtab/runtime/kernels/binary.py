"""Products with binary-coded weights. Legend: T tokens, N outputs, K inputs."""

from __future__ import annotations

import numpy as np

from trimtab.runtime.kernels import _core
from trimtab.runtime.numerics.rotation import rotation_of
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.bcq import BcqFormat


def binary_matrix(packed: Packed) -> _core.Binary:
    """A matrix in tiles as the kernels take it; the buffers must outlive it."""
    format = packed.format
    assert isinstance(format, BcqFormat) and format.tiled
    rows, cols = packed.shape
    return (
        packed.buffers["signs"].reshape(-1), packed.buffers["scales"].reshape(-1), rows, cols,
        format.scale_rows(rows), format.scale_cols, format.bits, format.apot,
    )  # fmt: skip


def rotation(format: BcqFormat, cols: int) -> _core.Rotation | None:
    """What inputs are brought into the basis of a matrix by; None where it is their own."""
    if not format.rotated:
        return None
    found = rotation_of(cols)
    return found.left, np.ascontiguousarray(found.right.T), found.order


def _inputs(packed: Packed, x: np.ndarray) -> np.ndarray:
    """Inputs float32 [T, K] in the basis of the matrix."""
    assert isinstance(packed.format, BcqFormat)
    return np.ascontiguousarray(rotation_of(packed.shape[1]).apply(x) if packed.format.rotated else x, np.float32)


def binary_multiply(packed: Packed, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """Y [T, N] = x [T, K] @ W.T: few tokens by look-up, many with the decoded matrix.

    Args:
        packed: ``bcq`` in tiles.
        x: float32, contiguous.
        threads: workers.
    """
    y = np.empty((len(x), packed.shape[0]), np.float32)
    _core.binary_multiply(binary_matrix(packed), _inputs(packed, x), threads, y)
    return y


def binary_multiply_plain(packed: Packed, x: np.ndarray) -> np.ndarray:
    """The same by plain loops over a number type that has additions and shifts and no multiplication at all."""
    y = np.empty((len(x), packed.shape[0]), np.float32)
    _core.binary_multiply_plain(binary_matrix(packed), _inputs(packed, x), y)
    return y
