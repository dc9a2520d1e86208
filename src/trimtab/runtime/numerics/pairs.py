"""Outlier-victim pairs: an outlier takes a code of a wider grid, and its neighbour, set to zero, tells that it did.

A value is an outlier where the nearest of all normal and outlier values is an outlier one; half way it is the lower of the
two. The other half of its pair becomes 0. Of two outliers in a pair one is kept: the larger (the left of equals), or the left.

A scale is ``alpha / max(normal values)``. ``alpha`` runs over percentages of ``max(|mean + 3 sigma|, |mean - 3 sigma|)`` of the
group, and the one of least squared error is kept, victims counted in.

Legend: N rows, K columns of a matrix, G groups of a row.

Source: Guo et al., OliVe, arXiv 2304.07493, sections 3 and 4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.grids import LARGEST_SCALE, LEAST_SCALE, nearest
from trimtab.runtime.numerics.tiles import allocate, code_rows, from_tiles, pack_code_tiles, tiled_format, to_tiles
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.grids import PairFormat, Values

#: Largest magnitude of an outlier that is written: products of two of them stay below 2**31. Wider codes are read.
OUTLIER_LIMIT = 1 << 15
#: Which of two outliers in a pair is kept.
BOTH = ("larger", "left")
#: Percentages of the three-sigma range that are tried: first, end, step.
SEARCH, SIGMA = (75, 250, 2), 3.0
#: Elements coded at a time: what is computed on the way stays in the cache.
_CHUNK = 1 << 16


def encode(values: np.ndarray, format: PairFormat) -> dict[str, np.ndarray]:
    """Round float32 [N, K] with the scales of `pair_scales`.

    Returns:
        The buffers of ``format.buffers(N, K)``.

    Raises:
        SpecError: a value is not finite.
    """
    scale, _ = pair_scales(values, format)
    return encode_pairs_with(values, format, scale)


def encode_pairs_with(
    values: np.ndarray, format: PairFormat, scale: np.ndarray, both: str = "larger"
) -> dict[str, np.ndarray]:
    """Round float32 [N, K] with given scales, float32 [N, G] (rounded to fp16); `both` is of `BOTH`.

    Raises:
        SpecError: a value is not finite.
    """
    from trimtab.runtime.kernels import pack_codes

    rows, cols = values.shape
    stored = scale.astype(np.float16)
    codes = np.empty((rows, cols), np.uint8)
    for part in _parts(rows, cols):
        w = values[part]
        _check_finite(w, format)
        x = w.reshape(len(w), scale.shape[1], -1) / stored[part].astype(np.float32)[:, :, None]
        codes[part] = pair_codes(x.reshape(len(w), cols), format, both)
    plain = dataclasses.replace(format, tiled=False)
    found = {"codes": pack_codes(codes, format.bits), "scale": stored}
    return dict(tile(Packed(plain, (rows, cols), found)).buffers) if format.tiled else found


def pair_codes(x: np.ndarray, format: PairFormat, both: str = "larger") -> np.ndarray:
    """Codes uint8 of float32 [..., K] in units of the scale."""
    normal, wide = format.tables
    codes = nearest(x, normal)
    places, kept = _outliers(x, np.abs(x), normal, both, wide)
    flat = codes.reshape(-1, 2)
    points, outlier_codes = _wide(wide)
    flat[places, kept] = outlier_codes[_lower_nearest(x.reshape(-1, 2)[places, kept], points)]
    flat[places, 1 - kept] = format.identifier
    return codes


def pair_scales(
    values: np.ndarray,
    format: PairFormat,
    *,
    search: tuple[int, int, int] = SEARCH,
    sigma: float = SIGMA,
    both: str = "larger",
) -> tuple[np.ndarray, np.ndarray]:
    """Search the scale of every group.

    Args:
        values: float32 [N, K].
        format: of the result.
        search: percentages of the range that are tried: first, end, step.
        sigma: standard deviations the range reaches from the mean.
        both: of `BOTH`.

    Returns:
        Scales float32 [N, G], values of fp16, and the sums of squared errors float64 [N, G].

    Raises:
        SpecError: a value is not finite.
    """
    rows, cols = values.shape
    groups = cols // format.group
    scale, error = np.empty((rows, groups), np.float32), np.full((rows, groups), np.inf)
    for part in _parts(rows, cols):
        _check_finite(values[part], format)
        w = values[part].reshape(-1, format.group)
        reach = _reach(w.mean(axis=1, dtype=np.float64), w.std(axis=1, dtype=np.float64), sigma)
        best, least = np.empty(len(w), np.float32), np.full(len(w), np.inf)
        for percent in range(*search):
            tried = _tried(percent, reach, format)
            found = _squared_errors(w, tried, *format.tables, both)
            better = found < least
            best[better], least[better] = tried[better], found[better]
        scale[part], error[part] = best.reshape(-1, groups), least.reshape(-1, groups)
    return scale, error


def pair_scale(
    values: np.ndarray,
    format: PairFormat,
    *,
    search: tuple[int, int, int] = SEARCH,
    sigma: float = SIGMA,
    both: str = "larger",
) -> tuple[float, float]:
    """As `pair_scales`, one scale for all of float32 [T, K]: the scale, a value of fp16, and the sum of squared errors."""
    _check_finite(values, format)
    reach = _reach(values.mean(dtype=np.float64), values.std(dtype=np.float64), sigma)
    best, least = 0.0, np.inf
    for percent in range(*search):
        tried = _tried(percent, reach, format)
        found = sum(
            _squared_errors(values[part], np.broadcast_to(tried, len(values[part])), *format.tables, both).sum()
            for part in _parts(*values.shape)
        )
        if found < least:
            best, least = float(tried), float(found)
    return best, least


def _reach(mean: np.ndarray, deviation: np.ndarray, sigma: float) -> np.ndarray:
    return np.abs(mean) + sigma * deviation  # max(|mean + s|, |mean - s|)


def _tried(percent: int, reach: np.ndarray, format: PairFormat) -> np.ndarray:
    """The scale float32 whose normal values end at `percent` of the reach, rounded to fp16."""
    scale = (percent / 100 * reach / max(format.tables[0])).clip(LEAST_SCALE, LARGEST_SCALE)
    return scale.astype(np.float16).astype(np.float32)


def _squared_errors(w: np.ndarray, scale: np.ndarray, normal: Values, wide: Values, both: str) -> np.ndarray:
    """Sums float64 [groups] of squared errors of float32 [groups, elements] under pairs of these scales."""
    x = w / scale[:, None]
    error = np.abs(x)
    places, kept = _outliers(x, error, normal, both, wide)
    error -= _nearest_magnitudes(error, normal)
    error.reshape(-1, 2)[places] = 0
    sums = np.einsum("ge,ge->g", error, error).astype(np.float64)
    if len(places):
        points, _ = _wide(wide)
        pairs = x.reshape(-1, 2)
        outlier, victim = pairs[places, kept], pairs[places, 1 - kept]
        paid = np.square(outlier - points[_lower_nearest(outlier, points)]) + np.square(victim)
        sums += np.bincount(places // (w.shape[1] // 2), weights=paid, minlength=len(w))
    return sums * np.square(scale.astype(np.float64))


def _nearest_magnitudes(sizes: np.ndarray, normal: Values) -> np.ndarray:
    """Nearest normal magnitudes, float32; which of two at one distance does not matter here."""
    magnitudes = normal[: len(normal) // 2]
    run = next((m for m, above in itertools.pairwise(magnitudes) if above > m + 1), magnitudes[-1])
    found = np.rint(sizes)
    np.minimum(found, np.float32(run), out=found)
    for below, above in itertools.pairwise(magnitudes):
        if below >= run:
            found += np.float32(above - below) * (sizes > np.float32((below + above) / 2))
    return found


def _outliers(
    x: np.ndarray, sizes: np.ndarray, normal: Values, both: str, wide: Values
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of `x` (magnitudes `sizes`) that hold an outlier, and which half of each is kept."""
    points, _ = _wide(wide)
    middle = np.float32((max(normal) + points[points > 0].min()) / 2)
    found = np.flatnonzero(sizes >= middle)
    places = np.unique(found >> 1)
    pairs = x.reshape(-1, 2)[places]
    beyond = (pairs > middle) | (pairs <= -middle)  # half way it is the lower, so an outlier below zero only
    held = beyond.any(axis=1)
    places, pairs, beyond = places[held], np.abs(pairs[held]), beyond[held]
    first = beyond[:, 0] & (~beyond[:, 1] | (both == "left") | (pairs[:, 0] >= pairs[:, 1]))
    return places, np.where(first, 0, 1)


