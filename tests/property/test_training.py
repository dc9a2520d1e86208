"""Properties of a priced training step: better hardware is never slower, parts add up, layouts keep what they must keep."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.predict.training.memory import stage_memory
from trimtab.predict.training.network import ring, ring_bytes
from trimtab.predict.training.step import comm_bytes, step_flops
from trimtab.predict.training.time import step_time
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.configs import load_spec
from trimtab.spec.families.sizes import gpt
from trimtab.spec.machine import load_machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.training import Network, TrainingSpec, load_training_stack

MODELS = {name: load_spec(name) for name in ("gpt2", "smollm2-360m", "llama-2-7b", "mixtral-8x7b")} | {
    "gpt-wide": gpt("gpt-wide", 8, 2048, 16, 51200, 512)
}
MACHINE = load_machine("a100")
STACKS = tuple(load_training_stack(name, MACHINE) for name in ("fsdp", "megatron"))
_WORKS: dict[tuple[Any, ...], TrainingWork] = {}


def work_of(spec: ModelSpec, training: TrainingSpec) -> TrainingWork:
    """One work per model and what it depends on; drawing many layouts stays quick."""
    key = (spec.name, training.seq_len, training.flash, training.dropout, training.trainable, training.dtype)
    return _WORKS.setdefault(key, TrainingWork(spec, training))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelSpec, TrainingSpec]:
    """A model and a layout it allows."""
    spec = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    layers, heads = spec.num_hidden_layers, getattr(spec.layers[0].self_attn, "num_attention_heads", 0)
    keys = getattr(spec.layers[0].self_attn, "num_key_value_heads", heads)
    pp = draw(st.sampled_from([pp for pp in (1, 2, 4) if layers % pp == 0]))
    chunks = 2 if pp > 1 and layers % (2 * pp) == 0 and draw(st.booleans()) else 1
    micro, dp = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2, 4, 16, 64]))
    training = TrainingSpec(
        micro_batch=micro,
        global_batch=micro * dp * pp * draw(st.sampled_from([1, 2, 8])),
        seq_len=draw(st.sampled_from([128, 512])),
        tp=draw(st.sampled_from([t for t in (1, 2, 4, 8) if heads % t == 0 and not (keys % t and t % keys)])),
        pp=pp,
        dp=dp,
        zero=draw(st.integers(0, 3 if pp == 1 else 1)),
        schedule="interleaved" if chunks > 1 else draw(st.sampled_from(["1f1b", "gpipe"])),  # type: ignore[arg-type]
        chunks=chunks,
        recompute=draw(st.sampled_from(["none", "selective", "full"])),  # type: ignore[arg-type]
        sequence_parallel=draw(st.booleans()),
        flash=draw(st.booleans()),
        dropout=draw(st.sampled_from([None, False])),
        gradient_bytes=draw(st.sampled_from([2, 4])),  # type: ignore[arg-type]
        overlap=draw(st.booleans()),
        trainable=draw(st.booleans()),
    )
    training.check(spec)
    return spec, training


networks = st.builds(
    lambda node, intra, share, hop: Network(
        gpus_per_node=node,
        intra_bytes_per_s=intra,
        inter_bytes_per_s=intra * share,
        intra_latency_s=hop,
        inter_latency_s=4 * hop,
    ),
    st.sampled_from([4, 8]),
    st.floats(5e9, 5e11),
    st.floats(0.05, 4.0),
    st.floats(0.0, 2e-5),
)


@settings(max_examples=60, deadline=None)
@given(layouts(), networks, st.sampled_from(STACKS), st.floats(1.0, 20.0))
def test_better_hardware_is_never_slower(
    layout: tuple[ModelSpec, TrainingSpec], network: Network, stack: Any, factor: float
) -> None:
    spec, training = layout
    work = work_of(spec, training)
    before = step_time(work, training, MACHINE, stack, network).step_s
    flops = {name: factor * rate for name, rate in MACHINE.flops_per_s.items()}
    bandwidth = factor * MACHINE.memory_bandwidth_bytes_per_s
    faster = (
        (dataclasses.replace(MACHINE, flops_per_s=flops), network),
        (dataclasses.replace(MACHINE, memory_bandwidth_bytes_per_s=bandwidth), network),
        (MACHINE, dataclasses.replace(network, intra_bytes_per_s=factor * network.intra_bytes_per_s)),
        (MACHINE, dataclasses.replace(network, inter_bytes_per_s=factor * network.inter_bytes_per_s)),
        (MACHINE, dataclasses.replace(network, intra_latency_s=0.0, inter_latency_s=0.0)),
    )
    for machine, links in faster:
        after = step_time(work, training, machine, stack, links).step_s
        assert (
            before / factor * (1 - 1e-9) <= after <= before * (1 + 1e-9)
            or links.intra_latency_s == 0.0 < after <= before
        )


@settings(max_examples=60, deadline=None)
@given(layouts(), networks, st.sampled_from(STACKS))
def test_parts_are_whole_and_none_is_negative(
    layout: tuple[ModelSpec, TrainingSpec], network: Network, stack: Any
) -> None:
    spec, training = layout
    time = step_time(work_of(spec, training), training, MACHINE, stack, network)
    assert min(time.parts.values()) >= 0 and time.hidden_s >= -1e-12
    assert abs(sum(time.parts.values()) - time.step_s) <= 1e-9 * time.step_s
    assert time.pipeline_s > 0


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_layouts_keep_parameters_flops_and_sums(layout: tuple[ModelSpec, TrainingSpec]) -> None:
    """Stages hold the model (twice what they share), no layout changes model FLOPs, memory is a sum that falls with ZeRO."""
    spec, training = layout
    work = work_of(spec, training)
    stages = [stage_memory(work, training, stage) for stage in range(training.pp)]
    whole = spec.num_parameters() + (training.pp > 1 and spec.tie_word_embeddings) * spec.vocab_size * spec.hidden_size
    held = sum(each.layer_parameters + each.edge_parameters for each in stages)
    assert whole / training.tp * (1 - 1e-9) <= held <= whole
    if training.tp == 1:
        assert held == whole
    for each in stages:
        parts = (
            each.weights,
            each.gradients,
            each.optimizer,
            each.layer_activations,
            each.edge_activations,
            each.working,
        )
        assert each.peak == sum(parts) and min(parts) >= 0
    alone = dataclasses.replace(
        training, tp=1, pp=1, dp=1, zero=0, schedule="1f1b", chunks=1, sequence_parallel=False,
    )  # fmt: skip
    assert step_flops(work, training) == step_flops(work, alone)
    if training.pp == 1:
        peaks = [stage_memory(work, dataclasses.replace(training, zero=zero), 0) for zero in range(4)]
        states = [each.weights + each.gradients + each.optimizer for each in peaks]
        assert states == sorted(states, reverse=True)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_recomputing_keeps_less_and_multiplies_more(layout: tuple[ModelSpec, TrainingSpec]) -> None:
    spec, training = layout
    work = work_of(spec, training)
    kept, hardware = [], []
    for recompute in ("none", "selective", "full"):
        each = dataclasses.replace(training, recompute=recompute)
        kept.append(stage_memory(work, each, 0).layer_activations)
        hardware.append(step_flops(work, each)[1])
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[2]
    assert hardware == sorted(hardware) and hardware[0] < hardware[2]


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_zero3_is_half_again_plain_replicas(layout: tuple[ModelSpec, TrainingSpec]) -> None:
    """With one micro-batch and 16-bit gradients; collectives of tensor parallelism and pipelines do not enter."""
    spec, training = layout
    once = dataclasses.replace(
        training, pp=1, dp=2 * training.dp, schedule="1f1b", chunks=1, gradient_bytes=2, trainable=True,
        global_batch=2 * training.micro_batch * training.dp,
    )  # fmt: skip
    work = work_of(spec, once)
    sums = {
        zero: sum(
            n for name, n in comm_bytes(work, dataclasses.replace(once, zero=zero)).items() if name.startswith("dp_")
        )
        for zero in (0, 1, 2, 3)
    }
    assert sums[0] == sums[1] == sums[2] > 0 and 2 * sums[3] == 3 * sums[0]


@settings(max_examples=100, deadline=None)
@given(networks, st.integers(1, 512), st.sampled_from([1, 2, 8, 16]), st.integers(0, 1 << 40))
def test_rings(network: Network, size: int, stride: int, nbytes: int) -> None:
    """An all-reduce is two passes, never faster than the links allow, and wider strides are never faster."""
    found = ring(network, size, stride)
    assert found.all_reduce_s(nbytes) == 2 * found.pass_s(nbytes)
    assert found.pass_s(nbytes) * network.intra_bytes_per_s >= ring_bytes(nbytes, size) * (1 - 1e-9)
    if network.inter_bytes_per_s <= network.intra_bytes_per_s and size > 1:
        wider = ring(network, size, stride * 2)
        assert wider.pass_s(nbytes) >= found.pass_s(nbytes) * (1 - 1e-9)
