"""Products of tensors by L-Mul, or of rounded floats: matrices, batches of them, and element by element.

Gradients, where a product lets them flow (`ste`), are those of exact products.

Legend: T tokens, K terms of a sum, N outputs, G KV heads, M rows of a head's queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.products import Exact
from trimtab.model.tensors import float_tensor
from trimtab.runtime.kernels import lmul as kernels
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import EXACT, Lmul, Product, Rounded

Times = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def multiply(a: torch.Tensor, b: torch.Tensor, product: Lmul | Rounded) -> torch.Tensor:
    """Products element by element in the dtype of `a`; shapes broadcast.

    Raises:
        SpecError: tensors of integers or complex numbers, or gradients are wanted of a product without `ste`.
    """
    _check(a, b, product)
    return _Elements.apply(a, b, product)  # type: ignore[no-any-return]


def matmul(x_TK: torch.Tensor, w: torch.Tensor, product: Lmul | Rounded, *, transposed: bool = False) -> torch.Tensor:
    """Return [T, N] = x @ W.T in the dtype of `x`, for W [N, K], or [K, N] if `transposed`.

    Raises:
        SpecError: as `multiply`.
    """
    _check(x_TK, w, product)
    return _Matmul.apply(x_TK, w, product, transposed)  # type: ignore[no-any-return]


def times_of(product: Product) -> Times:
    """The product element by element that a node asks for.

    Raises:
        SpecError: the product is one of matrices alone.
    """
    if product == EXACT:
        return torch.mul
    return lambda a, b: multiply(a, b, _known(product))


def scaled_dots(q_GMH: torch.Tensor, k_GSH: torch.Tensor, scale: float, product: Product) -> torch.Tensor:
    """Scaled inner products of queries and keys [G, M, S]; scaling by a power of two is exact, by another number one more L-Mul."""
    if product == EXACT:
        return torch.matmul(q_GMH, k_GSH.transpose(1, 2)) * scale
    rule = _known(product)
    found = torch.stack([matmul(q_MH, k_SH, rule) for q_MH, k_SH in zip(q_GMH, k_GSH, strict=True)])
    if np.frexp(scale)[0] == 0.5:
        return found * scale
    return multiply(found, torch.tensor(scale, dtype=found.dtype), rule)


def mixed(weights_GMS: torch.Tensor, v_GSH: torch.Tensor, product: Product) -> torch.Tensor:
    """Sums of values by weights [G, M, H]."""
    if product == EXACT:
        return torch.matmul(weights_GMS, v_GSH)
    rule = _known(product)
    return torch.stack([matmul(w, v, rule, transposed=True) for w, v in zip(weights_GMS, v_GSH, strict=True)])


class Approximate(Exact):
    """The product of a linear layer with the values of its matrix, term by term as its `product` has it."""

    def __init__(self, path: str, node: LinearSpec, weights: Weights) -> None:
        super().__init__(path, node, weights)
        self.product = _known(node.product)

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed = self.packed
        stored = float_tensor(packed) if packed.format.is_float else torch.from_numpy(decode(packed))
        y_TN = matmul(x_TK, stored, self.product, transposed=packed.layout == "transposed")
        return y_TN if bias is None else y_TN + bias


def _known(product: Product) -> Lmul | Rounded:
    if not isinstance(product, Lmul | Rounded):
        raise SpecError(f"{type(product).__name__} is no product of two tensors of floats. Allowed: Lmul, Rounded.")
    return product


def _check(a: torch.Tensor, b: torch.Tensor, product: Lmul | Rounded) -> None:
    for tensor in (a, b):
        if not tensor.is_floating_point():
            raise SpecError(
                f"L-Mul adds the bits of floating-point numbers; a tensor of {str(tensor.dtype).removeprefix('torch.')} has none. "
                "Allowed: float32, bfloat16, float16. Convert it first."
            )
    if not product.ste and torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        raise SpecError("L-Mul has no gradient. ste=1 lets those of exact products flow; or run in torch.no_grad().")


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()


class _Elements(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, product: Lmul | Rounded) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        left, right = torch.broadcast_tensors(a, b)
        y = kernels.multiply(_array(left), _array(right), product, torch.get_num_threads())
        return torch.from_numpy(y).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (a, b) = grads, ctx.saved_tensors
        return (grad * b).sum_to_size(a.shape).to(a.dtype), (grad * a).sum_to_size(b.shape).to(b.dtype), None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: torch.Tensor, w: torch.Tensor, product: Lmul | Rounded, transposed: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TK, w)
        ctx.transposed = transposed
        y = kernels.matmul(_array(x_TK), _array(w), product, transposed=transposed, threads=torch.get_num_threads())
        return torch.from_numpy(y).to(x_TK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TN,), (x_TK, w) = grads, ctx.saved_tensors
        w_NK = w.T if ctx.transposed else w
        grad_w = grad_TN.to(w.dtype).T @ x_TK.to(w.dtype)
        grad_x = grad_TN @ w_NK.to(grad_TN.dtype)
        return grad_x, (grad_w.T if ctx.transposed else grad_w), None, None
