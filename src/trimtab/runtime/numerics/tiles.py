"""From rows to the tiles the native program multiplies, and back. Nothing is rounded: codes and scales only change places.

Legend: N rows, K columns of a matrix.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.codec import codec_of
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import LOOKUP_KINDS, PLANE_KINDS, SUPER_BLOCKS, TILE_ROWS, UNIT_COLS, WeightFormat
from trimtab.spec.grids import GridFormat

#: The integer grid that holds the codes and scales of a simple block format as they are: (bits, symmetric).
PLAIN_BLOCKS = {"q4_0": (4, True), "q4_1": (4, False), "q5_0": (5, True), "q5_1": (5, False), "q8_0": (8, True)}
#: Elements moved at a time: what is unpacked stays in the cache.
_CHUNK = 1 << 20


def tiled_format(format: WeightFormat, cols: int) -> WeightFormat:
    """The tiled format that holds exactly what rows of `cols` in `format` hold.

    Raises:
        SpecError: there is none.
    """
    if format.tiled:
        return format
    if format.kind in PLAIN_BLOCKS:
        bits, sym = PLAIN_BLOCKS[format.kind]
        return WeightFormat(kind="int", bits=bits, group=32, sym=sym, tiled=True)
    found = dataclasses.replace(format, tiled=True)
    found.buffers(TILE_ROWS, cols)  # refuses groups that do not fit
    return found


def allocate(format: WeightFormat, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Empty buffers of a tiled matrix."""
    return {b.name: np.empty(b.shape, NUMPY_DTYPES[b.dtype]) for b in format.buffers(*shape)}


