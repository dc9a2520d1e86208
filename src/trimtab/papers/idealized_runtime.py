"""Checks of the idealized runtime (arXiv 2305.02440): held-out timings, nine runs, contention, random weights, recorded runs."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.measure.costs import usd_per_h
from trimtab.measure.idealize import Endpoint, engine_endpoint, profile, profile_all, random_model
from trimtab.measure.idealized import (
    Grid,
    Runtime,
    Sample,
    denoise,
    fit_runtime,
    helm_runtime,
    read_helm,
    read_log,
)
from trimtab.measure.recorded.megatron import fit, generations
from trimtab.measure.recorded.tables import load_table
from trimtab.papers.claims import Bench, Line, Needs, Outcome
from trimtab.spec.machine import load_machine, load_stack

FULL = Grid(prompts=(1, 16, 32, 64, 128, 256, 384, 512), outputs=(1, 2, 4, 8, 16, 32), trials=3)
HELD_OUT = 20
#: A model small enough that a request takes tens of milliseconds, so that many trials are quick and most requests pass between two
#: turns of other processes.
_SMALL = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of arithmetic: its processor time is its wall time on an idle machine, whatever else runs on this one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quiet() -> None:
    """Refuse to time where more is running than there are cores: caches and memory are shared whatever the clock says."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores:
        raise Needs(f"a quiet machine: load {load:.1f} on {cores} cores")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """The timings lines a1 and a2 share.

    Args:
        full: samples of the grid, all trials.
        again: further samples of its shortest output, which every other point is referred to.
        held: samples of the held-out pairs, all trials.
        least: samples of nine runs, once per trial.
    """

    full: list[Sample]
    again: list[Sample]
    held: list[Sample]
    least: list[list[Sample]]


def _pairs() -> tuple[tuple[int, int], ...]:
    """Held-out (prompt, output) pairs: no prompt of the grid, no output of it."""
    rng = np.random.default_rng(0)
    prompts = rng.permutation(np.setdiff1d(np.arange(1, FULL.prompts[-1] + 1), FULL.prompts))[:HELD_OUT]
    outputs = rng.choice(np.setdiff1d(np.arange(1, FULL.outputs[-1] + 1), FULL.outputs), HELD_OUT)
    return tuple((int(p), int(o)) for p, o in zip(prompts, outputs, strict=True))


def _timings(bench: Bench) -> _Timed:
    """Grid, nine runs and held-out pairs in turn, trial after trial."""

    def compute() -> _Timed:
        _quiet()
        run, once, held = engine_endpoint(bench.model, "cpu"), replace(FULL, trials=1), _pairs()
        first = [(p, FULL.outputs[0]) for p in FULL.prompts]
        found = _Timed(full=[], again=[], held=[], least=[])
        with _one_thread():
            for trial in range(FULL.trials):
                found.full.extend(profile(run, once, seed=trial))
                found.least.append(profile(run, FULL.least(), seed=trial))
                found.held.extend(profile(run, held, seed=trial))
                found.again.extend(profile(run, first, trials=2, seed=trial))
        return found

    return bench.once("idealized.timings", compute)


