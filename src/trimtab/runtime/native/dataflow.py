"""Which kernel multiplies a matrix with T rows of input: measured once per shape and processor, looked up afterwards.

Legend: T rows of input, K inputs, N outputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.files import write_atomically
from trimtab.runtime.kernels import _core
from trimtab.runtime.native.timings import processor
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import PRODUCT_KERNELS
from trimtab.spec.machine import home

#: Rows of input from which a kernel never comes into play.
NEVER = 1 << 40
#: (rows from which the flat kernel multiplies, rows from which the decoding one does) that leave one kernel alone.
ONLY = {"gemv": (NEVER, NEVER), "flat": (1, NEVER), "gemm": (1, 1)}
#: Rows of input that are measured.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 15, 16, 20, 24, 32, 48, 64)
#: The matrices that take turns hold this much together, more than a last-level cache, as the weights of a model do.
_COLD_BYTES = 64 << 20
_COPIES, _REPEATS = 64, 15
#: A tile takes the same time whatever the rows of its matrix; more rows than these tell nothing new.
_MOST_ROWS = 4096


def profile_path() -> Path:
    """The table of this user: JSON, by processor, instruction set and threads, then by matrix."""
    return home() / "product-kernels.json"


def thresholds(n: int, k: int, format: WeightFormat, kernels: Sequence[str], threads: int) -> tuple[int, int]:
    """Rows of input from which the flat kernel, and from which the decoding one, multiplies W [n, k].

    Args:
        n, k, format: the tiled matrix.
        kernels: names of `PRODUCT_KERNELS` to choose among.
        threads: workers.

    Raises:
        SpecError: no kernel to choose among.
    """
    if not kernels:
        raise SpecError(f"No kernel is left for a matrix [{n}, {k}]. Allowed: {', '.join(PRODUCT_KERNELS)}.")
    if len(kernels) == 1:
        return ONLY[kernels[0]]
    return choose(profile(n, k, format, threads), kernels)


def profile(n: int, k: int, format: WeightFormat, threads: int) -> dict[str, list[float]]:
    """Seconds of every kernel for `ROWS` rows of input, from the table; measured where it has none.

    The first measurement of a process says so in one sentence on stderr.
    """
    where = f"{processor()} | {_core.isa()} | {threads} threads"
    matrix = f"[{n}, {k}] {format}"
    path = profile_path()
    table = _read(path)
    found = table.get(where, {}).get(matrix)
    if found is None or any(len(times) != len(ROWS) for times in found.values()):
        if where not in table:
            print(
                f"trimtab: no times of the product kernels are known for {where}; measuring them once, kept in {path}.",
                file=sys.stderr,
            )
        found = measure(n, k, format, threads)
        table = _read(path)
        table.setdefault(where, {})[matrix] = found
        write_atomically(path, json.dumps(table, indent=1))
    return found


def choose(times: Mapping[str, Sequence[float]], kernels: Sequence[str] = PRODUCT_KERNELS) -> tuple[int, int]:
    """The thresholds that lose least, at the number of rows where they lose most, against the best kernel of each.

    Args:
        times: seconds by kernel for `ROWS`.
        kernels: to choose among.
    """
    allowed = {name: np.asarray(times[name]) for name in kernels}
    best = np.min(list(allowed.values()), axis=0)
    ends = (*ROWS, NEVER)
    found: tuple[float, float, int, int] | None = None
    for i, flat in enumerate(ends):
        for decoded in ends[i:]:
            used = ["gemv" if t < flat else "flat" if t < decoded else "gemm" for t in ROWS]
            if not set(used) <= set(kernels):
                continue
            losses = np.array([allowed[name][at] for at, name in enumerate(used)]) / best
            loss = (round(float(losses.max()), 3), float(np.log(losses).sum()), flat, decoded)
            found = loss if found is None or loss < found else found
    assert found is not None
    return found[2], found[3]


def measure(
    n: int, k: int, format: WeightFormat, threads: int, rows: Sequence[int] = ROWS, repeats: int = _REPEATS
) -> dict[str, list[float]]:
    """Seconds of every kernel for each number of rows: the fastest of a few runs that take turns.

    Matrices of one shape take turns too, so that they come from where the weights of a model come from.
    """
    matrices = random_tiles(min(n, _MOST_ROWS), k, format)
    found: dict[str, list[float]] = {name: [] for name in PRODUCT_KERNELS}
    rng = np.random.default_rng(0)
    flows = [ONLY[name] for name in PRODUCT_KERNELS]
    for count in rows:
        x = rng.standard_normal((count, k), dtype=np.float32)
        for name, taken in zip(PRODUCT_KERNELS, _core.time_products(matrices, x, threads, flows, repeats), strict=True):
            found[name].append(min(taken))
    return found


def random_tiles(n: int, k: int, format: WeightFormat, cold_bytes: int = _COLD_BYTES) -> list[_core.Tiles]:
    """Matrices [n, k] of one content, as many as hold `cold_bytes` together (at most 64)."""
    from trimtab.runtime.native.lower import core_tiles

    rng = np.random.default_rng(0)
    buffers: dict[str, np.ndarray] = {}
    for buffer in format.buffers(n, k):
        dtype = NUMPY_DTYPES[buffer.dtype]
        if dtype == np.uint8:
            buffers[buffer.name] = rng.integers(0, 256, buffer.shape, dtype=np.uint8)
        elif buffer.dtype == "bf16":
            buffers[buffer.name] = (rng.standard_normal(buffer.shape, np.float32).view(np.uint32) >> 16).astype(
                np.uint16
            )
        else:
            buffers[buffer.name] = (rng.standard_normal(buffer.shape, np.float32) / 16).astype(dtype)
    first = Packed(format, (n, k), buffers)
    copies = min(max(1, -(-cold_bytes // first.nbytes)), _COPIES)
    made = [first] + [
        Packed(format, (n, k), {name: buffer.copy() for name, buffer in buffers.items()}) for _ in range(copies - 1)
    ]
    return [core_tiles(packed) for packed in made]


def _read(path: Path) -> dict[str, Any]:
    """The table; empty if there is none or it is damaged, which costs a measurement."""
    try:
        table = json.loads(path.read_text("utf-8"))
        return table if isinstance(table, dict) else {}
    except (OSError, ValueError):
        return {}
