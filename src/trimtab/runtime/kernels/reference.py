"""The kernels in plain numpy: their definition, and the oracle of their tests. In float64 where rounding is free."""

from __future__ import annotations

import math

import numpy as np

from trimtab.runtime.kernels import GateFirst, IntRows, RowMatrix
from trimtab.spec.formats import GGUF_BLOCKS


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """See `kernels.pack_codes`."""
    planes = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(codes.shape[0], codes.shape[1] * bits), axis=1, bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, cols: int) -> np.ndarray:
    """See `kernels.unpack_codes`."""
    planes = np.unpackbits(packed, axis=1, count=cols * bits, bitorder="little").reshape(packed.shape[0], cols, bits)
    return (planes << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def decode(w: RowMatrix) -> np.ndarray:
    """Return a stored matrix as float64 [rows, cols]."""
    if not isinstance(w, IntRows):
        if w.dtype == np.uint16:
            w = (w.astype(np.uint32) << 16).view(np.float32)
        return w.astype(np.float64)
    rows, cols = w.shape
    codes = unpack_codes(w.codes, w.bits, cols).reshape(rows, -1, w.group).astype(np.float64)
    scale = w.scale.view(np.float16).astype(np.float64)[:, :, None]
    if w.minimum is None:
        return (scale * (codes - 2 ** (w.bits - 1))).reshape(rows, cols)
    return (scale * codes + w.minimum.view(np.float16).astype(np.float64)[:, :, None]).reshape(rows, cols)


def nbytes(w: RowMatrix) -> int:
    """Bytes of a stored matrix."""
    if not isinstance(w, IntRows):
        return w.nbytes
    return w.codes.nbytes + w.scale.nbytes + (0 if w.minimum is None else w.minimum.nbytes)


def int_gemv(x: np.ndarray, w: IntRows) -> tuple[np.ndarray, int]:
    """See `kernels.int_gemv`; y in float64."""
    return x.astype(np.float64) @ decode(w).T, nbytes(w)


def int_gemv_t(x: np.ndarray, w_t: IntRows) -> tuple[np.ndarray, int]:
    """See `kernels.int_gemv_t`; y in float64."""
    return x.astype(np.float64) @ decode(w_t), nbytes(w_t)


def activate(act: str, g: np.ndarray) -> np.ndarray:
    """``silu``, ``gelu_tanh`` or ``gelu`` (erf) of an array."""
    if act == "silu":
        return g / (1 + np.exp(-g))
    if act == "gelu_tanh":
        return 0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    return 0.5 * g * (1 + np.vectorize(math.erf)(g / math.sqrt(2)))


def gate_first(
    x: np.ndarray, gate: RowMatrix, up: RowMatrix, down_t: RowMatrix, *, threshold: float, act: str = "silu"
) -> GateFirst:
    """See `kernels.gate_first`; y in float64. Threshold, then dense: inactive rows count as zero rows."""
    g = activate(act, x.astype(np.float64) @ decode(gate).T)
    keep = ~(np.abs(g) <= threshold)
    rows = keep.any(axis=0)
    u = x.astype(np.float64) @ decode(up)[rows].T
    h = np.where(keep[:, rows], g[:, rows] * u, 0.0)
    y = h @ decode(down_t)[rows]
    share = int(rows.sum())
    read = (nbytes(gate), nbytes(up) // up.shape[0] * share, nbytes(down_t) // down_t.shape[0] * share)
    return GateFirst(y, share, keep.sum(axis=1), read)


def dequantize_gguf(kind: str, blocks: np.ndarray) -> np.ndarray:
    """See `kernels.dequantize_gguf`; returns float32 [elements], each product and sum rounded apart as in ggml."""
    b = blocks.reshape(-1, GGUF_BLOCKS[kind][1])
    return {"q8_0": _q8_0, "q4_k": _q45_k, "q5_k": _q45_k, "q6_k": _q6_k}.get(kind, _q45)(b, kind).reshape(-1)


def _half(columns: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _q8_0(b: np.ndarray, _: str) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _half(b[:, :2])


def _q45(b: np.ndarray, kind: str) -> np.ndarray:
    fifth, has_minimum = kind[1] == "5", kind[3] == "1"
    start = 4 if has_minimum else 2
    nibbles = b[:, -16:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if fifth:
        codes = codes | np.unpackbits(b[:, start : start + 4], axis=1, bitorder="little") << 4
    if has_minimum:
        return codes.astype(np.float32) * _half(b[:, :2]) + _half(b[:, 2:4])
    return (codes.astype(np.float32) - (16 if fifth else 8)) * _half(b[:, :2])


def _q45_k(b: np.ndarray, kind: str) -> np.ndarray:
    s = b[:, 4:16]
    scale = np.concatenate([s[:, :4] & 63, (s[:, 8:] & 15) | (s[:, :4] >> 6 << 4)], axis=1)
    minimum = np.concatenate([s[:, 4:8] & 63, (s[:, 8:] >> 4) | (s[:, 4:8] >> 6 << 4)], axis=1)
    pairs = b[:, -128:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)
    if kind == "q5_k":
        codes = codes | ((b[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1) << 4).transpose(0, 2, 1)
    d, low = _half(b[:, :2]) * scale.astype(np.float32), _half(b[:, 2:4]) * minimum.astype(np.float32)
    return codes.astype(np.float32) * d[:, :, None] - low[:, :, None]


def _q6_k(b: np.ndarray, _: str) -> np.ndarray:
    ql, qh = b[:, :128].reshape(-1, 2, 1, 2, 32), b[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=2).reshape(-1, 2, 4, 32)
    high = qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32) * _half(b[:, 208:])
    return codes * scale[:, :, None]


def binary_scales(
    w_Rg: np.ndarray, cost_Rg: np.ndarray, bits: int, apot: int, rounds: int, nearest: bool, even: tuple[float, ...]
) -> np.ndarray:
    """See `numerics.bcq.binary_scales`, one group after the other."""
    from trimtab.runtime.numerics.bcq import greedy_signs, signs_of, terms_of

    def powers(scales: np.ndarray) -> np.ndarray:
        return terms_of(scales.astype(np.float32), apot)[1] if apot else scales.astype(np.float32)

    found = np.empty((len(w_Rg), bits), np.float32)
    for w, cost, best in zip(w_Rg, cost_Rg, found, strict=True):
        rest, greedy = w, np.empty(bits)
        for i in range(bits):
            greedy[i] = (np.abs(rest) * cost).sum() / max(cost.sum(), 1e-30)
            rest = rest - np.where(rest >= 0, 1, -1) * greedy[i]
        steps = 2.0 ** np.arange(bits - 1, -1, -1) / (2**bits - 1)
        starts = [greedy, *(np.abs(w).max() * share * steps for share in even if bits >= 3)]
        least = np.inf
        for start in starts:
            scales = powers(start)
            for _ in range(rounds + 1):
                signs = (signs_of if nearest else greedy_signs)(w[None], scales[None])[0]
                b = np.where(signs, 1.0, -1.0)
                error = float((cost * np.square(b @ scales.astype(np.float64) - w)).sum())
                if error < least:
                    least, best[:] = error, scales
                gram = b.T @ (b * cost[:, None])
                gram += np.eye(bits) * (1e-6 * np.trace(gram) / bits + 1e-30)
                scales = powers(-np.sort(-np.abs(np.linalg.solve(gram, b.T @ (w * cost)))))
    return found
