"""Codes that are places in a small table: BitMoD, flint, small floats, bipolar and symmetric integers.

Every value is coded as the nearest of its group's table; half way between two of them it becomes the lower one. The scale of a
group is ``max|w| / max|table|``, rounded to what is stored before codes are chosen for it. Where a format holds several
tables, each is tried with a scale of its own and the one of least mean squared error is kept, the earliest of equals.

Legend: N rows, K columns of a matrix, G groups of a row.

Source: Chen et al., BitMoD, arXiv 2411.11745, section 3; scales in two levels: Dai et al., VS-Quant, arXiv 2102.04503; powers of
two: OCP Microscaling Formats v1.0, 6.3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.tiles import allocate, code_rows, from_tiles, pack_code_tiles, tiled_format, to_tiles
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import TILE_ROWS
from trimtab.spec.grids import GridFormat, Values

#: Range of a scale in fp16.
LEAST_SCALE, LARGEST_SCALE = 1e-5, 1e4
#: Elements coded at a time: what is computed on the way stays in the cache.
_CHUNK = 1 << 17


def encode(values: np.ndarray, format: GridFormat) -> dict[str, np.ndarray]:
    """Round float32 [N, K] to the grid.

    Returns:
        The buffers of ``format.buffers(N, K)``.

    Raises:
        SpecError: a value is not finite.
    """
    scale, choice = grid_scales(values, format)
    return encode_grid_with(values, format, scale, choice)


def grid_scales(
    values: np.ndarray, format: GridFormat, weight: np.ndarray | None = None, shrink: Sequence[float] = (1.0,)
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a scale and a table for every group.

    Args:
        values: float32 [N, K].
        format: of the result.
        weight: of the squared error of a column, [K]; None = all alike.
        shrink: shares of ``max|w| / max|table|`` to try as scales; the one of least error is kept, the earliest of equals.

    Returns:
        Scales float32 [N, G], exactly as the format stores them, and tables uint8 [N, G].

    Raises:
        SpecError: a value is not finite.
    """
    rows, cols = values.shape
    groups = cols // format.group
    scale, choice = np.empty((rows, groups), np.float32), np.zeros((rows, groups), np.uint8)
    weighted = None if weight is None else weight.astype(np.float32).reshape(groups, format.group)
    for part in _parts(rows, cols):
        w = values[part].reshape(-1, groups, format.group)
        peak = np.maximum(w.max(axis=2), -w.min(axis=2))
        if not np.isfinite(peak).all():
            raise SpecError(f"{format}: a weight is not finite. Keep this matrix in floats.")
        tried = [(index, share) for index in range(len(format.tables)) for share in shrink]
        least = None
        for index, share in tried:
            wanted = _rounded(peak, format, index, share)
            if len(tried) == 1:
                scale[part] = wanted
                break
            error = _errors(w, wanted, format.tables[index], weighted)
            better = np.ones(error.shape, bool) if least is None else error < least
            least = error if least is None else np.where(better, error, least)
            scale[part] = np.where(better, wanted, scale[part])
            choice[part] = np.where(better, np.uint8(index), choice[part])
        if format.scale == "int8":
            scale[part] = _second_level(scale[part])
    return scale, choice


def _rounded(peak: np.ndarray, format: GridFormat, index: int, share: float) -> np.ndarray:
    """The scale of groups whose largest magnitude is `peak`, for one table, as float32 of what is stored."""
    top = np.float32(max(abs(v) for v in format.tables[index]))
    if format.scale == "e8m0":
        # 2^(floor(log2 peak) + 1) / top, to the nearest power of two: the OCP rule for e2m1 and e2m3, and no value cut for 3 bits.
        exponent = np.frexp(peak * np.float32(share))[1] - int(np.rint(np.log2(top)))
        return np.ldexp(np.float32(1), np.where(peak > 0, exponent, -127).clip(-127, 127)).astype(np.float32)
    scale = (peak / top * np.float32(share)).clip(LEAST_SCALE, LARGEST_SCALE)
    return scale.astype(np.float16).astype(np.float32)


def _step(scale: np.ndarray) -> np.ndarray:
    """fp16 [N, 1]: the 255th part of the largest scale of each row."""
    return (scale.max(axis=1, keepdims=True) / np.float32(255)).astype(np.float16)


def _second_level(scale: np.ndarray) -> np.ndarray:
    """Scales [N, G] as multiples 1..255 of one fp16 step per row. The largest is always 255 steps, so this changes them once."""
    step = _step(scale).astype(np.float32)
    steps = np.where(scale == scale.max(axis=1, keepdims=True), 255, np.rint(scale / step).clip(1, 255))
    return (steps * step).astype(np.float32)


