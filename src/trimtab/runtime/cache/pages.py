"""How keys and values lie in pages: the codec of every page format, on numpy arrays.

`decode(encode(x))` is what a page stands for, and the oracle of every kernel that reads one.

Legend: G heads, T tokens, H head size, n elements that share a scale.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.kernels import pack_codes, unpack_codes
from trimtab.runtime.numerics import bfloat16_bits, bfloat16_to_float32
from trimtab.runtime.numerics.bfp import BlockFloat, decode_bfp, encode_bfp, pack_bfp, unpack_bfp
from trimtab.runtime.numerics.scaled import E4M3_VALUES, encode_e4m3
from trimtab.runtime.weights.packed import NUMPY_DTYPES
from trimtab.spec.cache import PageFormat

#: Encoded tokens: one array [G, T, ...] of a float format; codes, then what they are scaled by, of another.
Parts = tuple[np.ndarray, ...]


class Buffer(NamedTuple):
    """One array of a run: dtype, elements of an entry, and tokens of an entry (1, or those that share a scale)."""

    dtype: np.dtype
    width: int
    tokens: int = 1


def buffers(form: PageFormat, size: int) -> tuple[Buffer, ...]:
    """The arrays that hold tokens of `size` elements in a format, in the order of `encode`."""
    byte, half = NUMPY_DTYPES["u8"], NUMPY_DTYPES["fp16"]
    if form.is_float:
        return (Buffer(NUMPY_DTYPES[form.kind], size),)
    if form.kind == "fp8":
        return (Buffer(byte, size),)
    codes = Buffer(byte, -(-size * form.bits // 8))
    if form.kind == "bfp":
        return codes, Buffer(byte, size // form.group)
    if form.by_channel:
        return codes, Buffer(half, size, form.group), Buffer(half, size, form.group)
    groups = -(-size // form.group)
    return codes, Buffer(half, groups), Buffer(half, groups)


def encode(form: PageFormat, x_GTH: np.ndarray) -> Parts:
    """Code keys or values.

    Args:
        form: page format; one by channel takes whole groups of tokens.
        x_GTH: float32, float16, or bf16 as uint16.

    Raises:
        SpecError: a value that the format cannot hold, or tokens that are no whole groups.
    """
    if form.is_float:
        return (_converted(x_GTH, form.kind),)
    x = np.ascontiguousarray(_wide(x_GTH))
    if form.kind == "fp8":
        return (encode_e4m3(x),)
    if form.kind == "bfp":
        codes, fields = encode_bfp(x, _block_float(form))
        return pack_bfp(codes, form.bits), fields
    heads, tokens, size = x.shape
    if form.by_channel:
        if tokens % form.group:
            raise SpecError(f"{form} pages take whole groups of {form.group} tokens, not {tokens}.")
        grouped = x.reshape(heads, tokens // form.group, form.group, size).swapaxes(2, 3)
        codes, scale, minimum = _steps(grouped, form.bits)
        codes = codes.swapaxes(2, 3).reshape(x.shape)
    else:
        groups = -(-size // form.group)
        # The last group may be shorter: filled up with its own last element, it spans what it did.
        full = np.pad(x, ((0, 0), (0, 0), (0, groups * form.group - size)), mode="edge")
        codes, scale, minimum = _steps(full.reshape(heads, tokens, groups, form.group), form.bits)
        codes = codes.reshape(heads, tokens, groups * form.group)[..., :size]
    packed = codes if form.bits == 8 else _packed(codes, form.bits)
    return np.ascontiguousarray(packed), scale, minimum


def decode(form: PageFormat, parts: Parts, size: int) -> np.ndarray:
    """What coded tokens stand for, float32 [G, T, H]; a float format is returned as it is stored."""
    if form.is_float:
        return parts[0]
    if form.kind == "fp8":
        return E4M3_VALUES[parts[0]]
    if form.kind == "bfp":
        return decode_bfp(unpack_bfp(parts[0], form.bits, size), parts[1], _block_float(form))
    codes, scale, minimum = parts
    heads, tokens = codes.shape[:2]
    rows = np.ascontiguousarray(codes).reshape(heads * tokens, codes.shape[2])
    whole = rows if form.bits == 8 else unpack_codes(rows, form.bits, size)
    points = whole.reshape(heads, tokens, size).astype(np.float32)
    along = 1 if form.by_channel else 2
    for part, into in ((scale, np.multiply), (minimum, np.add)):
        wide = np.repeat(part.astype(np.float32), form.group, axis=along)
        into(points, wide[:, :tokens, :size], out=points)
    return points


def _steps(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of groups [..., n] in 2^bits steps from their least to their largest element; scales and minima in fp16 [...].

    Codes are chosen for scale and minimum as rounded to fp16. A group of equal elements has scale 0 and codes 0.

    Source: Liu et al., KIVI, arXiv 2402.02750, section 3.
    """
    top = np.float32(2**bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        minimum = x.min(axis=-1).astype(np.float16)
        base = minimum.astype(np.float32)
        scale = ((x.max(axis=-1) - base) / top).clip(0).astype(np.float16)
    if not (np.isfinite(scale).all() and np.isfinite(minimum).all()):
        raise SpecError(
            "A key or value is not finite, or beyond what an fp16 scale can express. Keep this cache in floats."
        )
    step = scale.astype(np.float32)[..., None]
    codes = np.divide(x - base[..., None], step, out=np.zeros_like(x), where=step > 0)
    return np.rint(codes).clip(0, top).astype(np.uint8), scale, minimum


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    heads, tokens, size = codes.shape
    return pack_codes(np.ascontiguousarray(codes).reshape(-1, size), bits).reshape(heads, tokens, -(-size * bits // 8))


def _block_float(form: PageFormat) -> BlockFloat:
    return BlockFloat(bits=form.bits, block=form.group)


def _wide(values: np.ndarray) -> np.ndarray:
    return bfloat16_to_float32(values) if values.dtype == np.uint16 else values.astype(np.float32, copy=False)


def _converted(values: np.ndarray, kind: str) -> np.ndarray:
    """Bring keys or values to a floating dtype; uint16 is bf16."""
    if values.dtype == NUMPY_DTYPES[kind]:
        return values
    wide = _wide(values)
    return bfloat16_bits(wide) if kind == "bf16" else wide.astype(NUMPY_DTYPES[kind])