def _fastest(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, output, seconds of the fastest trial) of every pair."""
    best: dict[tuple[int, int], float] = {}
    for p, o, seconds in samples:
        best[p, o] = min(best.get((p, o), np.inf), seconds)
    p, o = np.array(list(best)).T
    return p, o, np.array(list(best.values()))


def held_out_pairs(bench: Bench) -> Outcome:
    """R^2 of the full grid, the error on pairs it has not seen, and that of tokens x constant fitted to the same grid."""
    timed = _timings(bench)
    fitted = fit_runtime(timed.full + timed.again, "min")
    p, o, seconds = _fastest(timed.full)
    per_token = float(((p + o) * seconds).sum() / ((p + o) ** 2).sum())
    p, o, seconds = _fastest(timed.held)
    ours = float(np.median(np.abs(fitted.time_s(p, o) / seconds - 1)))
    naive = float(np.median(np.abs((p + o) * per_token / seconds - 1)))
    assert fitted.r_squared is not None and fitted.token_s is not None and fitted.largest_residual is not None
    worst = fitted.largest_residual
    return Outcome(
        predicted=f"F + (o - 1) g, g {fitted.token_s * 1e3:.1f} ms",
        measured=(
            f"R2 {fitted.r_squared:.4f}, largest residual {worst.seconds * 1e3:.0f} ms at {worst.prompt_tokens}+"
            f"{worst.output_tokens}; {len(seconds)} unseen pairs: median error {ours:.1%}, tokens x constant {naive:.1%} "
            f"({naive / ours:.1f}x); one thread, processor time, fastest of {FULL.trials}"
        ),
        met=fitted.r_squared >= 0.99 and ours <= 0.10 and naive >= 3 * ours,
    )


def nine_runs(bench: Bench) -> Outcome:
    """Each trial's nine runs against the full grid: g, F at every prompt of the grid, and time. Median of the trials."""
    timed = _timings(bench)
    full = fit_runtime(timed.full + timed.again, "min")
    assert full.token_s is not None
    prompts = np.array(FULL.prompts)
    g_off, f_off, f_mid = [], [], []
    for samples in timed.least:
        fitted = fit_runtime(samples)
        assert fitted.token_s is not None
        off = np.abs(fitted.prompt_time_s(prompts, "affine") / full.prompt_time_s(prompts) - 1)
        g_off.append(abs(fitted.token_s / full.token_s - 1))
        f_off.append(float(off.max()))
        f_mid.append(float(np.median(off)))
    whole_s = sum(sample.seconds for sample in timed.full)
    share = [sum(sample.seconds for sample in samples) / whole_s for samples in timed.least]

    def shown(values: list[float]) -> str:
        return "/".join(f"{value:.1%}" for value in values)

    return Outcome(
        measured=(
            f"trials: g off {shown(g_off)}, F off at the worst prompt {shown(f_off)}, at the median one {shown(f_mid)}; "
            f"{shown(share)} of {whole_s:.0f} s"
        ),
        met=float(np.median(g_off)) <= 0.10 and float(np.median(f_off)) <= 0.15 and float(np.median(share)) <= 0.10,
    )


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers ``/?p=1&o=8&wait=0.3`` after the request is computed and `wait` times its own time has passed."""

    def do_GET(self) -> None:
        asked = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        taken = self.server.run(int(asked["p"][0]), int(asked["o"][0]))  # type: ignore[attr-defined]
        time.sleep(taken * float(asked["wait"][0]))
        body = json.dumps({"prompt_tokens": int(asked["p"][0]), "output_tokens": int(asked["o"][0])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@contextlib.contextmanager
def _served(run: Endpoint) -> Iterator[Callable[[float], Endpoint]]:
    """Serve an endpoint on the loopback; yields a factory of clients by the mean of their exponential delay / own time."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
    server.run = run  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def client(mean: float) -> Endpoint:
        rng = np.random.default_rng(1)

        def ask(p: int, o: int) -> float:
            wait = rng.exponential(mean) if mean else 0.0
            start = time.perf_counter()
            with urllib.request.urlopen(
                f"http://127.0.0.1:{server.server_port}/?p={p}&o={o}&wait={wait:.6f}"
            ) as answer:
                answer.read()
            return time.perf_counter() - start

        return ask

    try:
        yield client
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def contention(bench: Bench) -> Outcome:
    """A service behind HTTP, every request delayed by an exponential of half its own time: minimum against mean."""
    del bench
    from trimtab.spec.configs import spec_from_config

    _quiet()

    model = random_model(spec_from_config(_SMALL, "small").with_dtype("float32"))
    grid = Grid(prompts=(1, 64), outputs=(1, 4, 8), trials=200)
    with _one_thread(), _served(engine_endpoint(model)) as client:
        found = profile_all({"quiet": client(0.0), "delayed": client(0.5)}, grid)
    with tempfile.TemporaryDirectory() as folder:  # as a user would hand it in
        log = Path(folder) / "log.jsonl"
        log.write_text("\n".join(json.dumps(sample._asdict()) for sample in found["delayed"]))
        delayed = read_log(log)
    quiet, clean, mean = denoise(found["quiet"]), denoise(delayed), fit_runtime(delayed, "mean")
    assert quiet.token_s and clean.token_s and mean.token_s
    off, mean_off = clean.token_s / quiet.token_s - 1, mean.token_s / quiet.token_s - 1
    return Outcome(
        measured=(
            f"quiet g {quiet.token_s * 1e3:.2f} ms; denoised {off:+.1%}, mean-based {mean_off:+.1%} ({grid.trials} trials)"
        ),
        met=abs(off) <= 0.10 and abs(mean_off) > 0.30,
    )


