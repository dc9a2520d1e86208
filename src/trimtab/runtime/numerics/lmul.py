"""What L-Mul computes, in plain numpy on the integers of the format itself: the definition its kernels are tested against.

A number is sign, exponent field and mantissa field; exponent and mantissa together are one integer. The product of X and Y is
``X + Y - (bias << m) + 2^(m - l)``, the signs xor-ed.

Source: Luo and Sun, Addition is All You Need, arXiv 2410.00907, equation 1.
"""

from __future__ import annotations

import numpy as np

from trimtab.runtime.numerics.floats import bfloat16_bits, bfloat16_to_float32, round_mantissa
from trimtab.runtime.numerics.scaled import E4M3_VALUES, encode_e4m3
from trimtab.spec.product import Lmul, Rounded

#: (bias, largest exponent field, mantissa of the largest number as a share of 1) by exponent bits.
_LAYOUT = {4: (7, 15, 0.75), 5: (15, 30, 0.75), 8: (127, 254, 1.0)}


def fields(values: np.ndarray, product: Lmul) -> np.ndarray:
    """Integers int64 of float32 magnitudes: exponent field above `mantissa` bits; 0 for zero and what is too small, NaN alike.

    What lies above the largest finite number becomes it.
    """
    m, (bias, last, share) = product.mantissa, _LAYOUT[product.exp]
    fraction, exponent = np.frexp(np.abs(np.where(np.isfinite(values), values, 0)).astype(np.float64))
    scaled = (2 * fraction - 1) * (1 << m)
    mantissa = (np.floor if product.round == "trunc" else np.rint)(scaled).astype(np.int64)  # rint: ties to even
    code = ((exponent.astype(np.int64) - 1 + bias) << m) + mantissa
    code = np.minimum(code, _largest(m, last, share))
    return np.where((fraction == 0) | (code < 1 << m), 0, code)


def _largest(m: int, last: int, share: float) -> int:
    return (last << m) + (((1 << m) - 1) if share == 1.0 else int(share * (1 << m)))


def value_of(code: np.ndarray, product: Lmul) -> np.ndarray:
    """float64 values of such integers; codes below ``1 << mantissa`` are zero."""
    m, bias = product.mantissa, _LAYOUT[product.exp][0]
    found = np.ldexp(1 + (code & ((1 << m) - 1)) / (1 << m), (code >> m) - bias)
    return np.where(code < 1 << m, 0.0, found)


def multiply(a: np.ndarray, b: np.ndarray, product: Lmul) -> np.ndarray:
    """Products float32 of float32 arrays; see `runtime.kernels.lmul.multiply`."""
    m, (bias, last, share) = product.mantissa, _LAYOUT[product.exp]
    x, y = fields(a, product), fields(b, product)
    offset = 0 if product.shift is None else 1 << (m - product.shift)
    if product.carry == "int":
        found = value_of(np.clip(x + y - (bias << m) + offset, 0, _largest(m, last, share)), product)
    else:
        cut = (1 << m) - 1
        sum_of = 1 + ((x & cut) + (y & cut) + offset) / (1 << m)
        exact = np.ldexp(sum_of.astype(np.float32).astype(np.float64), (x >> m) + (y >> m) - 2 * bias)
        largest, smallest = value_of(np.array([_largest(m, last, share), 1 << m]), product)
        found = np.where(exact < smallest, 0.0, np.minimum(exact, largest))
    infinite = np.isinf(a) | np.isinf(b)
    zero = ((x == 0) & np.isfinite(a)) | ((y == 0) & np.isfinite(b))
    found = np.where(zero, 0.0, np.where(infinite, np.inf, found))
    signed = np.where(np.signbit(a) ^ np.signbit(b), -found, found).astype(np.float32)
    return np.where(np.isnan(a) | np.isnan(b), np.float32(np.nan), signed)


def mantissa_table(product: Lmul) -> np.ndarray:
    """Products of all pairs of mantissas, int64 [2^m, 2^m]: exponent carry above m bits of mantissa, by the integer form.

    Hardware of a few bits would hold it in place of an adder.
    """
    m = product.mantissa
    found = np.zeros((1 << m, 1 << m), np.int64)
    for i in range(1 << m):
        for j in range(1 << m):
            total = i + j + (0 if product.shift is None else 1 << (m - product.shift))
            carry = 0
            while total >= 1 << m:
                total, carry = total - (1 << m), carry + 1
            found[i, j] = carry << m | total
    return found


def rounded_sum(values: np.ndarray, product: Lmul | Rounded) -> np.ndarray:
    """Float32 values as a partial sum is rounded: to nearest, ties to even; e4m3 cuts what is beyond 448 to it."""
    if product.acc == "fp32":
        return values
    if product.acc == "bf16":
        return bfloat16_to_float32(bfloat16_bits(values))
    if product.acc == "e4m3":
        return E4M3_VALUES[encode_e4m3(values)]
    return round_mantissa(values, product.mantissa)


def matmul(x: np.ndarray, w: np.ndarray, product: Lmul | Rounded) -> np.ndarray:
    """Return y float32 [T, N] = x [T, K] @ W.T for W [N, K], summed in the order of K."""
    if isinstance(product, Rounded):
        x, w = round_mantissa(x, product.mantissa), round_mantissa(w, product.mantissa)
    y = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        left, right = np.broadcast_arrays(x[:, k, None], w[None, :, k])
        term = left * right if isinstance(product, Rounded) else multiply(left, right, product)
        y = rounded_sum(y + term, product)
    return y
