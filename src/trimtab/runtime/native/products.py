"""Which kernel multiplies a matrix, in which layout the matrix is held for it, and the product itself outside a program.

Legend: T tokens, N rows, K columns of a matrix.
"""

from __future__ import annotations

import functools
import math
import time

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.kernels import _core, use_isa
from trimtab.runtime.native.timings import processor, settled
from trimtab.runtime.numerics.lookup import encode_ternary, grid_format, lay_out
from trimtab.runtime.numerics.tiles import tile, tiled_format
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import LOOKUP_KINDS, SUPER_BLOCKS, TILE_ROWS, UNIT_COLS, WeightFormat
from trimtab.spec.grids import GridFormat, PairFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.machine import home
from trimtab.spec.product import EXACT, TABLES, LookupTable, Product

#: Tokens up to which products are looked up; `lookup_tokens` of `cpp/native/program.cpp`.
LOOKUP_TOKENS = 8
_CODINGS = {
    "fp32": 0, "fp16": 1, "bf16": 2, "int": 3, "ternary": 4, "bitplane": 5, "bitlane": 6, "grid": 7, "pair": 8,
}  # fmt: skip
_SCALES = {"q4_k": 1, "q5_k": 1, "q6_k": 2, "int8": 3, "e8m0": 4}
#: Elements of the matrix two kernels are timed on, and runs of each: rows are left out beyond, which are all alike.
_TIMED, _RUNS = 1 << 22, 7


