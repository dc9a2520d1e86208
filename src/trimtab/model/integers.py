"""Products of integers: activations coded as they come, multiplied with codes, summed in int32.

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.products import Exact, added
from trimtab.runtime.kernels import int8_product
from trimtab.runtime.numerics import decode, pairs
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.grids import PairFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import ExponentInteger

_INT32_MAX = (1 << 31) - 1
#: Bits of a digit of an integer that is multiplied in parts.
_DIGIT = 7


class ExponentIntegers(Exact):
    """Pairs times pairs. A product of two slots is ``(i * j) << (e + f)``; their sum is an exact int32.

    Activation outliers are cut to what keeps every possible sum of a row within int32.
    """

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        super().__init__(path, node, weights)
        product, format = node.product, self.packed.format
        assert isinstance(product, ExponentInteger)
        if not isinstance(format, PairFormat) or format.group != node.k:
            raise SpecError(
                f"{path}: a product of exponents and integers needs outlier-victim pairs with one scale a row, not {format}."
            )
        self.both = product.both
        self.act = PairFormat(bits=product.bits, normal=product.normal, group=node.k)
        self.act_scale = np.float32(decode(weights[f"{path}.act_scale"])[0, 0])
        self.limit = largest_input(self.weights_NK(), self.act, path)

    def weights_NK(self) -> np.ndarray:
        """The matrix int32 [N, K] in units of its row scales."""
        format = self.packed.format
        assert isinstance(format, PairFormat)
        return pairs.integers_of(pairs.parts_of(self.packed)[0], format)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.act_scale.nbytes

    def inputs_TK(self, x_TK: np.ndarray) -> np.ndarray:
        """Activations float32 [T, K] as int32 in units of their scale."""
        x = np.clip(x_TK / self.act_scale, -self.limit, self.limit)
        return pairs.integers_of(pairs.pair_codes(x, self.act, self.both), self.act)

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = self.inputs_TK(np.ascontiguousarray(x_TK.float().numpy()))
        sums_TN = integer_product(x, self.weights_NK())
        _, scale_N1 = pairs.parts_of(self.packed)
        return added(sums_TN * (scale_N1[:, 0] * self.act_scale), x_TK.dtype, bias)


def largest_input(w_NK: np.ndarray, act: PairFormat, path: str) -> np.float32:
    """The largest activation value, normal or outlier, with which no sum of a row of integers `w_NK` can leave int32.

    Raises:
        SpecError: not even the largest normal value fits.
    """
    normal, wide = act.tables
    rows = int(np.abs(w_NK.astype(np.int64)).sum(axis=1).max(initial=1))
    allowed = [v for v in (max(normal), *wide) if 0 < v <= min(pairs.OUTLIER_LIMIT, _INT32_MAX // max(rows, 1))]
    if max(normal) not in allowed:
        raise SpecError(
            f"{path}: sums of K={w_NK.shape[1]} products of {act.bits}-bit activations may leave int32: the codes of a row sum to "
            f"{rows}, times {max(normal)} is more than {_INT32_MAX}. Use abits=4, or wbits=4."
        )
    return np.float32(max(allowed))


def integer_product(x_TK: np.ndarray, w_NK: np.ndarray) -> np.ndarray:
    """Return int32 [T, N] = x @ w.T of int32 matrices whose sums fit int32, by products in int8 of their digits."""
    total = np.zeros((len(x_TK), len(w_NK)), np.int32)
    right = list(_digits(w_NK))
    for i, codes in _digits(x_TK):
        for j, data in right:
            total += int8_product(data, codes, torch.get_num_threads()) << (
                _DIGIT * (i + j)
            )  # wraps on the way at most
    return total


def _digits(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(place, int8 digits) in radix 128, -64..63; places of zeros alone are left out."""
    half, place = 1 << (_DIGIT - 1), 0
    while values.any():
        digit = ((values + half) & (2 * half - 1)) - half
        if digit.any():
            yield place, digit.astype(np.int8)
        values, place = (values - digit) >> _DIGIT, place + 1
