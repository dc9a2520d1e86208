"""From kernels of the graph to the sizes of fitted forms, collectives by hand, replicas, old prices, the user's own constants."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Kernel, StepShape
from trimtab.graph.passes import samples
from trimtab.graph.shard import shard
from trimtab.predict import forms
from trimtab.predict.kernels import constants_of, device_of
from trimtab.predict.links import collective_s
from trimtab.predict.memory import Footprint
from trimtab.predict.notes import price_age
from trimtab.predict.predict import predict
from trimtab.predict.price import price
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import Efficiency, load_machine, load_stack
from trimtab.spec.nodes import MoESpec
from trimtab.spec.parallel import Parallel
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import make_plan

H100 = load_machine("h100")
# Kernels as recorded: no factor of an engine, nothing saved.
PLAIN = replace(
    load_stack("vllm"), factors={}, graph_saving_s=0.0, overhead_per_step_s=0.0, overhead_per_sequence_s=0.0
).on(H100)


def kernel_at(spec, name: str) -> Kernel:
    return next(k for k in fuse(build(spec), PLAIN) if any(op.name == f"layers.0.{name}" for op in k.ops))


def seconds(kernel: Kernel, step: StepShape) -> float:
    return price([kernel], step, H100, PLAIN).total_s


def test_matrices_that_read_one_input_are_one_product() -> None:
    spec = load_spec("llama-3.1-8b").with_dtype("bfloat16")
    step = StepShape.of([[300]], [[0]], logits=1)
    kernel = kernel_at(spec, "self_attn.q_proj")
    counts = count(kernel, step, "tiled", H100.llc_bytes)
    found = PLAIN.efficiency("gemm", "bf16")
    assert found.form == "gemm"
    expected = forms.gemm_s(
        300, (32 + 2 * 8) * 128, 4096, counts.weight_read, counts.act_read + counts.act_written,
        device_of(H100, "bf16"), constants_of(found), working_set_bytes=counts.weight_read,
    )  # fmt: skip
    assert seconds(kernel, step) == pytest.approx(float(np.sum(expected)), rel=1e-12)


def test_fp8_products_run_at_the_fp8_peak() -> None:
    step = StepShape.of([[4096]], [[0]], logits=1)
    times = {
        dtype: seconds(kernel_at(load_spec("llama-3.1-8b").with_dtype(dtype), "mlp.down_proj"), step)
        for dtype in ("bfloat16", "fp8")
    }
    assert 0.4 < times["fp8"] / times["bfloat16"] < 0.8


@pytest.mark.parametrize(("new", "form"), [(1, forms.decode_attention_s), (700, forms.prefill_attention_s)])
def test_attention_of_equal_rows(new: int, form) -> None:
    spec = load_spec("llama-3.1-8b").with_dtype("bfloat16", "bfloat16")
    step = StepShape.of([[new]], [[0]], logits=1, copies=6)
    kernel = kernel_at(spec, "self_attn.attend")
    device = device_of(H100, "bf16")
    c = constants_of(PLAIN.efficiency("attention_decode" if new == 1 else "attention_prefill"))
    expected = (
        form(6, new, 32, 8, 128, 2.0, device, c) if new == 1 else form(6, new, 0, 32, 8, 128, np.inf, 2.0, device, c)
    )
    assert seconds(kernel, step) == pytest.approx(float(np.sum(expected)), rel=1e-9)


def test_a_few_tokens_over_a_long_past_run_as_decoding_does() -> None:
    spec = load_spec("llama-3.1-8b").with_dtype("bfloat16", "bfloat16")
    kernel = kernel_at(spec, "self_attn.attend")
    one, five = (seconds(kernel, StepShape.of([[new]], [[30000]], logits=1)) for new in (1, 5))
    assert one <= five < 2 * one  # as in speculative verification: the keys are read once


def test_experts_are_one_kernel_of_this_ranks_experts() -> None:
    spec = load_spec("mixtral-8x7b").with_dtype("bfloat16")
    step = StepShape.of([[16]], [[0]], logits=1)
    for parallel in (Parallel(), Parallel(tp=4, ep=4), Parallel(tp=1, dp=4, ep=4)):
        part = shard(spec, parallel)
        moe = part.layers[0].mlp
        assert isinstance(moe, MoESpec)
        tokens = 16 * (4 if parallel.exchange else 1)
        nbytes = 3 * moe.experts.up_proj.nbytes()
        expected = forms.moe_s(
            tokens, 4096, 14336, 2, 8, nbytes, device_of(H100, "bf16"),
            constants_of(PLAIN.efficiency("moe", "bf16")), expert_ranks=parallel.ep,
        )  # fmt: skip
        kernel = kernel_at(part, "mlp.experts.up_proj")
        assert [op.name.rpartition(".")[2] for op in kernel.ops] == ["gate_proj", "up_proj", "act", "down_proj"]
        assert seconds(kernel, step) == pytest.approx(float(np.sum(expected)), rel=1e-12)


def test_collectives_by_hand() -> None:
    link = Efficiency(compute_efficiency=1.0, bandwidth_efficiency=0.5, launch_s=1e-5)
    # 8 ranks, 80 MB, 100 GB/s of which half is reached: a ring sends 7/8 of the value twice, in 14 messages.
    assert collective_s("all_reduce", 80e6, 8, 100e9, link) == pytest.approx(14 * (10e6 / 50e9 + 1e-5))
    assert collective_s("all_gather", 80e6, 8, 100e9, link) == pytest.approx(7 * 10e6 / 50e9 + 1e-5)
    # A small value goes to all others at once.
    assert collective_s("all_reduce", 8e3, 8, 100e9, link) == pytest.approx(7 * 8e3 / 50e9 + 1e-5)
    assert collective_s("send", 1e6, 2, 100e9, link) == pytest.approx(1e6 / 50e9 + 1e-5)


def test_recorded_collectives_are_priced_by_their_form() -> None:
    found = PLAIN.efficiency("all_reduce")
    assert found.form == "collective" and found.band is not None
    times = [float(collective_s("all_reduce", n, 8, 450e9, found)) for n in (1e3, 1e6, 1e9)]
    assert 5e-6 < times[0] < 5e-5 and 1e9 * 1.75 / 450e9 * 0.9 < times[2] < 1e9 * 1.75 / 450e9 * 1.5
    assert times == sorted(times)


def test_replicas_share_the_sequences() -> None:
    one, four = (
        predict(make_plan("llama-3.1-8b", "h100", Workload(batch=b, prompt=500, gen=20), parallel=Parallel(dp=dp)))
        for b, dp in ((8, 1), (32, 4))
    )
    for name in ("kv_bytes", "peak_bytes", "weight_read", "kv_read"):
        assert one.counts[name] == four.counts[name], name
    assert one.figures["tpot_s"].value == four.figures["tpot_s"].value
    assert four.figures["tokens_per_s"].value == pytest.approx(4 * one.figures["tokens_per_s"].value)  # type: ignore[operator]


def test_the_largest_stage_holds_one_table_not_two() -> None:
    spec = load_spec("llama-3.1-8b").with_dtype("bfloat16")
    weights = [Footprint(spec, PLAIN, Parallel(pp=pp)).at(Workload()).weights for pp in (1, 2, 32)]
    table = spec.embed_tokens.nbytes()
    layer = (weights[0] - 2 * table - spec.norm.nbytes()) // 32  # type: ignore[union-attr]
    assert weights[1] == 16 * layer + table + spec.norm.nbytes()  # type: ignore[union-attr]
    assert weights[2] == layer + table + spec.norm.nbytes()  # type: ignore[union-attr]


def test_sampled_steps_stand_in_the_middle_of_what_they_stand_for() -> None:
    for count_ in (5, 17, 100, 1023):
        at, share = samples(count_)
        assert len(at) == 4 and share * 4 == count_ and sum(at) / 4 == (count_ - 1) / 2
        assert all(abs(index - (i + 0.5) * count_ / 4) <= 1 for i, index in enumerate(at))


def test_prices_are_dated() -> None:
    today = datetime.date(2026, 11, 25)
    assert "no date" in price_age(H100, today)
    assert "over a year ago" in price_age(replace(H100, price_date="2025-11-01"), today)
    assert price_age(replace(H100, price_date="2026-01-01"), today) == ""
    assert price_age(H100.priced(1.0), datetime.date.today()) == ""
    assert price_age(replace(H100, usd_per_h=None), today) == ""


def test_a_users_own_constants_go_first(home: Path) -> None:
    shipped = load_stack("vllm").on(H100).efficiency("gemm", "bf16")
    own = home / "kernels"
    own.mkdir(parents=True)
    (own / "h100-sxm5-80gb.toml").write_text(
        '[op_class."gemm.bf16"]\ncompute_efficiency = 0.1\nbandwidth_efficiency = 0.2\nlaunch_s = 1.0\nsource = "mine"\n'
    )
    (own / "rtx-4090.toml").write_text(
        '[op_class."gemm.bf16"]\ncompute_efficiency = 0.3\nbandwidth_efficiency = 0.2\nlaunch_s = 1e-6\n'
    )
    mine = load_stack("vllm").on(H100).efficiency("gemm", "bf16")
    assert mine.source == "mine" and mine != shipped
    assert make_plan("llama-3.1-8b", "rtx-4090", Workload()).stack.name == "vllm"
