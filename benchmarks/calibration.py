"""Predicted against measured time of SmolLM2 after calibration: fp32 and bf16, prompts 32, 128 and 512, decode and prefill.

Usage: python benchmarks/calibration.py [--rounds 5] [--gen 16] [--fresh] [--record]. Prints a table; `--record` also writes
benchmarks/recorded/calibration.json, which is kept with the sources. `--fresh` calibrates anew first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from trimtab.api import load, make_plan, predict
from trimtab.measure.calibrate import calibrate
from trimtab.measure.measure import Arm, _timed, ensure_calibrated
from trimtab.model.variant import Model, Variant
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.workload import Workload

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gen", type=int, default=16)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    calibrated_s = calibrate().time_s if options.fresh else None
    ensure_calibrated()
    rng = np.random.default_rng(0)
    arms, prompts, times = [], [], []
    for dtype in ("float32", "bfloat16"):
        model = load("smollm2-135m", dtype=dtype)
        for prompt in (32, 128, 512):
            plan = make_plan(
                "smollm2-135m", "this", Workload(prompt=prompt, gen=options.gen), dtype=dtype, kv_dtype=dtype
            )
            arms.append(Arm(f"{dtype} {prompt}", plan, Model(Variant(plan.base, model.weights), None)))
            prompts.append([rng.integers(0, plan.base.vocab_size, prompt)])
            times.append([])
    for turn in range(options.rounds + 1):  # the first round warms up
        for arm, tokens, found in zip(arms, prompts, times, strict=True):
            measured = _timed(arm, tokens)
            if turn:
                found.append(measured)
    rows = []
    for arm, found in zip(arms, times, strict=True):
        figures = predict(arm.plan).figures
        for index, name in enumerate(("ttft_s", "tpot_s")):
            values = [pair[index] for pair in found]
            p10, median, p90 = (float(np.quantile(values, q)) for q in (0.1, 0.5, 0.9))
            predicted = figures[name].value
            rows.append(
                {
                    "case": arm.label, "figure": name, "predicted_s": predicted, "median_s": median, "p10_s": p10, "p90_s": p90,
                    "error": predicted / median - 1, "band": [figures[name].p10, figures[name].p90],
                }
            )  # fmt: skip
    errors = [abs(row["error"]) for row in rows]
    print(f"{'case':16}{'figure':>8}{'predicted ms':>14}{'measured ms':>13}{'p10':>9}{'p90':>9}{'error':>8}")
    for row in rows:
        ms = "".join(
            f"{row[key] * 1e3:{w}.1f}" for key, w in (("predicted_s", 14), ("median_s", 13), ("p10_s", 9), ("p90_s", 9))
        )
        print(f"{row['case']:16}{row['figure'][:4]:>8}{ms}{row['error']:+8.1%}")
    print(f"largest error {max(errors):.1%}, mean {np.mean(errors):.1%}; aim: every case within 25 %")
    if options.record:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip()
        machine, stack = load_machine("this"), load_stack("this")
        result = {
            "commit": commit, "machine": machine.name, "cores": os.cpu_count(), "load": os.getloadavg(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "threads": torch.get_num_threads(), "rounds": options.rounds, "warm_up": 1, "calibration_s": calibrated_s,
            "stack": stack.source, "largest_error": max(errors), "mean_error": float(np.mean(errors)), "rows": rows,
        }  # fmt: skip
        (HERE / "recorded").mkdir(exist_ok=True)
        (HERE / "recorded" / "calibration.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
