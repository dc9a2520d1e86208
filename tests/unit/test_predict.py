"""Predictions: every count and figure of a report against its definition, memory by hand, fit, notes, the verbs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from trimtab.api import make_plan
from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import StepShape
from trimtab.predict.explain import explain
from trimtab.predict.fit import fit
from trimtab.predict.memory import UNBOUNDED, Footprint, live
from trimtab.predict.predict import predict
from trimtab.predict.price import bandwidth, price
from trimtab.spec.machine import Efficiency, Machine, Stack, load_machine, load_stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.plan import Plan
from trimtab.spec.report import Report
from trimtab.spec.workload import Workload

COUNTS = (
    "weight_bytes",
    "kv_bytes",
    "activation_bytes",
    "peak_bytes",
    "prefill_flops",
    "decode_flops",
    "weight_read",
    "kv_read",
)
FIGURES = ("ttft_s", "tpot_s", "tokens_per_s", "energy_j", "usd_per_million_tokens")


def machine(**fields: Any) -> Machine:
    facts = dict(
        id="toy", name="Toy", vendor="", kind="gpu", year=2024, flops_per_s={"bf16": 1e12, "fp32": 1e12}, memory_bytes=1 << 40,
        memory_type="", memory_bandwidth_bytes_per_s=1e9, tdp_w=100.0, usd_per_h=3.6,
    )  # fmt: skip
    return Machine(**(facts | fields))


def stack(**fields: Any) -> Stack:
    one = Efficiency(compute_efficiency=0.5, bandwidth_efficiency=0.25, launch_s=1e-3)
    classes = {name: one for name in ("gemm", "gemv", "attention", "elementwise", "embedding")}
    return Stack(**(dict(name="toy", op_classes=classes, band=(0.5, 2.0)) | fields))


def small(
    name: str = "smollm2-135m", work: Workload | None = None, techniques: tuple[str, ...] = (), **options: Any
) -> Plan:
    options.setdefault("stack", "datasheet")  # an engine's overheads are the subject of test_serving.py
    return make_plan(
        name, options.pop("machine", "a100"), work or Workload(batch=2, prompt=100, gen=11), techniques, **options
    )


@pytest.fixture(scope="module")
def report() -> Report:
    return predict(small())


# --------------------------------------------------------------------------------------------------- counts and figures


def test_counts_follow_their_definitions(report: Report) -> None:
    plan = small()
    spec, counts = plan.model, report.counts
    assert set(COUNTS) <= set(counts)
    assert all(type(value) is int for value in counts.values())
    assert counts["weight_bytes"] == 2 * 134_515_008
    assert counts["kv_bytes"] == 2 * (100 + 11) * 23_040
    assert counts["kv_reserved_bytes"] == 2 * 128 * 23_040  # two pages of 64
    assert counts["peak_bytes"] == sum(
        counts[n] for n in ("weight_bytes", "kv_reserved_bytes", "activation_bytes", "reserve_bytes")
    )
    prompt = StepShape.of([100, 100], [0, 0], logits=2)
    assert counts["prefill_flops"] == sum(int(count(op, prompt, "tiled").flops) for op in build(spec).ops)
    # Steps at 100 ... 109 earlier tokens: mean 104.5, rounded down.
    step = StepShape.of([1, 1], [104, 104], logits=2)
    for name, field in (("decode_flops", "flops"), ("weight_read", "weight_read"), ("kv_read", "kv_read")):
        assert counts[name] == sum(int(getattr(count(op, step, "tiled"), field)) for op in build(spec).ops), name
    assert counts["kv_read"] == 2 * 105 * 23_040


def test_chunks_do_not_change_the_arithmetic_of_a_causal_prompt() -> None:
    whole = predict(small(stack=dataclasses.replace(load_stack("datasheet"), prefill_chunk=None)))
    parts = predict(small(stack=dataclasses.replace(load_stack("datasheet"), prefill_chunk=7)))
    assert whole.counts["prefill_flops"] == parts.counts["prefill_flops"]
    assert parts.counts["prefill_weight_read"] > 10 * whole.counts["prefill_weight_read"]
    assert parts.counts["activation_bytes"] < whole.counts["activation_bytes"]


def test_figures_follow_their_definitions(report: Report) -> None:
    figures = report.figures
    assert set(FIGURES) <= set(figures)
    ttft, tpot, rate = (figures[name].value for name in FIGURES[:3])
    assert ttft and tpot and rate
    assert rate == pytest.approx(2 / tpot)
    assert figures["energy_j"].value == pytest.approx(400 * (ttft + 10 * tpot))
    assert figures["usd_per_million_tokens"].value == pytest.approx(load_machine("a100").usd_per_h / 3600 / rate * 1e6)  # type: ignore[operator]
    seconds = {phase: sum(row.time_s for row in report.ops if row.phase == phase) for phase in ("prefill", "decode")}
    assert ttft == pytest.approx(seconds["prefill"])
    assert tpot == pytest.approx(seconds["decode"] / 10)
    for name in FIGURES[:3]:
        assert figures[name].p10 < figures[name].value < figures[name].p90  # type: ignore[operator]
        assert figures[name].kind == "datasheet"
    assert (
        figures["tpot_s"].check
        == "trimtab measure smollm2-135m --batch 2 --prompt 100 --gen 11 --dtype bf16 --kv-dtype bf16"
    )


def test_a_figure_without_a_source_is_none_and_says_why() -> None:
    bare = machine(tdp_w=None, usd_per_h=None)
    got = predict(small(machine=bare, stack="ideal", work=Workload(prompt=8, gen=1))).figures
    for name in ("energy_j", "usd_per_million_tokens", "tpot_s", "tokens_per_s"):
        assert got[name].value is None and got[name].p10 is None
        assert len(got[name].why) > 10
    assert got["ttft_s"].value


def test_report_is_json_of_schema_1(report: Report) -> None:
    read = json.loads(json.dumps(report.to_dict()))
    assert read["schema"] == 1
    assert set(read) >= {"plan", "counts", "figures", "ops"}
    assert set(read["figures"]["ttft_s"]) == {"value", "p10", "p90", "unit", "kind", "check", "why"}
    assert {"phase", "name", "flops", "bytes", "time_s"} <= set(read["ops"][0])


def test_techniques_change_the_counts_they_claim(report: Report) -> None:
    quantized = predict(small(techniques=("rtn:bits=4,group=32",))).counts
    # A matrix element takes 4 bits and a 2-byte scale in 32; embedding (its own head) and norms stay.
    matrices = sum(node.n * node.k for path, node in small().model.linears() if path != "lm_head")
    assert report.counts["weight_bytes"] - quantized["weight_bytes"] == matrices * 2 - (
        matrices // 2 + matrices // 32 * 2
    )
    assert quantized["kv_bytes"] == report.counts["kv_bytes"]
    ring = predict(small(techniques=("streaming-llm:sink=4,recent=28",))).counts
    assert ring["kv_bytes"] == 2 * 32 * 23_040
    assert ring["weight_bytes"] == report.counts["weight_bytes"]
    filtered = predict(small(techniques=("gemfilter:layer=3,topk=20",)))
    assert filtered.counts["kv_bytes"] == 2 * (20 + 11) * 23_040
    assert {row.phase for row in filtered.ops} == {"filter", "prefill", "decode"}
    alone = small(work=Workload(prompt=100, gen=11))
    sparse = make_plan("smollm2-135m", "a100", alone.workload, ("cats:sparsity=0.5",))
    dense_read, sparse_read = (predict(p).counts["weight_read"] for p in (alone, sparse))
    # Half the rows of up and down, and a threshold of four bytes per layer more.
    assert dense_read - sparse_read == 30 * (2 * 576 * 1536 * 2 // 2 - 4)
    assert predict(sparse).observed["layers.7.mlp.active_rows"] == 768


# ------------------------------------------------------------------------------------------------------------------ price


def test_a_kernel_takes_the_larger_of_compute_and_memory_plus_its_launch() -> None:
    spec = small(dtype="bfloat16").model
    op = next(k for k in fuse(build(spec), stack()) if k.name == "layers.0.mlp.up_proj")
    step = StepShape.of([[1], [4000]], [[0], [0]])
    priced = price([op], step, machine(), stack())
    matrix = 576 * 1536
    memory = [(matrix + rows * (576 + 1536)) * 2 / (1e9 * 0.25) for rows in (1, 4000)]
    compute = [2 * rows * matrix / (1e12 * 0.5) for rows in (1, 4000)]
    assert priced.time_s == pytest.approx([max(m, c) + 1e-3 for m, c in zip(memory, compute, strict=True)])
    assert price([op], step, machine(memory_bandwidth_bytes_per_s=1e15), stack()).time_s == pytest.approx(
        [c + 1e-3 for c in compute], rel=1e-3
    )


def test_stage_time_is_the_sum_over_kernels_not_one_maximum() -> None:
    spec = small().model
    kernels = fuse(build(spec), stack(overhead_per_step_s=0.5))
    step = StepShape.of([[64]], [[0]], logits=1)
    together = price(kernels, step, machine(), stack(overhead_per_step_s=0.5)).total_s
    alone = sum(price([kernel], step, machine(), stack()).total_s for kernel in kernels)
    assert together == pytest.approx(alone + 0.5)


def test_few_rows_are_priced_as_gemv_and_a_weight_format_may_have_constants_of_its_own() -> None:
    slow = Efficiency(compute_efficiency=1, bandwidth_efficiency=1, launch_s=7.0)
    slower = Efficiency(compute_efficiency=1, bandwidth_efficiency=1, launch_s=9.0)
    held = stack()
    held = dataclasses.replace(held, op_classes={**held.op_classes, "gemv": slow, "gemv.int": slower})
    plain, packed = small().model, small(techniques=("rtn:bits=4,group=32",)).model
    for spec, expected in ((plain, [7.0, 1e-3]), (packed, [9.0, 1e-3])):
        kernel = next(k for k in fuse(build(spec), held) if k.name == "layers.0.mlp.up_proj")
        priced = price([kernel], StepShape.of([[16], [17]], [[0], [0]]), machine(), held).kernels[0]
        assert priced.launch_s.tolist() == expected


def test_bandwidth_follows_the_working_set() -> None:
    table = stack(bandwidth_by_working_set=((1e6, 100.0), (1e8, 10.0)))
    assert bandwidth(1e3, machine(), table) == 100.0  # type: ignore[arg-type]
    assert bandwidth(1e7, machine(), table) == pytest.approx(55.0)  # type: ignore[arg-type]
    assert bandwidth(1e12, machine(), table) == 10.0  # type: ignore[arg-type]
    assert bandwidth(1e12, machine(), stack()) == 1e9  # type: ignore[arg-type]


def test_experts_of_an_unfused_stack_are_one_launch_each() -> None:
    spec = small("mixtral-8x7b").model
    for fused, launches in ((frozenset(), 2.0), (frozenset({"act"}), 1.0)):
        held = stack(fused=fused)
        kernel = next(k for k in fuse(build(spec), held) if k.name.startswith("layers.0.mlp.experts.gate_proj"))
        priced = price([kernel], StepShape.of([[1]], [[0]]), machine(), held).kernels[0]
        assert priced.launch_s.tolist() == [launches * 1e-3]


# ----------------------------------------------------------------------------------------------------------------- memory


def test_peak_of_live_activations_by_hand() -> None:
    spec = small(dtype="float32").model
    rows, item, hidden, width, vocab = 10, 4, 576, 1536, 49152
    states = live(fuse(build(spec), stack()))
    step = StepShape.of([rows], [0])
    # The residual, the normed input, gate, up and their product; the normed input dies when up is written.
    assert max(s.nbytes(step, "tiled") for s in states) == rows * item * max(
        hidden + hidden + 2 * width, hidden + 3 * width
    )
    logits = StepShape.of([1], [0], logits=1)
    assert max(s.nbytes(logits, "tiled") for s in states) == item * (hidden + vocab)  # normed row and logits
    # Eager: scores of 9 heads, before and after softmax; q lives on, k and v are in the cache, so is nothing else.
    long = StepShape.of([1000], [0])
    assert max(s.nbytes(long, "eager") for s in states) == item * (2 * 9 * 1000 * 1000 + 1000 * (hidden + 576 + 576))


def test_what_does_not_fit_is_said_with_the_sum_and_what_would_fit() -> None:
    work = Workload(batch=64, prompt=4000, gen=100)
    plan = make_plan("llama-3.1-8b", "4090", work)
    note = next(note for note in predict(plan).notes if note.startswith("Does not fit"))
    batch = Footprint(plan.model, plan.stack).largest_batch(4000, 100, plan.machine.memory_bytes)
    assert f"Batch {batch} fits." in note and "GiB" in note
    fits, over = (
        predict(make_plan("llama-3.1-8b", "4090", Workload(batch=b, prompt=4000, gen=100))) for b in (batch, batch + 1)
    )
    assert not any("Does not fit" in note for note in fits.notes)
    assert any("Does not fit" in note for note in over.notes)
    for name, on, bits in (("llama-2-13b", "4090", 8), ("llama-3.1-70b", "l40s", 3), ("mixtral-8x7b", "4090", 3)):
        tight = make_plan(name, on, Workload())
        assert f"Weights of {bits} bits would" in predict(tight).notes[0]
        held = [make_plan(name, on, Workload(), (f"rtn:bits={b},group=32",)) for b in range(bits, 9)]
        assert [any("Does not fit" in n for n in predict(p).notes) for p in held] == [False] + [True] * (8 - bits)


def test_fit_finds_the_last_context_and_batch_that_fit() -> None:
    plan = make_plan("smollm2-135m", "4090", Workload(gen=16))
    capacity = 1 << 30
    found = fit(plan, memory_bytes=capacity)
    footprint = Footprint(plan.model, plan.stack)
    assert len(found.rows) > 3
    for row in found.rows[:-1]:
        assert row.peak <= capacity
        assert footprint.at(Workload(batch=row.batch, prompt=row.context - 16 + 1, gen=16)).peak > capacity
    assert found.rows[-1].context == 0  # the first batch of which nothing fits ends the list
    at = fit(plan, memory_bytes=capacity, context=1000).rows[0]
    assert at.context == 1000
    assert at.peak <= capacity < footprint.at(Workload(batch=at.batch + 1, prompt=984, gen=16)).peak
    ring = make_plan("smollm2-135m", "4090", Workload(), ("streaming-llm",))
    assert fit(ring).rows[0].unbounded and UNBOUNDED > 1 << 20


# ------------------------------------------------------------------------------------------------------------------ notes


def test_notes_tell_what_was_assumed() -> None:
    notes = " ".join(predict(small(work=Workload(prompt=9000, gen=2))).notes)
    assert "beyond the 8192 positions" in notes
    assert "priced as" in " ".join(predict(small(machine="rpi4")).notes)
    assert "gemfilter:layer is `auto`" in " ".join(predict(small(techniques=("gemfilter:topk=20",))).notes)
    assert not any("auto" in note for note in predict(small(techniques=("gemfilter:layer=3,topk=20",))).notes)
    assert all("price" in note or "No measured stack" in note for note in predict(small()).notes)


def test_explain_shows_formula_inputs_and_sources(report: Report) -> None:
    text = explain(report, "tpot_s")
    for part in (
        "max(flops / (peak ec), bytes / (bw eb))",
        "312 TFLOP/s",
        "a100-sxm4-80gb",
        "datasheet",
        "trimtab measure",
    ):
        assert part in text
    assert f"{report.counts['kv_bytes']}" in explain(report, "kv_bytes")
    for name in report.counts:
        assert len(explain(report, name).splitlines()) > 1, name
    with pytest.raises(SpecError, match="Did you mean 'tpot_s'"):
        explain(report, "tpots")


# ------------------------------------------------------------------------------------------------------------------ verbs


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimtab.cli.main", *arguments], capture_output=True, text=True, timeout=60
    )


def test_predict_answers_in_a_second_without_torch() -> None:
    watch = (
        "import sys, trimtab.cli.main as m; sys.argv = ['trimtab', 'predict', 'llama-3.1-405b', '--on', 'h100', '--json']\n"
        "try: m.main()\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["weight_bytes"] == 2 * 405_853_388_800
    assert min(times) < 2.0, times


def test_predict_prints_the_answer_first_and_the_check_last() -> None:
    done = run("predict", "smollm2-135m", "--on", "a100", "-t", "rtn:bits=4,group=32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert "smollm2-135m on a100-sxm4-80gb" in lines[0]
    assert any(line.startswith("Fits") and "yes" in line for line in lines[:6])
    assert lines[-1].startswith("Check it: trimtab measure smollm2-135m") and "-t rtn" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("predict", "smollm2-135n"), "Did you mean"),
        (("predict", "smollm2-135m", "--on", "h1000"), "Did you mean 'h100'"),
        (("predict", "smollm2-135m", "--on", "a100", "-t", "rtm"), "Did you mean 'rtn'"),
        (("predict", "smollm2-135m", "--on", "a100", "-t", "rtn:bits=9"), "2..8"),
        (("predict", "smollm2-135m", "--on", "a100", "-t", "rtn:group=37"), "37"),
        (("predict", "smollm2-135m", "--on", "a100", "-t", "rtn:bits=4", "-t", "rtn:bits=8"), "different values"),
        (("predict", "smollm2-135m", "--on", "a100", "--batch", "0"), "batch=0"),
        (("predict", "smollm2-135m", "--on", "a100", "--dtype", "float23"), "Did you mean"),
        (("predict", "smollm2-135m", "--on", "a100", "--explain", "tpot"), "tpot_s"),
        (("fit", "smollm2-135m", "--on", "a100", "--memory", "8QiB"), "8GiB"),
        (("fit", "smollm2-135m", "--on", "a100", "--context", "1"), "2 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], needle: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert needle in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_fit_prints_json() -> None:
    done = run("fit", "smollm2-135m", "--on", "4090", "--memory", "1GiB", "--context", "1000", "--json")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["schema"] == 1 and got["capacity_bytes"] == 1 << 30
    row = got["rows"][0]
    assert row["batch"] > 1 and row["peak"] == row["weights"] + row["kv"] + row["activations"] + row["reserve"]


def test_spec_may_be_given_instead_of_a_name() -> None:
    spec = small().base
    assert isinstance(spec, ModelSpec)
    assert predict(make_plan(spec, "a100")).counts == predict(make_plan("smollm2-135m", "a100")).counts
