"""Idealized runtime: the fit, the rules between prompts, denoising, costs, the recorded stack and bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import CalibrationError, CapacityError, SpecError
from trimtab.measure.costs import PowerGrid, carbon_kg, idealized_energy_j, idealized_usd, usd_per_h
from trimtab.measure.idealize import (
    CLOCKS,
    engine_endpoint,
    predicted_endpoint,
    profile,
    profile_all,
    random_model,
)
from trimtab.measure.idealized import (
    Grid,
    Runtime,
    Sample,
    denoise,
    discrepancy,
    fit_runtime,
    helm_runtime,
    parse_points,
    read_helm,
    read_log,
)
from trimtab.measure.recorded.megatron import generations
from trimtab.measure.recorded.tables import load_table
from trimtab.spec.machine import load_machine

GRID = Grid(prompts=(1, 64, 256, 512), outputs=(1, 2, 8, 32))
G_S, FLOOR_S, SLOPE_S = 0.020, 0.022, 1e-4


def service(p: int, o: int) -> float:
    """A request on a machine without noise: flat, then linear in p; no output token costs as much as one."""
    return max(FLOOR_S, 0.005 + SLOPE_S * p) + max(o - 1, 0) * G_S


# --- fit ---------------------------------------------------------------------------------------------------------------


def test_fit_recovers_both_quantities() -> None:
    found = fit_runtime(profile(service, GRID))
    assert found.token_s == pytest.approx(G_S, rel=1e-9)
    assert found.r_squared == pytest.approx(1.0)
    assert found.prompt_s == pytest.approx([service(p, 1) for p in GRID.prompts])
    assert found.warnings == ()
    assert found.time_s(256, 9) == pytest.approx(service(256, 9))


def test_counts_output_tokens_beyond_the_first() -> None:
    """One output token costs F alone, two cost one decode step more."""
    found = fit_runtime(profile(service, GRID))
    assert found.time_s(64, 1) == pytest.approx(found.prompt_time_s(64))
    assert found.time_s(64, 2) - found.time_s(64, 1) == pytest.approx(G_S)


def test_one_regression_weighs_all_prompts() -> None:
    """A slope per prompt, averaged, would give the noisy short prompt as much say as the long one."""
    samples = [Sample(1, 1, 0.02), Sample(1, 2, 0.08)]  # slope 0.06
    samples += [Sample(512, o, 0.05 + (o - 1) * G_S) for o in (1, 2, 4, 8, 16, 32, 64)]
    assert fit_runtime(samples).token_s == pytest.approx(G_S, rel=0.03)


def test_prompts_without_one_output_token_are_fitted_too() -> None:
    samples = [Sample(p, o, service(p, o)) for p in (1, 128) for o in (4, 16, 32)]
    found = fit_runtime(samples)
    assert found.token_s == pytest.approx(G_S)
    assert found.prompt_s == pytest.approx([service(1, 1), service(128, 1)])


def test_statistics_of_trials() -> None:
    rows = [Sample(8, o, service(8, o) + extra) for o in (1, 5, 9) for extra in (0.0, 0.001, 0.5)]
    low, mid, mean = (fit_runtime(rows, s).prompt_s[0] for s in ("min", "median", "mean"))
    assert (low, mid) == pytest.approx((FLOOR_S, FLOOR_S + 0.001))
    assert mean == pytest.approx(FLOOR_S + 0.167)


def test_largest_residual_names_the_point() -> None:
    rows = [s if s[:2] != (64, 8) else Sample(64, 8, s.seconds + 0.05) for s in profile(service, GRID)]
    found = fit_runtime(rows)
    assert found.largest_residual is not None
    assert found.largest_residual[:2] == (64, 8)
    assert found.r_squared is not None and 0.9 < found.r_squared < 0.9999


def test_falling_f_is_named_only_beyond_noise() -> None:
    times = {1: 0.10, 16: 0.20, 32: 0.15, 64: 0.30}
    found = fit_runtime([Sample(p, o, t + (o - 1) * G_S) for p, t in times.items() for o in (1, 4, 8)])
    (warning,) = found.warnings
    assert "0.15 s at 32 tokens after 0.2 s at 16" in warning
    assert "64 tokens" not in warning
    rng = np.random.default_rng(0)  # the same fall inside the scatter of the trials is no fall
    noisy = [
        Sample(p, o, t + (o - 1) * G_S + rng.uniform(0, 0.2))
        for p, t in times.items()
        for o in (1, 4, 8)
        for _ in range(6)
    ]
    assert fit_runtime(noisy, "median").warnings == ()


# --- between profiled prompts ------------------------------------------------------------------------------------------


def test_rules_between_prompts() -> None:
    runtime = Runtime(prompt_tokens=(16, 64, 128), prompt_s=(1.0, 1.0, 2.0), token_s=0.5)
    asked = np.array([1, 16, 40, 96, 128, 256])
    assert runtime.prompt_time_s(asked).tolist() == pytest.approx([1.0, 1.0, 1.0, 1.5, 2.0, 4.0])
    assert runtime.prompt_time_s(asked, "helm").tolist() == pytest.approx([1 / 16, 1.0, 40 / 64, 1.5, 2.0, 4.0])
    with pytest.raises(SpecError, match="Allowed: linear, helm, affine"):
        runtime.prompt_time_s(1, "cubic")  # type: ignore[arg-type]


def test_affine_needs_a_line_that_starts_above_zero() -> None:
    flat = Runtime(prompt_tokens=(1, 512, 1024), prompt_s=(0.087, 0.179, 0.324), token_s=0.081)
    assert flat.prompt_time_s(64, "affine") == pytest.approx(0.087)  # the floor: the line is below it
    assert flat.prompt_time_s(768, "affine") == pytest.approx((0.179 + 0.324) / 2)
    steep = Runtime(prompt_tokens=(1, 512, 1024), prompt_s=(0.1, 1.0, 3.0), token_s=0.1)  # the line starts at -1 s
    assert steep.prompt_time_s(256, "affine") == steep.prompt_time_s(256)


def _helm_rule(table: dict, p: int, o: int) -> float:
    """The published rule, written as a loop over the raw table."""
    raw = {int(k): v for k, v in table["runtime_for_prompt_tokens"].items()}
    key = next((k for k in sorted(raw) if p <= k), max(raw))
    return raw[key] * (p / key) + max(o - 1, 0) * table["runtime_per_output_token"]


def test_helm_parity(shared_data: Path) -> None:
    path = shared_data / "analyze" / "helm_inference_idealized_runtimes.json"
    tables, found = json.loads(path.read_text()), read_helm(path)
    assert set(found) == set(tables) and len(found) >= 15
    assert found["openai/davinci"].time_s(300, 10, "helm") == pytest.approx(0.854625, abs=1e-12)
    for name, table in tables.items():
        for p in (1, 2, 17, 300, 511, 512, 513, 1920, 1921, 4000):
            for o in (0, 1, 2, 100):
                assert found[name].time_s(p, o, "helm") == pytest.approx(_helm_rule(table, p, o), rel=1e-12), (
                    name,
                    p,
                    o,
                )


def test_helm_rule_without_the_tables() -> None:
    runtime = helm_runtime({"320": 0.134, "16": 0.087}, 0.081)
    assert runtime.time_s(300, 10, "helm") == pytest.approx(0.134 * 300 / 320 + 9 * 0.081)


# --- few points --------------------------------------------------------------------------------------------------------


def test_nine_runs_agree_with_the_grid() -> None:
    full = Grid(prompts=(1, 16, 64, 128, 256, 384, 512), outputs=(1, 2, 4, 8, 16, 32), trials=3)
    least = full.least()
    assert (least.prompts, least.outputs, least.trials, len(least.points)) == ((1, 256, 512), (1, 8, 32), 1, 9)
    assert Grid(prompts=(1,), outputs=(1, 2, 3)).least().points == ((1, 1), (1, 2), (1, 3))
    a, b = fit_runtime(profile(service, full)), fit_runtime(profile(service, least))
    assert b.token_s == pytest.approx(a.token_s)
    asked = np.array(full.prompts)
    assert b.prompt_time_s(asked, "affine") == pytest.approx(a.prompt_time_s(asked))


def test_grid_refuses() -> None:
    with pytest.raises(SpecError, match="outputs=1\\+8 holds 2 points"):
        Grid(outputs=(1, 8))
    for bad in ((), (0, 4), (4, 2), (1, 1)):
        with pytest.raises(SpecError, match="is not a grid"):
            Grid(prompts=bad)
    with pytest.raises(SpecError, match="trials=0"):
        Grid(trials=0)
    with pytest.raises(SpecError, match="fits a context of 16"):
        GRID.up_to(16)
    assert GRID.up_to(300).prompts == (1, 64, 256)
    assert parse_points("1+16|64,128") == (1, 16, 64, 128)
    with pytest.raises(SpecError, match="'1\\+x'"):
        parse_points("1+x")


# --- contention --------------------------------------------------------------------------------------------------------


def _contended(trials: int, overhead_s: float = 0.0) -> list[Sample]:
    """Every request is delayed by an exponential of half its own time."""
    rng = np.random.default_rng(7)
    return [
        Sample(p, o, (t := service(p, o) + overhead_s) + rng.exponential(0.5 * t))
        for _ in range(trials)
        for p, o in GRID.points
    ]


def test_denoised_fit_forgets_contention() -> None:
    samples = _contended(20)
    assert denoise(samples).token_s == pytest.approx(G_S, rel=0.10)
    mean = fit_runtime(samples, "mean").token_s
    assert mean is not None and mean / G_S - 1 > 0.30


def test_denoise_splits_the_overhead_of_a_request() -> None:
    quiet = [Sample(p, o, service(p, o) + 0.3) for p, o in GRID.points for _ in range(3)]
    found = denoise(quiet)
    # A one-token prompt costs FLOOR_S against G_S of a decode step: those 2 ms cannot be told from overhead.
    assert found.overhead_s == pytest.approx(0.3 + FLOOR_S - G_S)
    assert found.time_s(256, 9) == pytest.approx(service(256, 9) + 0.3)
    assert found.warnings == ()
    given = denoise(quiet, overhead_s=0.3)
    assert given.prompt_s[0] == pytest.approx(FLOOR_S)
    with pytest.raises(SpecError, match="overhead_s=0.5"):
        denoise(quiet, overhead_s=0.5)
    long_only = denoise([s for s in quiet if s.prompt_tokens > 1])
    assert long_only.overhead_s == 0.0
    assert any("cannot be told from F" in warning for warning in long_only.warnings)
    assert any("1 trial" in warning for warning in denoise(quiet[::3]).warnings)


def test_discrepancy_is_observed_minus_idealized() -> None:
    runtime = fit_runtime(profile(service, GRID))
    assert discrepancy([Sample(64, 8, service(64, 8) + 0.4)], runtime) == pytest.approx([0.4])


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_single_output_length_cannot_be_split() -> None:
    for o in (1, 8):
        with pytest.raises(CalibrationError, match="cannot separate F from g"):
            fit_runtime([Sample(p, o, 0.1) for p in (1, 64)])
    with pytest.raises(CalibrationError, match="cannot separate F from g"):  # two lengths, but no prompt has both
        fit_runtime([Sample(1, 1, 0.1), Sample(64, 8, 0.3)])
    with pytest.raises(CalibrationError, match="No timed request"):
        fit_runtime([])


def test_no_output_token_gives_f_alone() -> None:
    found = fit_runtime([Sample(p, 0, service(p, 0)) for p in (1, 64, 512)])
    assert found.token_s is None
    assert found.time_s(512, 0) == found.time_s(512, 1) == pytest.approx(service(512, 1))
    with pytest.raises(SpecError, match="g is unknown"):
        found.time_s(512, 2)
    full = fit_runtime(profile(service, GRID))
    assert full.time_s(64, 0) == full.prompt_time_s(64)
    with pytest.raises(SpecError, match="output_tokens=-1"):
        full.time_s(64, -1)
    with pytest.raises(SpecError, match="prompt_tokens=0"):
        full.time_s(0, 1)


def test_hidden_or_broken_numbers_are_refused() -> None:
    for sample in ((1, None, 0.1), (None, 1, 0.1), (0, 1, 0.1), (1, -1, 0.1), (1, 1.5, 0.1), (True, 1, 0.1)):
        with pytest.raises(SpecError):
            fit_runtime([sample])  # type: ignore[list-item]
    for seconds in (0.0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(SpecError, match="seconds="):
            fit_runtime([(1, 1, seconds)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is not an object"),
        ('{"output_tokens": 3, "seconds": 1}', "no prompt_tokens: without token counts"),
        ('{"prompt_tokens": 3, "output_tokens": null, "seconds": 1}', "no output_tokens: without token counts"),
        ('{"seconds": 1}', "no prompt_tokens and no output_tokens"),
        ('{"prompt_tokens": 3, "output_tokens": 2}', "has no seconds"),
        ('{"prompt_tokens": 3, "output_tokens": 2, "seconds": -1}', "seconds=-1"),
        ('{"prompt_tokens": 3.5, "output_tokens": 2, "seconds": 1}', "prompt_tokens=3.5"),
    ],
)
def test_log_errors_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt_tokens": 3, "output_tokens": 2, "seconds": 0.5}\n\n' + line + "\n")
    with pytest.raises(SpecError, match=message) as caught:
        read_log(path)
    assert "log.jsonl, line 3" in str(caught.value)


def test_log_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    samples = profile(service, GRID)
    path.write_text("\n".join(json.dumps(s._asdict()) for s in samples))
    assert read_log(path) == samples
    with pytest.raises(SpecError, match="cannot be read"):
        read_log(tmp_path / "absent.jsonl")


# --- costs -------------------------------------------------------------------------------------------------------------


def test_costs() -> None:
    assert idealized_usd(7200, 2.5, devices=8) == pytest.approx(40.0)
    assert idealized_energy_j(2.0, 400.0, devices=8) == pytest.approx(6400.0)
    assert carbon_kg(1.1 * 3.6e9, PowerGrid(kg_co2eq_per_kwh=0.429, pue=1.1, source="x")) == pytest.approx(519.09)
    assert usd_per_h(load_machine("v100")) == pytest.approx(3.06)
    assert usd_per_h(load_machine("v100-16gb"), override=1.5) == 1.5
    with pytest.raises(CalibrationError) as caught:
        usd_per_h(load_machine("v100-pcie-16gb"))
    assert "v100-sxm2-32gb (3.06)" in str(caught.value) and "a10-" not in str(caught.value)
    for bad in (-1.0,):
        with pytest.raises(SpecError, match="price_usd_per_h"):
            usd_per_h(load_machine("v100"), override=bad)
    with pytest.raises(SpecError, match="PUE of 1"):
        PowerGrid(kg_co2eq_per_kwh=0.1, pue=0.9, source="x")


# --- endpoints ---------------------------------------------------------------------------------------------------------


def test_profile_interleaves_endpoints_and_discards_the_first() -> None:
    seen: list[tuple[str, int, int]] = []

    def endpoint(name: str):
        def run(p: int, o: int) -> float:
            seen.append((name, p, o))
            return float(len(seen))

        return run

    grid = Grid(prompts=(1, 2), outputs=(1, 2, 3), trials=2)
    found = profile_all({"a": endpoint("a"), "b": endpoint("b")}, grid)
    assert [name for name, _, _ in seen] == ["a", "b"] * 13  # one warm-up of each, then turn by turn
    assert min(s.seconds for s in found["a"]) == 3.0  # the warm-up is not among the samples
    for trial in (found["a"][:6], found["a"][6:]):
        assert sorted(s[:2] for s in trial) == sorted(grid.points)
    assert [s[:2] for s in found["a"][:6]] != [s[:2] for s in found["a"][6:]]  # an order of its own


def test_engine_endpoint_runs_the_model(tiny_model, monkeypatch) -> None:
    """Counts passes instead of seconds: one prefill pass, then o - 1 decode steps; the context is respected."""
    passes: list[int] = []
    session_type = type(tiny_model.session())
    original = session_type._forward
    monkeypatch.setattr(session_type, "_forward", lambda self, *a: (passes.append(len(a[1][0])), original(self, *a))[1])
    monkeypatch.setitem(CLOCKS, "wall", lambda: float(len(passes)))
    run = engine_endpoint(tiny_model)
    assert run(17, 1) == 1.0 and passes == [17]
    assert run(3, 5) == 5.0 and passes[1:] == [3, 1, 1, 1, 1]
    with pytest.raises(SpecError, match="clock=sun"):
        engine_endpoint(tiny_model, clock="sun")  # type: ignore[arg-type]


def test_random_model_has_the_architecture_and_refuses_what_cannot_fit(tiny_model) -> None:
    model = random_model(tiny_model.spec, seed=5)
    assert model.spec == tiny_model.spec
    assert engine_endpoint(model)(4, 2) > 0
    from trimtab.spec.configs import load_spec

    with pytest.raises(CapacityError, match="gpt3-175b|GPT"):
        random_model(load_spec("gpt3-175b").with_dtype("float32"))


def test_predicted_endpoint_equals_the_prediction() -> None:
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    plan = make_plan("gpt-neox-20b", "a100", Workload(prompt=128, gen=16), dtype="float16", kv_dtype="float16")
    figures, run = predict(plan).figures, predicted_endpoint(plan)
    ttft, tpot = figures["ttft_s"].value, figures["tpot_s"].value
    assert ttft is not None and tpot is not None
    assert run(128, 16) == pytest.approx(ttft + 15 * tpot, rel=1e-9)
    assert run(128, 1) == pytest.approx(ttft)
    fitted = fit_runtime(profile(run, Grid(prompts=(1, 128, 512), outputs=(1, 8, 16), trials=1)))
    assert fitted.r_squared is not None and fitted.r_squared > 0.999
    assert fitted.token_s == pytest.approx(tpot, rel=0.02)
    eager = dataclasses.replace(plan, stack=dataclasses.replace(plan.stack, floor_per_layer_s=0.01))
    assert predicted_endpoint(eager)(1, 2) == pytest.approx(2 * 44 * 0.01, rel=0.02)


def test_recorded_fits_are_lines(shared_data: Path) -> None:
    """g in ms of the four recorded models, as published."""
    rows = generations(load_table("megatron_a100_generation", shared_data / "analyze"))
    wanted = {"openai_ada": 18.6, "ai21_j1_large": 23.7, "gpt_neox_20b": 33.2, "openai_davinci": 81.5}
    for name, each in rows.items():
        columns = zip(each.prompt_tokens.astype(int), each.output_tokens.astype(int), each.seconds, strict=True)
        found = fit_runtime([Sample(*row) for row in columns])
        assert found.token_s == pytest.approx(wanted[name] / 1e3, rel=0.005)
        assert found.r_squared is not None and found.r_squared > 0.998
