"""ggml blocks that carry the codes and scales of other formats as they are, and back. Nothing is rounded.

Fewer bits than a block has, or a group that spans several blocks, take more room there; every value stays what it is.

Source: block layouts of ggml `ggml-common.h`; order of codes from `dequantize_row_*` of `ggml-quants.c` (August 2025).
Legend: N rows, K columns, B blocks of a row.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.lookup import lay_out, ternary_of
from trimtab.runtime.numerics.tiles import PLAIN_BLOCKS, by_column, grid_of
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import FILE_BLOCKS, GGUF_BLOCKS, MX_BLOCK, PLANE_KINDS, WeightFormat

#: Blocks of an integer grid by symmetry: the first that has enough bits carries the codes.
_GRIDS = {True: ("q4_0", "q5_0", "q8_0"), False: ("q4_1", "q5_1")}
#: What ternary blocks become: the codes 1, 2, 3 of two bits.
TERNARY_ROWS = WeightFormat(kind="int", bits=2, group=256)
#: Powers of three that bring the digits of a byte of tq1_0 to its front.
_THREES = np.array([1, 3, 9, 27, 81], np.uint8)


def carrier(format: WeightFormat, cols: int) -> str | None:
    """The ggml type that holds exactly what rows of `cols` in `format` hold; None if there is none.

    >>> carrier(WeightFormat(kind="int", bits=3, group=64), 128), carrier(WeightFormat(kind="int", bits=4, group=16), 128)
    ('q4_0', None)
    """
    if type(format) is not WeightFormat:
        return None
    if format.is_float or format.kind in GGUF_BLOCKS:
        return None if format.tiled else format.kind
    if format.kind == "mxfp4":
        return "mxfp4"
    if format.kind == "ternary":
        if cols % 256 == 0 and (format.group % 256 == 0 or format.group >= cols):
            return "tq2_0"
        return "q4_0" if _fits(format, cols) else None
    if format.kind not in ("int", *PLANE_KINDS) or not _fits(format, cols):
        return None
    return next((kind for kind in _GRIDS[format.sym] if PLAIN_BLOCKS[kind][0] >= format.bits), None)


def _fits(format: WeightFormat, cols: int) -> bool:
    """Whether no block of 32 meets two scales."""
    return cols % 32 == 0 and (format.group % 32 == 0 or format.group >= cols)


def to_blocks(packed: Packed) -> np.ndarray:
    """The matrix in the blocks of its `carrier`, uint8 [N, bytes of a row]; floats as they are.

    Raises:
        SpecError: nothing carries it.
    """
    format, (rows, cols) = packed.format, packed.shape
    kind = carrier(format, cols)
    if kind is None or (packed.layout != "row" and not format.is_float):
        raise SpecError(f"No ggml block holds a matrix in {format} ({packed.layout}) as it is.")
    if format.is_float:
        data = packed.buffers["data"]
        return np.ascontiguousarray(data if packed.layout == "row" else data.T)
    if format.kind in GGUF_BLOCKS:
        return packed.buffers["blocks"]
    if kind == "mxfp4":
        return _mxfp4(packed.buffers["codes"], packed.buffers["scale"])
    if kind == "tq2_0":
        weights, scale = ternary_of(packed)
        return _tq2_0(weights, _per_block(scale, format.group, cols, 256))
    if format.kind == "ternary":  # rows that no ternary block divides
        packed = lay_out(packed, "int")
        format = packed.format
    codes, scale, minimum = grid_of(packed)
    bits = PLAIN_BLOCKS[kind][0]
    if format.sym:
        codes = codes + np.uint8((1 << (bits - 1)) - (1 << (format.bits - 1)))
    scales = [_per_block(each, format.group, cols, 32) for each in (scale, minimum) if each is not None]
    return _grid(codes.reshape(rows, cols // 32, 32), scales, bits)


def _per_block(scale: np.ndarray, group: int, cols: int, block: int) -> np.ndarray:
    """Scales [N, G] as one of every block, [N, B]."""
    return by_column(scale, min(group, cols), cols)[:, ::block]


def _grid(codes: np.ndarray, scales: list[np.ndarray], bits: int) -> np.ndarray:
    """q4_0, q4_1, q5_0, q5_1 and q8_0 of codes [N, B, 32] and scales fp16 [N, B]."""
    parts: list[np.ndarray] = [np.ascontiguousarray(scale)[:, :, None].view(np.uint8) for scale in scales]
    if bits == 8:
        parts.append(codes ^ 0x80)  # offset by 128 to signed
    else:
        if bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 15
        parts.append(low[:, :, :16] | low[:, :, 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def _mxfp4(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Ours holds neighbours in a byte, a block of ggml the first and the second half of its elements."""
    rows, blocks = scale.shape
    both = codes.reshape(rows, blocks, MX_BLOCK // 2)
    plain = np.stack((both & 15, both >> 4), axis=-1).reshape(rows, blocks, MX_BLOCK)
    halves = plain[:, :, :16] | plain[:, :, 16:] << 4
    return np.concatenate((scale[:, :, None], halves), axis=-1).reshape(rows, -1)


def _tq2_0(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Two halves of 128 elements; byte m of a half holds elements m, m + 32, m + 64 and m + 96."""
    rows, blocks = scale.shape
    q = (weights + 1).astype(np.uint8).reshape(rows, blocks, 2, 4, 32)
    bytes_ = q[:, :, :, 0] | q[:, :, :, 1] << 2 | q[:, :, :, 2] << 4 | q[:, :, :, 3] << 6
    halves = np.ascontiguousarray(scale)[:, :, None].view(np.uint8)
    return np.concatenate((bytes_.reshape(rows, blocks, 64), halves), axis=-1).reshape(rows, -1)


def from_blocks(kind: str, blocks: np.ndarray, cols: int) -> Packed:
    """Rows of ``mxfp4``, ``tq1_0`` or ``tq2_0`` blocks, uint8 [N, bytes of a row], as rows of ours.

    Returns:
        ``mxfp4``, or the codes 1, 2, 3 of `TERNARY_ROWS`.
    """
    elements, size = FILE_BLOCKS[kind]
    rows = len(blocks)
    block = blocks.reshape(rows, cols // elements, size)
    if kind == "mxfp4":
        halves = block[:, :, 1:]
        plain = np.concatenate((halves & 15, halves >> 4), axis=-1)
        codes = (plain[:, :, ::2] | plain[:, :, 1::2] << 4).reshape(rows, cols // 2)
        return Packed(
            WeightFormat(kind="mxfp4"), (rows, cols), {"codes": codes, "scale": np.ascontiguousarray(block[:, :, 0])}
        )
    from trimtab.runtime.kernels import pack_codes

    digits = _digits_2(block) if kind == "tq2_0" else _digits_1(block)
    scale = np.ascontiguousarray(block[:, :, -2:]).view(np.float16)[..., 0]
    codes = pack_codes(np.ascontiguousarray(digits.reshape(rows, cols) + np.uint8(1)), 2)
    return Packed(TERNARY_ROWS, (rows, cols), {"codes": codes, "scale": scale})


def _digits_2(block: np.ndarray) -> np.ndarray:
    rows, blocks = block.shape[:2]
    bytes_ = block[:, :, :64].reshape(rows, blocks, 2, 1, 32)
    return np.concatenate([bytes_ >> shift & 3 for shift in (0, 2, 4, 6)], axis=3)


def _digits_1(block: np.ndarray) -> np.ndarray:
    """Five digits to a byte: 32 bytes, then 16, then 4 of which four digits count."""
    rows, blocks = block.shape[:2]
    parts = []
    for start, count, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        bytes_ = block[:, :, None, start : start + count]
        wrapped = bytes_ * _THREES[:digits, None]  # the product wraps, as there
        parts.append((wrapped.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(rows, blocks, -1))
    return np.concatenate(parts, axis=-1)