def _errors(w: np.ndarray, scale: np.ndarray, table: Values, weight: np.ndarray | None) -> np.ndarray:
    """Sum of (weighted) squared errors of groups [N, G, elements] in float64; squares are float32."""
    step = scale[:, :, None]
    error = _nearest_values(w / step, table)
    error *= step
    error -= w
    np.square(error, out=error)
    if weight is not None:
        error *= weight
    return error.sum(axis=2, dtype=np.float64)


@functools.cache
def _places(table: Values) -> tuple[int, np.ndarray, np.ndarray]:
    """Nearest code and value for every ``ceil(2 x)``, and the first of these.

    Values are integers, so twice a midpoint is one, and ``x <= midpoint`` is ``ceil(2 x) <= 2 midpoint``.
    """
    points, codes = np.unique(np.asarray(table), return_index=True)  # of equal values the least code
    low, high = int(2 * points[0]), int(2 * points[-1])
    nearest = np.searchsorted(points[:-1] + points[1:], np.arange(low, high + 1))
    return low, codes[nearest].astype(np.uint8), points[nearest].astype(np.float32)


def _place(x: np.ndarray, low: int, count: int) -> np.ndarray:
    place = x + x
    np.ceil(place, out=place)
    np.clip(place, low, low + count - 1, out=place)
    place -= np.float32(low)
    return place.astype(np.intp)


def nearest(x: np.ndarray, table: Values) -> np.ndarray:
    """Codes uint8 of the values of `table` (integers) nearest to float32 `x`, ties to the lower; beyond the ends, the ends."""
    low, codes, _ = _places(table)
    return codes[_place(x, low, len(codes))]


def _nearest_values(x: np.ndarray, table: Values) -> np.ndarray:
    low, _, points = _places(table)
    return points[_place(x, low, len(points))]


def nearest_codes_of(values: np.ndarray, scale: np.ndarray, choice: np.ndarray, format: GridFormat) -> np.ndarray:
    """Codes uint8 of float32 [N, columns] for given scales and tables.

    Args:
        values: whole groups, or any columns with a scale and a table for each.
        scale: float32 [N, G] as `grid_scales` returns it, or [N, columns].
        choice: uint8, shaped as `scale`.
        format: of the codes.
    """
    rows, cols = values.shape
    x = values.reshape(rows, scale.shape[1], -1) / scale[:, :, None]
    if len(format.tables) == 1:
        return nearest(x, format.tables[0]).reshape(rows, cols)
    codes = np.empty(x.shape, np.uint8)
    for index, table in enumerate(format.tables):
        chosen = choice == index
        codes[chosen] = nearest(x[chosen], table)
    return codes.reshape(rows, cols)


