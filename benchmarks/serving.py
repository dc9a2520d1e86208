"""What `trimtab serve` does under load: throughput, latency, jitter, overhead, goodput beside llama.cpp, overload, faults.

Usage: python benchmarks/serving.py WHAT... [options], WHAT of
  throughput   tokens/s at 1, 8 and 64 streams, and this program's own prefill of 512 tokens
  ttft         first token of a short request while a prompt of 4096 tokens runs, in step budgets
  jitter       from the engine's token to the write into the socket, p99, engine on 1 and on 2 threads
  overhead     time of the engine's loop outside passes, 8 answers, greedy and drawn
  goodput      largest Poisson rate within TTFT 2 s and TPOT 100 ms, here and in llama.cpp (--llama-server PATH)
  overload     10 times the sustained rate (--rate): answered or 429, memory flat, TPOT kept, gauges back at zero
  chaos        clients that misbehave and engines that are killed: nothing is left behind
  all          everything but chaos, overload and goodput
The model is SmolLM2-135M in 4 bits, as the built-in file has it. Loads are open-loop: arrivals are drawn beforehand. Clients run in
this process, on the same cores. Writes benchmarks/results/serving.json, a section for each WHAT; what was there of others stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import serving_stress as stress
from decode import HERE, about
from serving_client import (
    Answer,
    Job,
    Texts,
    ask,
    grown,
    histogram_quantile,
    llama_server,
    mixed_jobs,
    play,
    poisson,
    samples,
    swallow,
    trimtab_server,
)

from trimtab.runtime.weights.load import open_model, read_tokenizer

MODEL = "smollm2-135m"
#: Limits of a request that counts as served well, and the share of requests that must.
TTFT_S, TPOT_S, SHARE = 2.0, 0.1, 0.95
#: What each contestant may be set to; the best of three counts.
OURS = ("--step-ms 50", "--step-ms 80 --answer-ms 60", "--step-ms 100 --answer-ms 80")
THEIRS = ("-b 2048 -ub 512", "-b 512 -ub 128", "-b 2048 -ub 512 -ctk f16 -ctv f16 -fa on")


def row(line: str, measured: str, needed: str, holds: bool | None) -> dict[str, Any]:
    """A line of the table; prints it."""
    told = "" if holds is None else "holds" if holds else "FALLS SHORT"
    print(f"  {line:66} {measured:>22}   {needed:>16}   {told}", flush=True)
    return {"line": line, "measured": measured, "needed": needed, "holds": holds}


def title(text: str) -> None:
    print(f"{text}\n  {'':66} {'measured':>22}   {'needed':>16}", flush=True)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {}
    return dict(zip(("p50", "p90", "p99", "max"), np.quantile(values, (0.5, 0.9, 0.99, 1.0)).tolist(), strict=True))


class Bench:
    """Options and prompts that all measurements share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = str(open_model(MODEL, dtype="file").tokenizer_source)
        self.texts = Texts(read_tokenizer(Path(self.path)), options.seed)

    def flags(self, threads: int | None = None) -> list[str]:
        return ["--threads", str(threads or self.options.threads), *self.options.server_flags.split()]

    # Throughput.

    def throughput(self) -> dict[str, Any]:
        threads = self.options.threads
        title(f"Throughput, engine on {threads} thread(s)")
        command = [sys.executable, "-m", "trimtab.cli.main", "run", MODEL, "--prompt-tokens", "512", "--gen", "1"]
        told = [
            json.loads(subprocess.run([*command, "--threads", str(threads), "--json"], capture_output=True, text=True, check=True).stdout)
            for _ in range(3)
        ]  # fmt: skip
        prefill = max(each["figures"]["prefill_tokens_per_s"]["value"] for each in told)
        found: dict[str, Any] = {"threads": threads, "prefill_tokens_per_s": prefill, "rows": []}
        found["rows"].append(row("prefill of 512 tokens, trimtab run, best of 3", f"{prefill:.0f} tokens/s", "", None))
        with trimtab_server(MODEL, [*self.flags(), "--answer-ms", "0"]) as server:
            for streams in self.options.streams:
                jobs = [Job(0.0, self.texts.prompt(32), self.options.gen) for _ in range(streams)]
                answers = asyncio.run(play(server.port, jobs, MODEL))
                rate = together(answers)
                found[f"tokens_per_s_{streams}"] = rate
                found["rows"].append(
                    row(f"{streams} streams, all of them decoding", f"{rate:.1f} tokens/s", f"{rate / prefill:.0%} of prefill", None)
                )  # fmt: skip
        return found

    # First tokens beside a long prompt.

    def ttft(self) -> dict[str, Any]:
        budget = self.options.step_ms / 1000
        title(
            f"First token of a short request while {self.options.long} tokens of another prompt run, steps of {budget * 1e3:g} ms"
        )
        inside: list[float] = []
        longs: list[float] = []
        flags = [*self.flags(), "--step-ms", f"{self.options.step_ms:g}"]
        with trimtab_server(MODEL, flags) as server:
            before = asyncio.run(samples(server.port))
            for turn in range(self.options.rounds):
                shorts, long = asyncio.run(self._beside(server.port, turn))
                longs.append(long.ttft_s)
                inside += [each.ttft_s for each in shorts if each.started + each.ttft_s < long.started + long.ttft_s]
            time.sleep(1.3)
            after = asyncio.run(samples(server.port))
        step = grown(before, after, "trimtab_step_seconds_total") / grown(before, after, "trimtab_steps_total")
        worst = quantiles([value / budget for value in inside])
        found = {
            "step_ms": self.options.step_ms,
            "long_ttft_s": longs,
            "step_s": step,
            "ttft_budgets": worst,
            "requests": len(inside),
        }
        rows = [
            row(f"median of {len(inside)} requests", f"{worst.get('p50', 0):.2f} budgets", "", None),
            row("p90", f"{worst.get('p90', 0):.2f} budgets", "", None),
            row("worst", f"{worst.get('max', 0):.2f} budgets", "at most 3", bool(inside) and worst["max"] <= 3),
            row("first token of the long prompt itself, median", f"{float(np.median(longs)):.1f} s", "", None),
            row("a step, mean", f"{1e3 * step:.0f} ms", "", None),
        ]
        return found | {"rows": rows}

    async def _beside(self, port: int, turn: int) -> tuple[list[Answer], Answer]:
        """A long prompt and, once it runs, short requests at random times."""
        loop, length = asyncio.get_running_loop(), self.options.long
        long = asyncio.ensure_future(ask(port, Job(0, self.texts.prompt(length), 4), MODEL, loop.time()))
        await asyncio.sleep(0.3)
        shorts = []
        gaps = poisson(1 / self.options.gap, 600, self.options.seed + turn)
        begun = loop.time()
        for at in gaps:
            await asyncio.wait([long], timeout=max(begun + at - loop.time(), 0))
            if long.done():
                break
            shorts.append(asyncio.ensure_future(ask(port, Job(0, self.texts.prompt(16), 2), MODEL, begun + at)))
        return [await each for each in shorts], await long

    # Jitter.

    def jitter(self) -> dict[str, Any]:
        streams, gen = max(self.options.streams), self.options.gen
        title(f"From the engine's token to the write into the socket, {streams} streams")
        found: dict[str, Any] = {"streams": streams, "rows": []}
        for threads in (1, 2):
            with trimtab_server(MODEL, [*self.flags(threads), "--answer-ms", "0"]) as server:
                before, after = self._around(server.port, streams, gen)
            name = "trimtab_stream_delay_seconds"
            bounds = {share: histogram_quantile(before, after, name, share)[0] for share in (0.5, 0.9, 0.99, 0.999)}
            count = histogram_quantile(before, after, name, 0.5)[1]
            found[f"threads_{threads}"] = {"writes": count, "bounds_s": {str(share): v for share, v in bounds.items()}}
            told = ", ".join(f"p{100 * share:g} {1e3 * value:.1f}" for share, value in bounds.items() if share != 0.99)
            found["rows"].append(
                row(f"engine on {threads} thread(s), p99 of {count} writes ({told})", f"<= {1e3 * bounds[0.99]:.2f} ms", "at most 5 ms",
                    bounds[0.99] <= 0.005)
            )  # fmt: skip
        return found

    def _around(self, port: int, streams: int, gen: int, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics before and after some streams side by side."""
        before = asyncio.run(samples(port))
        swallow(port, [Job(0.0, self.texts.prompt(16), gen, options) for _ in range(streams)], MODEL)
        time.sleep(1.3)  # for the engine's statistics
        return before, asyncio.run(samples(port))

    # Overhead.

    def overhead(self) -> dict[str, Any]:
        title("Time of the engine's loop outside passes, 8 answers side by side, engine on 1 thread")
        found: dict[str, Any] = {"rows": []}
        kinds = {
            "greedy": {"temperature": 0},
            "drawn": {"temperature": 1.0, "seed": 1},
            "drawn, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
        }
        with trimtab_server(MODEL, self.flags(1)) as server:
            self._around(server.port, 8, 16)
            for _ in range(self.options.rounds):
                for kind, options in kinds.items():
                    before, after = self._around(server.port, 8, self.options.gen, **options)
                    busy, passes, native, steps = (
                        grown(before, after, f"trimtab_{name}_total")
                        for name in ("busy_seconds", "pass_seconds", "native_seconds", "steps")
                    )
                    found.setdefault(kind, []).append(
                        {
                            "step_ms": 1e3 * busy / steps,
                            "outside_passes": 1 - passes / busy,
                            "outside_native": 1 - native / busy,
                        }
                    )
        for kind in kinds:
            outside, arranging, step = (
                float(np.median([each[name] for each in found[kind]]))
                for name in ("outside_passes", "outside_native", "step_ms")
            )
            told = f"{kind}, step of {step:.1f} ms; with arranging pages {arranging:.1%}"
            found["rows"].append(row(told, f"{outside:.2%}", "below 5 %", outside < 0.05))
        return found

    # Goodput.

    def goodput(self) -> dict[str, Any]:
        options = self.options
        title(
            f"Goodput: largest Poisson rate at which {SHARE:.0%} of requests have TTFT <= {TTFT_S:g} s and TPOT <= {1e3 * TPOT_S:g} ms, "
            f"{options.seconds:g} s each"
        )
        found: dict[str, Any] = {
            "ttft_s": TTFT_S,
            "tpot_s": TPOT_S,
            "share": SHARE,
            "seconds": options.seconds,
            "ours": [],
            "theirs": [],
        }
        contestants = [("ours", flags) for flags in options.ours or OURS]
        if options.llama_server:
            contestants += [("theirs", flags) for flags in options.theirs or THEIRS]
        for who, flags in contestants:
            words = flags.split()
            if who == "ours":
                server = trimtab_server(MODEL, [*self.flags(), *words])
            else:
                common = ["-np", "16", "-cb", "-c", str(16 * options.slot_tokens), "-t", str(options.threads)]
                server = llama_server(options.llama_server, self.path, [*common, *words])
            with server:
                rate, runs = self._largest_rate(server.port)
            print(
                f"    {' '.join(server.command[1 if who == 'theirs' else 3 :])}\n      {rate:.2f} requests/s",
                flush=True,
            )
            found[who].append({"command": server.command[1:], "rate": rate, "runs": runs})
        best = {who: max((each["rate"] for each in found[who]), default=0.0) for who in ("ours", "theirs")}
        ratio = best["ours"] / best["theirs"] if best["theirs"] else None
        rows = [row("trimtab, best of its settings", f"{best['ours']:.2f} requests/s", "", None)]
        if ratio is not None:
            rows.append(row("llama.cpp, best of its settings", f"{best['theirs']:.2f} requests/s", "", None))
            rows.append(row("trimtab over llama.cpp", f"{ratio:.2f}", "at least 1.3", ratio >= 1.3))
        else:
            print("  llama.cpp was left out: give --llama-server PATH")
        return found | {"best": best, "ratio": ratio, "rows": rows}

    def _largest_rate(self, port: int) -> tuple[float, list[dict[str, Any]]]:
        """Bracket by doubling, then halve the bracket until it is within `--precision`."""
        runs: list[dict[str, Any]] = []

        def holds(rate: float) -> bool:
            seconds = self.options.seconds
            times = poisson(rate, seconds, self.options.seed + 7)
            jobs = mixed_jobs(self.texts, times, self.options.seed + 7)
            answers = asyncio.run(play(port, jobs, MODEL))
            good = sum(a.done and a.status == 200 and a.ttft_s <= TTFT_S and a.tpot_s <= TPOT_S for a in answers)
            share = good / max(len(answers), 1)
            runs.append(
                {"rate": rate, "requests": len(answers), "good": share, "ttft_s": quantiles([a.ttft_s for a in answers if a.times_s]),
                 "tpot_s": quantiles([a.tpot_s for a in answers if a.tokens > 1])}
            )  # fmt: skip
            print(f"      {rate:6.2f}/s: {share:.0%} of {len(answers)} served well", flush=True)
            return share >= SHARE

        asyncio.run(play(port, mixed_jobs(self.texts, [0.0, 0.1], 1), MODEL))  # warm-up
        low, high = 0.0, self.options.first_rate
        while holds(high):
            low, high = high, 2 * high
            if high > 256:
                return low, runs
        while high - low > self.options.precision * high and high > 0.02:
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low, runs

    # Stress.

    def overload(self) -> dict[str, Any]:
        return stress.overload(self, row, title)

    def chaos(self) -> dict[str, Any]:
        return stress.chaos(self, row, title)


def together(answers: Sequence[Answer]) -> float:
    """Tokens/s of all streams while all of them decode."""
    broken = [a for a in answers if a.status != 200 or not a.done or len(a.times_s) < 3]
    if broken:
        raise SystemExit(f"A stream broke: {broken[0]}")
    start = max(a.started + a.times_s[0] for a in answers)
    end = min(a.started + a.times_s[-1] for a in answers)
    if end <= start:
        raise SystemExit("The streams did not decode together. Raise --gen.")
    total = 0.0
    for a in answers:
        pieces = sum(start < a.started + at <= end for at in a.times_s)
        total += pieces * a.tokens / len(a.times_s)  # a piece of text may hold two tokens
    return total / (end - start)


WHAT = ("throughput", "ttft", "jitter", "overhead", "goodput", "overload", "chaos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*WHAT, "all"), metavar="WHAT")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="of the engine; jitter and overhead set their own",
    )
    parser.add_argument("--server-flags", default="", help="further flags of trimtab serve, in one text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of ttft and overhead")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1, 8, 64], help="of throughput; jitter takes the most"
    )
    parser.add_argument(
        "--gen", type=int, default=128, help="new tokens of each stream in throughput, jitter and overhead"
    )
    parser.add_argument("--step-ms", type=float, default=100.0, help="budget of a step in ttft")
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long prompt in ttft")
    parser.add_argument("--gap", type=float, default=0.7, help="mean seconds between short requests in ttft")
    parser.add_argument("--llama-server", help="llama.cpp's llama-server, for goodput")
    parser.add_argument("--ours", action="append", help="a setting of trimtab serve in goodput; repeatable")
    parser.add_argument("--theirs", action="append", help="a setting of llama-server in goodput; repeatable")
    parser.add_argument("--slot-tokens", type=int, default=2048, help="context of each of llama-server's 16 slots")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run in goodput and overload")
    parser.add_argument("--first-rate", type=float, default=1.0, help="requests/s that goodput tries first")
    parser.add_argument("--precision", type=float, default=0.1, help="of the largest rate")
    parser.add_argument(
        "--rate", type=float, help="requests/s sustained, for overload; default: the recorded or measured goodput"
    )
    parser.add_argument("--times", type=float, default=10.0, help="of the sustained rate, in overload")
    parser.add_argument("--faults", type=int, default=1000, help="of clients, in chaos")
    parser.add_argument("--kills", type=int, default=10, help="of the engine, in chaos")
    parser.add_argument("--minutes", type=float, default=10.0, help="that chaos lasts")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "serving.json")
    options = parser.parse_args()
    asked = [what for each in options.what for what in (WHAT[:4] if each == "all" else (each,))]
    bench = Bench(options)
    for what in asked:
        section = about() | {"load_average": os.getloadavg()[0]} | getattr(bench, what)()
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(known | {what: section}, indent=1) + "\n")


if __name__ == "__main__":
    main()