def _padded(cols: int) -> int:
    return -(-cols // UNIT_COLS) * UNIT_COLS


def tiles_of(format: WeightFormat, product: Product, rows: int, cols: int) -> WeightFormat:
    """The format in which a product reads a matrix [rows, cols] that is stored in `format`.

    Raises:
        SpecError: the format has no tiles, or none that the product can use.
    """
    if format.kind == "int8":  # multiplied as its rows lie
        return format
    if not isinstance(product, LookupTable):
        return format if format.kind in LOOKUP_KINDS else tiled_format(format, cols)
    if format.kind == "ternary":
        if product.isa != "auto":
            use_isa(product.isa)
        vnni = kernel_of(format, product, rows, cols) == "vnni"
        return grid_format(format, "int") or format if vnni else format
    planes, ints = grid_format(format, "bitplane"), grid_format(format, "int")
    if planes is None or ints is None:
        raise SpecError(
            f"A matrix in {format} has no product by table lookup. Those with one: 1 to 4 bits in groups, ternary."
        )
    planes.buffers(rows, cols)  # refuses groups that do not fit
    if product.isa != "auto":
        use_isa(product.isa)
    if kernel_of(planes, product, rows, cols) == "vnni":
        ints.buffers(rows, cols)
        return ints
    group, table = (_padded(cols) if size in (0, cols) else size for size in (planes.group, product.act_group))
    lanes = product.table != "f32" and not product.fast_agg and math.gcd(group, table) % UNIT_COLS == 0
    return grid_format(format, "bitlane") or planes if lanes and _core.isa() == "avx512" else planes


def stored_for(packed: Packed, node: LinearSpec, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """A matrix as its product reads it; codes and scales are not changed."""
    return as_tiles(packed, tiles_of(packed.format, node.product, *packed.shape), buffers)


def as_tiles(packed: Packed, format: WeightFormat, buffers: dict[str, np.ndarray] | None = None) -> Packed:
    """Store a matrix in tiles of `format`, which `tiles_of` found for it."""
    if packed.format == format:
        if buffers is None:
            return packed
        for name, buffer in packed.buffers.items():
            buffers[name][...] = buffer
        return Packed(format, packed.shape, buffers)
    kinds = {packed.format.kind, format.kind}
    if kinds & {*LOOKUP_KINDS} or kinds == {"grid", "int"}:
        return lay_out(packed, format.kind, buffers)
    return tile(packed, buffers)


def core_tiles(packed: Packed, product: Product = EXACT) -> _core.Tiles:
    """The tiled matrix as the kernels take it."""
    format, (rows, cols) = packed.format, packed.shape
    flat = {name: buffer.reshape(-1).view(np.uint8) for name, buffer in packed.buffers.items()}
    if format.is_float:
        return _core.tiles(_CODINGS[format.kind], 0, 0, rows, cols, 0, flat["data"], None, None, None)
    bits, group, _ = SUPER_BLOCKS.get(format.kind, (format.bits, format.group, False))
    if group == cols and format.kind != "ternary":  # one scale a row: it holds for the padding too
        group = _padded(cols)
    if isinstance(format, GridFormat | PairFormat):
        return _looked_up(format, rows, cols, group, flat)
    entry, act_group, fast = 0, 0, False
    if isinstance(product, LookupTable):
        entry, act_group, fast = TABLES.index(product.table), product.act_group, product.fast_agg
    return _core.tiles(
        _CODINGS.get(format.kind, 3), _SCALES.get(format.kind, 0), bits, rows, cols, group, flat["codes"], flat["scale"],
        flat.get("minimum"), flat.get("sub"), entry, 0 if act_group >= _padded(cols) else act_group, fast,
    )  # fmt: skip


def _looked_up(
    format: GridFormat | PairFormat, rows: int, cols: int, group: int, flat: dict[str, np.ndarray]
) -> _core.Tiles:
    """Tiles whose codes stand for the values of tables; see `Grid` of `cpp/native/tiles.h`."""
    grid = isinstance(format, GridFormat)
    scale = format.scale if grid else "fp16"
    own = flat["scale"] if scale == "fp16" else flat.get("step")
    sub = None if scale == "fp16" else flat["scale"]
    bipolar = grid and format.grid == "bipolar"  # the integers' own kernel, with a zero between two codes
    values = None if bipolar else np.array(format.tables, np.int32)
    return _core.tiles(
        _CODINGS["int" if bipolar else format.kind], _SCALES.get(scale, 0), format.bits, rows, cols, group, flat["codes"],
        own, None, sub, bipolar=bipolar, values=values, choice=flat.get("choice"),
    )  # fmt: skip


def multiply(packed: Packed, product: Product, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return y [T, N] = x [T, K] @ W.T for a matrix as `stored_for` made it.

    Args:
        packed: W.
        product: how it is multiplied.
        x: float32, contiguous. More than `LOOKUP_TOKENS` tokens are multiplied with the decoded matrix.
        threads: workers.
    """
    y = np.empty((len(x), packed.shape[0]), np.float32)
    _core.multiply(core_tiles(packed, product), x, threads, y)
    return y


def kernel_of(planes: WeightFormat, product: LookupTable, rows: int, cols: int) -> str:
    """``lut`` or ``vnni`` for a matrix; ``auto`` times both once per processor, instruction set, format and shape."""
    if product.kernel != "auto":
        return product.kernel
    if product.table != "i8" or product.fast_agg:
        return "lut"  # asked for by name: the other kernel has neither
    ints = grid_format(planes, "int")
    try:
        assert ints is not None
        ints.buffers(rows, cols)
    except SpecError:
        return "lut"
    return _fastest(
        planes, product, min(rows, max(TILE_ROWS, _TIMED // cols // TILE_ROWS * TILE_ROWS)), cols, _core.isa()
    )


@functools.cache
def _fastest(planes: WeightFormat, product: LookupTable, rows: int, cols: int, isa: str) -> str:
    def find() -> str:
        found = time_kernels(planes, product, rows, cols)
        return min(found, key=lambda name: found[name])

    key = f"{processor()}|{isa}|{planes}|act{product.act_group}|{rows}x{cols}"
    return settled(home() / "kernels.json", key, lambda kept: kept in ("lut", "vnni"), find)


def time_kernels(planes: WeightFormat, product: LookupTable, rows: int, cols: int) -> dict[str, float]:
    """Seconds of one product with one token on one thread by each kernel: the best of a few runs in turn."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, cols), dtype=np.float32)
    made: dict[str, Packed] = {}
    if planes.kind == "ternary":  # whose bytes are not codes at random
        stored = encode_ternary(rng.standard_normal((rows, cols), dtype=np.float32), planes)
    else:
        wanted = planes.buffers(rows, cols)
        buffers = {b.name: rng.integers(0, 256, b.shape, np.uint8) for b in wanted if b.dtype == "u8"}
        scales = {b.name: np.full(b.shape, 0.01, np.float16) for b in wanted if b.dtype == "fp16"}
        stored = Packed(planes, (rows, cols), buffers | scales)
    for kernel in ("lut", "vnni"):
        asked = LookupTable(act_group=product.act_group, kernel=kernel)
        made[kernel] = as_tiles(stored, tiles_of(planes, asked, rows, cols))
    best = dict.fromkeys(made, math.inf)
    for _ in range(_RUNS):
        for kernel, packed in made.items():
            start = time.perf_counter()
            multiply(packed, LookupTable(act_group=product.act_group), x)
            best[kernel] = min(best[kernel], time.perf_counter() - start)
    return best
