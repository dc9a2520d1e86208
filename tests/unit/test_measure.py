"""Quality metrics against plain definitions, meters against known programs, and a whole measurement on a tiny model."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, SpecError
from trimtab.measure.calibrate import calibrate, thread_scaling, to_toml
from trimtab.measure.fit_classes import Sample, fit_classes
from trimtab.measure.ledger import Ledger
from trimtab.measure.measure import Arm, agreement, compare
from trimtab.measure.meters import ActivationMeter
from trimtab.measure.quality import TokenScores, evaluate_text, kl_nats, windows
from trimtab.model.variant import Model
from trimtab.spec.machine import Efficiency, load_machine, load_stack, this_machine_path
from trimtab.spec.plan import Plan
from trimtab.spec.workload import Workload
from trimtab.techniques.apply import derive
from trimtab.techniques.registry import parse_all


def test_kl_and_perplexity_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    p_log, q_log = (torch.from_numpy(rng.standard_normal((300, 17)).astype(np.float32)) for _ in range(2))
    nexts = torch.from_numpy(rng.integers(0, 17, 300))
    p, q = p_log.double().softmax(-1).numpy(), q_log.double().softmax(-1).numpy()
    kl = (p * np.log(p / q)).sum(-1)
    scores = TokenScores()
    scores.add(p_log, q_log, nexts)
    found = scores.result()
    rows = np.arange(300)
    assert kl_nats(p_log, q_log) == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_nats == pytest.approx(kl.mean(), rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(-np.log(q[rows, nexts.numpy()]).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    paired = -np.log(q[rows, nexts.numpy()]) + np.log(p[rows, nexts.numpy()])
    assert found.nll_difference_se == pytest.approx(paired.std(ddof=1) / math.sqrt(300), rel=1e-4)
    assert found.kl_se == pytest.approx(kl.std(ddof=1) / math.sqrt(300), rel=1e-4)


def test_a_model_against_itself_is_zero(tiny_model: Any) -> None:
    pieces = windows(np.arange(90) % 100, 30)
    found = evaluate_text(tiny_model.variant, tiny_model.variant, pieces)
    assert found.kl_nats == 0 and found.top1_agreement == 1 and found.ppl == found.ppl_base
    assert found.tokens == 3 * 29  # the first token of a window is not scored


def test_windows_are_spread_and_short_texts_refused() -> None:
    assert [int(piece[0]) for piece in windows(np.arange(100), 10, 4)] == [0, 30, 60, 90]
    with pytest.raises(CalibrationError, match="9 tokens"):
        windows(np.arange(9), 10)


def test_activation_meter_sees_the_peak_of_live_storages() -> None:
    weight = torch.from_numpy(np.ones((256, 256), np.float32))  # wrapped, never counted
    with ActivationMeter() as meter:
        a = weight + 1  # 256 KiB
        b = a.view(-1)[:10]  # a view costs nothing
        c = a * 2  # 512 KiB live
        del a, b
        d = c[:128].clone()  # 256 + 128 KiB
        del c, d
    assert meter.peak == 2 * 256 * 256 * 4
    assert meter.live == 0


def _plan(model: Model, stack: Any, techniques: tuple[str, ...] = ()) -> Plan:
    return Plan(
        base=model.spec,
        model=model.spec,
        machine=load_machine("a100"),
        stack=dataclasses.replace(stack, attention="eager", prefill_chunk=16),
        workload=Workload(batch=2, prompt=37, gen=6),
        techniques=techniques,
        dtype="fp32",
        kv_dtype="fp32",
    )


class _Words:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 131 for letter in text]


@pytest.mark.parametrize(
    "setting",
    [
        "rtn:bits=4,group=16",
        "streaming-llm:sink=2,recent=20",
        "gemfilter:layer=1,topk=11",
        "cats",
        "snapkv:cap=20,window=4",
        "knorm:cap=24+kivi:group=8,residual=8",
        "think:ratio=0.4,obs=8,recent=5",
        "h2o:cap=20",
        "quest:budget=16,page=4,skip=1",
    ],
)
def test_predicted_and_measured_counts_are_equal(
    tiny_model: Any, tiny_materials: Any, tmp_path: Path, setting: str
) -> None:
    stack = load_stack("datasheet")
    base = Model(tiny_model.variant, _Words)  # type: ignore[arg-type]
    variant = Model(derive(base.variant, parse_all([setting]), tiny_materials), _Words)  # type: ignore[arg-type]
    plan = dataclasses.replace(_plan(base, stack), model=variant.spec, techniques=(setting,))
    arms = [Arm("baseline", _plan(base, stack), base), Arm(setting, plan, variant)]
    ledger = Ledger(tmp_path / "l.sqlite")
    found = compare(arms, rounds=1, ledger=ledger)
    for each in found:
        compared = agreement(each.predicted, each.measured)
        assert len(compared) == 7
        assert all(one.equal or one.observed for one in compared), compared
        assert not each.measured.notes  # with the observed counts put in, equality is to the unit
        assert each.measured.figures["tpot_s"].value and each.measured.figures["ttft_s"].value
    assert found[0].measured.figures["kl_nats"].value == 0
    assert found[1].measured.figures["kl_nats"].value > 0
    assert [run.state for run in ledger.runs()] == ["done", "done"]


def test_a_formula_that_is_off_is_noticed(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.graph import attention as module

    pairs = module.pairs
    monkeypatch.setattr(module, "pairs", lambda *args: pairs(*args) + 1)
    base = Model(tiny_model.variant, _Words)  # type: ignore[arg-type]
    (found,) = compare(
        [Arm("baseline", _plan(base, load_stack("datasheet")), base)], rounds=1, ledger=Ledger(tmp_path / "l")
    )
    assert any("decode_flops" in note for note in found.measured.notes)
    assert not all(one.equal for one in agreement(found.predicted, found.measured))


def test_fit_recovers_planted_constants() -> None:
    planted = Efficiency(compute_efficiency=0.6, bandwidth_efficiency=0.3, launch_s=2e-5)
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(80):
        compute, memory = 10 ** rng.uniform(-6, -2, 2)
        time_s = max(compute / 0.6, memory / 0.3) + 2e-5
        samples.append(Sample("gemm.fp32", compute, memory, 1.0, time_s))
    found = fit_classes(samples)["gemm.fp32"]
    for name in ("compute_efficiency", "bandwidth_efficiency", "launch_s"):
        assert getattr(found, name) == pytest.approx(getattr(planted, name), rel=0.1)  # the grid's last step is 4 %


def test_thread_scaling_puts_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rates = thread_scaling()
        assert [rate.threads for rate in rates] == [1, 2] and torch.get_num_threads() == 2
        assert all(rate.gemm_flops_per_s > 1e8 and rate.read_bytes_per_s > 1e8 for rate in rates)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_calibration_is_written_and_read_back() -> None:
    found = calibrate()
    assert this_machine_path().exists()
    machine, stack = load_machine("this"), load_stack("this")
    assert machine == found.machine and stack == found.stack
    native = load_stack("native")
    assert to_toml(machine, (stack, native)) == to_toml(found.machine, (found.stack, found.native))


_LOAD = """
import sys, gc, trimtab
from trimtab.measure.process import rss_bytes
m = trimtab.load("smollm2-135m", techniques=sys.argv[1:])
gc.collect()
print(rss_bytes(), m.weights.nbytes)
"""


def test_loading_with_a_technique_frees_the_originals(smollm2_path: Path) -> None:
    def load(*techniques: str) -> tuple[int, int]:
        out = subprocess.run([sys.executable, "-c", _LOAD, *techniques], capture_output=True, text=True, check=True)
        resident, weights = out.stdout.split()
        return int(resident), int(weights)

    (plain, plain_weights), (packed, packed_weights) = load(), load("rtn:bits=4,group=32")
    saved = plain_weights - packed_weights
    assert saved > 300e6
    assert plain - packed > 0.8 * saved  # allocators keep a little


def test_plan_beyond_the_context_is_refused() -> None:
    from trimtab.measure.measure import prepare
    from trimtab.techniques.plan import make_plan

    with pytest.raises(SpecError, match="8192"):
        prepare(make_plan("smollm2-135m", "a100", Workload(prompt=8190, gen=10)))
