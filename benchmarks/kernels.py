"""Kernels of trimtab.runtime.kernels against torch doing the same the plain way; interleaved rounds, one machine.

Usage: python benchmarks/kernels.py [--threads 1] [--rounds 15]. Prints a table and writes benchmarks/results/kernels.json.
Predicted: bytes the kernel reads and writes over the bandwidth of a plain sum over 256 MB, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trimtab.runtime import kernels
from trimtab.runtime.kernels import IntRows, reference
from trimtab.spec.formats import GGUF_BLOCKS

HERE = Path(__file__).resolve().parent


def quantiles(seconds: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(seconds, (0.1, 0.5, 0.9))
    return {"median_s": float(median), "p10_s": float(low), "p90_s": float(high)}


def interleaved(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Run every arm once per round, in turn; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: quantiles(values) for name, values in seconds.items()}


def dequantization(rng: np.random.Generator) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """16 Mi elements of each block format to float32."""
    arms: dict[str, Callable[[], object]] = {}
    moved = {}
    out = np.empty(2**24, np.float32)
    for kind, (elements, nbytes) in GGUF_BLOCKS.items():
        blocks = rng.integers(0, 128, 2**24 // elements * nbytes, dtype=np.uint8)
        arms[f"dequantize {kind}"] = lambda kind=kind, blocks=blocks: kernels.dequantize_gguf(kind, blocks, out)
        moved[f"dequantize {kind}"] = blocks.nbytes + out.nbytes
    return arms, moved


def products(rng: np.random.Generator, threads: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """One token times a 4096 x 4096 matrix in 4 bits, and torch after decoding it or with it decoded beforehand."""
    n = k = 4096
    codes = kernels.pack_codes(rng.integers(0, 16, (n, k), dtype=np.uint8), 4)
    w = IntRows(codes, rng.uniform(0, 0.1, (n, k // 32)).astype(np.float16), None, 4, 32)
    x = rng.standard_normal((1, k), dtype=np.float32)
    dense, x_torch = torch.from_numpy(reference.decode(w).astype(np.float32)), torch.from_numpy(x)
    scale = torch.from_numpy(w.scale)

    def decode_then_matmul() -> torch.Tensor:
        unpacked = torch.from_numpy(kernels.unpack_codes(codes, 4, k)).view(n, -1, 32).float() - 8
        return x_torch @ (unpacked * scale[:, :, None].float()).view(n, k).T

    nbytes = codes.nbytes + w.scale.nbytes
    arms = {
        "int4 gemv": lambda: kernels.int_gemv(x, w, threads),
        "int4 gemv, transposed": lambda: kernels.int_gemv_t(x, w, threads),
        "torch, decode then matmul": decode_then_matmul,
        "torch, float32 matmul": lambda: x_torch @ dense.T,
    }
    return arms, dict(zip(arms, (nbytes, nbytes, nbytes + 2 * dense.nbytes, dense.nbytes), strict=True))


def gated_ffn(rng: np.random.Generator, threads: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """Row-skipping FFN of Mistral-7B's shape, float32, one token, and torch dense."""
    gate, up, down_t = (rng.standard_normal((14336, 4096), dtype=np.float32) / 64 for _ in range(3))
    x = rng.standard_normal((1, 4096), dtype=np.float32)
    magnitudes = np.abs(reference.activate("silu", x @ gate.T))
    arms: dict[str, Callable[[], object]] = {}
    moved = {}
    for sparsity in (0.0, 0.5, 0.7, 0.9):
        threshold = float(np.quantile(magnitudes, sparsity)) if sparsity else -1.0
        name = f"gate_first, {sparsity:.0%} dropped"
        arms[name] = lambda t=threshold: kernels.gate_first(x, gate, up, down_t, threshold=t, threads=threads)
        moved[name] = sum(kernels.gate_first(x, gate, up, down_t, threshold=threshold, threads=threads).bytes_read)
    g, u, d, x_torch = (torch.from_numpy(a) for a in (gate, up, down_t, x))
    arms["torch, dense FFN"] = lambda: (torch.nn.functional.silu(x_torch @ g.T) * (x_torch @ u.T)) @ d
    moved["torch, dense FFN"] = 3 * gate.nbytes
    return arms, moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)

    stream = torch.ones(2**26)
    noise = interleaved({"first": stream.sum, "second": stream.sum}, options.rounds)
    bandwidth = stream.nbytes / noise["first"]["median_s"]
    rows = []
    for arms, moved in (dequantization(rng), products(rng, options.threads), gated_ffn(rng, options.threads)):
        for name, measured in interleaved(arms, options.rounds).items():
            rows.append({"name": name, "bytes": moved[name], "predicted_s": moved[name] / bandwidth, **measured})

    spread = abs(noise["first"]["median_s"] / noise["second"]["median_s"] - 1)
    print(
        f"{bandwidth / 1e9:.1f} GB/s, {options.threads} threads, {kernels.isa()}; the same run twice differs by {spread:.1%}"
    )
    print(f"{'':28}{'MB':>8}{'predicted ms':>14}{'median ms':>11}{'p10':>8}{'p90':>8}")
    for row in rows:
        times = (
            f"{row[key] * 1e3:{width}.2f}"
            for key, width in (("predicted_s", 14), ("median_s", 11), ("p10_s", 8), ("p90_s", 8))
        )
        print(f"{row['name']:28}{row['bytes'] / 1e6:8.1f}{''.join(times)}")

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    about = {
        "commit": commit,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    result = {
        **about,
        "versions": versions,
        "threads": options.threads,
        "isa": kernels.isa(),
        "warm_up": 2,
        "rounds": options.rounds,
    }
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps({**result, "bandwidth_bytes_per_s": bandwidth, "noise": noise, "rows": rows}, indent=1)
    (HERE / "results" / "kernels.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
