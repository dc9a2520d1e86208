"""Bit-serial products: which kernel multiplies, and the product itself with what it writes.

Legend: T tokens, N rows, K columns of a matrix.
"""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.kernels import _core
from trimtab.runtime.native.timings import processor, settled
from trimtab.runtime.numerics.bipolar import unpack_planes
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.bipolar import BipolarPlanes
from trimtab.spec.machine import home
from trimtab.spec.product import BitSerial

#: Tokens at which the two kernels are timed, and most rows and runs of it.
_TOKENS, _ROWS, _RUNS = (1, 4, 16, 32, 64, 128), 512, 5
#: More tokens than there will be: counting bits was faster at every number that was timed.
NEVER = 1 << 30


class Written(NamedTuple):
    """Bytes that a product wrote, counted where they are stored.

    Args:
        product: by the kernel that multiplies.
        recovery: by a second pass that adds up what every pair of planes gave; 0 where the kernel does that itself.
    """

    product: int
    recovery: int


def multiply(packed: Packed, product: BitSerial, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """Return y float32 [T, N] = x [T, K] @ W.T with the tokens coded as the product says.

    Args:
        packed: W, in `BipolarPlanes`.
        product: how tokens are coded, and which kernel multiplies.
        x: float32 [T, K]; contiguous or not.
        threads: workers; the result does not depend on them.

    Raises:
        SpecError: x has another number of columns.
    """
    return metered(packed, product, x, threads)[0]


def metered(
    packed: Packed, product: BitSerial, x: np.ndarray, threads: int = 1, *, fused: bool = True
) -> tuple[np.ndarray, Written]:
    """As `multiply`, with the bytes written.

    Args:
        packed, product, x, threads: as there.
        fused: False writes an int32 matrix for every pair of planes and adds them up in a second pass, as a kernel without
            recovery in registers must: by counting bits, one scale a row. It exists to be compared with.
    """
    format, (rows, cols) = packed.format, packed.shape
    assert isinstance(format, BipolarPlanes)
    if x.ndim != 2 or x.shape[1] != cols:
        raise SpecError(f"x {list(x.shape)} does not go with a matrix of {cols} columns.")
    x = np.ascontiguousarray(x, np.float32)
    if not fused and format.group != cols:
        raise SpecError(f"{format}: parts are written for one scale a row alone. Use group=0.")
    if product.backend == "ref" and fused:
        y = reference(packed, product, x)
        return y, Written(y.nbytes, 0)
    y = np.empty((len(x), rows), np.float32)
    found = _core.bit_multiply(
        packed.buffers["planes"], packed.buffers["scale"].view(np.uint16), format.bits, cols, format.group, x, product.abits,
        product.clipped, fused and kernel_of(packed, product, len(x)) == "cpu-vnni", fused, threads, y,
    )  # fmt: skip
    return y, Written(*found)


def code(x: np.ndarray, product: BitSerial) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [T, K] and scales float32 [T] that the product gives to tokens, float32 [T, K]."""
    x = np.ascontiguousarray(x, np.float32)
    codes, scale = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    _core.code_bits(x, product.abits, product.clipped, codes, scale)
    return codes, scale


def reference(packed: Packed, product: BitSerial, x: np.ndarray) -> np.ndarray:
    """The product from decoded odd integers in int64; groups are added up in float64."""
    format, (rows, cols) = packed.format, packed.shape
    assert isinstance(format, BipolarPlanes)
    codes, scale = code(x, product)
    w = odd(unpack_planes(packed.buffers["planes"], format.bits, format.group, cols), format.bits)
    by_group = (cols // format.group, format.group)
    sums = np.einsum("tgk,ngk->tng", odd(codes, product.abits).reshape(-1, *by_group), w.reshape(rows, *by_group))
    weights = packed.buffers["scale"].astype(np.float32)
    if format.group == cols:
        return sums[:, :, 0].astype(np.float32) * weights[:, 0] * scale[:, None]
    return ((sums * weights.astype(np.float64)).sum(axis=2) * scale[:, None]).astype(np.float32)


def odd(codes: np.ndarray, bits: int) -> np.ndarray:
    """The odd integers int64 that bipolar codes stand for."""
    return 2 * codes.astype(np.int64) - (2**bits - 1)


def integers(
    planes: np.ndarray, bits: int, x: np.ndarray, abits: int, cols: int, backend: str = "cpu-popcnt"
) -> np.ndarray:
    """Sums of products of odd integers, int64 [T, N], from planes of one group, uint8 [N, bytes] and [T, bytes]."""
    out = np.empty((len(x), len(planes)), np.int64)
    _core.bit_integers(planes, bits, x, abits, cols, backend == "cpu-vnni", 1, out)
    return out


def kernel_of(packed: Packed, product: BitSerial, tokens: int) -> str:
    """``cpu-popcnt`` or ``cpu-vnni`` for a product with `tokens`; ``auto`` has timed both once on this processor."""
    if product.backend in ("cpu-popcnt", "cpu-vnni"):
        return product.backend
    assert isinstance(packed.format, BipolarPlanes)
    rows, cols = packed.shape
    return (
        "cpu-vnni"
        if tokens >= _bytes_from(packed.format, product.abits, min(rows, _ROWS), cols, _core.isa())
        else "cpu-popcnt"
    )


@functools.cache
def _bytes_from(format: BipolarPlanes, abits: int, rows: int, cols: int, isa: str) -> int:
    """Tokens from which multiplying bytes was faster."""

    def find() -> int:
        found = time_kernels(format, abits, rows, cols)
        return next((tokens for tokens, times in found.items() if times["cpu-vnni"] < times["cpu-popcnt"]), NEVER)

    key = f"{processor()}|{isa}|{format}|a{abits}|{rows}x{cols}"
    return settled(home() / "bitserial-kernels.json", key, lambda kept: isinstance(kept, int), find)


def time_kernels(format: BipolarPlanes, abits: int, rows: int, cols: int) -> dict[int, dict[str, float]]:
    """Seconds of a product on one thread by number of tokens and kernel: the best of a few runs in turn."""
    rng = np.random.default_rng(0)
    planes, scale = format.buffers(rows, cols)
    buffers = {"planes": rng.integers(0, 256, planes.shape, np.uint8), "scale": np.ones(scale.shape, np.float16)}
    packed = Packed(format, (rows, cols), buffers)
    found: dict[int, dict[str, float]] = {}
    for tokens in _TOKENS:
        x = rng.standard_normal((tokens, cols), dtype=np.float32)
        best: dict[str, float] = {"cpu-popcnt": math.inf, "cpu-vnni": math.inf}
        for _ in range(_RUNS):
            for backend in best:
                start = time.perf_counter()
                multiply(packed, BitSerial(abits=abits, backend=backend), x)
                best[backend] = min(best[backend], time.perf_counter() - start)
        found[tokens] = best
    return found
