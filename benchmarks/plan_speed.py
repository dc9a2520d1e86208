"""Plans evaluated per second on one core, and that each evaluated plan has the figures `predict` gives it.

An evaluated plan counts only because its figures are those of `predict(plan)`: 200 random ones are compared to 1e-9.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path

import numpy as np

from trimtab.predict.predict import predict
from trimtab.predict.search import grid, search
from trimtab.spec.machine import load_machine
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import engine_of, make_plan, variants

# One core: nothing here calls BLAS, and elementwise numpy runs on one thread.

MODEL, PROMPT, GEN = "llama-3.1-70b", 2048, 256
MACHINES = ("a100", "a100-40gb", "h100", "h200", "l40s", "mi300x", "b200", "h100-pcie")
BATCH = tuple(range(1, 513))


def main() -> None:
    cases = variants(MODEL, ("bfloat16", "fp8"), ("bfloat16", "fp8"), ("rtn:bits=4", "streaming-llm"))
    machines = [load_machine(name) for name in MACHINES]
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        found = search(cases, machines, engine_of, prompt=PROMPT, gen=GEN, counts=(1, 2, 4, 8), concurrency=BATCH)
        rates.append(found.evaluated / (time.perf_counter() - start))
    print(f"{found.evaluated} plans, {len(found.best)} unbeaten; plans/s: median {statistics.median(rates):.0f}, "
          f"{min(rates):.0f} to {max(rates):.0f} of {len(rates)} runs on one core")  # fmt: skip
    worst = check(cases, machines)
    print(f"200 random plans against predict(plan): largest relative difference {worst:.1e} (needed: 1e-9)")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    facts = {"plans": found.evaluated, "plans_per_s": rates, "largest_difference": worst}
    (results / "plan_speed.json").write_text(json.dumps(facts, indent=1) + "\n")
    if worst > 1e-9:
        raise SystemExit("figures differ from predict(plan)")


def check(cases, machines) -> float:
    """Largest relative difference of any figure of 200 random plans."""
    draw, worst = random.Random(1), 0.0
    ready = [case for case in grid(cases, machines, engine_of, (1, 2, 4, 8), PROMPT, GEN) if isinstance(case, tuple)]
    for _ in range(200):
        variant, requests = draw.choice(ready)
        batch = draw.choice(BATCH)
        costs = requests.costs(np.asarray(BATCH))
        report = predict(
            make_plan(
                MODEL, requests.machine, Workload(batch=batch, prompt=PROMPT, gen=GEN, continuous=True), variant.techniques,
                dtype=variant.dtype, kv_dtype=variant.kv_dtype, stack=requests.stack, parallel=requests.parallel,
            )
        )  # fmt: skip
        for name in ("ttft_s", "tpot_s", "tokens_per_s"):
            mine, its = float(getattr(costs, name)[BATCH.index(batch)]), report.figures[name].value
            worst = max(worst, abs(mine / its - 1))
        peak = float(np.broadcast_to(np.asarray(costs.memory.peak, float), (len(BATCH),))[BATCH.index(batch)])
        worst = max(worst, abs(peak / report.counts["peak_bytes"] - 1))
    return worst


if __name__ == "__main__":
    main()
