"""Decode and encode a packed matrix. ggml blocks are read, not written.

`decode(encode(w))` is the oracle of every kernel that reads a format.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.floats import bfloat16_bits, bfloat16_to_float32, float16
from trimtab.runtime.numerics.grid import decode_grid, encode_grid
from trimtab.runtime.numerics.scaled import decode_scaled, encode_fp8, encode_mxfp4
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import GGUF_BLOCKS, LOOKUP_KINDS, SCALED_KINDS, WeightFormat

#: Kinds whose codec is a module of its own: ``encode(values, format) -> buffers``, ``decode(packed, out)``, and for the layout of
#: the native program, where there is one, ``tile(packed, buffers | None) -> Packed`` and ``untile(packed) -> Packed``. `values`
#: and `out` are float32 [rows, cols].
MODULES = {
    "grid": "grids", "pair": "pairs", "palette": "palettes", "bitmask": "bitmasks", "bcq": "bcq", "bipolar": "bipolar",
    "int8": "vectors",
}  # fmt: skip


def codec_of(format: WeightFormat) -> ModuleType | None:
    """The module that codes a format, or None where this one does."""
    name = MODULES.get(format.kind)
    return importlib.import_module(f"trimtab.runtime.numerics.{name}") if name else None


def decode(packed: Packed, rows: slice | np.ndarray | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """Return the values as stored.

    Args:
        packed: any format.
        rows: only these stored rows (a slice or indices); None = all.
        out: float32 [rows, cols], contiguous, to write into; None allocates.

    Returns:
        float32 [rows, cols] as stored (the transpose of W in the transposed layout). An fp32 matrix is returned itself, not
        a copy, unless `out` is given.
    """
    kind, cols = packed.format.kind, packed.shape[1]
    module = codec_of(packed.format)
    if packed.format.tiled or module:
        from trimtab.runtime.numerics.tiles import decode_tiles

        whole = np.empty(packed.shape, np.float32)
        (module.decode if module else decode_tiles)(packed, whole)
        chosen = whole if rows is None else whole[rows]
        if out is None:
            return chosen
        out[...] = chosen
        return out
    buffers = packed.buffers if rows is None else {name: buffer[rows] for name, buffer in packed.buffers.items()}
    count = packed.shape[0] if rows is None else next(iter(buffers.values())).shape[0]
    if kind == "fp32" and out is None:
        return buffers["data"]
    out = np.empty((count, cols), np.float32) if out is None else out
    if kind in ("fp32", "fp16"):
        out[...] = buffers["data"]
    elif kind == "bf16":
        bfloat16_to_float32(buffers["data"], out)
    elif kind == "int":
        decode_grid(buffers, packed.format, cols, out)
    elif kind in SCALED_KINDS:
        decode_scaled(buffers, packed.format, out)
    else:
        from trimtab.runtime.kernels import dequantize_gguf

        dequantize_gguf(kind, np.ascontiguousarray(buffers["blocks"]).reshape(-1), out.reshape(-1))
    return out


def matrix(packed: Packed) -> np.ndarray:
    """Return W as float32 [n, k], whatever the layout (a view where it is stored transposed)."""
    stored = decode(packed)
    return stored.T if packed.layout == "transposed" else stored


def encode(values: np.ndarray, format: WeightFormat, layout: str = "row") -> Packed:
    """Store float32 values in a format.

    Args:
        values: float32 [rows, cols] as they are to be stored, or [n] for a vector.
        format: fp32 (keeps the array itself where it is contiguous), fp16, bf16, fp8, mxfp4, int, bitplane, bitlane, ternary
            or one of `MODULES`; all round to nearest.
        layout: what the rows mean; nothing is transposed here.

    Raises:
        SpecError: a ggml block format, a group that does not divide, a value the format cannot hold.
    """
    stored = np.ascontiguousarray(values, dtype=np.float32)
    stored = stored.reshape(1, -1) if stored.ndim == 1 else stored
    shape = (stored.shape[0], stored.shape[1])
    module = codec_of(format)
    if module:
        format.buffers(*shape)  # refuses rows that do not divide
        return Packed(format, shape, module.encode(stored, format), layout)
    if format.kind == "int":
        return Packed(format, shape, encode_grid(stored, format), layout)
    if format.kind in LOOKUP_KINDS:
        from trimtab.runtime.numerics.lookup import encode_planes, encode_ternary

        return encode_ternary(stored, format) if format.kind == "ternary" else encode_planes(stored, format)
    if format.kind in SCALED_KINDS:
        format.buffers(*shape)  # refuses rows that do not divide
        return Packed(format, shape, {"fp8": encode_fp8, "mxfp4": encode_mxfp4}[format.kind](stored), layout)
    if format.kind in GGUF_BLOCKS:
        raise SpecError(
            f"{format} is a block format of files: it is read, not written. Use float32, bfloat16, float16 or an int format."
        )
    make = {"fp32": lambda array: array, "bf16": bfloat16_bits, "fp16": float16}[format.kind]
    return Packed(format, shape, {"data": make(stored)}, layout)


def transcode(packed: Packed, format: WeightFormat, layout: str | None = None) -> Packed:
    """Store a matrix in another format or layout.

    Args:
        packed: floats, or the block format of a file.
        format: of the result.
        layout: of the result; None = as it is.

    Returns:
        `packed` itself if nothing changes.

    Raises:
        SpecError: an integer grid would be rounded to another one or grouped along another axis: the second rounding is on
            top of the first, so the result is worse than its name says.
    """
    layout = packed.layout if layout is None else layout
    if packed.format == format and packed.layout == layout:
        return packed
    if packed.format.is_rounded and format.is_rounded:
        what = f"{format}" if packed.format != format else f"groups along the other axis ({layout})"
        raise SpecError(
            f"A matrix already rounded to {packed.format} cannot be stored as {what}: it would be rounded twice. Start from floats."
        )
    if format.kind in GGUF_BLOCKS:
        if packed.format == format:
            raise SpecError(
                f"{format} blocks run along a row and cannot be stored {layout}. "
                "Load the model with dtype='float32', or re-encode it (rtn)."
            )
        raise SpecError(f"{format} is a block format of files: it is read, not written. Use a float or an int format.")
    values = decode(packed)
    if packed.layout != layout:
        values = np.ascontiguousarray(values.T)
    return encode(values, format, layout)
