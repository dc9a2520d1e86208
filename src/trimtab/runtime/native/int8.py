"""Matrices in int8 as the native program multiplies them: as their rows lie, outlier columns of the input apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trimtab.errors import UnsupportedModelError
from trimtab.runtime.kernels import _core
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import Int8Vector


def missing_int8(product: Int8Vector) -> str:
    """What of a product in int8 has no native kernel; empty = it has."""
    if product.granularity != "vector" or product.zeropoint:
        zero = " between minimum and maximum" if product.zeropoint else ""
        return f"A product in int8 with scales by {product.granularity}{zero}"
    return ""


def one_input(nodes: Mapping[str, LinearSpec]) -> Int8Vector | None:
    """How all of these matrices, which share an input, are multiplied in int8; None = none of them is.

    Raises:
        UnsupportedModelError: some are and others are not, or not in the same way.
    """
    kinds = {node.product if isinstance(node.product, Int8Vector) else None for node in nodes.values()}
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"Matrices that share an input, and code it differently for products in int8 ({', '.join(nodes)}), have no native kernel."
        )
    return kinds.pop()


def int8_name(name: str, matrices: set[str], product: Int8Vector) -> str:
    """A kernel's name with the ops that stand around each of its matrices, as `graph.build` names them."""
    before, behind = ("find+quantize", "dequantize+outliers") if product.decomposes else ("quantize", "dequantize")
    first, *rest = name.split("+")
    last = first.rpartition(".")[2]
    if last in matrices:  # nothing stands before the product
        first = f"{first}.{before}+{last}+{behind}"
    return "+".join([first, *(f"{before}+{part}+{behind}" if part in matrices else part for part in rest)])


def int8_matrix(
    path: str, node: LinearSpec, weights: Weights, buffers: dict[str, np.ndarray]
) -> tuple[_core.Int8Rows, int]:
    """Copy a matrix into `buffers`.

    Returns:
        Rows, scales and the 16-bit columns of outliers, if it has such; and the bytes of all.
    """
    packed = weights[path]
    for name, buffer in packed.buffers.items():
        buffers[name][...] = buffer
    columns, nbytes = None, packed.nbytes
    assert isinstance(node.product, Int8Vector)
    if node.product.columns_kept(node.k):
        kept = weights[f"{path}.outliers"].buffers["data"]
        columns, nbytes = kept.view(np.uint16), nbytes + kept.nbytes
    return (buffers["data"], buffers["scale"].reshape(-1), columns), nbytes
