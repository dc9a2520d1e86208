"""Properties of the price: monotone in hardware and work, never below the ideal stack, additive over passes."""

from __future__ import annotations

import dataclasses

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
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.plan import Plan
from trimtab.spec.workload import Workload

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
