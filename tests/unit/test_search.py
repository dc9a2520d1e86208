"""The search for a plan: its figures are those of `predict`, its winners beat the losers, its reasons are true."""

from __future__ import annotations

import random

import numpy as np
import pytest
from typer.testing import CliRunner

from trimtab.api import find_plans
from trimtab.cli.main import app
from trimtab.errors import SpecError
from trimtab.predict.emit import command_line
from trimtab.predict.predict import predict
from trimtab.predict.search import OBJECTIVES, Found, Limits, grid, layouts, search
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import engine_of, make_plan, variants

MACHINES = ("a100", "h100", "l40s", "rtx-4090")


@pytest.fixture(scope="module")
def found() -> Found:
    return find_plans(
        "llama-3.1-8b", MACHINES, prompt=1000, gen=100, concurrency=64, dtypes=("bfloat16", "fp8"),
        techniques=("rtn:bits=4", "streaming-llm+rtn:bits=4"), limits=Limits(tpot_s=0.02, ttft_s=1.0),
    )  # fmt: skip


def test_figures_equal_predict() -> None:
    draw = random.Random(5)
    cases = variants("qwen3-30b-a3b", ("bfloat16", "fp8"), ("bfloat16", "fp8"), ("rtn:bits=4",))
    machines = [load_machine(name) for name in ("h100", "a100", "mi300x")]
    batch = np.arange(1, 129)
    ready = [
        (variant, requests, requests.costs(batch))
        for variant, requests in (
            c for c in grid(cases, machines, engine_of, (1, 2, 4), 700, 90) if isinstance(c, tuple)
        )
    ]
    for _ in range(40):
        variant, requests, costs = draw.choice(ready)
        at = draw.randrange(len(batch))
        plan = make_plan(
            "qwen3-30b-a3b", requests.machine, Workload(batch=int(batch[at]), prompt=700, gen=90, continuous=True),
            variant.techniques, dtype=variant.dtype, kv_dtype=variant.kv_dtype, stack=requests.stack, parallel=requests.parallel,
        )  # fmt: skip
        report = predict(plan)
        for name in ("ttft_s", "tpot_s", "tokens_per_s"):
            assert report.figures[name].value == pytest.approx(float(getattr(costs, name)[at]), rel=1e-9)
        assert report.counts["peak_bytes"] == int(np.broadcast_to(costs.memory.peak, batch.shape)[at])


def test_no_winner_is_beaten_and_every_loser_has_a_true_reason(found: Found) -> None:
    def values(candidate):
        return np.array(
            [candidate.figures[name] if candidate.figures[name] is not None else np.inf for name in OBJECTIVES]
        )

    assert found.best and found.lost
    for one in found.best:
        assert not one.lost and one.figures["tpot_s"] <= 0.02 and one.figures["ttft_s"] <= 1.0  # type: ignore[operator]
        for other in found.best:
            assert not (np.all(values(other) <= values(one)) and np.any(values(other) < values(one)))
    reasons = {"does not fit": 0, "TPOT": 0, "beaten by": 0}
    for loser in found.lost:
        assert loser.lost
        for word in reasons:
            reasons[word] += loser.lost.startswith(word)
        if loser.lost.startswith("beaten by"):
            assert any(
                np.all(values(other) <= values(loser)) and other.name in loser.lost for other in found.best
            ) or any(other.name in loser.lost for other in found.lost)
    assert reasons["beaten by"] > 0


def test_a_winner_could_not_take_one_request_more() -> None:
    limits = Limits(tpot_s=0.015)
    best = find_plans("llama-3.1-8b", ["h100"], prompt=500, gen=50, counts=[1], concurrency=256, limits=limits).best[0]
    tpot = [
        predict(
            make_plan(
                "llama-3.1-8b", "h100", Workload(batch=best.concurrency + more, prompt=500, gen=50, continuous=True)
            )
        )
        .figures["tpot_s"]
        .value
        for more in (0, 1)
    ]
    assert tpot[0] <= 0.015 < tpot[1]  # type: ignore[operator]


