"""The scorecard: every metric family from report JSON, speed-up against a named baseline, carbon, money, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import Conflict, SpecError
from trimtab.measure.costs import PowerGrid
from trimtab.measure.pareto import pareto
from trimtab.measure.scorecard import FAMILIES, RULES, read_run, scorecard
from trimtab.ui.scorecard import front_lines, print_scorecard


def _figure(value: float | None, unit: str, low: float = 0.9, high: float = 1.2) -> dict[str, Any]:
    ends = (None, None) if value is None else (value * low, value * high)
    return {
        "value": value,
        "p10": ends[0],
        "p90": ends[1],
        "unit": unit,
        "kind": "measured",
        "check": "",
        "why": "as said",
    }


def report(source: str = "measured", *, machine: str = "m1", tpot: float = 0.02, **changed: Any) -> dict[str, Any]:
    """A report as JSON with round numbers."""
    facts: dict[str, Any] = {
        "schema": 1,
        "source": source,
        "plan": {
            "model": "x", "model_hash": "0", "machine": machine, "stack": "s", "techniques": [], "dtype": "bf16",
            "kv_dtype": "bf16", "workload": {"batch": 1, "prompt": 100, "gen": 11},
        },
        "counts": {
            "prefill_flops": 1000, "decode_flops": 10, "weight_bytes": 1 << 20, "kv_reserved_bytes": 1 << 10,
            "peak_bytes": 1 << 21, "parameters": 500_000,
        },
        "figures": {
            "ttft_s": _figure(0.1, "s"),
            "tpot_s": _figure(tpot, "s"),
            "tokens_per_s": _figure(1 / tpot, "tokens/s"),
            "energy_j": _figure(7200.0, "J"),
            "usd_per_million_tokens": _figure(None, "USD/Mtoken"),
            "top1_agreement": _figure(0.97, ""),
            "kl_nats": _figure(0.02, "nats"),
        },
        "observed": {}, "ops": [], "notes": [],
    }  # fmt: skip
    for name, value in changed.items():
        facts["plan"][name] = value
    return facts


def test_every_family_is_there() -> None:
    assert set(FAMILIES) == {"compute", "memory", "energy", "money", "network", "fidelity"}
    card = scorecard([read_run(report(), "a")])
    assert [metric.name for metric in card.metrics] == [rule.name for rule in RULES]
    wanted = {
        "prefill FLOPs": 1000, "decode FLOPs": 10, "TTFT": 0.1, "TPOT": 0.02, "latency": 0.1 + 10 * 0.02, "throughput": 50,
        "speed-up": 1, "parameters": 500_000, "weights": 1 << 20, "cache": 1 << 10, "peak memory": 1 << 21,
        "energy": 7200 / 3.6e6, "prefill network": 0, "decode network": 0, "agreement": 0.97, "KL to base": 0.02,
    }  # fmt: skip
    for name, value in wanted.items():
        assert card.metric(name).measured[0].value == pytest.approx(value), name
        assert card.metric(name).predicted[0].value is None
    assert card.metric("price").measured[0].value is None
    assert card.metric("TTFT").unit == "s"
    latency = card.metric("latency").measured[0]
    assert (latency.p10, latency.p90) == pytest.approx((0.9 * 0.3, 1.2 * 0.3))


def test_carbon_is_kwh_times_pue_times_grid() -> None:
    grid = PowerGrid(kg_co2eq_per_kwh=0.4, pue=1.5, source="a grid of 2020")
    card = scorecard([read_run(report(), "a")], grid=grid)
    assert card.metric("carbon").measured[0].value == pytest.approx(0.002 * 1.5 * 0.4)
    assert card.metric("carbon").measured[0].p90 == pytest.approx(0.002 * 1.5 * 0.4 * 1.2)
    assert "a grid of 2020" in card.notes[0]
    assert "2023" in scorecard([read_run(report(), "a")]).notes[0]  # the default says its year


def test_dollars_from_price_devices_and_rate() -> None:
    runs = [read_run(report(), "a"), read_run(report(parallel={"tp": 2, "pp": 2, "dp": 3, "ep": 2}), "b")]
    price = scorecard(runs, price_usd_per_h=1.8).metric("price").measured
    assert price[0].value == pytest.approx(1.8 / (3600 * 50) * 1e6)
    assert price[1].value == pytest.approx(12 * 1.8 / (3600 * 50) * 1e6)
    assert price[0].p10 is not None and price[0].value is not None and price[0].p90 is not None
    assert price[0].p10 < price[0].value < price[0].p90  # the fastest rate is the cheapest
    assert scorecard(runs[:1], price_usd_per_h=1.8, devices=8).metric("price").measured[0].value == pytest.approx(80.0)


def test_network_is_counted_or_unknown_but_zero_on_one_device() -> None:
    runs = [read_run(report(), "a"), read_run(report(parallel={"tp": 2, "pp": 1, "dp": 1, "ep": 1}), "b")]
    alone, several = scorecard(runs).metric("decode network").measured
    assert alone.value == 0 and several.value is None and several.why == "not counted in this run"
    runs[1].measured["counts"]["comm_bytes"] = 4096  # type: ignore[index]
    assert scorecard(runs).metric("decode network").measured[1].value == 4096


def test_speed_up_is_against_the_named_baseline() -> None:
    runs = [read_run(report(tpot=0.02), "slow"), read_run(report(tpot=0.01), "fast")]
    assert [v.value for v in scorecard(runs).metric("speed-up").measured] == pytest.approx([1.0, 0.3 / 0.2])
    named = scorecard(runs, baseline="fast")
    assert [v.value for v in named.metric("speed-up").measured] == pytest.approx([0.2 / 0.3, 1.0])
    with pytest.raises(SpecError, match="Did you mean 'fast'"):
        scorecard(runs, baseline="fst")


@pytest.mark.parametrize("part", ["stack", "workload"])
def test_no_speed_up_over_another_engine_or_workload(part: str) -> None:
    other = {"stack": "t", "workload": {"batch": 2, "prompt": 100, "gen": 11}}[part]
    card = scorecard([read_run(report(), "a"), read_run(report(**{part: other}), "b")])
    cell = card.metric("speed-up").measured[1]
    assert cell.value is None and f"another {part}" in cell.why
    assert any(part in note for note in card.notes)


def test_machines_are_not_mixed_unless_asked() -> None:
    runs = [read_run(report(), "a"), read_run(report(machine="m2", tpot=0.001), "b")]
    with pytest.raises(Conflict, match="a on m1, b on m2"):
        scorecard(runs)
    card = scorecard(runs, cross_machine=True)
    assert card.metric("speed-up").measured[1].value is None
    assert any("m1, m2" in note for note in card.notes)
    assert card.machines == ("m1", "m2")


def test_reads_reports_pairs_and_files(tmp_path: Path) -> None:
    pair = {"schema": 1, "predicted": report("predicted", tpot=0.03), "measured": report(), "agreement": []}
    path = tmp_path / "run7.json"
    path.write_text(json.dumps(pair))
    run = read_run(path)
    assert run.label == "run7"
    tpot = scorecard([run]).metric("TPOT")
    assert (tpot.predicted[0].value, tpot.measured[0].value) == (0.03, 0.02)
    assert tpot.column() == (0.02,) and tpot.column("predicted") == (0.03,)
    assert read_run(report("predicted")).measured is None
    assert read_run(report(techniques=["rtn:bits=4", "cats"])).label == "rtn:bits=4 + cats"
    for text in ("[]", "{}", '{"source": "measured"}', "{", '{"measured": null}'):
        path.write_text(text)
        with pytest.raises(SpecError, match="run7.json"):
            read_run(path)


def test_real_reports_have_all_that_the_card_asks(tiny_model) -> None:
    """Names of counts and figures are those `predict` writes."""
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    plans = [make_plan("llama-2-7b", "a100", Workload(prompt=128, gen=8), t) for t in ((), ("rtn:bits=4",))]
    card = scorecard([read_run(predict(plan)) for plan in plans])
    assert card.labels == ("baseline", plans[1].techniques[0])
    for metric in card.metrics:
        if metric.family != "fidelity":
            assert all(cell.value is not None for cell in metric.predicted), metric.name
    weights, flops = card.metric("weights").predicted, card.metric("prefill FLOPs").predicted
    assert weights[0].value and weights[1].value and flops[0].value and flops[1].value
    assert 3.0 <= weights[0].value / weights[1].value <= 4.0
    assert flops[0].value == flops[1].value
    speed_up = card.metric("speed-up").predicted[1].value
    assert speed_up is not None and speed_up > 1
    usd = predict(plans[0]).figures["usd_per_million_tokens"].value
    assert card.metric("price").predicted[0].value == usd
    again = scorecard([read_run(predict(plans[0]))], price_usd_per_h=plans[0].machine.usd_per_h)
    assert again.metric("price").predicted[0].value == pytest.approx(usd)


def test_front_over_metrics_names_the_dominator() -> None:
    runs = [
        read_run(report(tpot=0.02), "base"),
        read_run(report(tpot=0.03), "worse"),
        read_run(report(tpot=0.01), "fast"),
    ]
    runs[2].measured["figures"]["kl_nats"] = _figure(0.5, "nats")  # type: ignore[index]
    runs.append(read_run(report(tpot=0.005), "blind"))
    runs[3].measured["figures"]["kl_nats"] = _figure(None, "nats")  # type: ignore[index]
    card = scorecard(runs)
    front = card.front(["TPOT", "KL to base"])
    assert front.mask.tolist() == [True, False, True, False]
    assert (front.by, front.incomplete) == ((None, 0, None, None), (3,))
    assert front_lines(card.labels, front) == [
        "base: on the front",
        "worse: dominated by base",
        "fast: on the front",
        "blind: a metric is missing, not comparable",
    ]
    with pytest.raises(SpecError, match="two metrics"):
        card.front(["TPOT"])
    with pytest.raises(SpecError, match="Did you mean 'TPOT'"):
        card.front(["TPOT", "TPOTS"])
    with pytest.raises(SpecError, match="no better direction"):
        card.front(["TPOT", "parameters"])


def test_front_of_random_points_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 6, (60, 3)).astype(float)
    front = pareto(points.tolist(), ["min", "max", "min"])
    sign = np.array([1, -1, 1])
    for i, row in enumerate(points * sign):
        over = [j for j, other in enumerate(points * sign) if (other <= row).all() and (other < row).any()]
        assert front.mask[i] == (not over)
        assert front.by[i] == (min((j for j in over if front.mask[j]), default=None))


def test_front_refuses() -> None:
    with pytest.raises(SpecError, match="two metrics"):
        pareto([(1,)], ["min"])
    with pytest.raises(SpecError, match="Known: max, min"):
        pareto([(1, 2)], ["min", "low"])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="hold 2 metrics"):
        pareto([(1, 2), (1,)], ["min", "max"])
    assert pareto([], ["min", "max"]).mask.shape == (0,)


def test_labels_must_differ() -> None:
    with pytest.raises(SpecError, match="labels that differ"):
        scorecard([read_run(report(), "a"), read_run(report(), "a")])
    with pytest.raises(SpecError, match="none"):
        scorecard([])


def test_printed_card(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [read_run(report(tpot=0.02), "base"), read_run(report(tpot=0.01), "fast")]
    print_scorecard(runs, front=["TPOT", "peak memory"], price_usd_per_h=1.8)
    out = capsys.readouterr().out
    for text in (
        "m1; speed-up against base",
        "20.0 ms (18.0 ms..24.0 ms)",
        "carbon",
        "kgCO2eq",
        "1.5 x",
        "base: dominated by fast",
    ):
        assert text in out, text
    assert "predicted" not in out  # nothing was predicted: no empty columns
