"""The codec of int8 weights with one scale a row, and of the rows of activations they are multiplied with.

Legend: T tokens, N rows, K columns.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import WeightFormat
from trimtab.spec.vector import RowInt8Format

#: Largest code.
MOST = np.float32(127)


def encode(values: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    """Round float32 [N, K]: ``rint(127 w / largest |w|)``, halves to even.

    Raises:
        SpecError: a weight is not finite.
    """
    shared = cast(RowInt8Format, format).shared
    peak = np.abs(values).max(axis=1 if shared == "row" else None, keepdims=True, initial=0.0).astype(np.float32)
    if not np.isfinite(peak).all():
        raise SpecError("int8 weights: a weight is not finite. Keep this matrix in floats.")
    codes = np.rint(values * np.divide(MOST, peak, out=np.zeros_like(peak), where=peak > 0))
    return {"data": codes.astype(np.int8), "scale": peak / MOST}


def decode(packed: Packed, out: np.ndarray) -> None:
    """Values into `out`, float32 [N, K]."""
    np.multiply(packed.buffers["data"], packed.buffers["scale"], out=out, casting="unsafe")


def tile(packed: Packed, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """The matrix itself: there are no tiles. With `buffers`, copied there."""
    if buffers is None:
        return packed
    for name, buffer in packed.buffers.items():
        buffers[name][...] = buffer
    return Packed(packed.format, packed.shape, buffers)