def test_limits_are_named_in_the_reasons() -> None:
    for limits, said in (
        (Limits(tpot_s=1e-6), "TPOT"),
        (Limits(ttft_s=1e-6), "TTFT"),
        (Limits(usd_per_h=0.01), "USD/h"),
        (Limits(usd_per_million_tokens=1e-6), "USD/Mtoken"),
        (Limits(tokens_per_s=1e9), "tokens/s at most"),
        (Limits(devices=1), "devices > 1"),
        (Limits(memory_bytes=10**9), "per device > 954 MiB"),
    ):
        counts = [2] if limits.devices else [1]
        found = find_plans("llama-3.1-8b", ["h100"], counts=counts, concurrency=4, limits=limits)
        assert not found.best and all(said in loser.lost for loser in found.lost)
    tight = find_plans("llama-3.1-70b", ["rtx-4090"], counts=[1], concurrency=4)
    assert "does not fit by" in tight.lost[0].lost and "GiB per device" in tight.lost[0].lost


def test_layouts_cut_every_number_of_devices_in_every_way() -> None:
    assert sorted((p.tp, p.pp) for p in layouts([1, 4])) == [(1, 1), (1, 4), (2, 2), (4, 1)]


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(SpecError, match="Nothing to search"):
        search([], [], engine_of, prompt=1, gen=2)


def test_commands_of_the_winner() -> None:
    found = find_plans(
        "llama-3.1-70b", ["h100"], prompt=2000, gen=200, counts=[4], concurrency=32, dtypes=["fp8"], kv_dtypes=["fp8"]
    )
    best = next(c for c in found.best if c.parallel.tp == 4)
    vllm, sglang = (command_line(best, engine, 2200) for engine in ("vllm", "sglang"))
    assert vllm.startswith("vllm serve meta-llama/") and sglang.startswith(
        "python -m sglang.launch_server --model-path meta-llama/"
    )
    for part in (
        "--tensor-parallel-size 4",
        "--quantization fp8",
        "--kv-cache-dtype fp8",
        "--max-model-len 2200",
        f"--max-num-seqs {best.concurrency}",
    ):
        assert part in vllm
    for part in (
        "--tp-size 4",
        "--quantization fp8",
        "--kv-cache-dtype fp8_e4m3",
        "--context-length 2200",
        f"--max-running-requests {best.concurrency}",
    ):
        assert part in sglang
    with pytest.raises(SpecError, match="Unknown engine"):
        command_line(best, "llamafile", 2200)


def test_an_engine_is_refused_what_it_cannot_do(found: Found) -> None:
    odd = next(c for c in (*found.best, *found.lost) if c.variant.techniques)
    with pytest.raises(SpecError, match="does not know"):
        command_line(odd, "vllm", 100)
    mixed = find_plans(
        "llama-3.1-8b", ["h100"], counts=[1], concurrency=2, dtypes=["bfloat16"], kv_dtypes=["int4"]
    ).best[0]
    with pytest.raises(SpecError, match="cache in int4"):
        command_line(mixed, "vllm", 100)


def test_the_verb() -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["plan", "llama-3.1-8b", "--on", "h100", "--counts", "1|2", "--concurrency", "16", "--emit", "vllm"]
    )
    assert done.exit_code == 0 and "plans priced" in done.stdout and "vllm serve" in done.stdout
    none = runner.invoke(
        app, ["plan", "llama-3.1-8b", "--on", "h100", "--counts", "1", "--concurrency", "4", "--tpot", "1e-6"]
    )
    assert none.exit_code == 1 and "No plan keeps the limits" in none.stdout
    bad = runner.invoke(app, ["plan", "llama-3.1-8b", "--counts", "two"])
    assert isinstance(bad.exception, SpecError) and "whole numbers" in str(bad.exception)
    json = runner.invoke(app, ["plan", "llama-3.1-8b", "--on", "h100", "--counts", "1", "--concurrency", "4", "--json"])
    assert '"evaluated"' in json.stdout


def test_stacks_differ_by_machine() -> None:
    assert engine_of(load_machine("rpi4")).name == "datasheet"
    assert engine_of(load_machine("h100"), "sglang") == load_stack("sglang")