def tile(packed: Packed, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """Store a row-wise matrix in tiles.

    Args:
        packed: W [N, K] by rows; a matrix stored transposed is refused.
        buffers: where to write, see `allocate`; None allocates.

    Raises:
        SpecError: a format without tiles, or a transposed layout.
    """
    if packed.format.tiled:
        return packed
    if packed.layout != "row":
        raise SpecError("A matrix stored transposed has no tiles: its groups run along the outputs.")
    module = codec_of(packed.format)
    if module:
        return module.tile(packed, buffers)
    rows, cols = packed.shape
    format = tiled_format(packed.format, cols)
    out = allocate(format, packed.shape) if buffers is None else buffers
    step = max(TILE_ROWS, _CHUNK // cols // TILE_ROWS * TILE_ROWS)
    for start in range(0, rows, step):
        part = {name: buffer[start : start + step] for name, buffer in packed.buffers.items()}
        tiles = slice(start // TILE_ROWS, -(-min(start + step, rows) // TILE_ROWS))
        into = {name: buffer[tiles] for name, buffer in out.items()}
        if format.is_float:
            _tile_floats(part["data"], format.kind, into["data"])
        else:
            _tile_codes(part, packed.format, cols, format, into)
    return Packed(format, packed.shape, out)


def untile(packed: Packed) -> Packed:
    """Undo `tile`: floats and codes by rows. Super-block formats have no rows of their own; see `decode_tiles`.

    Raises:
        SpecError: a super-block format, or another one without rows of its own.
    """
    module = codec_of(packed.format)
    if module and hasattr(module, "untile"):
        return module.untile(packed)
    format, rows = packed.format, packed.shape[0]
    if not format.is_float and format.kind != "int":
        raise SpecError(f"{format} cannot be brought back to rows.")
    plain = WeightFormat(kind=format.kind, bits=format.bits, group=format.group, sym=format.sym)
    if format.is_float:
        return Packed(plain, packed.shape, {"data": _float_rows(packed)})
    from trimtab.runtime.kernels import pack_codes

    found = {"codes": pack_codes(code_rows(packed), format.bits)}
    for name in ("scale", "minimum"):
        if name in packed.buffers:
            found[name] = from_tiles(packed.buffers[name], rows)
    return Packed(plain, packed.shape, found)


def decode_tiles(packed: Packed, out: np.ndarray) -> None:
    """Values of a tiled matrix into `out`, float32 [N, K]."""
    format, (rows, cols) = packed.format, packed.shape
    if format.is_float:
        from trimtab.runtime.numerics.floats import bfloat16_to_float32

        found = _float_rows(packed)
        out[...] = bfloat16_to_float32(found) if format.kind == "bf16" else found
        return
    if format.kind in LOOKUP_KINDS:
        from trimtab.runtime.numerics.lookup import decode_lookup

        decode_lookup(packed, out)
        return
    codes = code_rows(packed).astype(np.float32)
    if format.kind == "int":
        group, bits = format.group, format.bits
        scale = from_tiles(packed.buffers["scale"], rows).astype(np.float32)
        minimum = None
        if not format.sym:
            minimum = from_tiles(packed.buffers["minimum"], rows).astype(np.float32)
    else:
        bits, group, coded_minimum = SUPER_BLOCKS[format.kind]
        tiles, blocks, kinds, _ = packed.buffers["scale"].shape
        sub = packed.buffers["sub"] if coded_minimum else packed.buffers["sub"].view(np.int8)
        scales = packed.buffers["scale"].astype(np.float32)[:, :, :, None] * sub.astype(np.float32)
        by_row = scales.transpose(2, 0, 4, 1, 3).reshape(kinds, tiles * TILE_ROWS, blocks * (256 // group))[:, :rows]
        scale, minimum = by_row[0], -by_row[1] if coded_minimum else None
    if cols % group:
        scale, minimum = by_column(scale, group, cols), None if minimum is None else by_column(minimum, group, cols)
        out[...] = (codes - np.float32(1 << (bits - 1))) * scale if minimum is None else codes * scale + minimum
        return
    values = codes.reshape(rows, cols // group, group)
    if minimum is None:
        values = (values - np.float32(1 << (bits - 1))) * scale[:, :, None]
    else:
        values = values * scale[:, :, None] + minimum[:, :, None]
    out[...] = values.reshape(rows, cols)


def by_column(scales: np.ndarray, group: int, cols: int) -> np.ndarray:
    """Scales [N, G] repeated for every column, [N, K]; the last group may be shorter."""
    return np.repeat(scales, group, axis=1)[:, :cols]


def grid_of(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes uint8 [N, K], scale and minimum fp16 [N, G] of a matrix on an integer grid: rows, tiles or simple blocks."""
    format, (rows, cols) = packed.format, packed.shape
    if isinstance(format, GridFormat):  # sign and magnitude to an offset
        from trimtab.runtime.numerics.grids import parts_of

        codes, scale, _ = parts_of(packed)
        offset = np.array(format.tables[0], np.int64) + (1 << (format.bits - 1))
        return offset.astype(np.uint8)[codes], scale.astype(np.float16), None
    if not format.tiled:
        codes, rest = _unpacked(dict(packed.buffers), format, cols)
        flat = {name: np.ascontiguousarray(values.reshape(rows, -1)) for name, values in rest.items()}
        return codes, flat["scale"], flat.get("minimum")
    scales = {name: from_tiles(packed.buffers[name], rows) for name in ("scale", "minimum") if name in packed.buffers}
    return code_rows(packed), scales["scale"], scales.get("minimum")


def to_tiles(scales: np.ndarray) -> np.ndarray:
    """Scales [N, G] -> [tiles, G, 16]; rows that fill the last tile get zero."""
    whole = _padded(scales, -(-len(scales) // TILE_ROWS) * TILE_ROWS)
    return np.ascontiguousarray(whole.reshape(-1, TILE_ROWS, scales.shape[1]).transpose(0, 2, 1))


def pack_code_tiles(codes: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Write codes uint8 [N, K] into tiles, uint8 [tiles, units, 64 * bits]; what fills the last tile and unit is code 0."""
    from trimtab.runtime.kernels import _core

    padded = _padded(codes, out.shape[0] * TILE_ROWS, out.shape[1] * UNIT_COLS)
    _core.pack_tiles(np.ascontiguousarray(padded), bits, out.reshape(-1))


def _tile_floats(rows: np.ndarray, kind: str, out: np.ndarray) -> None:
    tiles, cols = out.shape[0], rows.shape[1]
    padded = _padded(rows, tiles * TILE_ROWS, out.shape[1] * (2 if kind == "bf16" else 1))
    if kind == "bf16":
        out[...] = padded.reshape(tiles, TILE_ROWS, -1, 2).transpose(0, 2, 1, 3)
    else:
        out[...] = padded.reshape(tiles, TILE_ROWS, cols).transpose(0, 2, 1)


def _float_rows(packed: Packed) -> np.ndarray:
    data, (rows, cols) = packed.buffers["data"], packed.shape
    if packed.format.kind == "bf16":
        data = data.transpose(0, 2, 1, 3).reshape(data.shape[0], TILE_ROWS, -1)
    else:
        data = data.transpose(0, 2, 1)
    return np.ascontiguousarray(data.reshape(-1, data.shape[-1])[:rows, :cols])


def _tile_codes(
    part: dict[str, np.ndarray], stored: WeightFormat, cols: int, format: WeightFormat, out: dict[str, np.ndarray]
) -> None:
    bits = format.bits or SUPER_BLOCKS[format.kind][0]
    codes, rest = _unpacked(part, stored, cols)
    tiles = out["codes"].shape[0]
    pack_code_tiles(codes, bits, out["codes"])
    for name, values in rest.items():  # [N, ...] -> [tiles, ..., 16]
        whole = _padded(values.reshape(len(values), -1), tiles * TILE_ROWS).reshape(tiles, TILE_ROWS, -1)
        out[name][...] = whole.transpose(0, 2, 1).reshape(out[name].shape)


def _unpacked(part: dict[str, np.ndarray], stored: WeightFormat, cols: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes as bytes [N, K], and the scales of every row in the order of the tiled buffers."""
    if stored.kind == "int":
        from trimtab.runtime.kernels import unpack_codes

        codes = unpack_codes(np.ascontiguousarray(part["codes"]), stored.bits, cols)
        return codes, {name: part[name] for name in ("scale", "minimum") if name in part}
    blocks = part["blocks"]
    rows = len(blocks)
    if stored.kind in PLAIN_BLOCKS:
        block = blocks.reshape(rows, cols // 32, -1)
        if stored.kind == "q8_0":
            codes = (block[:, :, 2:] ^ 0x80).reshape(rows, cols)  # signed to offset by 128
            return codes, {"scale": _halves(block[:, :, :2])}
        bits, sym = PLAIN_BLOCKS[stored.kind]
        at = 2 if sym else 4
        scales = {"scale": _halves(block[:, :, :2])}
        if not sym:
            scales["minimum"] = _halves(block[:, :, 2:4])
        high = None
        if bits == 5:
            high = np.unpackbits(block[:, :, at : at + 4], axis=-1, bitorder="little")
            at += 4
        nibbles = block[:, :, at : at + 16]
        codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=-1)
        return (codes if high is None else codes | high << 4).reshape(rows, cols), scales
    block = blocks.reshape(rows, cols // 256, -1)
    return (_q6_k if stored.kind == "q6_k" else _q45_k)(block, stored.kind)


def _q45_k(block: np.ndarray, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """d, dmin, 12 bytes of six-bit scales and minima, (high bits,) nibbles. Source: ggml-common.h, get_scale_min_k4."""
    rows, blocks = block.shape[:2]
    packed = block[:, :, 4:16]
    first, second, third = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scale = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=-1)
    minimum = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=-1)
    at = 48 if kind == "q5_k" else 16
    nibbles = block[:, :, at:].reshape(rows, blocks, 4, 1, 32)
    codes = np.concatenate((nibbles & 15, nibbles >> 4), axis=3)  # 64 columns: 32 low halves, then 32 high ones
    if kind == "q5_k":
        bits = np.unpackbits(block[:, :, 16:48, None], axis=-1, bitorder="little")  # [N, blocks, 32, 8]
        codes = codes | bits.transpose(0, 1, 3, 2).reshape(codes.shape) << 4
    both = np.stack((_halves(block[:, :, :2])[..., 0], _halves(block[:, :, 2:4])[..., 0]), axis=-1)
    return codes.reshape(rows, -1), {"scale": both, "sub": np.stack((scale, minimum), axis=2)}


def _q6_k(block: np.ndarray, kind: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Low nibbles (128), high pairs of bits (64), 16 signed scales, d. Source: ggml-common.h, dequantize_row_q6_K."""
    rows, blocks = block.shape[:2]
    low = block[:, :, :128].reshape(rows, blocks, 2, 2, 32)  # two halves of 128 columns; columns 0..31 and 32..63
    high = block[:, :, 128:192].reshape(rows, blocks, 2, 1, 32)
    quarters = [low[:, :, :, :1] & 15, low[:, :, :, 1:] & 15, low[:, :, :, :1] >> 4, low[:, :, :, 1:] >> 4]
    codes = np.concatenate([q | (high >> (2 * i) & 3) << 4 for i, q in enumerate(quarters)], axis=3)
    return codes.reshape(rows, -1), {"scale": _halves(block[:, :, 208:])[..., 0], "sub": block[:, :, 192:208]}


def _halves(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs).view(np.float16)


def _padded(values: np.ndarray, rows: int, cols: int | None = None) -> np.ndarray:
    width = values.shape[1] if cols is None else cols
    if values.shape == (rows, width):
        return values
    out = np.zeros((rows, width), values.dtype)
    out[: values.shape[0], : values.shape[1]] = values
    return out


def code_rows(packed: Packed) -> np.ndarray:
    """Codes uint8 [N, K] of a tiled matrix."""
    from trimtab.runtime.kernels import _core

    format, (rows, cols) = packed.format, packed.shape
    bits = format.bits or SUPER_BLOCKS[format.kind][0]
    tiles, units = packed.buffers["codes"].shape[0], packed.buffers["codes"].shape[1]
    out = np.empty((tiles * TILE_ROWS, units * UNIT_COLS), np.uint8)
    if format.kind in PLANE_KINDS:
        _core.unpack_planes(packed.buffers["codes"].reshape(-1), bits, format.kind == "bitlane", out)
    else:
        _core.unpack_tiles(packed.buffers["codes"].reshape(-1), bits, out)
    return np.ascontiguousarray(out[:rows, :cols])


def from_tiles(scales: np.ndarray, rows: int) -> np.ndarray:
    """Undo `to_tiles`: [tiles, G, 16] -> [N, G]."""
    return np.ascontiguousarray(scales.transpose(0, 2, 1).reshape(-1, scales.shape[1])[:rows])
