"""Weights as codes of a table of values: the table is found by k-means on a line.

Where rows hold no more distinct fp16 values than the table has places, nothing is lost. Otherwise Lloyd's iteration starts from
evenly spaced quantiles; on a line it needs a sorted list and its running sums only, so a step costs one search per value of the
table. Values are rounded to fp16 before weights are assigned to them, ties to the lower.

Source: Cho et al., eDKM, arXiv 2309.00964, section 2; Lloyd, Least Squares Quantization in PCM, 1982.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.floats import float16
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.sparse import PaletteFormat

#: Most steps of Lloyd's iteration; it ends when no boundary moves.
_STEPS = 100


def encode(values: np.ndarray, format: PaletteFormat) -> dict[str, np.ndarray]:
    """Cluster and code float32 [rows, cols].

    Returns:
        The buffers of ``format.buffers(rows, cols)``.

    Raises:
        SpecError: a value is not finite or too large for fp16.
    """
    step = format.rows or len(values)
    tables = [palette(values[start : start + step], 1 << format.bits) for start in range(0, len(values), step)]
    return encode_palette_with(values, format, np.stack(tables))


def encode_palette_with(values: np.ndarray, format: PaletteFormat, tables: np.ndarray) -> dict[str, np.ndarray]:
    """Code float32 [rows, cols] with given tables, [tables, 2**bits] in ascending order; they are rounded to fp16."""
    from trimtab.runtime.kernels import pack_codes

    stored = float16(tables)
    codes = np.empty(values.shape, np.uint8)
    step = format.rows or len(values)
    for index, table in enumerate(stored.astype(np.float64)):
        part = slice(index * step, (index + 1) * step)
        codes[part] = np.searchsorted((table[:-1] + table[1:]) / 2, values[part])
    return {"codes": pack_codes(codes, format.bits), "table": stored}


def palette(values: np.ndarray, count: int) -> np.ndarray:
    """The table of `count` ascending values, float32, that serves float32 `values` of any shape.

    Raises:
        SpecError: a value is not finite or too large for fp16.
    """
    if not np.isfinite(values).all():
        raise SpecError("palette: a weight is not finite. Keep this matrix in floats.")
    distinct = np.unique(float16(values))
    if len(distinct) <= count:
        return np.concatenate((distinct, np.repeat(distinct[-1:], count - len(distinct)))).astype(np.float32)
    ordered = np.sort(values.reshape(-1)).astype(np.float64)
    sums = np.concatenate(([0.0], np.cumsum(ordered)))
    table = ordered[((np.arange(count) + 0.5) / count * len(ordered)).astype(np.intp)]
    ends = None
    for _ in range(_STEPS):
        inner = np.searchsorted(ordered, (table[:-1] + table[1:]) / 2, side="right")
        found = np.concatenate(([0], inner, [len(ordered)]))
        if ends is not None and np.array_equal(found, ends):
            break
        ends = found
        sizes = np.diff(ends)
        table = np.where(sizes > 0, np.diff(sums[ends]) / np.maximum(sizes, 1), table)
        table.sort()
    return table.astype(np.float32)


def decode(packed: Packed, out: np.ndarray) -> None:
    """Write the values of a matrix into `out`, float32 [rows, cols]."""
    from trimtab.runtime.kernels import unpack_codes

    assert isinstance(packed.format, PaletteFormat)
    step = packed.format.rows or packed.shape[0]
    for index, table in enumerate(packed.buffers["table"].astype(np.float32)):
        part = slice(index * step, (index + 1) * step)
        out[part] = table[unpack_codes(packed.buffers["codes"][part], packed.format.bits, packed.shape[1])]
