"""Small floats: fp8 (e4m3, e5m2) without a scale or with one per row (e4m3), and mxfp4 (e2m1, a power of two per 32).

All are table lookups. A value is coded as the nearest point of the table, ties to the even code; a scaled value never lies
beyond the last point of fp8, and beyond that of mxfp4 it is cut to it, as the OCP rule has it.

Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433; OCP Microscaling Formats v1.0, 6.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from trimtab.errors import SpecError
from trimtab.spec.formats import MX_BLOCK, WeightFormat

#: Elements coded at a time.
_CHUNK = 1 << 18


def _points(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """The values of the codes without a sign, in order: subnormals, then 2^(e - bias) (1 + m / 2^mantissa_bits)."""
    code = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, code % (1 << mantissa_bits) / (1 << mantissa_bits)
    normal = np.ldexp(1 + mantissa, exponent - bias)
    return np.where(exponent == 0, np.ldexp(mantissa, 1 - bias), normal).astype(np.float32)


_E2M1 = _points(2, 1, bias=1)
_E4M3 = _points(4, 3, bias=7)[:-1]  # the last code is NaN
E4M3_MAX = float(_E4M3[-1])
_E5M2 = _points(5, 2, bias=15)[:-4]  # the last four are infinity and NaN

#: Value of every code.
E2M1_VALUES = np.concatenate((_E2M1, -_E2M1))
E4M3_VALUES = np.concatenate((_E4M3, [np.nan], -_E4M3, [np.nan])).astype(np.float32)


def nearest_codes(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Index of the nearest of the ascending `points` to every magnitude of `values`, ties to the even index."""
    last = ((points[:-1] + points[1:]) / 2).astype(np.float32)  # exact: one more bit than the points have
    last[1::2] = np.nextafter(last[1::2], np.float32(0))  # half way above an odd point belongs to the even one after it
    return np.searchsorted(last, np.abs(values)).astype(np.uint8)


def encode_e4m3(values: np.ndarray) -> np.ndarray:
    """Nearest codes uint8 of float32 values of any shape, without a scale; what is beyond 448 is cut to it, NaN stays."""
    codes = nearest_codes(values.reshape(-1), _E4M3).reshape(values.shape) | (np.signbit(values) << np.uint8(7))
    codes[np.isnan(values)] = 0x7F
    return codes


def round_fp8(values: np.ndarray, kind: str) -> np.ndarray:
    """Nearest fp8 numbers of float32 values of any shape, without a scale; what is beyond the largest is cut to it, NaN stays.

    Args:
        values: float32.
        kind: ``e4m3`` (largest 448) or ``e5m2`` (57344).

    >>> round_fp8(np.array([1.3, 1e6, -3e-3], np.float32), "e4m3").tolist()
    [1.25, 448.0, -0.00390625]
    """
    points = {"e4m3": _E4M3, "e5m2": _E5M2}[kind]
    found = np.copysign(points[nearest_codes(values.reshape(-1), points)].reshape(values.shape), values)
    return np.where(np.isnan(values), np.float32(np.nan), found)


def encode_fp8(values: np.ndarray) -> dict[str, np.ndarray]:
    """Code float32 [rows, cols]; the largest magnitude of a row becomes 448.

    Raises:
        SpecError: a value that is not finite.
    """
    peak = _peak(values, "fp8")
    scale = (peak / np.float32(E4M3_MAX)).astype(np.float32)
    data = np.empty(values.shape, np.uint8)
    for part in _parts(*values.shape):
        step = scale[part]
        scaled = np.divide(values[part], step, out=np.zeros_like(values[part]), where=step > 0)
        data[part] = nearest_codes(scaled, _E4M3) | (np.signbit(scaled) << np.uint8(7))
    return {"data": data, "scale": scale}


def encode_mxfp4(values: np.ndarray) -> dict[str, np.ndarray]:
    """Code float32 [rows, cols]: the scale of a block is 2^(floor(log2(largest magnitude)) - 2).

    Raises:
        SpecError: a value that is not finite.
    """
    rows, cols = values.shape
    blocks = values.reshape(rows, cols // MX_BLOCK, MX_BLOCK)
    peak = _peak(blocks, "mxfp4")[..., 0]
    exponent = np.where(peak > 0, np.frexp(peak)[1] - 3, -127)  # frexp's mantissa is below 1
    exponent = np.clip(exponent, -127, 127)
    codes = np.empty((rows, cols), np.uint8)
    for part in _parts(rows, cols):
        scaled = np.ldexp(blocks[part], -exponent[part][..., None]).reshape(-1, cols)
        codes[part] = nearest_codes(scaled, _E2M1) | (np.signbit(scaled) << np.uint8(3))
    return {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "scale": (exponent + 127).astype(np.uint8)}


def decode_scaled(buffers: Mapping[str, np.ndarray], format: WeightFormat, out: np.ndarray) -> None:
    """Write the values of an fp8 or mxfp4 matrix into `out`, float32 [rows, cols]."""
    for part in _parts(*out.shape):
        target = out[part]
        if format.kind == "fp8":
            np.multiply(E4M3_VALUES[buffers["data"][part]], buffers["scale"][part], out=target)
        else:
            codes = buffers["codes"][part]
            target[:, ::2], target[:, 1::2] = E2M1_VALUES[codes & 15], E2M1_VALUES[codes >> 4]
            exponent = buffers["scale"][part].astype(np.int32) - 127
            blocks = target.reshape(len(target), -1, MX_BLOCK)
            np.ldexp(blocks, exponent[..., None], out=blocks)
            blocks[exponent == 128] = np.nan


def _peak(values: np.ndarray, name: str) -> np.ndarray:
    """Largest magnitude along the last axis, which is kept."""
    peak = np.maximum(values.max(axis=-1, keepdims=True), -values.min(axis=-1, keepdims=True))
    if not np.isfinite(peak).all():
        raise SpecError(f"{name}: a weight is not finite. Keep this matrix in floats.")
    return peak


def _parts(rows: int, cols: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(cols, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
