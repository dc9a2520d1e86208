"""How a linear layer multiplies: one rule for each class of `spec.product`, found by name when it is first needed.

Legend: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import numpy as np
import torch

from trimtab.model.tensors import float_tensor, linear
from trimtab.runtime.kernels import IntRows, int_gemv, int_gemv_t
from trimtab.runtime.numerics import decode
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import BitSerial, ExponentInteger, Int8Vector, Lmul, LookupTable, Product, Rounded

#: Tokens up to which an integer matrix is multiplied in its packed form; above, decoding it once is cheaper.
PACKED_TOKENS = 8


class Rule(Protocol):
    """The product with one matrix; built once from its weight path, its node and the weights, side weights included.

    Attributes:
        packed: the matrix as it is held.
    """

    packed: Packed

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads: the matrix and what stands beside it, without the bias."""
        ...

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return [T, N] in the dtype of the input."""
        ...

    def meter(self, record: Recorder, path: str, flops: int, bias_nbytes: int) -> None:
        """Tell what the last call did; `flops` are those of the whole product."""
        ...


#: Class of the product -> ``module:class`` of its rule.
RULES: dict[type[Product], str] = {
    Product: "trimtab.model.products:Exact",
    LookupTable: "trimtab.model.products:Lookup",
    Lmul: "trimtab.model.lmul:Approximate",
    Rounded: "trimtab.model.lmul:Approximate",
    BitSerial: "trimtab.model.bitserial:BitSerialProduct",
    ExponentInteger: "trimtab.model.integers:ExponentIntegers",
    Int8Vector: "trimtab.model.int8:VectorInt8",
}


def rule_of(path: str, node: LinearSpec, weights: Weights) -> Rule:
    """Build the rule of a matrix."""
    module, _, name = RULES[type(node.product)].partition(":")
    return getattr(importlib.import_module(module), name)(path, node, weights)


def int_rows(packed: Packed) -> IntRows:
    """The stored rows of an integer matrix as the kernels take them."""
    buffers, form = packed.buffers, packed.format
    return IntRows(buffers["codes"], buffers["scale"], buffers.get("minimum"), form.bits, form.group)


class Exact:
    """The product with the values of the matrix."""

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        self.packed = self.laid_out(weights[path], node)

    def laid_out(self, packed: Packed, node: LinearSpec) -> Packed:
        """The matrix as the kernel of the product reads it."""
        del node
        return packed

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed, form = self.packed, self.packed.format
        transposed = packed.layout == "transposed"
        if form.kind == "int" and not form.tiled and x_TK.shape[0] <= PACKED_TOKENS:
            kernel = int_gemv_t if transposed else int_gemv
            x = np.ascontiguousarray(x_TK.float().numpy())
            return added(kernel(x, int_rows(packed), torch.get_num_threads())[0], x_TK.dtype, bias)
        stored = float_tensor(packed) if form.is_float else torch.from_numpy(decode(packed))
        stored = stored.to(x_TK.dtype)
        return linear(x_TK, stored.T if transposed else stored, bias)

    def meter(self, record: Recorder, path: str, flops: int, bias_nbytes: int) -> None:
        record.op(path, flops=flops, weight_read=self.nbytes + bias_nbytes)


class Lookup(Exact):
    """Few tokens by table lookup, many with the decoded matrix."""

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        super().__init__(path, node, weights)
        assert isinstance(node.product, LookupTable)
        self.product = node.product

    def laid_out(self, packed: Packed, node: LinearSpec) -> Packed:
        from trimtab.runtime.native.products import stored_for

        return stored_for(packed, node)

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x_TK.shape[0] > PACKED_TOKENS:
            return super().__call__(x_TK, bias)
        from trimtab.runtime.native.products import multiply

        x = np.ascontiguousarray(x_TK.float().numpy())
        threads = self.product.threads or torch.get_num_threads()
        return added(multiply(self.packed, self.product, x, threads), x_TK.dtype, bias)


def added(y_TN: np.ndarray, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    """The result of a kernel as a tensor, with the bias on it."""
    y = torch.from_numpy(y_TN).to(dtype)
    return y if bias is None else y + bias
