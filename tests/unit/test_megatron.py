"""Megatron's generations through the product's own price: floors come back from their own times, bytes bind beyond them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.measure.recorded.megatron import Generation, fit, generations, with_gemm, without_floor
from trimtab.measure.recorded.tables import load_table
from trimtab.predict.predict import predict
from trimtab.spec.families.sizes import gpt
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.parallel import Parallel
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import make_plan

A100, EAGER = load_machine("a100"), load_stack("hf-eager")


def invented(layers: int, hidden: int, tp: int) -> Generation:
    pairs = [(p, o) for p in (1, 256, 1024, 1920) for o in (1, 4, 32)]
    columns = {
        "model": np.array(["x"] * len(pairs)), "layers": np.full(len(pairs), layers), "hidden": np.full(len(pairs), hidden),
        "heads": np.full(len(pairs), hidden // 128), "tp": np.full(len(pairs), tp),
        "prompt_tokens": np.array([p for p, _ in pairs]), "output_tokens": np.array([o for _, o in pairs]),
        "seconds": np.ones(len(pairs)),
    }  # fmt: skip
    return generations(columns)["x"]


def test_planted_floors_come_back() -> None:
    truth = replace(with_gemm(EAGER, 0.5), floor_per_layer_s=7e-4, floor_per_collective_s=5e-5)
    rows = [invented(24, 1024, 1), invented(96, 12288, 8)]
    rows = [replace(each, seconds=each.time_s(A100, truth)) for each in rows]
    found = fit(rows, A100, EAGER)
    assert found.op_classes["gemm"].compute_efficiency == pytest.approx(0.5)
    assert found.floor_per_layer_s == pytest.approx(7e-4) and found.floor_per_collective_s == pytest.approx(5e-5)
    bare = fit(rows, A100, EAGER, floor=False)
    assert bare.floor_per_layer_s == bare.floor_per_collective_s == 0.0
    with pytest.raises(SpecError, match="No recorded generation"):
        fit([], A100, EAGER)


def test_bytes_bind_where_they_outlast_the_floor() -> None:
    wide = invented(2, 12288, 1)
    assert np.array_equal(wide.time_s(A100, EAGER), wide.time_s(A100, without_floor(EAGER)))
    small = invented(24, 1024, 1)
    assert small.passes_s(A100, EAGER)[1] == pytest.approx(24 * EAGER.floor_per_layer_s)


@pytest.mark.parametrize("tp", (1, 4))
def test_they_are_what_predict_says(tp: int) -> None:
    spec = gpt("x", layers=8, hidden=1024, heads=8, vocab=50304, positions=4096)
    each = invented(8, 1024, tp)
    plan = make_plan(
        spec, "a100", Workload(prompt=256, gen=4), dtype="float16", kv_dtype="float16", stack="hf-eager",
        parallel=Parallel(tp=tp),
    )  # fmt: skip
    figures = predict(plan).figures
    index = next(
        i for i, pair in enumerate(zip(each.prompt_tokens, each.output_tokens, strict=True)) if pair == (256, 4)
    )
    whole = figures["ttft_s"].value + 3 * figures["tpot_s"].value  # type: ignore[operator]
    assert each.time_s(A100, EAGER)[index] == pytest.approx(whole, rel=1e-3)


def test_two_models_predict_two_others(shared_data: Path) -> None:
    rows = generations(load_table("megatron_a100_generation", shared_data / "analyze"))
    assert sum(len(each.seconds) for each in rows.values()) == 1080
    held = [rows["ai21_j1_large"], rows["gpt_neox_20b"]]
    fitted_on = [rows["openai_ada"], rows["openai_davinci"]]
    stacks = [fit(fitted_on, A100, EAGER, floor=floor) for floor in (True, False)]
    errors = [float(np.median(np.concatenate([each.error(A100, stack) for each in held]))) for stack in stacks]
    assert errors[0] <= 0.12 and errors[1] >= 3 * errors[0]
    # What ships is that fit.
    shipped = stacks[0]
    assert EAGER.floor_per_layer_s == pytest.approx(shipped.floor_per_layer_s)
    assert EAGER.floor_per_collective_s == pytest.approx(shipped.floor_per_collective_s)
    assert EAGER.op_classes["gemm"].compute_efficiency == pytest.approx(shipped.op_classes["gemm"].compute_efficiency)
