"""Decoding with every weight format of the native program on a random model of the 1b shape: does its time follow its bytes?

Usage: python benchmarks/formats.py [--threads 1|2] [--rounds 7] [--gen 17] [--formats 'int*;bitmod4'] [--layers 16] [--json FILE].
Without --threads it runs 1 and 2. Prints one line a format and writes benchmarks/results/formats.json.

The shape is that of benchmarks/decode.py: 16 layers, hidden size 2048, FFN 8192, 32000 words, 1.1 billion weights, untied. All
matrices, the embedding too, are random codes in groups of 128. Each format is timed in turn with int4, round by round in one
process, and its ratio is to the int4 of its own rounds. A step is the median of `gen` - 1 greedy ones behind a prompt of 8 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from decode import HERE, about, busy_seconds, spread

from trimtab.measure.calibrate_native import random_tiles
from trimtab.runtime import kernels
from trimtab.runtime.native import NativeModel, lower, lowered_spec
from trimtab.spec import tree
from trimtab.spec.configs import spec_from_config
from trimtab.spec.formats import WeightFormat
from trimtab.spec.grids import GridFormat, PairFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec

CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "num_hidden_layers": 16, "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
GROUP, WARM_UP = 128, 1
PROMPT = (1, 17, 91, 4, 1023, 777, 12, 5)


def formats() -> dict[str, WeightFormat]:
    """By the name that is printed; int4 is what the others are compared with."""
    found: dict[str, WeightFormat] = {
        f"int{bits}": WeightFormat(kind="int", bits=bits, group=GROUP) for bits in (4, 8, 3, 2)
    }
    grids = (("bitmod", 4), ("bitmod", 3), ("bipolar", 4), ("bipolar", 3), ("bipolar", 2), ("bipolar", 1), ("int", 8), ("int", 4),
             ("int", 3), ("int", 2), ("fp", 6), ("fp", 4), ("fp", 3), ("flint", 4), ("ant", 4))  # fmt: skip
    for grid, bits in grids:
        found[f"{'symmetric ' if grid == 'int' else ''}{grid}{bits}"] = GridFormat(grid=grid, bits=bits, group=GROUP)
    found["bitmod4, int8 scales"] = GridFormat(grid="bitmod", bits=4, group=GROUP, scale="int8")
    for normal, bits in (("int", 4), ("flint", 4), ("int", 8)):
        found[f"pair {normal}{bits}"] = PairFormat(normal=normal, bits=bits, group=GROUP)
    return found


def model(form: WeightFormat, threads: int, layers: int) -> NativeModel:
    """The 1b shape in one format."""
    spec = spec_from_config(CONFIG | {"num_hidden_layers": layers}, "llama-1b-random").with_dtype("float32")
    paths = [path for path, node in tree.walk(spec) if isinstance(node, LinearSpec | EmbeddingSpec)]
    spec = spec.edit([tree.Edit(path, "format", form) for path in paths], by="formats")
    return NativeModel(lower(spec, random_tiles(lowered_spec(spec)), threads))


def step_s(one: NativeModel, gen: int) -> float:
    return float(np.median(one.time(PROMPT, gen).decode_s))


def bytes_of(one: NativeModel) -> int:
    """Weights one step reads."""
    return sum(row[1] for row in one.program.metered())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="1 and 2 by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gen", type=int, default=17)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument(
        "--formats", default="*", help="only formats that match one of these patterns, e.g. 'int*;bitmod4'"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "formats.json")
    options = parser.parse_args()
    result: dict[str, Any] = about() | {"isa": kernels.isa(), "rounds": options.rounds, "gen": options.gen, "runs": []}
    known = formats()
    chosen = {n: f for n, f in known.items() if any(fnmatch(n, p) for p in options.formats.split(";"))}
    for threads in [options.threads] if options.threads else [1, 2]:
        print(f"{threads} thread{'s' * (threads > 1)}, {kernels.isa()}, load average {os.getloadavg()[0]:.1f}")
        print(f"{'':24}{'GB':>7}{'ms':>9}{'p10':>9}{'p90':>9}{'GB/s':>7}  time and bytes over int4's")
        base = model(known["int4"], threads, options.layers)
        base_bytes = 0
        for name, form in chosen.items():
            other = base if name == "int4" else model(form, threads, options.layers)
            seconds: dict[str, list[float]] = {"int4": [], name: []}
            before = busy_seconds() - busy_seconds(os.getpid())
            for turn in range(WARM_UP + options.rounds):
                for arm, one in {"int4": base, name: other}.items():
                    taken = step_s(one, options.gen)
                    if turn >= WARM_UP:
                        seconds[arm].append(taken)
            others = max(0.0, busy_seconds() - busy_seconds(os.getpid()) - before)
            base_bytes, nbytes = bytes_of(base), bytes_of(other)
            ratio = spread((np.array(seconds[name]) / seconds["int4"]).tolist())
            taken = spread(seconds[name])
            rate = nbytes / taken["median"] / 1e9
            print(
                f"{name:24}{nbytes / 1e9:7.3f}{1e3 * taken['median']:9.2f}{1e3 * taken['p10']:9.2f}{1e3 * taken['p90']:9.2f}{rate:7.1f}  "
                f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f}) and {nbytes / base_bytes:.3f}"
            )
            result["runs"].append(
                {"threads": threads, "format": name, "stored": str(form), "bytes": nbytes, "step_s": taken, "over_int4": ratio,
                 "bytes_over_int4": nbytes / base_bytes, "bytes_per_s": 1e9 * rate, "seconds_of_other_processes": others}
            )  # fmt: skip
            del other
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
