"""Decoding behind a long prompt with the cache in several formats, against llama.cpp: same model, prompt and threads.

Usage: python benchmarks/kv_decode.py [--threads 1|2] [--rounds 7] [--prompt-tokens 7900] [--gen 29] [--arms 'ours*'] [--json FILE], once
benchmarks/peers/setup.sh has been run. Writes benchmarks/results/kv_decode.json.

SmolLM2-135M in Q4_1. Every arm is a process of its own that reads the prompt once; then rounds of `gen` - 1 greedy steps are timed in
turn, each in another order, all at the end of the same context.
"""

from __future__ import annotations

import argparse
import json
import random
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from decode import HERE, PEER_PYTHON, VOCABULARY, WARM_UP, Arm, Worker, WorkerError, about, busy_seconds, files, spread

CONTEXT = 8192
#: Label, who, format of keys and values, techniques.
ARMS = (
    ("ours, fp32", "ours", "float32", ()),
    ("ours, bf16", "ours", "bfloat16", ()),
    ("ours, kivi 4 bits", "ours", "bfloat16", ("kivi:bits=4",)),
    ("ours, kivi 2 bits", "ours", "bfloat16", ("kivi:bits=2",)),
    ("llama.cpp, f16", "llama.cpp", "f16", ()),
    ("llama.cpp, q8_0", "llama.cpp", "q8_0", ()),
    ("llama.cpp, q4_0", "llama.cpp", "q4_0", ()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="1 and 2 by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=7900)
    parser.add_argument("--gen", type=int, default=29)
    parser.add_argument("--arms", default="*", help="only arms whose label matches this pattern")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "kv_decode.json")
    options = parser.parse_args()
    if not PEER_PYTHON.exists():
        print("kv_decode.py compares with llama.cpp, which is not installed: run make bench-peers.")
        return
    steps = (WARM_UP + options.rounds) * options.gen
    if options.prompt_tokens + steps > CONTEXT:
        raise SystemExit(f"The prompt and {steps} steps exceed the context of {CONTEXT} tokens. Ask for fewer.")
    facts = files("smollm2", None)["Q4_1"]
    result = about() | {key: getattr(options, key) for key in ("rounds", "prompt_tokens", "gen")} | {"runs": []}
    for threads in [options.threads] if options.threads else [1, 2]:
        result["runs"].append({"threads": threads, "rows": compare(facts["path"], threads, options)})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(path: str, threads: int, options: Any) -> list[dict[str, Any]]:
    """Time all arms with so many threads, print the table and return it."""
    draw = random.Random(0)
    prompt = [draw.randrange(300, VOCABULARY["smollm2"]) for _ in range(options.prompt_tokens)]
    workers: dict[str, Worker] = {}
    found: dict[str, dict[str, Any]] = {}
    try:
        for label, who, kv, techniques in (arm for arm in ARMS if fnmatch(arm[0], options.arms)):
            try:
                workers[label] = Worker(Arm(who, "Q4_1", techniques), path, threads, kv=kv, context=CONTEXT)
            except WorkerError as error:
                print(f"  {label}: left out ({error})")
                continue
            first = workers[label].ask({"prompt": prompt, "gen": 1})
            found[label] = {
                "arm": label,
                **workers[label].told,
                "prefill_s": first["prefill_s"],
                "ms": [],
                "others": [],
            }
        for turn in range(WARM_UP + options.rounds):
            for label, worker in draw.sample(list(workers.items()), len(workers)):
                before = busy_seconds() - busy_seconds(worker.process.pid)
                answer = worker.ask({"prompt": [], "gen": options.gen})
                others = busy_seconds() - busy_seconds(worker.process.pid) - before
                if turn >= WARM_UP:
                    found[label]["ms"].append(1e3 * answer["decode_s"] / answer["decoded"])
                    found[label]["others"].append(max(0.0, others) / answer["decode_s"])
                    found[label]["kv_bytes"] = answer.get("kv_bytes")
    finally:
        for worker in workers.values():
            worker.close()
    print(f"{threads} thread{'s' * (threads > 1)}, {options.prompt_tokens} tokens of prompt")
    print(
        f"{'':22}{'ms/token':>10}{'p10':>8}{'p90':>8}{'KV MB':>8}{'prefill s':>11}   time over ours with 4 bits (p10 to p90)"
    )
    ours = np.array(found.get("ours, kivi 4 bits", {}).get("ms", []))
    for label, row in found.items():
        row |= spread(row["ms"])
        ratio = spread((np.array(row["ms"]) / ours).tolist()) if len(ours) else None
        row["over_kivi_4"] = ratio
        told = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})" if ratio else ""
        nbytes = f"{row['kv_bytes'] / 1e6:8.0f}" if row.get("kv_bytes") else f"{'':8}"
        print(
            f"  {label:20}{row['median']:10.2f}{row['p10']:8.2f}{row['p90']:8.2f}{nbytes}{row['prefill_s']:11.1f}   {told}"
        )
    return list(found.values())


if __name__ == "__main__":
    main()
