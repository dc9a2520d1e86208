"""The integer grid: groups of a row share a scale (and a minimum); every weight is rounded to the nearest point.

Symmetric groups use the whole range of codes: the scale is the element of largest magnitude over ``-2**(bits-1)``, sign
included, so that element is met exactly and no code is wasted (ggml's Q4_0 rule). On Gaussian groups of 32 its mean squared
error is 22 % below ``max|w| / (2**(bits-1) - 1)`` at 4 bits and 70 % below it at 2.

Asymmetric groups span their minimum and maximum. Scales and minima are rounded to fp16 first, codes are chosen for those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import WeightFormat

#: Elements encoded or decoded at a time.
_CHUNK = 1 << 18


def encode_grid(values: np.ndarray, format: WeightFormat) -> dict[str, np.ndarray]:
    """Round float32 [rows, cols] to the grid.

    Returns:
        The buffers of ``format.buffers(rows, cols)``.

    Raises:
        SpecError: the group does not divide the row, or a scale is not finite in fp16.
    """
    from trimtab.runtime.kernels import pack_codes

    rows, cols = values.shape
    names = [buffer.name for buffer in format.buffers(rows, cols)]
    groups = cols // format.group
    codes = np.empty((rows, (cols * format.bits + 7) // 8), np.uint8)
    scale = np.empty((rows, groups), np.float16)
    minimum = np.empty((rows, groups), np.float16)
    for part in _parts(rows, cols):
        points, scale[part], low = nearest_points(values[part].reshape(-1, groups, format.group), format)
        if low is not None:
            minimum[part] = low
        codes[part] = pack_codes(points.reshape(-1, cols), format.bits)
    found = {"codes": codes, "scale": scale, "minimum": minimum}
    return {name: found[name] for name in names}


def packed_grid(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, format: WeightFormat) -> Packed:
    """A matrix of given codes uint8 [rows, cols], scale and minimum fp16 [rows, groups], stored by rows."""
    from trimtab.runtime.kernels import pack_codes

    buffers = {"codes": pack_codes(np.ascontiguousarray(codes), format.bits), "scale": scale}
    if minimum is not None:
        buffers["minimum"] = minimum
    return Packed(format, (codes.shape[0], codes.shape[1]), buffers)


def nearest_points(w: np.ndarray, format: WeightFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Round whole groups, float32 [rows, groups, elements], to the grid of `format`.

    Returns:
        Codes uint8 as `w`, scale and minimum fp16 [rows, groups]; no minimum where the grid is symmetric.

    Raises:
        SpecError: a scale is not finite in fp16.
    """
    levels = 2**format.bits
    low, high = w.min(axis=2), w.max(axis=2)
    minimum = None
    with np.errstate(over="ignore"):  # told below, in words
        if format.sym:
            scale = (np.where(-low >= high, low, high) / np.float32(-levels // 2)).astype(np.float16)
        else:
            scale, minimum = ((high - low) / np.float32(levels - 1)).astype(np.float16), low.astype(np.float16)
    if not np.isfinite(scale).all() or (minimum is not None and not np.isfinite(minimum).all()):
        raise SpecError(
            f"{format}: a group of weights is not finite, or beyond what an fp16 scale can express. Keep this matrix in floats."
        )
    step = scale.astype(np.float32)[:, :, None]
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)
    if minimum is None:
        points = np.rint(w * inverse) + np.float32(levels // 2)
    else:
        points = np.rint((w - minimum.astype(np.float32)[:, :, None]) * inverse)
    np.clip(points, 0, levels - 1, out=points)
    return points.astype(np.uint8), scale, minimum


def decode_grid(buffers: Mapping[str, np.ndarray], format: WeightFormat, cols: int, out: np.ndarray) -> None:
    """Write the values of the grid into `out`, float32 [rows, cols]."""
    from trimtab.runtime.kernels import unpack_codes

    scale, minimum = buffers["scale"], buffers.get("minimum")
    for part in _parts(out.shape[0], cols):
        codes = unpack_codes(np.ascontiguousarray(buffers["codes"][part]), format.bits, cols)
        target = out[part].reshape(-1, cols // format.group, format.group)
        target[...] = codes.reshape(target.shape)
        if minimum is None:
            target -= np.float32(2 ** (format.bits - 1))
        target *= scale[part].astype(np.float32)[:, :, None]
        if minimum is not None:
            target += minimum[part].astype(np.float32)[:, :, None]


def _parts(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, _CHUNK // cols)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
