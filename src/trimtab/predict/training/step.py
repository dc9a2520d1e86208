"""From a model, a layout and a machine to the Report of one training step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from trimtab.errors import SpecError
from trimtab.predict.energy import energy
from trimtab.predict.money import usd_per_million_tokens
from trimtab.predict.training.memory import StageMemory, stage_memory
from trimtab.predict.training.network import ring_bytes
from trimtab.predict.training.time import StepTime, hop_bytes, sends, step_time
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.machine import Machine, Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import MoESpec
from trimtab.spec.report import Figure, OpRow, Report
from trimtab.spec.training import ITEM, Network, TrainingSpec, default_network, load_training_stack
from trimtab.units import GIB, format_bytes, format_si


def predict_training(
    spec: ModelSpec,
    training: TrainingSpec,
    machine: Machine,
    stack: Stack | None = None,
    network: Network | None = None,
    gpus: int | None = None,
) -> Report:
    """Price one training step.

    Counts: ``parameters``; for a device of the first and of the last stage ``weight_bytes_first``, ``gradient_bytes_...``,
    ``optimizer_bytes_...``, ``activation_bytes_...``, ``working_bytes_...``, ``peak_bytes_...``; ``peak_bytes`` of the fullest
    stage; ``comm_..._bytes`` a step's bytes sent by the busiest device, by collective; ``model_flops`` (forward and backward,
    attention over the full square, as Megatron states them), ``hardware_flops`` (with recomputation) of the whole step.

    Figures: ``step_time_s`` and its parts (they add up), ``tokens_per_s``, ``mfu``, ``hfu``, ``bubble_fraction`` (of the time
    without it), ``energy_j`` of a step, ``usd_per_million_tokens``.

    Args:
        spec: the model.
        training: the layout.
        machine: one device.
        stack: efficiencies; None = ``megatron`` where tensor or pipeline parallel, else ``fsdp``.
        network: links; None = `default_network`.
        gpus: devices there are; None = as many as the layout takes.

    Raises:
        SpecError: a layout that the model or the number of devices does not allow.
    """
    training.check(spec, gpus)
    stack = stack or load_training_stack("megatron" if training.tp * training.pp > 1 else "fsdp", machine)
    if network is None:
        network = default_network(machine) if training.world_size > 1 else _ALONE
    work = TrainingWork(spec, training)
    time = step_time(work, training, machine, stack, network)
    stages = memory_table(work, training, stack)
    model, hardware = step_flops(work, training)
    sent = comm_bytes(work, training)
    fullest = max(stages, key=lambda each: each.peak)
    ends = {f"{name}_{end}": value for end, at in (("first", 0), ("last", -1)) for name, value in _bytes(stages[at])}
    return Report(
        source="predicted",
        plan={
            "model": spec.name,
            "machine": machine.id,
            "stack": stack.name,
            "training": training.to_dict(),
            "network": network.to_dict() if network is not _ALONE else None,
        },
        counts={
            "parameters": spec.num_parameters(),
            "devices": training.world_size,
            "micro_batches": training.micro_batches,
            "tokens": training.tokens,
            **ends,
            "peak_bytes": fullest.peak,
            "capacity_bytes": machine.memory_bytes,
            **{f"comm_{name}_bytes": nbytes for name, nbytes in sent.items()},
            "comm_bytes": sum(sent.values()),
            "model_flops": model,
            "hardware_flops": hardware,
        },
        figures=_figures(training, machine, stack, network, time, model, hardware),
        ops=_rows(training, time, model, hardware, sent),
        notes=tuple(_notes(spec, work, training, machine, stack, network, stages)),
    )


#: The network of a single device is never asked.
_ALONE = Network(gpus_per_node=1, intra_bytes_per_s=1.0, inter_bytes_per_s=1.0)


def memory_table(work: TrainingWork, training: TrainingSpec, stack: Stack) -> tuple[StageMemory, ...]:
    """Memory of one device of every pipeline stage."""
    return tuple(stage_memory(work, training, stage, stack.reserve_bytes) for stage in range(training.pp))


def step_flops(work: TrainingWork, training: TrainingSpec) -> tuple[int, int]:
    """(model FLOPs, hardware FLOPs) of a step, all devices. Both count attention over the full square; the second adds what
    is computed anew.
    """
    share = work.share(1)
    layers = [(share.kinds[kind], times) for stage in work.stages(training) for kind, times in stage]
    model = sum(times * part.model_flops for part, times in layers)
    model += share.embedding.model_flops + share.head.model_flops
    again = 0
    if training.recompute == "full":
        again = sum(times * part.forward_model_flops for part, times in layers)
    elif training.recompute == "selective" and not work.flash:
        again = sum(times * part.core_model_flops for part, times in layers)
    return training.global_batch * model, training.global_batch * (model + again)


def comm_bytes(work: TrainingWork, training: TrainingSpec) -> dict[str, int]:
    """Bytes the busiest device sends in a step, by collective; rings send (n - 1) / n of a value once, an all-reduce twice."""
    share, m, b, dp = work.share(training.tp), training.micro_batches, training.micro_batch, training.dp
    found: dict[str, list[int]] = {}
    forwards = 2 if training.recompute == "full" else 1
    for stage, layers in enumerate(work.stages(training)):
        parts = [(share.kinds[kind], times) for kind, times in layers]
        edges = [share.embedding] * (stage == 0) + [share.head] * (stage == training.pp - 1)
        summed = sum(times * (forwards * part.reduced_bytes + part.backward_reduced_bytes) for part, times in parts)
        summed += sum(part.reduced_bytes + part.backward_reduced_bytes for part in edges)
        once = m * ring_bytes(b * summed, training.tp)
        parameters = sum(times * part.parameters for part, times in parts) + sum(part.parameters for part in edges)
        if work.spec.tie_word_embeddings and training.pp == 1:
            parameters -= work.tied_parameters(training.tp)
        learned = parameters if training.trainable else 0
        gradients = ring_bytes(learned * (training.reduce_bytes or training.gradient_bytes), dp)
        weights = ring_bytes(parameters * ITEM, dp)
        sent = {"pp_send": m * sends(training, stage) * hop_bytes(work, training)}
        if training.sequence_parallel:
            sent |= {"tp_reduce_scatter": once, "tp_all_gather": once}
        else:
            sent |= {"tp_all_reduce": 2 * once}
        if training.zero == 0:
            sent |= {"dp_all_reduce": 2 * gradients}
        else:
            gathered = 2 * m * weights if training.zero == 3 else weights * training.trainable
            sent |= {"dp_reduce_scatter": (m if training.zero >= 2 else 1) * gradients, "dp_all_gather": gathered}
        if training.pp > 1 and training.trainable and edges:
            nbytes = work.tied_parameters(training.tp) * (training.reduce_bytes or training.gradient_bytes)
            sent |= {"tied_all_reduce": 2 * ring_bytes(nbytes, 2)}
        for name, nbytes in sent.items():
            found.setdefault(name, []).append(nbytes)
    return {name: most for name, each in found.items() if (most := max(each))}


def _bytes(memory: StageMemory) -> Iterator[tuple[str, int]]:
    yield "weight_bytes", memory.weights
    yield "gradient_bytes", memory.gradients
    yield "optimizer_bytes", memory.optimizer
    yield "activation_bytes", memory.activations
    yield "working_bytes", memory.working
    yield "reserve_bytes", memory.reserve
    yield "peak_bytes", memory.peak


# ----------------------------------------------------------------------------------------------------- figures and rows


def _figures(
    training: TrainingSpec,
    machine: Machine,
    stack: Stack,
    network: Network,
    time: StepTime,
    model: int,
    hardware: int,
) -> dict[str, Figure]:
    step, devices = time.step_s, training.world_size
    peak, priced_as = machine.peak(training.dtype)
    low, high = stack.band
    rate = training.tokens / step
    waited = time.bubble_s / time.pipeline_s

    def figure(value: float, unit: str, why: str, *, inverse: bool = False) -> Figure:
        ends = (1 / high, 1 / low) if inverse else (low, high)
        band = (value * ends[0], value * ends[1]) if stack.band != (1.0, 1.0) else (None, None)
        return Figure(value=value, p10=band[0], p90=band[1], unit=unit, kind=stack.kind, why=why)  # type: ignore[arg-type]

    shares = ", ".join(f"{name} {value:.4g} s" for name, value in time.parts.items())
    constants = "; ".join(
        f"{name} ec={e.compute_efficiency:.3g} eb={e.bandwidth_efficiency:.3g} t0={e.launch_s * 1e6:g} us"
        for name, e in stack.op_classes.items()
    )
    links = f" Network: {network.source}." if network is not _ALONE and network.source else ""
    formula = (
        f"{shares}; {time.hidden_s:.4g} s of collectives hide under computing. Products: max(flops / (peak ec), bytes / (bw eb)) + "
        f"t0, peak = {format_si(peak, 'FLOP/s')} ({priced_as}); {constants}. Stack {stack.name}: {stack.source}.{links}"
    )
    utilised = f"FLOPs / (time x {devices} devices x {format_si(peak, 'FLOP/s')}), attention over the full square"
    found = {
        "step_time_s": figure(step, "s", formula),
        **{name: figure(value, "s", f"Part of step_time_s: {name}.") for name, value in time.parts.items()},
        "tokens_per_s": figure(rate, "tokens/s", f"{training.tokens} tokens / step_time_s", inverse=True),
        "mfu": figure(model / step / devices / peak, "", f"Model {utilised}.", inverse=True),
        "hfu": figure(
            hardware / step / devices / peak, "", f"Hardware {utilised}; with what is recomputed.", inverse=True
        ),
        "bubble_fraction": figure(waited, "", "Waiting over computing: (pp - 1) / (v m) for equal stages."),
        "energy_j": energy(machine, step, stack.band, devices),
        "usd_per_million_tokens": usd_per_million_tokens(machine, rate, stack.band, devices),
    }
    return found


def _rows(training: TrainingSpec, time: StepTime, model: int, hardware: int, sent: dict[str, int]) -> tuple[OpRow, ...]:
    """One row per part of the step, for one device on average; FLOPs stand at computing and at computing anew."""
    devices = training.world_size
    flops = {"product_s": model // devices, "recompute_s": (hardware - model) // devices}
    links = {"tp_s": "tp_", "p2p_s": "pp_", "dp_s": "dp_"}
    return tuple(
        OpRow(
            phase="train",
            name=name.removesuffix("_s"),
            kind="collective" if name in links else "compute",
            count=training.micro_batches,
            flops=flops.get(name, 0),
            bytes=sum(nbytes for key, nbytes in sent.items() if name in links and key.startswith(links[name])),
            time_s=value,
            bound="network" if name in links else "memory" if name in ("elementwise_s", "optimizer_s") else "compute",
        )
        for name, value in time.parts.items()
    )


# ---------------------------------------------------------------------------------------------------------------- notes


def _notes(
    spec: ModelSpec,
    work: TrainingWork,
    training: TrainingSpec,
    machine: Machine,
    stack: Stack,
    network: Network,
    stages: tuple[StageMemory, ...],
) -> Iterable[str]:
    if max(each.peak for each in stages) > machine.memory_bytes:
        yield _too_big(spec, work, training, machine, stack, network, stages)
    _, priced_as = machine.peak(training.dtype)
    if priced_as != training.dtype:
        yield f"No {training.dtype} path on {machine.id}: products are priced as {priced_as}."
    if training.tp > network.gpus_per_node and network is not _ALONE:
        yield (
            f"tp={training.tp} crosses nodes of {network.gpus_per_node}: every layer's sums pass over the slow links. "
            f"tp={network.gpus_per_node} with more pp is faster."
        )
    if training.dtype == "fp16":
        yield "fp16 needs loss scaling; a step whose gradients overflow is lost and not counted here."
    if training.recompute == "selective" and training.flash:
        yield "Flash attention keeps no scores, so selective recomputation changes nothing."
    if training.with_dropout(spec) and training.flash:
        yield "Dropout of the attention weights inside a flash kernel is taken as free."
    if any(isinstance(layer.mlp, MoESpec) for layer in spec.layers):
        yield "Experts are priced as evenly loaded and not spread over devices (expert parallelism)."
    if spec.max_position_embeddings and training.seq_len > spec.max_position_embeddings:
        yield f"seq_len={training.seq_len} is beyond the {spec.max_position_embeddings} positions {spec.name} was made for."


def _too_big(
    spec: ModelSpec,
    work: TrainingWork,
    training: TrainingSpec,
    machine: Machine,
    stack: Stack,
    network: Network,
    stages: tuple[StageMemory, ...],
) -> str:
    rows = "; ".join(
        f"stage {each.stage}: weights {each.weights / GIB:.1f} + gradients {each.gradients / GIB:.1f} + optimizer "
        f"{each.optimizer / GIB:.1f} + activations {each.activations / GIB:.1f} + working {each.working / GIB:.1f} + reserve "
        f"{each.reserve / GIB:.1f} = {each.peak / GIB:.1f} GiB"
        for each in _few(stages)
    )
    over = max(each.peak for each in stages) - machine.memory_bytes
    text = f"Does not fit {machine.id} ({format_bytes(machine.memory_bytes)}) by {format_bytes(over)}: {rows}."
    found = smallest_change(spec, training, machine, stack, network)
    if found is None:
        return f"{text} No one or two changes of the layout fit; take more or larger devices."
    changes, step = found
    shown = ", ".join(f"{name}={_plain(value)}" for name, value in changes.items())
    return f"{text} Smallest change that fits: {shown} ({step:.3g} s per step)."


def smallest_change(
    spec: ModelSpec, training: TrainingSpec, machine: Machine, stack: Stack, network: Network
) -> tuple[dict[str, Any], float] | None:
    """Return the fewest changes (one or two) of a layout that fit the memory, and the seconds of the step.

    Of equally many the fastest is taken. Devices, global batch and model stay; None = nothing fits.
    """
    works = {training.flash: TrainingWork(spec, training), True: TrainingWork(spec, replace(training, flash=True))}
    single = list(_changes(training))
    for count in (1, 2):
        best: tuple[dict[str, Any], float] | None = None
        for chosen in itertools.combinations(single, count):
            changes = {name: value for each in chosen for name, value in each.items()}
            if len(changes) < sum(map(len, chosen)):  # two changes of one field
                continue
            try:
                changed = replace(training, **changes)
                changed.check(spec, training.world_size)
            except SpecError:
                continue
            work = works[changed.flash]
            if max(each.peak for each in memory_table(work, changed, stack)) > machine.memory_bytes:
                continue
            step = step_time(work, changed, machine, stack, network).step_s
            if best is None or step < best[1]:
                best = changes, step
        if best is not None:
            return best
    return None


def _changes(training: TrainingSpec) -> Iterator[dict[str, Any]]:
    """Changes of one kind each that save memory."""
    if not training.flash:
        yield {"flash": True}
    if training.tp > 1 and not training.sequence_parallel:
        yield {"sequence_parallel": True}
    order = ("none", "selective", "full") if not training.flash else ("none", "full")
    if training.recompute in order:
        for choice in order[order.index(training.recompute) + 1 :]:
            yield {"recompute": choice}
    for zero in range(training.zero + 1, 4):
        yield {"zero": zero}
    half = training.micro_batch
    while half > 1 and half % 2 == 0:
        half //= 2
        yield {"micro_batch": half}
    for factor in (2, 4, 8, 16):
        if training.dp % factor == 0:
            yield {"tp": training.tp * factor, "dp": training.dp // factor}
            yield {"pp": training.pp * factor, "dp": training.dp // factor}


def _few(stages: tuple[StageMemory, ...]) -> tuple[StageMemory, ...]:
    """All stages of a short pipeline; of a long one the first three and the last."""
    return stages if len(stages) <= 8 else (*stages[:3], stages[-1])


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
