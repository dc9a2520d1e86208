"""Sparse weights as a bit mask and the values it keeps.

The mask is stored, not read off the zeros: a kept weight may be zero, and stays kept.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.floats import bfloat16_bits, bfloat16_to_float32, float16
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.sparse import BitmaskFormat


def encode(values: np.ndarray, format: BitmaskFormat) -> dict[str, np.ndarray]:
    """Store float32 [rows, cols] whose other weights are zero; where fewer are not zero than are kept, first zeros are kept too.

    Returns:
        The buffers of ``format.buffers(rows, cols)``.

    Raises:
        SpecError: more weights are not zero than the format keeps, or one is too large for fp16.
    """
    mask = values != 0
    short = format.kept - int(np.count_nonzero(mask))
    if short > 0:
        mask.reshape(-1)[np.flatnonzero(~mask)[:short]] = True
    return encode_bitmask_with(values, format, mask)


def encode_bitmask_with(values: np.ndarray, format: BitmaskFormat, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Store the weights of float32 [rows, cols] where `mask` (bool) is set.

    Raises:
        SpecError: the mask keeps another number than the format, or a kept weight is too large for fp16.
    """
    counts = np.count_nonzero(mask, axis=1)
    if counts.sum() != format.kept:
        raise SpecError(
            f"The mask keeps {counts.sum()} weights and the format {format.kept}. Use kept={counts.sum()}, or prune first."
        )
    kept = values[mask]
    stored = {"fp32": np.ascontiguousarray, "fp16": float16, "bf16": bfloat16_bits}[format.value](kept)
    start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return {"mask": np.packbits(mask, axis=1, bitorder="little"), "values": stored, "start": start}


def mask_of(packed: Packed) -> np.ndarray:
    """Which weights are kept, bool [rows, cols]."""
    return np.unpackbits(packed.buffers["mask"], axis=1, count=packed.shape[1], bitorder="little").astype(bool)


def decode(packed: Packed, out: np.ndarray) -> None:
    """Write the values of a matrix into `out`, float32 [rows, cols]."""
    values = packed.buffers["values"]
    out[...] = 0
    out[mask_of(packed)] = bfloat16_to_float32(values) if values.dtype == np.uint16 else values
