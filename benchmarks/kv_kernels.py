"""Decode attention over pages of the cache: the forms of page the kernels read, one thread, SmolLM2-135M's 90 KV heads.

Usage: python benchmarks/kv_kernels.py [--tokens 8192] [--rounds 9] [--only NAME,NAME] [--isa NAME] [--json FILE]. The arms
take turns; seconds of the thread (other jobs of the machine do not count) and on the wall, bytes of pages read (as the
kernels meter them) and ratios to fp32 and bf16 of the same round go to benchmarks/results/kv_kernels.json. At 8192 tokens
fp32 pages are 377 MB and those of 2 bits 35 MB: none of them stays in a cache of 32 MB from one round to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.runtime import kernels
from trimtab.runtime.kernels import _core
from trimtab.runtime.memory import mapped

HERE = Path(__file__).resolve().parent
LAYERS, HEADS, KV_HEADS, SIZE, PAGE = 30, 9, 3, 64, 64
F32, F16, BF16, GRID, TILED_BF16, TILED_GRID = 0, 1, 2, 4, 8, 9
THIN = 39  # of 64 channels

Form = tuple[int, int, int, int, int]


def form(kind: int, bits: int = 0, group: int = 0, width: int = SIZE) -> Form:
    return kind, PAGE, width, bits, group


@dataclass(frozen=True)
class Arm:
    """Forms of keys and values; pieces of `piece` tokens of which `chosen` are read, or everything."""

    k: Form
    v: Form
    piece: int = 0
    chosen: float = 1.0


ARMS = {
    "fp32": Arm(form(F32), form(F32)),
    "bf16": Arm(form(BF16), form(BF16)),
    "fp16": Arm(form(F16), form(F16)),
    "int8": Arm(form(GRID, 8, 64), form(GRID, 8, 64)),
    "kivi 8 bits": Arm(form(TILED_GRID, 8, 32), form(GRID, 8, 32)),
    "kivi 4 bits": Arm(form(TILED_GRID, 4, 32), form(GRID, 4, 32)),
    "kivi 2 bits": Arm(form(TILED_GRID, 2, 32), form(GRID, 2, 32)),
    "think 39/64 bf16": Arm(form(TILED_BF16, width=THIN), form(BF16)),
    "think 39/64 4 bits": Arm(form(TILED_GRID, 4, 32, THIN), form(GRID, 4, 32)),
    "quest 25 % bf16": Arm(form(BF16), form(BF16), 16, 0.25),
}


def bytes_of(form: Form) -> int:
    """Bytes of a page, in whole cache lines."""
    kind, page, width, bits, group = form
    items = {F32: 4, F16: 2, BF16: 2, TILED_BF16: 2}
    if kind in items:
        used = page * width * items[kind]
    elif kind == GRID:
        used = page * (-(-width * bits // 8) + 4 * -(-width // group))
    else:
        used = page * -(-width * bits // 8) + 4 * width * page // group
    return -(-used // 64) * 64


class Cache:
    """Pages of all heads in one order of memory, and a program that attends to them."""

    def __init__(self, arm: Arm, tokens: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        heads, pages = LAYERS * KV_HEADS, -(-tokens // PAGE)
        self.records = np.zeros((LAYERS, 1, KV_HEADS, 16), np.int64)
        self.kept: list[np.ndarray] = []
        coded = arm.k[0] == TILED_GRID or arm.k[2] < SIZE
        for field, kind in enumerate((arm.k, arm.v)):
            room = mapped(heads * pages * bytes_of(kind) + 64)  # huge pages, as the store takes them
            start = room.ctypes.data + -room.ctypes.data % 64
            table = (start + np.arange(heads * pages) * bytes_of(kind)).reshape(heads, pages)
            for first in range(0, heads, 9):
                x = rng.standard_normal((9, pages * PAGE, kind[2]), dtype=np.float32)
                assert _core.encode_pages(kind, table[first : first + 9], 0, x)
            self.records[:, 0, :, 2 * coded + field] = (table.ctypes.data + np.arange(heads) * table[0].nbytes).reshape(
                LAYERS, KV_HEADS
            )
            self.kept += [room, table]
        self.records[..., 4], self.records[..., 14] = tokens, tokens - 1
        if coded:
            self.records[..., 5:9] = tokens
        if arm.k[2] < SIZE:
            channels = np.sort(rng.permutation(SIZE)[: arm.k[2]]).astype(np.uint8)
            self.records[..., 9] = channels.ctypes.data
            self.kept.append(channels)
        if arm.piece:
            count = -(-tokens // arm.piece)
            for record in self.records.reshape(-1, 16):
                pieces = np.sort(rng.permutation(count)[: round(arm.chosen * count)]).astype(np.int32)
                record[11:14] = pieces.ctypes.data, len(pieces), arm.piece
                self.kept.append(pieces)
        forms = (form(F32), form(F32), arm.k, arm.v, 0, 0) if coded else (arm.k, arm.v, None, None, 0, 0)
        self.program = _core.Program(1)
        self.source = self.program.values((HEADS + 2 * KV_HEADS) * SIZE, False)
        self.out = self.program.values(HEADS * SIZE, False)
        for layer in range(LAYERS):
            self.program.attend_heads(
                "attend", layer, self.source, self.out, -1, HEADS, KV_HEADS, SIZE, 0,
                [forms] * KV_HEADS, None, None, SIZE**-0.5, 0.0, None, False,
            )  # fmt: skip
        self.x = rng.standard_normal((1, (HEADS + 2 * KV_HEADS) * SIZE), dtype=np.float32)
        self.y = np.empty((1, HEADS * SIZE), np.float32)
        self.past = np.array([tokens - 1])

    def run(self) -> tuple[float, float]:
        """Seconds of one pass on the wall, and of this thread."""
        start = time.thread_time()
        seconds = self.program.run_on(np.array([0, 1]), self.past, self.records, self.source, self.x, self.out, self.y)
        return seconds, time.thread_time() - start

    @property
    def bytes_read(self) -> int:
        return sum(row[2] for row in self.program.metered())


def spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def measure(names: list[str], tokens: int, rounds: int) -> dict[str, Any]:
    caches = {name: Cache(ARMS[name], tokens) for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    thread: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, cache in caches.items():
            seconds, busy = cache.run()
            if turn:
                wall[name].append(seconds)
                thread[name].append(busy)
    found: dict[str, Any] = {}
    for name, cache in caches.items():
        taken = np.array(thread[name])
        row = {"wall_s": spread(np.array(wall[name])), "thread_s": spread(taken), "kv_read": cache.bytes_read}
        row["bytes_per_s"] = spread(cache.bytes_read / taken)
        for base in ("fp32", "bf16"):
            if base in thread:
                row[f"{base}_over_this"] = spread(np.array(thread[base]) / taken)
                row[f"{base}_bytes_over_these"] = caches[base].bytes_read / cache.bytes_read
        found[name] = row
    return found


def show(found: dict[str, Any]) -> None:
    names = ("ms", "p10", "p90", "wall", "MB", "GB/s", "fp32/", "bytes", "bf16/", "bytes")
    print(f"{'pages':<22}" + "".join(f"{name:>8}" for name in names))
    for name, row in found.items():
        ms = [1e3 * row["thread_s"][key] for key in ("median", "p10", "p90")]
        numbers = [*ms, 1e3 * row["wall_s"]["median"], row["kv_read"] / 1e6, row["bytes_per_s"]["median"] / 1e9]
        for base in ("fp32", "bf16"):
            if f"{base}_over_this" in row:
                numbers += [row[f"{base}_over_this"]["median"], row[f"{base}_bytes_over_these"]]
        print(f"{name:<22}" + "".join(f"{number:8.2f}" for number in numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(ARMS))
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "kv_kernels.json")
    args = parser.parse_args()
    kernels.use_isa(args.isa)
    found = measure(args.only.split(","), args.tokens, args.rounds)
    show(found)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "commit": commit, "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "isa": kernels.isa(),
        "threads": 1, "rounds": args.rounds, "warm_up": 1, "tokens": args.tokens, "load": os.getloadavg()[0], "arms": found,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
