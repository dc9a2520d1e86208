"""Products by addition of bit patterns (L-Mul) and of rounded floats, on numpy arrays; `numerics.lmul` defines them.

Sums go in the order of their terms and are rounded after every addition, so results are the same bits with any instruction set
and any number of threads.

Legend: T tokens, K terms of a sum, N outputs.
"""

from __future__ import annotations

import functools

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.kernels import _core
from trimtab.spec.product import Lmul, Rounded

#: Fields (exponent and mantissa, in the layout of fp32) of the smallest normal and the largest finite number of the fp8 ranges:
#: 2^-6 and 448, 2^-14 and 57344.
_FP8_FIELDS = {4: (121 << 23, 0x43E00000), 5: (113 << 23, 0x47600000)}
_INTEGER, _FORMULA, _EXACT = 0, 1, 2
_SUMS = {"fp32": 0, "bf16": 1, "e4m3": 2, "lmul-m": 3}


@functools.cache
def _rule(product: Lmul | Rounded) -> _core.AddRule:
    """The product as `cpp/lmul.h` has it."""
    bits, to = product.mantissa, _SUMS[product.acc]
    if isinstance(product, Rounded):
        return _EXACT, bits, True, 0, 1 << 23, 0x7F7FFFFF, to, bits
    low, high = _FP8_FIELDS.get(product.exp, (1 << 23, 0x7F800000 - (1 << (23 - bits))))
    offset = 0 if product.shift is None else 1 << (23 - product.shift)
    how = _FORMULA if product.carry == "formula" else _INTEGER
    return how, bits, product.round == "nearest", offset, low, high, to, bits


def multiply(a: np.ndarray, b: np.ndarray, product: Lmul | Rounded, threads: int = 1) -> np.ndarray:
    """Return the products of two float32 arrays of one shape.

    Zero times anything but NaN is zero, with the sign of the product; so is a subnormal, and what underflows. What overflows
    becomes the largest finite number; infinity comes of infinity alone.

    Raises:
        SpecError: shapes that differ, or arrays that are not contiguous float32.
    """
    if a.shape != b.shape:
        raise SpecError(f"Products of {list(a.shape)} and {list(b.shape)}: the shapes differ. Broadcast them first.")
    y = np.empty(a.shape, np.float32)
    _core.lmul(_rule(product), _flat(a, "a"), _flat(b, "b"), threads, y.reshape(-1))
    return y


def matmul(
    x: np.ndarray, w: np.ndarray, product: Lmul | Rounded, *, transposed: bool = False, threads: int = 1
) -> np.ndarray:
    """Return y [T, N] = x [T, K] @ W.T with these products and sums; nothing of [T, N, K] is ever held.

    Args:
        x: float32, contiguous.
        w: float32, contiguous: [N, K], or [K, N] if `transposed`.
        product: what a product is, and what sums are rounded to.
        transposed: how `w` lies.
        threads: workers.

    Raises:
        SpecError: shapes that do not agree, or arrays that are not contiguous float32.
    """
    for array, name in ((x, "x"), (w, "W")):
        _flat(array, name)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[not transposed]:
        raise SpecError(
            f"x {list(x.shape)} and W {list(w.shape)} do not agree. Allowed: [T, K] and {'[K, N]' if transposed else '[N, K]'}."
        )
    y = np.empty((x.shape[0], w.shape[transposed]), np.float32)
    _core.lmul_matmul(_rule(product), x, w, transposed, threads, y)
    return y


def rounded_sum(x: np.ndarray, product: Lmul | Rounded) -> np.ndarray:
    """Return float32 values as a partial sum of this product is rounded."""
    y = np.empty(x.shape, np.float32)
    _core.lmul_round(_rule(product), _flat(x, "x"), y.reshape(-1))
    return y


def _flat(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise SpecError(
            f"{name} must be a contiguous float32 array, got {array.dtype}{list(array.shape)}. L-Mul adds the bits of floats: "
            "convert it first."
        )
    return array.reshape(-1)
