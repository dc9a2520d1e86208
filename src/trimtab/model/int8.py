"""Products of int8 inputs with int8 rows, outlier columns of the input apart: the arithmetic that `spec.product.Int8Vector` means.

Legend: T tokens, K inputs, N outputs, O outlier columns.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from trimtab.errors import UnsupportedModelError
from trimtab.model.products import Exact
from trimtab.model.tensors import as_tensor, float_tensor
from trimtab.runtime.kernels import int8_product
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import Int8Vector

_MOST = 127.0


def outlier_columns(x_TK: torch.Tensor, product: Int8Vector) -> torch.Tensor:
    """Columns [O] of the input that hold an outlier in any row of this call, ascending; NaN is none."""
    if product.columns is not None:
        return torch.tensor(product.columns, dtype=torch.int64)
    return (x_TK.abs() >= product.threshold).any(0).nonzero()[:, 0]


def coded(x_TK: torch.Tensor, product: Int8Vector) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Code an input whose outlier columns are zero by now.

    Returns:
        Codes int8 [T, K]; what a unit of them stands for, fp32 [T, 1] or [1, 1], NaN where the input is not finite; and the
        zero points, integers in fp32 of the same shape, or None: ``x = unit * (code + zero)``.
    """
    over = (0, 1) if product.granularity == "tensor" else (1,)
    if product.zeropoint:
        low, high = (x_TK.amin(over, keepdim=True).clamp(max=0), x_TK.amax(over, keepdim=True).clamp(min=0))
        by = torch.where(high > low, 2 * _MOST / (high - low), 0.0)
        zero = torch.round(low * by) + _MOST
        units, codes = (high - low) / (2 * _MOST), torch.round(x_TK * by) - zero
    else:
        peak = x_TK.abs().amax(over, keepdim=True)
        by = torch.where(peak > 0, _MOST / peak, 0.0)
        zero, units, codes = None, peak / _MOST, torch.round(x_TK * by)
    strange = ~torch.isfinite(units)  # an int8 of NaN may be anything
    codes = torch.where(strange, 0.0, codes).clamp(-_MOST, _MOST)
    return codes.to(torch.int8), torch.where(strange, torch.nan, units), zero


class VectorInt8(Exact):
    """One matrix in int8 and, with ``source="fp"``, its columns in fp16.

    NaN and infinity in a row of the input make its outputs NaN, or what floats make of them in an outlier column.
    """

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        super().__init__(path, node, weights)
        assert isinstance(node.product, Int8Vector)
        self.product, self.path = node.product, path
        self.columns = weights[f"{path}.outliers"] if self.product.columns_kept(node.k) else None
        self.found = 0  # outlier columns of the last call

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.is_grad_enabled() and x_TK.requires_grad:
            raise UnsupportedModelError(
                f"{self.path} is held in int8, which has no gradient. Train LoRA adapters beside it, or load the model in floats."
            )
        x, n = x_TK.float(), self.packed.shape[0]
        listed = outlier_columns(x, self.product)
        self.found = len(listed)
        if self.found == x.shape[1]:
            warnings.warn(
                f"llm-int8: all {self.found} input columns of {self.path} hold outliers, so nothing is multiplied in int8. "
                "Try a higher threshold.",
                RuntimeWarning,
                stacklevel=2,
            )
            y = torch.zeros(len(x), n)
        elif len(x) == 0:
            y = torch.zeros(0, n)
        else:
            y = self._product(x if self.found == 0 else x.index_fill(1, listed, 0.0))
        if self.found:
            y = y + x[:, listed] @ self._outliers(listed)
        y = y.to(x_TK.dtype)
        return y if bias is None else y + bias

    def _product(self, x_TK: torch.Tensor) -> torch.Tensor:
        codes, units, zero = coded(x_TK, self.product)
        data = self.packed.buffers["data"]
        sums = torch.from_numpy(int8_product(data, codes.numpy(), torch.get_num_threads()))
        if zero is not None:  # exact: both terms are integers below 2^53
            rows = torch.from_numpy(data.sum(1, dtype=np.int64)).double()
            sums = sums.double() + torch.nan_to_num(zero).double() * rows
        scale = as_tensor(self.packed.buffers["scale"], "fp32").T
        return sums.float() * (units * scale)

    def _outliers(self, listed: torch.Tensor) -> torch.Tensor:
        """Columns of the matrix [O, N] by which outliers are multiplied."""
        if self.columns is not None:
            kept = float_tensor(self.columns)
            return (kept if self.product.columns is not None else kept[listed]).float()
        codes = torch.from_numpy(np.ascontiguousarray(self.packed.buffers["data"][:, listed.numpy()].T))
        return codes.float() * as_tensor(self.packed.buffers["scale"], "fp32").T

    def meter(self, record: Recorder, path: str, flops: int, bias_nbytes: int) -> None:
        """The search for outlier columns, codes of the rest, the product in int8, its scaling, and the product of the outliers."""
        (n, k), count = self.packed.shape, self.found
        used = count < k
        if self.product.decomposes:
            record.op(f"{path}.find")
        record.op(f"{path}.quantize")
        record.op(path, flops=flops * used, weight_read=self.packed.nbytes * used)
        record.op(f"{path}.dequantize", weight_read=bias_nbytes)
        if self.product.decomposes:
            item = 1 if self.columns is None else 2
            record.op(f"{path}.outliers", flops=flops // k * count, weight_read=item * n * count)
            record.observe(f"{path}.outliers", count)