def architecture_only(bench: Bench) -> Outcome:
    """The built-in model and one of random weights, request by request in turn."""
    runs = {
        "trained": engine_endpoint(bench.model, "cpu"),
        "random": engine_endpoint(random_model(bench.model.spec), "cpu"),
    }
    with _one_thread():
        found = profile_all(runs, Grid(prompts=(1, 64), outputs=(1, 8, 24), trials=6))
    trained, random = (fit_runtime(found[name], "min").token_s for name in runs)
    assert trained and random
    return Outcome(
        measured=f"g {trained * 1e3:.2f} ms trained, {random * 1e3:.2f} ms random ({random / trained - 1:+.1%})",
        met=abs(random / trained - 1) <= 0.05,
    )


def recorded_models(bench: Bench) -> Outcome:
    """An eager stack fitted on two recorded models; the two others, with and without what its host takes per layer."""
    rows = generations(load_table("megatron_a100_generation", bench.tables))
    a100, eager, seen = load_machine("a100"), load_stack("hf-eager"), [rows["openai_ada"], rows["openai_davinci"]]
    held = {"j1-large": rows["ai21_j1_large"], "NeoX-20B": rows["gpt_neox_20b"]}
    stacks = [fit(seen, a100, eager, floor=floor) for floor in (True, False)]
    errors = [{n: r.error(a100, stack) for n, r in held.items()} for stack in stacks]
    ours, bare = (float(np.median(np.concatenate(list(each.values())))) for each in errors)
    long = np.concatenate([each.output_tokens >= 16 for each in held.values()])
    at_length = [float(np.median(np.concatenate(list(each.values()))[long])) for each in errors]
    by_model = "; ".join(
        f"{name} {np.median(errors[0][name]):.1%} against {np.median(errors[1][name]):.1%}" for name in held
    )
    share = stacks[0].op_classes["gemm"].compute_efficiency
    return Outcome(
        predicted=(
            f"ec {share:.2f}, {stacks[0].floor_per_layer_s * 1e3:.3f} ms per layer and "
            f"{stacks[0].floor_per_collective_s * 1e3:.3f} ms per collective, from ada and davinci"
        ),
        measured=(
            f"median error over the {len(long)} rows of both {ours:.1%}, with t_layer = 0 {bare:.1%} ({bare / ours:.1f}x); "
            f"o >= 16: {at_length[0]:.1%} against {at_length[1]:.1%}; {by_model}"
        ),
        met=ours <= 0.12 and bare >= 3 * ours,
    )


