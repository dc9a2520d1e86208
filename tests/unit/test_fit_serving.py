"""Fitting an engine: the fit's arithmetic is the product's, planted constants come back, nothing is fitted to impossible rows."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.measure.recorded.fit_serving import BOUNDS, MARK, EngineFit, fit_engine, held_out, to_toml, write_stack
from trimtab.measure.recorded.serving_points import DENSE, Features, impossible, points, predict_points, with_constants
from trimtab.measure.recorded.tables import Columns, load_table
from trimtab.spec.machine import Stack, load_stack, stack_from_table

PLANTED = {
    "gemm": 0.9, "attention": 1.2, "moe": 1.1, "link": 0.7, "graph_saving_s": 4e-6, "overhead_per_step_s": 1e-3,
    "overhead_per_sequence_s": 1e-5, "interference": 0.8, "overhead_per_prefill_s": 0.03, "queue": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def columns() -> Columns:
    return load_table("e2e_serving")


@pytest.fixture(scope="module")
def features(columns: Columns) -> Features:
    return Features(columns, load_stack("vllm"), "vllm")


@pytest.mark.parametrize("engine", ("vllm", "sglang"))
def test_features_predict_what_predict_does(columns: Columns, engine: str) -> None:
    stack = load_stack(engine)
    found = Features(columns, stack, engine)
    ttft, tpot = predict_points(columns, {engine: with_constants(stack, PLANTED)})
    assert found.tpot(PLANTED) == pytest.approx(tpot[found.rows], rel=1e-9)
    assert found.ttft(PLANTED) == pytest.approx(ttft[found.rows], rel=1e-9)


def test_planted_constants_come_back(features: Features) -> None:
    truth = features.tpot(PLANTED), features.ttft(PLANTED)
    before = features.tpot_s, features.ttft_s
    try:
        features.tpot_s, features.ttft_s = truth
        found = fit_engine(features)
        assert features.tpot(found) == pytest.approx(truth[0], rel=0.05)
        fits = features.crowd <= 1
        assert features.ttft(found)[fits] == pytest.approx(truth[1][fits], rel=0.1)
        assert found["interference"] == pytest.approx(0.8, rel=0.1)
    finally:
        features.tpot_s, features.ttft_s = before


def test_every_second_point_of_each_model_is_held_out(columns: Columns) -> None:
    unseen = held_out(columns)
    assert np.array_equal(unseen, held_out(columns))
    for engine in ("vllm", "sglang", "trtllm"):
        for model in set(map(str, columns["model_path"])):
            rows = [
                i
                for i, b in enumerate(columns["backend"])
                if str(b) == engine and str(columns["model_path"][i]) == model
            ]
            assert sum(unseen[rows]) == len(rows) // 2


def test_points_cover_rows_once(columns: Columns) -> None:
    rows = np.concatenate([point.rows for point in points(columns)])
    assert len(rows) == len(set(rows.tolist()))
    assert len(rows) > 500


def test_impossible_rows_beat_perfect_hardware(columns: Columns) -> None:
    bad = impossible(columns)
    assert 0 < bad.sum() < 15
    # Making every row ten times slower makes none impossible.
    slower = {name: value * 10 if name.startswith("silicon") else value for name, value in columns.items()}
    assert not impossible(slower).any()


def test_too_few_rows_are_refused(features: Features) -> None:
    with pytest.raises(SpecError, match="too few"):
        fit_engine(features, np.flatnonzero(np.isin(features.models, list(DENSE)))[:3])


def test_the_file_reads_back(tmp_path: Path) -> None:
    stack = load_stack("vllm")
    fit = EngineFit(
        engine="vllm", stack=stack, constants=PLANTED, rows_fitted=10, rows_held_out=9, impossible=1,
        tpot=(0.1, 0.08, 0.8), ttft=(0.3, 0.2, 0.8),
    )  # fmt: skip
    path = tmp_path / "vllm.toml"
    path.write_text(_file("vllm"))
    write_stack(fit, path)
    found: Stack = stack_from_table("vllm", tomllib.loads(path.read_text()))
    assert found.factors == {name: PLANTED[name] for name in ("gemm", "attention", "moe", "link")}
    assert found.overhead_per_step_s == 1e-3 and found.serving.queue == 0.2 and found.bands == stack.bands
    assert MARK in to_toml(fit) and set(PLANTED) == set(BOUNDS)
    plain = tmp_path / "plain.toml"
    plain.write_text("name = 'x'")
    with pytest.raises(SpecError, match="no line"):
        write_stack(fit, plain)


def _file(name: str) -> str:
    from trimtab.data import root

    return (root() / "stacks" / f"{name}.toml").read_text("utf-8")
