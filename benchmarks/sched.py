"""What scheduling costs: microseconds of Python per step, `step` and `commit` together, at several batches.

`decode`: every sequence continues its answer. `churn`: answers of 32 tokens, so that in every step some request ends, is kept as
a prefix and freed, and another is submitted, hashed (512 tokens) and started beside those that go on. The model is not part of it.
Processor time of the thread: other processes on the machine count only by what they do to its caches and clock.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

from trimtab.sched import ModelledExecutor, Request, Scheduler, SchedulerConfig, cache_bytes, lengths
from trimtab.spec.configs import spec_from_config

BATCHES, RUNS, STEPS, WARM_UP = (8, 64, 256), 5, 150, 20
PROMPT, CHURN = 512, 32
STEP_S = 0.01  # of the model, to compare with
# Llama of the size of SmolLM2-135M: its cache description is what a real engine hands in.
CONFIG = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip


def run(batch: int, answer: int, nbytes) -> tuple[list[float], int]:
    """Seconds of scheduling of each measured step, and the rows of all of them."""
    config = SchedulerConfig(max_running=batch, max_step_tokens=batch + 2048, max_queue=10**6, reserve_tokens=64)
    scheduler = Scheduler(config, capacity_bytes=batch * nbytes(4 * PROMPT), nbytes=nbytes)
    executor = ModelledExecutor(lambda *_: STEP_S, lengths(lambda *_: answer))
    now, number, spent, rows = 0.0, 0, [], 0
    for step in range(-WARM_UP - batch // 4, STEPS):
        fresh = [
            Request(id=f"r{number + i}", prompt=list(range(number + i, number + i + PROMPT)), max_tokens=answer)
            for i in range(2 * batch - len(scheduler._groups))
        ]
        number += len(fresh)
        start = time.thread_time()
        for request in fresh:
            scheduler.submit(request, now)
        work = scheduler.step(now)
        paused = time.thread_time()
        outcome = executor.run(work)
        resumed = time.thread_time()
        scheduler.commit(work, outcome)
        taken = time.thread_time() - resumed + paused - start
        now += outcome.seconds
        if step >= 0:
            spent.append(taken)
            rows += len(work.rows)
    return spent, rows


def main() -> None:
    nbytes = cache_bytes(spec_from_config(CONFIG, "smollm2").with_dtype("bfloat16", "bfloat16"))
    found = []
    print(f"{'':8}{'batch':>6}{'us/step':>10}{'p10':>8}{'p90':>8}{'us/row':>8}{'of a 10 ms step':>18}")
    for kind, answer in (("decode", 10**4), ("churn", CHURN)):
        for batch in BATCHES:
            runs = [run(batch, answer, nbytes) for _ in range(RUNS)]
            # Median over the runs of the mean step: ends and starts of requests fall on some steps only.
            means = sorted(statistics.fmean(spent) for spent, _ in runs)
            steps = sorted(second for spent, _ in runs for second in spent)
            us, per_row = 1e6 * means[RUNS // 2], runs[0][1] / STEPS
            p10, p90 = (1e6 * steps[int(share * len(steps))] for share in (0.1, 0.9))
            print(f"{kind:8}{batch:6}{us:10.0f}{p10:8.0f}{p90:8.0f}{us / per_row:8.2f}{us / 1e6 / STEP_S:18.1%}")
            spread = [1e6 * means[0], 1e6 * means[-1]]
            found.append({"kind": kind, "batch": batch, "us_per_step": us, "spread": spread, "p10": p10, "p90": p90, "us_per_row": us / per_row})  # fmt: skip
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "commit": commit,
        "python": platform.python_version(),
        "machine": platform.processor(),
        "runs": RUNS,
        "rows": found,
    }
    (results / "sched.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
