"""LLM-Viewer's numbers come out with its faults and Trimtab's count without them; the effects add up."""

from __future__ import annotations

import json

import pytest

from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import Counts, StepShape
from trimtab.predict.compat import (
    ALL,
    FAULTS,
    REQUEST_FAULTS,
    Case,
    Traffic,
    analyze,
    faults,
    generation_s,
    memory_bytes,
    request_faults,
)
from trimtab.spec.configs import load_spec
from trimtab.spec.formats import WeightFormat
from trimtab.spec.machine import load_machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.ui.compat import compat_json, print_faults, print_viewer

PHASES = ("prefill", "decode")


def fp16(name: str) -> ModelSpec:
    return load_spec(name).with_dtype("float16")


def quantized(name: str) -> ModelSpec:
    paths = [path for path, _ in fp16(name).linears() if path != "lm_head"]
    return fp16(name).edit([Edit(path, "format", WeightFormat(kind="q4_1")) for path in paths], by="test")


# Table of the paper (Llama-2-7B, A6000, batch 1, 2048 tokens, fp16): operations, bytes, operations per byte, bound.
GOLDEN = {
    "prefill": {
        "q_proj k_proj v_proj out_proj": (68.7e9, 67.1e6, 1024, "compute"),
        "gate_proj up_proj down_proj": (184.7e9, 152e6, 1215, "compute"),
        "qk_matmul sv_matmul": (34.4e9, 302e6, 114, "memory"),
        "softmax": (671e6, 537e6, 1.25, "memory"),
    },
    "decode": {
        "q_proj k_proj v_proj out_proj": (33.6e6, 33.6e6, 1.0, "memory"),
        "gate_proj up_proj down_proj": (90.2e6, 90.2e6, 1.0, "memory"),
        "qk_matmul sv_matmul": (16.8e6, 16.9e6, 0.99, "memory"),
        "softmax": (328e3, 262e3, 1.25, "memory"),
    },
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_table_of_the_paper(phase: str) -> None:
    stage = analyze(fp16("llama-2-7b"), load_machine("a6000"), Case(), phase)
    for names, (ops, nbytes, intensity, bound) in GOLDEN[phase].items():
        for name in names.split():
            row = stage.row(name)
            assert row.traffic.ops == pytest.approx(ops, rel=3e-3) and row.times == 32
            assert row.traffic.nbytes == pytest.approx(nbytes, rel=3e-3)
            assert row.arithmetic_intensity == pytest.approx(intensity, rel=5e-3)
            assert row.bound == bound


# What the tool itself printed for these arguments (commit 472f71f, run once): operations, bytes, seconds, memory.
PRINTED = [
    ("llama-2-7b", "a6000", Case(), "prefill", (28751179022336.0, 65861130752.0, 0.22687859086500456, 14803795968.0)),
    ("llama-2-7b", "a6000", Case(), "decode", (14169669632.0, 14313150976.0, 0.01863691533333334, None)),
    (
        "llama-3-8b", "h100", Case(batch=4, seqlen=777, w_bit=8, a_bit=8, kv_bit=8, flash=True), "prefill",
        (44671374544896.0, 31189640448.0, 0.027150715492073093, 7528517888.0),
    ),
    (
        "llama-3-8b", "h100", Case(batch=4, seqlen=777, w_bit=8, a_bit=8, kv_bit=8, flash=True), "decode",
        (59590758400.0, 8342676736.0, 0.002715715083333333, None),
    ),
    (
        "llama-3-70b", "a100-40gb", Case(batch=3, seqlen=1024, w_bit=4, a_bit=16, kv_bit=8, flash=True), "prefill",
        (428929456275456.0, 258726963712.0, 1.4415157228295026, 36289118208.0),
    ),
    (
        "llama-3-8b", "l40", Case(batch=7, seqlen=129, w_bit=4, a_bit=4, kv_bit=4), "prefill",
        (12672132221952.0, 5929073280.0, 0.036272999182962146, 3552567520.0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "machine", "case", "phase", "printed"), PRINTED)
def test_totals_are_those_the_tool_prints(
    model: str, machine: str, case: Case, phase: str, printed: tuple[float, float, float, float | None]
) -> None:
    ops, nbytes, time_s, memory = printed
    stage = analyze(fp16(model), load_machine(machine), case, phase)
    assert stage.total.ops == pytest.approx(ops, rel=1e-12)
    assert stage.total.nbytes == pytest.approx(nbytes, rel=1e-12)
    assert stage.time_s == pytest.approx(time_s, rel=1e-12)
    if memory is not None:
        assert memory_bytes(fp16(model), load_machine(machine), case)["reported"] == pytest.approx(memory, rel=1e-12)


def test_generation_has_one_decode_step_too_many() -> None:
    spec, machine = fp16("llama-2-7b"), load_machine("a6000")
    total_s, extra_s = generation_s(spec, machine, Case(batch=2, seqlen=300), 20)
    assert total_s == pytest.approx(0.4086642569617526, rel=1e-12)  # printed by the tool
    assert extra_s == analyze(spec, machine, Case(batch=2, seqlen=319), "decode").time_s
    weights, cache, extra = request_faults(spec, machine, Case(batch=2, seqlen=300), 20)
    assert (extra.name, extra.time_s) == ("extra_step", extra_s)
    assert cache.nbytes == -2 * 20 * 524_288 and weights.nbytes == -(2 * 32000 * 4096 + 65 * 4096) * 2


def counted(spec: ModelSpec, case: Case, phase: str, llc_bytes: int | None) -> Traffic:
    new, past = (case.seqlen, 0) if phase == "prefill" else (1, case.seqlen)
    step = StepShape.of(new=[new], past=[past], logits=case.batch, copies=case.batch)
    total = Counts()
    for op in build(spec, phase).ops:  # type: ignore[arg-type]
        total = total + count(op, step, "tiled" if case.flash else "eager", llc_bytes)
    return Traffic(
        total.flops + total.vector_flops, total.weight_read, total.act_read, total.act_written, total.kv_read, total.kv_written
    )  # fmt: skip


SPECS = [
    fp16("llama-2-7b"),
    fp16("llama-3-8b"),  # grouped queries
    fp16("qwen3-0.6b"),  # head size is not hidden size / heads; norms of queries and keys
    fp16("qwen2.5-0.5b"),  # biases
    fp16("mistral-7b-v0.1"),  # sliding window
    quantized("smollm2-135m"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("flash", [False, True])
def test_without_faults_it_is_trimtabs_count(spec: ModelSpec, phase: str, flash: bool) -> None:
    machine = load_machine("a6000")
    for case in (Case(flash=flash), Case(batch=3, seqlen=6001, flash=flash)):
        assert analyze(spec, machine, case, phase, ()).total == counted(spec, case, phase, machine.llc_bytes)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("flash", [False, True])
def test_effects_add_up_to_the_whole_difference(spec: ModelSpec, phase: str, flash: bool) -> None:
    machine, case = load_machine("h100"), Case(batch=2, seqlen=3000, flash=flash)
    effects = faults(spec, machine, case, phase)
    assert [fault.name for fault in effects] == list(FAULTS)
    theirs, ours = analyze(spec, machine, case, phase), counted(spec, case, phase, machine.llc_bytes)
    assert sum(f.ops for f in effects) == pytest.approx(theirs.total.ops - ours.ops, rel=1e-9)
    assert sum(f.nbytes for f in effects) == pytest.approx(theirs.total.nbytes - ours.nbytes, rel=1e-9)
    assert sum(f.time_s for f in effects) == pytest.approx(
        theirs.time_s - analyze(spec, machine, case, phase, ()).time_s, rel=1e-9
    )


def effect(name: str, model: ModelSpec, machine: str, case: Case, phase: str = "prefill") -> tuple[float, float, float]:
    found = next(f for f in faults(model, load_machine(machine), case, phase) if f.name == name)
    return found.ops, found.nbytes, found.time_s


def test_each_fault_by_hand() -> None:
    """Llama-3-8B: hidden 4096, FFN 14336, 32 heads, 8 KV heads of 128, 32 layers, vocabulary 128256."""
    spec, s, B = fp16("llama-3-8b"), 1000, 3
    case, flash = Case(batch=B, seqlen=s), Case(batch=B, seqlen=s, flash=True)
    T, L, h, d, V = B * s, 32, 4096, 128, 128256
    assert effect("lm_head_flops", spec, "h100", case)[:2] == (-B * h * V, 0)
    assert effect("lm_head_batch", spec, "h100", case)[:2] == (0, -(B - 1) * (h + V) * 2)
    assert effect("mlp_act", spec, "h100", case)[:2] == (L * T * (2 * h - 5 * 14336), L * 3 * T * (h - 14336) * 2)
    assert effect("norms", spec, "h100", case)[:2] == (L * 2 * 2 * T * h, -L * 2 * h * 2)
    assert effect("residual", spec, "h100", case)[:2] == (0, -L * 2 * T * h * 2)
    assert effect("query_heads", spec, "h100", case)[:2] == (0, L * T * (8 - 32) * d * 2)
    assert effect("query_heads", spec, "h100", case, "decode")[:2] == (0, 0)
    assert effect("cache_write", spec, "h100", case)[:2] == (0, -L * 4 * T * 8 * d * 2)
    assert effect("keys", spec, "h100", case, "decode")[:2] == (
        -L * B * 32 * (4 * d + 5),
        -L * B * (2 * 8 * d + 4 * 32) * 2,
    )
    assert effect("flash_output", spec, "h100", flash)[:2] == (0, L * B * 32 * (2 * s * s - s * d) * 2)
    assert effect("flash_heads", spec, "h100", flash)[:2] == (0, L * B * 8 * s * (32 - 8) * 2 * d * 2)
    assert effect("mask", spec, "h100", flash)[:2] == (L * B * 32 * (s * s - s * (s + 1) // 2) * (4 * d + 5), 0)
    assert effect("hardware", spec, "h100", case, "decode")[2] > 0 == effect("hardware", spec, "l40s", case)[2]
    assert effect("scales", spec, "h100", case)[:2] == effect("dequantization", spec, "h100", case)[:2] == (0, 0)


def test_flash_writes_537_mb_instead_of_17() -> None:
    spec, machine, case = fp16("llama-2-7b"), load_machine("a6000"), Case(flash=True)
    wrong, right = (
        analyze(spec, machine, case, "prefill", p).row("fused_attention").traffic for p in (ALL, ALL - {"flash_output"})
    )
    assert (round(wrong.store_act / 1e6), round(right.store_act / 1e6, 1)) == (537, 16.8)


def test_quantized_weights_lose_their_scales_and_unpacking() -> None:
    spec = quantized("smollm2-135m")
    matrices = sum(node.n * node.k for path, node in spec.linears() if path != "lm_head")
    case = Case(seqlen=64)
    assert effect("scales", spec, "h100", case)[:2] == (
        0,
        matrices * (4 / 8 - 20 / 32) + spec.lm_head.n * spec.lm_head.k * (4 / 8 - 2),
    )
    assert effect("dequantization", spec, "h100", case)[:2] == (-2 * matrices, 0)


def test_int8_rates_need_an_int8_cache_and_int4_rates_never_come() -> None:
    spec = fp16("llama-3-8b")
    assert effect("peak", spec, "a100", Case(w_bit=8, a_bit=8, kv_bit=16))[2] > 0  # priced at fp16
    assert effect("peak", spec, "a100", Case(w_bit=8, a_bit=8, kv_bit=8))[2] == 0
    assert effect("peak", spec, "a100", Case(w_bit=4, a_bit=4, kv_bit=4))[2] > 0  # int4 exists there
    assert effect("peak", spec, "a100", Case(w_bit=4))[2] == 0


def test_head_size_of_the_config() -> None:
    assert effect("head_size", fp16("qwen3-0.6b"), "h100", Case())[0] < 0  # 1024 / 16 = 64, the config says 128
    assert effect("head_size", fp16("llama-3-8b"), "h100", Case()) == (0, 0, 0)


def test_what_memory_forgets() -> None:
    spec, machine = fp16("llama-3-8b"), load_machine("h100")
    found = memory_bytes(spec, machine, Case(batch=2, seqlen=100), gen=28)
    norms = spec.num_hidden_layers * 2 * 4096 + 4096
    assert found["missing_weights"] == (2 * 128256 * 4096 + norms) * 2
    assert found["missing_cache"] == 2 * 28 * spec.kv_nbytes(1)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("mixtral-8x7b", "experts"),
        ("deepseek-v3", "latent attention"),
        ("gpt2", "not Llama's"),
        ("gemma-2-2b", "norms, caps"),
    ],
)
def test_models_it_has_no_operators_for(model: str, word: str) -> None:
    with pytest.raises(SpecError, match=f"{word}.* for which LLM-Viewer has no operators. Try a Llama-like model"):
        analyze(load_spec(model), load_machine("h100"), Case(), "decode")


def test_impossible_sizes() -> None:
    with pytest.raises(SpecError, match="seqlen=0 is not possible"):
        Case(seqlen=0)
    with pytest.raises(SpecError, match="w_bit=64 is not possible"):
        Case(w_bit=64)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    spec, machine = fp16("llama-2-7b"), load_machine("a6000")
    print_viewer(spec, machine, Case())
    shown = capsys.readouterr().out
    assert "qk_matmul" in shown and "28.8" in shown and shown.count("lm_head") == 2
    print_faults(spec, machine, Case(flash=True))
    shown = capsys.readouterr().out
    assert "flash_output" in shown and "Trimtab's count" in shown and "head_size" not in shown
    assert "extra_step" in shown and "latent attention" in shown
    found = json.loads(json.dumps(compat_json(spec, machine, Case())))
    assert found["schema"] == 1 and len(found["prefill"]["faults"]) == len(FAULTS)
    assert found["decode"]["total"]["ops"] == 14169669632.0
    assert [fault["name"] for fault in found["request"]["faults"]] == list(REQUEST_FAULTS)
