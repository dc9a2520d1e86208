"""Counts of products with int8 inputs: what codes the input, what scales the sums, and the outlier columns apart.

They are ops of their own, since each reads and writes memory: that, not the product, is why int8 loses where matrices are small.

Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, appendix on speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.graph.attention import DEQUANT
from trimtab.graph.ops import Counts, Op, StepShape
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import Int8Vector


def is_coded(node: LinearSpec) -> bool:
    """Whether the product of a matrix is in int8 with ops before and behind it."""
    return isinstance(node.product, Int8Vector)


def product_counts(op: Op, step: StepShape) -> Counts:
    """The product in int8 itself; none where every column holds an outlier."""
    node: Any = op.node
    rows = step.rows(op.writes[0].rows)
    product: Int8Vector = node.product
    used = (rows > 0) & (_outliers(product, node.k, f"{op.name}.outliers", step) < node.k)
    nbytes = node.format.nbytes(*node.stored_shape)
    return Counts(flops=2 * rows * node.n * node.k * used, weight_read=np.where(used, nbytes, 0)[()])


def find(op: Op, step: StepShape, how: Any) -> Counts:
    """A look at every value of the input before any of it can be coded."""
    return Counts(vector_flops=2 * step.rows(op.reads[0].rows) * op.reads[0].width)


def quantize(op: Op, step: StepShape, how: Any) -> Counts:
    """The largest value of a row, then its codes."""
    return Counts(vector_flops=DEQUANT * step.rows(op.reads[0].rows) * op.reads[0].width)


def dequantize(op: Op, step: StepShape, how: Any) -> Counts:
    """Sums times two scales, and the bias."""
    node: Any = op.node
    rows = step.rows(op.writes[0].rows)
    bias = node.bias_format.nbytes(1, node.n) if node.bias else 0
    return Counts(vector_flops=(2 + node.bias) * rows * node.n, weight_read=np.where(rows > 0, bias, 0)[()])


def outliers(op: Op, step: StepShape, how: Any) -> Counts:
    """Columns observed, or as many as are expected, in 16-bit numbers or read once more from the codes.

    Their product is a matrix of its own, written and read again to be added.
    """
    node: Any = op.node
    product: Int8Vector = node.product
    rows = step.rows(op.writes[0].rows)
    found = _outliers(product, node.k, op.name, step)
    item = 2 if product.columns_kept(node.k) else 1
    between = rows * op.writes[0].row_bytes
    return Counts(
        flops=2 * rows * node.n * found,
        weight_read=np.where(rows > 0, item * node.n * found, 0)[()],
        act_read=between,
        act_written=between,
    )


def _outliers(product: Int8Vector, k: int, name: str, step: StepShape) -> int:
    return step.observed.get(name, product.outliers_expected(k))