def encode_grid_with(
    values: np.ndarray, format: GridFormat, scale: np.ndarray, choice: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Round float32 [N, K] to the grid with given scales.

    Args:
        values: the matrix.
        format: of the result.
        scale: float32 [N, G]; rounded to what the format stores, which changes nothing of what `grid_scales` found.
        choice: table uint8 [N, G]; None = the first.

    Returns:
        The buffers of ``format.buffers(N, K)``.

    Raises:
        SpecError: a scale is beyond what the format stores, or a value is not finite.
    """
    scale, choice = _storable(scale, format), np.zeros(scale.shape, np.uint8) if choice is None else choice
    codes = np.empty(values.shape, np.uint8)
    for part in _parts(*values.shape):
        if not np.isfinite(values[part]).all():
            raise SpecError(f"{format}: a weight is not finite. Keep this matrix in floats.")
        codes[part] = nearest_codes_of(values[part], scale[part], choice[part], format)
    return buffers_of(codes, scale, choice, format)


def _storable(scale: np.ndarray, format: GridFormat) -> np.ndarray:
    """The scales float32 [N, G] that the format stores for these."""
    if format.scale == "e8m0":
        fraction, exponent = np.frexp(scale)
        found = np.ldexp(np.float32(1), (exponent - (fraction == 0.5)).clip(-127, 127)).astype(np.float32)
    else:
        with np.errstate(over="ignore"):  # told below, in words
            found = _second_level(scale) if format.scale == "int8" else scale.astype(np.float16).astype(np.float32)
    if not (np.isfinite(scale).all() and np.isfinite(found).all() and (found > 0).all()):
        raise SpecError(f"{format}: a scale is zero, not finite, or beyond what is stored. Keep this matrix in floats.")
    return found


def buffers_of(codes: np.ndarray, scale: np.ndarray, choice: np.ndarray, format: GridFormat) -> dict[str, np.ndarray]:
    """Store codes uint8 [N, K] with scales float32 [N, G], as the format stores them, and tables uint8 [N, G]."""
    from trimtab.runtime.kernels import pack_codes

    rows = dataclasses.replace(format, tiled=False)
    found = {"codes": pack_codes(codes, format.bits)}
    if format.scale == "fp16":
        found["scale"] = scale.astype(np.float16)
    elif format.scale == "e8m0":
        found["scale"] = (np.frexp(scale)[1] + 126).astype(np.uint8)
    else:
        found["step"] = _step(scale)
        found["scale"] = np.rint(scale / found["step"].astype(np.float32)).astype(np.uint8)
    if format.choice_bits:
        found["choice"] = pack_codes(choice, format.choice_bits)
    found = {buffer.name: found[buffer.name] for buffer in rows.buffers(*codes.shape)}
    if not format.tiled:
        return found
    return dict(tile(Packed(rows, (codes.shape[0], codes.shape[1]), found)).buffers)


def parts_of(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 [N, K], scales float32 [N, G] and tables uint8 [N, G] of a matrix, by rows or in tiles."""
    from trimtab.runtime.kernels import unpack_codes

    packed = untile(packed)
    format, (rows, cols) = _grid(packed), packed.shape
    groups = cols // format.group
    choice = np.zeros((rows, groups), np.uint8)
    if format.choice_bits:
        choice = unpack_codes(packed.buffers["choice"], format.choice_bits, groups)
    return unpack_codes(packed.buffers["codes"], format.bits, cols), _scales(packed.buffers, format), choice


def _scales(buffers: Mapping[str, np.ndarray], format: GridFormat) -> np.ndarray:
    stored = buffers["scale"]
    if format.scale == "e8m0":
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
    scale = stored.astype(np.float32)
    return scale * buffers["step"].astype(np.float32) if format.scale == "int8" else scale


def decode(packed: Packed, out: np.ndarray) -> None:
    """Write the values of a matrix, by rows or in tiles, into `out`, float32 [N, K]."""
    format, (rows, cols) = _grid(packed), packed.shape
    codes, scale, choice = parts_of(packed)
    values = np.array(format.tables, np.float32).reshape(-1)
    for part in _parts(rows, cols):
        place = codes[part].reshape(-1, cols // format.group, format.group).astype(np.intp)
        if format.choice_bits:
            place += choice[part].astype(np.intp)[:, :, None] << format.bits
        out[part] = (values[place] * scale[part][:, :, None]).reshape(-1, cols)


def tile(packed: Packed, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """Store rows in tiles, in `buffers` if given; nothing is rounded.

    Raises:
        SpecError: groups that tiles cannot hold.
    """
    from trimtab.runtime.kernels import pack_codes, unpack_codes

    format, (rows, cols) = _grid(packed), packed.shape
    found = tiled_format(format, cols)
    out = allocate(found, packed.shape) if buffers is None else buffers
    pack_code_tiles(unpack_codes(packed.buffers["codes"], format.bits, cols), format.bits, out["codes"])
    out["scale"][...] = to_tiles(packed.buffers["scale"])
    if "step" in packed.buffers:
        out["step"][...] = to_tiles(packed.buffers["step"])[:, 0]
    if format.choice_bits:
        choice = to_tiles(unpack_codes(packed.buffers["choice"], format.choice_bits, cols // format.group))
        packed_choice = pack_codes(choice.reshape(-1, TILE_ROWS), format.choice_bits)
        out["choice"][...] = packed_choice.reshape(out["choice"].shape)
    return Packed(found, (rows, cols), out)


def untile(packed: Packed) -> Packed:
    """Undo `tile`; rows are returned as they are."""
    from trimtab.runtime.kernels import pack_codes, unpack_codes

    format, rows = _grid(packed), packed.shape[0]
    if not format.tiled:
        return packed
    found = {
        "codes": pack_codes(code_rows(packed), format.bits),
        "scale": from_tiles(packed.buffers["scale"], rows),
    }
    if "step" in packed.buffers:
        found["step"] = from_tiles(packed.buffers["step"][:, None], rows)
    if format.choice_bits:
        stored = packed.buffers["choice"]
        choice = unpack_codes(stored.reshape(-1, stored.shape[2]), format.choice_bits, TILE_ROWS)
        choice = from_tiles(choice.reshape(*stored.shape[:2], TILE_ROWS), rows)
        found["choice"] = pack_codes(choice, format.choice_bits)
    return Packed(dataclasses.replace(format, tiled=False), packed.shape, found)


def _grid(packed: Packed) -> GridFormat:
    assert isinstance(packed.format, GridFormat)
    return packed.format


def _parts(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, _CHUNK // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
