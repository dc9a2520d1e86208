"""Serving points: the closed loop in numbers, waiting for a place in memory, and the limits of one request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trimtab.graph.passes import Graphs
from trimtab.predict.predict import predict
from trimtab.predict.request import Requests
from trimtab.predict.serving import continuous
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import GRAPH_SHARE, Serving, load_machine, load_stack
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import make_plan

BATCH = np.arange(1, 65)


def requests(**changes) -> Requests:
    machine, stack = load_machine("h100"), replace(load_stack("datasheet"), **changes)
    spec = load_spec("llama-3.1-8b").with_dtype("bfloat16")
    return Requests(Graphs(spec), machine, stack.on(machine), prompt=1000, gen=100, concurrent=True)


def test_the_closed_loop_by_hand() -> None:
    stack = replace(load_stack("datasheet"), serving=Serving(interference=0.5, queue=0.25))
    ttft, tpot = continuous(np.array([0.2]), np.array([0.01]), np.array([5]), np.array([5]), 50, stack)
    assert ttft == pytest.approx(0.2 * (1 + 0.25 * 4) + 0.005)
    assert tpot == pytest.approx(0.01 + 0.5 * 0.2 * 4 / 50)
    waiting, _ = continuous(np.array([0.2]), np.array([0.01]), np.array([10]), np.array([5]), 50, stack)
    assert waiting == pytest.approx(ttft + (ttft + 49 * tpot))  # half of them wait for a whole request
    alone, none = continuous(np.array([0.2]), None, np.array([1]), np.array([1]), 1, stack)
    assert alone == pytest.approx(0.2) and none is None


def test_one_request_is_a_batch_of_one() -> None:
    report, batch = (
        predict(
            make_plan("llama-3.1-8b", "h100", Workload(batch=1, prompt=700, gen=50, continuous=c), stack="datasheet")
        )
        for c in (True, False)
    )
    assert report.figures["tpot_s"].value == pytest.approx(batch.figures["tpot_s"].value, rel=1e-12)
    assert report.figures["ttft_s"].value == pytest.approx(
        batch.figures["ttft_s"].value + batch.figures["tpot_s"].value / 2,
        rel=1e-12,  # type: ignore[operator]
    )


def test_more_requests_wait_longer_and_produce_more() -> None:
    costs = requests().costs(BATCH)
    assert np.all(np.diff(costs.tpot_s) >= 0) and np.all(np.diff(costs.ttft_s) > 0)  # type: ignore[arg-type]
    assert np.all(np.diff(costs.tokens_per_s) > 0)  # type: ignore[arg-type]


def test_interference_is_what_prefills_add_to_a_step() -> None:
    with_, without = (requests(serving=Serving(interference=i, queue=0.0)).costs(BATCH) for i in (1.0, 0.0))
    prefill = requests().prefill_s()
    assert with_.tpot_s - without.tpot_s == pytest.approx(prefill * (BATCH - 1) / 100)  # type: ignore[operator]


def test_what_has_no_place_waits() -> None:
    asked = requests(memory_share=0.25)
    memory = asked.footprint.at_batches(BATCH, 1000, 100)
    running = asked.running(BATCH, memory)
    fits = memory.peak <= asked.usable_bytes
    assert np.all(running[fits] == BATCH[fits]) and not fits.all()
    assert np.all(running[~fits] < BATCH[~fits]) and np.all(running >= 1)
    costs = asked.costs(BATCH)
    assert float(costs.ttft_s[-1]) > 3 * float(requests().costs(BATCH).ttft_s[-1])


def test_overheads_are_added_where_they_belong() -> None:
    base = requests().costs(BATCH)
    for field, value, per in (
        ("overhead_per_step_s", 1e-3, np.ones(64)),
        ("overhead_per_layer_s", 1e-4, np.full(64, 32)),
        ("overhead_per_sequence_s", 1e-4, BATCH),
    ):
        stack = {field: value, "serving": Serving(interference=0.0, queue=0.0)}
        still = requests(serving=Serving(interference=0.0, queue=0.0)).costs(BATCH)
        more = requests(**stack).costs(BATCH)
        assert more.tpot_s - still.tpot_s == pytest.approx(value * per)  # type: ignore[operator]
    late = requests(overhead_per_prefill_s=0.5).costs(BATCH)
    assert late.ttft_s[0] - base.ttft_s[0] == pytest.approx(0.5)
    floor = requests(floor_per_layer_s=1.0).costs(np.array([1]))
    assert floor.tpot_s == pytest.approx(32.0)


def test_kernels_inside_an_engine() -> None:
    still = {"serving": Serving(interference=0.0, queue=0.0)}
    base = requests(**still).costs(BATCH)
    all_kernels = requests(
        factors=dict.fromkeys(("gemm", "attention", "elementwise", "embedding"), 2.0), **still
    ).costs(BATCH)
    assert all_kernels.tpot_s == pytest.approx(2 * base.tpot_s)  # type: ignore[operator]
    gemm = requests(factors={"gemm": 2.0}, **still).costs(BATCH)
    assert np.all(gemm.tpot_s > base.tpot_s) and np.all(gemm.tpot_s < 2 * base.tpot_s)  # type: ignore[operator]
    saved = requests(graph_saving_s=1e-6, **still).costs(BATCH)
    kernels = sum(p.times for p in saved.passes[-1][1].kernels)
    assert base.tpot_s - saved.tpot_s == pytest.approx(kernels * 1e-6)  # type: ignore[operator]
    most = requests(graph_saving_s=1.0, **still).costs(BATCH)
    assert most.tpot_s == pytest.approx((1 - GRAPH_SHARE) * base.tpot_s)  # type: ignore[operator]
