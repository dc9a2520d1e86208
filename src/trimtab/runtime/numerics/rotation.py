"""Fixed random rotations of the columns of a matrix: they spread what stands out over all columns, so that few bits do less harm.

``W x = (W V^T) (V x)``: the matrix is coded in the rotated basis, and every input is rotated before the product. V reorders the columns,
lays them out as a table [a, b] with a * b = K and a, b as near to each other as K allows, and rotates its rows and its columns: a + b
multiplications for a column instead of K. It follows from K alone, so nothing of it is stored.

Legend: K columns.
Source: Chee et al., QuIP, arXiv 2307.13304, section 4 (incoherence processing).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.spec.bcq import rotation_factor


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """V, orthogonal [K, K].

    Args:
        left: float32 [a, a], orthogonal.
        right: float32 [b, b], orthogonal.
        order: int32 [K], which column stands where in the table.
    """

    left: np.ndarray
    right: np.ndarray
    order: NDArray[np.int32]

    def apply(self, x: np.ndarray) -> np.ndarray:
        """V x of the last axis: float32 or float64 [..., K]."""
        table = x[..., self.order].reshape(*x.shape[:-1], len(self.left), len(self.right))
        return (self.left.astype(x.dtype) @ table @ self.right.T.astype(x.dtype)).reshape(x.shape)

    def undo(self, y: np.ndarray) -> np.ndarray:
        """V^T y of the last axis."""
        table = y.reshape(*y.shape[:-1], len(self.left), len(self.right))
        x = np.empty_like(y)
        x[..., self.order] = (self.left.T.astype(y.dtype) @ table @ self.right.astype(y.dtype)).reshape(y.shape)
        return x


@functools.cache
def rotation_of(cols: int) -> Rotation:
    """The rotation of rows of `cols`."""
    rng = np.random.default_rng(cols)
    left = rotation_factor(cols)
    order = rng.permutation(cols).astype(np.int32)
    return Rotation(_orthogonal(left, rng), _orthogonal(cols // left, rng), order)


def _orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix float32 [size, size], by QR of normal numbers with the sign that makes it unique."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.ascontiguousarray(q * np.sign(np.diag(r)), np.float32)
