"""Plain floating formats in numpy; bfloat16 travels as its bits in uint16."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trimtab.errors import SpecError

#: Elements converted at a time: temporaries stay in the cache and out of the peak of memory.
_CHUNK = 1 << 18


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest and ties to even; a NaN stays one.

    Args:
        values: float32 of any shape.

    Returns:
        uint16 of that shape, the bits.

    >>> hex(int(bfloat16_bits(np.array([1.0], np.float32))[0]))
    '0x3f80'
    """
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    bits = np.empty(flat.shape, np.uint16)
    for part in _parts(flat.size):
        word = flat[part]
        rounded = (word + (((word >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        nan = (word & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            rounded[nan] = (word[nan] >> 16) | 0x40  # adding could carry a NaN into infinity
        bits[part] = rounded
    return bits.reshape(values.shape)


def bfloat16_to_float32(bits: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Widen bfloat16 bits (uint16) to float32 exactly, into `out` if given."""
    out = np.empty(bits.shape, np.float32) if out is None else out
    np.left_shift(bits, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    return out


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """Round float32 to `bits` bits of mantissa (1..23), to nearest and ties to even, the exponent being unlimited.

    3 bits are those of e4m3, 2 those of e5m2, 7 those of bfloat16. Infinities and NaN stay.

    >>> round_mantissa(np.array([1.3, -1.0625], np.float32), 3).tolist()
    [1.25, -1.0]
    """
    cut = 23 - bits
    if cut == 0:
        return values
    word = np.ascontiguousarray(values, np.float32).view(np.int32)
    field = word & 0x7FFFFFFF
    kept = (field + ((1 << (cut - 1)) - 1) + ((field >> cut) & 1)) & ~((1 << cut) - 1)
    return (np.where(field >= 0x7F800000, field, kept) | (word & np.int32(-(2**31)))).astype(np.int32).view(np.float32)


def float16(values: np.ndarray) -> np.ndarray:
    """Round float32 to float16.

    Raises:
        SpecError: a finite value beyond 65504.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if np.isinf(half).any() and not np.isinf(values).any():
        raise SpecError("float16 ends at 65504 and a weight is larger. Use bfloat16 or float32.")
    return half


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))