@functools.cache
def _wide(wide: Values) -> tuple[np.ndarray, np.ndarray]:
    """Outlier values up to the limit in order, float32, and their codes."""
    values = np.array(wide)
    codes = np.flatnonzero((values != 0) & (np.abs(values) <= OUTLIER_LIMIT))
    order = codes[np.argsort(values[codes])]
    return values[order].astype(np.float32), order.astype(np.uint8)


def _lower_nearest(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Places of the ascending integer `points` nearest to `x`, ties to the lower."""
    return np.searchsorted((points[:-1] + points[1:]) / 2, x)


def exponent_integers(format: PairFormat) -> tuple[np.ndarray, np.ndarray]:
    """What the decoder of the paper makes of a code: exponents and small integers, int32 [2, codes], normal and outlier.

    ``value = integer << exponent``; the integer has at most 4 bits and a sign (8-bit normal values: 7 bits).
    """
    values = np.array(format.tables, np.int64)
    size = np.abs(values)
    exponent = np.zeros(values.shape, np.int64)
    if format.normal == "flint":
        trailing = np.log2(np.where(size, size & -size, 1)).astype(np.int64)
        exponent[0] = np.where(size[0] > 7, trailing[0], 0)
    # Outliers: the mantissa with its leading one.
    _, mantissa_bits, _ = format.abfloat
    leading = np.floor(np.log2(np.maximum(size[1], 1))).astype(np.int64)
    exponent[1] = np.where(size[1] > 0, leading - mantissa_bits, 0)
    return exponent.astype(np.int32), (np.sign(values) * (size >> exponent)).astype(np.int32)


def integers_of(codes: np.ndarray, format: PairFormat) -> np.ndarray:
    """Values int32 [..., K] of codes uint8 [..., K], in units of the scale."""
    exponent, integer = exponent_integers(format)
    return (integer << exponent).reshape(-1)[_table_places(codes, format)]


def _table_places(codes: np.ndarray, format: PairFormat) -> np.ndarray:
    """Where the value of each code stands in (normal, outlier) values one after the other."""
    pairs = codes.reshape(-1, 2)
    is_outlier = pairs[:, ::-1] == format.identifier
    return (pairs + (is_outlier.astype(np.intp) << format.bits)).reshape(codes.shape)


def parts_of(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [N, K] and scales float32 [N, G] of a matrix, by rows or in tiles."""
    from trimtab.runtime.kernels import unpack_codes

    packed = untile(packed)
    codes = unpack_codes(packed.buffers["codes"], packed.format.bits, packed.shape[1])
    return codes, packed.buffers["scale"].astype(np.float32)


def decode(packed: Packed, out: np.ndarray) -> None:
    """Write the values of a matrix, by rows or in tiles, into `out`, float32 [N, K]."""
    format, (rows, cols) = _pair(packed), packed.shape
    codes, scale = parts_of(packed)
    values = np.array(format.tables, np.float32).reshape(-1)
    for part in _parts(rows, cols):
        found = values[_table_places(codes[part], format)].reshape(-1, cols // format.group, format.group)
        out[part] = (found * scale[part][:, :, None]).reshape(-1, cols)


def tile(packed: Packed, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """Store rows in tiles, in `buffers` if given; nothing is rounded.

    Raises:
        SpecError: groups that tiles cannot hold.
    """
    found = tiled_format(packed.format, packed.shape[1])
    out = allocate(found, packed.shape) if buffers is None else buffers
    codes, _ = parts_of(packed)
    pack_code_tiles(codes, found.bits, out["codes"])
    out["scale"][...] = to_tiles(packed.buffers["scale"])
    return Packed(found, packed.shape, out)


def untile(packed: Packed) -> Packed:
    """Undo `tile`; rows are returned as they are."""
    from trimtab.runtime.kernels import pack_codes

    format = _pair(packed)
    if not format.tiled:
        return packed
    scale = from_tiles(packed.buffers["scale"], packed.shape[0])
    found = {"codes": pack_codes(code_rows(packed), format.bits), "scale": scale}
    return Packed(dataclasses.replace(format, tiled=False), packed.shape, found)


def _pair(packed: Packed) -> PairFormat:
    assert isinstance(packed.format, PairFormat)
    return packed.format


def _check_finite(w: np.ndarray, format: PairFormat) -> None:
    if not np.isfinite(w).all():
        raise SpecError(f"{format}: a value is not finite. Keep this matrix in floats.")


def _parts(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, _CHUNK // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
