"""Properties of the price: monotone in hardware and work, never below the ideal stack, additive over passes."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import FUSIONS, fuse
from trimtab.graph.ops import Counts, StepShape
from trimtab.graph.passes import chunks
from trimtab.predict.memory import Footprint
from trimtab.predict.predict import predict
from trimtab.predict.price import price
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import Stack, load_machine, load_stack
from trimtab.spec.plan import Plan
from trimtab.spec.workload import Workload
from trimtab.techniques.base import compose
from trimtab.techniques.plan import make_plan
from trimtab.techniques.registry import parse_all

MODELS = {
    name: load_spec(name) for name in ("smollm2-135m", "gpt2", "gemma-2-2b", "mixtral-8x7b", "deepseek-v3", "phi-2")
}
GRAPHS = {name: build(spec) for name, spec in MODELS.items()}
MACHINE, DATASHEET, IDEAL = load_machine("a100"), load_stack("datasheet"), load_stack("ideal")

models = st.sampled_from(sorted(MODELS))
sizes = st.integers(1, 3000)
steps = st.builds(
    lambda new, past, copies: StepShape.of([[new]], [[past]], logits=copies, copies=copies),
    sizes,
    st.integers(0, 9000),
    st.integers(1, 64),
)
fusions = st.frozensets(st.sampled_from(sorted(FUSIONS)))
attentions = st.sampled_from(["eager", "tiled"])


@settings(max_examples=40, deadline=None)
@given(models, steps, st.floats(1.0, 50.0), fusions, attentions)
def test_better_hardware_is_never_slower(
    name: str, step: StepShape, factor: float, fused: frozenset[str], attention: str
) -> None:
    stack = dataclasses.replace(DATASHEET, fused=fused, attention=attention)
    kernels = fuse(GRAPHS[name], stack)
    before = price(kernels, step, MACHINE, stack).total_s
    for better in (
        dataclasses.replace(MACHINE, memory_bandwidth_bytes_per_s=MACHINE.memory_bandwidth_bytes_per_s * factor),
        dataclasses.replace(MACHINE, flops_per_s={k: v * factor for k, v in MACHINE.flops_per_s.items()}),
    ):
        after = price(kernels, step, better, stack).total_s
        assert before / factor * (1 - 1e-9) <= after <= before * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(models, steps, fusions, attentions)
def test_no_stack_beats_the_ideal_one(name: str, step: StepShape, fused: frozenset[str], attention: str) -> None:
    stack = dataclasses.replace(DATASHEET, fused=fused, attention=attention)
    ideal = price(fuse(GRAPHS[name], IDEAL), step, MACHINE, IDEAL).total_s
    assert ideal <= price(fuse(GRAPHS[name], stack), step, MACHINE, stack).total_s


@settings(max_examples=40, deadline=None)
@given(models, sizes, st.integers(0, 5000), st.integers(1, 600))
def test_a_causal_prompt_costs_the_same_flops_in_any_chunks(name: str, prompt: int, past: int, chunk: int) -> None:
    if name == "deepseek-v3":  # its decode form; chunks of the expanded form expand the cached latents again
        return
    first, last = chunks(prompt, chunk)
    assert first * chunk + last == prompt and 0 < last <= chunk
    whole = StepShape.of([[prompt]], [[past]])
    parts = StepShape.of([[chunk]] * first + [[last]], [[past + i * chunk] for i in range(first + 1)])
    for op in GRAPHS[name].ops[:20]:
        assert count(op, parts, "tiled").total("flops") == count(op, whole, "tiled").total("flops")


@settings(max_examples=40, deadline=None)
@given(models, steps, fusions, attentions)
def test_fusion_moves_no_weight_cache_or_flop(
    name: str, step: StepShape, fused: frozenset[str], attention: str
) -> None:
    kernels = fuse(GRAPHS[name], dataclasses.replace(DATASHEET, fused=fused))
    assert [op for kernel in kernels for op in kernel.ops] == list(GRAPHS[name].ops)
    alone = sum((count(op, step, attention) for op in GRAPHS[name].ops), Counts())
    together = sum((count(kernel, step, attention) for kernel in kernels), Counts())
    for field in ("flops", "vector_flops", "weight_read", "kv_read", "kv_written"):
        assert getattr(alone, field) == getattr(together, field)
    assert together.nbytes <= alone.nbytes


@settings(max_examples=25, deadline=None)
@given(models, st.integers(1, 8), st.integers(1, 4000), st.integers(1, 64), st.integers(0, 3))
def test_more_work_never_costs_less(name: str, batch: int, prompt: int, gen: int, grow: int) -> None:
    work = Workload(batch=batch, prompt=prompt, gen=gen)
    field = ("batch", "prompt", "gen", "batch")[grow]
    more = dataclasses.replace(work, **{field: getattr(work, field) + 7})
    less, most = (_report(name, w) for w in (work, more))
    for count_name in ("kv_bytes", "peak_bytes", "prefill_flops", "decode_flops", "kv_read"):
        assert most.counts[count_name] >= less.counts[count_name], count_name
    footprint = Footprint(MODELS[name], DATASHEET)
    assert footprint.at(more).peak >= footprint.at(work).peak


def _report(name: str, work: Workload):
    spec = MODELS[name]
    return predict(Plan(base=spec, model=spec, machine=MACHINE, stack=DATASHEET, workload=work))


# ----------------------------------------------------------------------------------- stacks fitted to recorded hardware

FITTED = {name: load_stack("vllm").on(load_machine(name)) for name in ("a100", "h100", "h200", "l40s")}
small_steps = st.builds(
    lambda new, past, copies: StepShape.of([[new]], [[past]], logits=copies, copies=copies),
    st.sampled_from([1, 1, 1, 2, 5, 64, 1000]),
    st.integers(0, 9000),
    st.integers(1, 300),
)
MOST_MODELS = st.sampled_from(["smollm2-135m", "gemma-2-2b", "mixtral-8x7b", "deepseek-v3"])


@settings(max_examples=40, deadline=None)
@given(MOST_MODELS, small_steps, st.sampled_from(sorted(FITTED)), st.floats(1.0, 20.0))
def test_better_hardware_is_never_slower_with_fitted_kernels(
    name: str, step: StepShape, machine_name: str, factor: float
) -> None:
    machine, stack = load_machine(machine_name), FITTED[machine_name]
    kernels = fuse(GRAPHS[name], stack)
    before = price(kernels, step, machine, stack).total_s
    for better in (
        dataclasses.replace(machine, memory_bandwidth_bytes_per_s=machine.memory_bandwidth_bytes_per_s * factor),
        dataclasses.replace(machine, flops_per_s={k: v * factor for k, v in machine.flops_per_s.items()}),
    ):
        assert price(kernels, step, better, stack).total_s <= before * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["smollm2-135m", "mixtral-8x7b", "gemma-2-2b"]),
    st.sampled_from([1, 1, 300]),
    st.integers(0, 5000),
    st.integers(1, 200),
    st.sampled_from(["h100", "l40s", "datasheet"]),
)
def test_fewer_bits_are_never_slower(name: str, new: int, past: int, copies: int, where: str) -> None:
    """Of weights and of the cache, in kernels of the same class: fp8 products have kernels of their own."""
    stack = DATASHEET if where == "datasheet" else FITTED[where]
    machine = MACHINE if where == "datasheet" else load_machine(where)
    step = StepShape.of([[new]], [[past]], logits=copies, copies=copies)
    spec = MODELS[name].with_dtype("bfloat16")
    by_weights = [spec, *(compose(spec, parse_all([f"rtn:bits={bits}"])) for bits in (8, 4, 2))]
    by_cache = [spec, *(spec.with_dtype("bfloat16", kv) for kv in ("int8", "int4"))]
    for line in (by_weights, by_cache):
        times = [price(fuse(build(each), stack), step, machine, stack).total_s for each in line]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(times)), times


@settings(max_examples=30, deadline=None)
@given(MOST_MODELS, small_steps, st.sampled_from(sorted(FITTED)), st.sampled_from(["copies", "past"]))
def test_more_sequences_and_longer_contexts_never_cost_less(
    name: str, step: StepShape, machine_name: str, grows: str
) -> None:
    machine, stack = load_machine(machine_name), FITTED[machine_name]
    kernels = fuse(GRAPHS[name], stack)
    copies = int(step.copies) + (grows == "copies") * 13
    more = StepShape.of(step.new, step.past + (grows == "past") * 777, logits=copies, copies=copies)
    assert price(kernels, step, machine, stack).total_s <= price(kernels, more, machine, stack).total_s * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(MOST_MODELS, small_steps, st.sampled_from(["h100", "datasheet"]))
def test_sums_equal_parts_and_many_passes_equal_each(name: str, step: StepShape, where: str) -> None:
    stack = DATASHEET if where == "datasheet" else FITTED[where]
    machine = MACHINE if where == "datasheet" else load_machine(where)
    kernels = fuse(GRAPHS[name], stack)
    whole = price(kernels, step, machine, stack)
    alone = sum(float(price([kernel], step, machine, _bare(stack)).time_s.sum()) for kernel in kernels)
    if not stack.bandwidth_by_working_set and where == "datasheet":  # fitted kernels know what the pass streams
        assert whole.total_s == pytest.approx(alone, rel=1e-9)
    parts = float(sum(p.times * p.time_s.sum() for p in whole.kernels) + whole.overhead_s.sum())
    assert whole.total_s == pytest.approx(parts, rel=1e-12)
    twice = StepShape.of([[step.new[0, 0]]] * 2, [[step.past[0, 0]]] * 2, logits=step.logits[0], copies=step.copies)
    assert price(kernels, twice, machine, stack).total_s == pytest.approx(2 * whole.total_s, rel=1e-12)


def _bare(stack: Stack) -> Stack:
    return dataclasses.replace(
        stack, overhead_per_step_s=0.0, overhead_per_layer_s=0.0, overhead_per_sequence_s=0.0, floor_per_layer_s=0.0
    )


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["smollm2-135m", "gemma-2-2b", "gpt2"]),
    st.integers(1, 3000),
    st.integers(6, 500),
    st.integers(1, 9),
)
def test_what_is_linear_in_the_context_is_exact_from_four_steps(name: str, prompt: int, gen: int, batch: int) -> None:
    """Decode totals of the operator table against the sum over every single step (no windows bind below 4 K)."""
    plan = make_plan(name, "a100", Workload(batch=batch, prompt=min(prompt, 500), gen=gen), stack="datasheet")
    report = predict(plan)
    step = StepShape.of([[1]] * (gen - 1), [[min(prompt, 500) + i] for i in range(gen - 1)], logits=batch, copies=batch)
    kernels = fuse(build(plan.model), plan.stack)
    for field, of in (("flops", lambda c: c.total("flops")), ("bytes", lambda c: c.total("nbytes"))):
        every = sum(of(count(kernel, step, "tiled", plan.machine.llc_bytes)) for kernel in kernels)
        assert sum(getattr(row, field) for row in report.ops if row.phase == "decode") == every