def helm_parity(bench: Bench) -> Outcome:
    """HELM's rule over its whole table: scale the next longer profiled prompt; compared with it written as a plain loop."""
    path = bench.tables / "helm_inference_idealized_runtimes.json"
    tables, found = json.loads(path.read_text("utf-8")), read_helm(path)
    worst, cases = 0.0, 0
    for name, table in tables.items():
        raw = sorted((int(p), t) for p, t in table["runtime_for_prompt_tokens"].items())
        for p in (1, 17, 100, 300, 512, 1000, 1920, 3000):
            key, t = next((pair for pair in raw if p <= pair[0]), raw[-1])
            for o in (0, 1, 10, 500):
                wanted = t * p / key + max(o - 1, 0) * table["runtime_per_output_token"]
                worst, cases = max(worst, abs(found[name].time_s(p, o, "helm") / wanted - 1)), cases + 1
    example = found["openai/davinci"].time_s(300, 10, "helm")
    return Outcome(
        predicted="0.854625 s (davinci, p=300, o=10)",
        measured=f"{example:.6f} s; {cases} requests of {len(tables)} models within {worst:.0e}",
        met=abs(example - 0.854625) < 1e-9 and worst < 1e-12,
    )


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets one sentence, and what is no error is none."""
    del bench
    whole = helm_runtime({"1": 0.1, "64": 0.2}, 0.05)
    only_f = fit_runtime([Sample(p, 0, 0.1) for p in (1, 64)])
    dips = [Sample(p, o, t + 0.05 * o) for p, t in ((1, 0.1), (16, 0.3), (32, 0.1)) for o in (1, 4, 8)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        log.write_text('{"prompt_tokens": 3, "output_tokens": null, "seconds": 1}\n')
        cases: dict[str, tuple[Callable[[], Any], str]] = {
            "single output point": (
                lambda: fit_runtime([Sample(p, 8, 0.1) for p in (1, 64)]),
                "cannot separate F from g",
            ),
            "two output points in a grid": (lambda: Grid(outputs=(1, 8)), "3 or more"),
            "g after o = 0 only": (lambda: only_f.time_s(1, 2), "g is unknown"),
            "no price": (lambda: usd_per_h(load_machine("v100-pcie-16gb")), "a100-sxm4-80gb"),
            "hidden token counts": (lambda: read_log(log), "line 1 has no output_tokens"),
            "no prompt": (lambda: whole.time_s(0, 1), "1 or more"),
            "no trial": (lambda: Grid(trials=0), "1 or more"),
        }
        missed = [name for name, (case, said) in cases.items() if not _refused(case, said)]
    quiet = only_f.time_s(64, 0) == 0.1 and whole.time_s(64, 0) == 0.2
    warned = _warns(fit_runtime(dips), "0.15 s at 32")
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused; o = 0 gives F: {quiet}; falling F named: {warned}"
        + (f"; accepted: {missed}" if missed else ""),
        met=not missed and quiet and warned,
    )


def _refused(case: Callable[[], Any], said: str) -> bool:
    try:
        case()
    except TrimtabError as error:
        return said in str(error)
    return False


def _warns(runtime: Runtime, said: str) -> bool:
    return any(said in warning for warning in runtime.warnings)


LINES = (
    Line(
        id="a1",
        text="full grid here; 20 unseen (p, o) pairs; against tokens x constant",
        needed="R2 >= 0.99, median <= 10 %, 3x better",
        check=held_out_pairs,
    ),
    Line(
        id="a2",
        text="nine runs against the full grid",
        needed="g within 10 %, F within 15 %, <= 1/10 of the time",
        check=nine_runs,
    ),
    Line(
        id="a3",
        text="service with exponential delays of half a request",
        needed="denoised g within 10 %, mean off > 30 %",
        check=contention,
    ),
    Line(id="a4", text="random weights, same architecture", needed="g within 5 %", check=architecture_only),
    Line(
        id="b1",
        text="1080 recorded A100 runs: j1-large, NeoX-20B from ada, davinci",
        needed="median <= 12 %; t_layer = 0 3x worse",
        check=recorded_models,
    ),
    Line(id="b2", text="HELM's rule between prompts", needed="exact", check=helm_parity),
    Line(id="c", text="bad input", needed="refused with a sentence", check=refuses_bad_input),
)
