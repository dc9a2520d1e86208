"""How recorded runs of whole models are predicted: columns -> cases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.measure.recorded import llamacpp
from trimtab.measure.recorded.megatron import fit, generations
from trimtab.measure.recorded.scoreboard import Case, limits_of
from trimtab.measure.recorded.tables import Columns
from trimtab.measure.recorded.training_runs import by_machine, mean_error, mpt_runs, seqsel_run
from trimtab.predict.training.time import step_time
from trimtab.spec.machine import Stack, load_machine, load_stack, stack_names
from trimtab.spec.training import default_network, load_training_stack

#: Stack with the constants of all its rows; they are judged on the same rows.
SHIPPED = "llama.cpp"

#: Lengths llama.cpp constants are fitted on; the others are predicted.
_FITTED_LENGTHS = (512, 4096)

#: Megatron ran on this machine; the models whose rows constants are fitted on (one and eight devices).
_MEGATRON_MACHINE, _MEGATRON_FITTED = "a100-sxm4-80gb", ("openai_ada", "openai_davinci")


def llama_cpp(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """Fitted per device on two lengths, judged on the others; and one share of bandwidth for all, which must not do."""
    steps = llamacpp.decode_steps(columns)
    fitted = np.isin(columns["tokens"][columns["phase"] == "decode"], _FITTED_LENGTHS)
    constants = llamacpp.fit_devices(steps.of(fitted))
    judged = steps.of(~fitted & np.isin(steps.device, list(constants)))
    predicted = llamacpp.predict_s(judged, constants)
    bare = llamacpp.predict_s(judged, llamacpp.Constants(bandwidth_efficiency=1.0, layer_s=0.0))
    yield from _by_device(judged, predicted, device, "llama.cpp decode", held_out=True)
    if SHIPPED in stack_names():
        own, shipped_s = llamacpp.priced_s(columns, load_stack(SHIPPED))
        yield from _by_device(own, shipped_s, device, "llama.cpp decode, as shipped", held_out=False)
    if device is not None:
        return
    alike = llamacpp.predict_s(judged, llamacpp.fit(steps.of(fitted)))
    together = (
        ("llama.cpp decode", predicted, False),
        ("llama.cpp decode, one share for all", alike, True),
    )
    for op_class, seconds, contrast in together:
        yield Case(
            table="llamacpp_llama3",
            device="all",
            stack="llama.cpp",
            op_class=op_class,
            measured_s=judged.measured_s,
            predicted_s=seconds,
            datasheet_s=bare,
            held_out=True,
            limits=limits_of(op_class, "all"),
            contrast=contrast,
        )


def _by_device(
    steps: llamacpp.Steps, predicted: npt.NDArray[np.float64], device: str | None, op_class: str, *, held_out: bool
) -> Iterator[Case]:
    bare = llamacpp.predict_s(steps, llamacpp.Constants(bandwidth_efficiency=1.0, layer_s=0.0))
    for name in np.unique(steps.device):
        if device in (None, name):
            rows = steps.device == name
            yield Case(
                table="llamacpp_llama3",
                device=str(name),
                stack="llama.cpp",
                op_class=op_class,
                measured_s=steps.measured_s[rows],
                predicted_s=predicted[rows],
                datasheet_s=bare[rows],
                held_out=held_out,
                limits=limits_of(op_class, str(name)),
            )


def megatron(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """An eager stack fitted on two models and judged on the others; as shipped; and without what its host takes per layer."""
    machine, eager = load_machine(_MEGATRON_MACHINE), load_stack("hf-eager")
    if device not in (None, machine.id):
        return
    rows = generations(columns)
    fitted = [rows[name] for name in _MEGATRON_FITTED if name in rows]
    judged = [found for name, found in rows.items() if name not in _MEGATRON_FITTED]
    if not fitted or not judged:
        return
    stacks = {
        "Megatron generation": fit(fitted, machine, eager),
        "Megatron generation, as shipped": eager,
        "Megatron generation, no time per layer": fit(fitted, machine, eager, floor=False),
    }
    for op_class, each in stacks.items():
        yield Case(
            table="megatron_a100_generation",
            device=machine.id,
            stack="Megatron 2022",
            op_class=op_class,
            measured_s=np.concatenate([found.seconds for found in judged]),
            predicted_s=np.concatenate([found.time_s(machine, each) for found in judged]),
            band=each.band if each is eager else None,
            held_out=True,
            limits=limits_of(op_class, machine.id),
            contrast="no time" in op_class,
        )


def mpt(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """Seconds of a training step, by the MFU recorded of it, with the shipped constant of each GPU; fitted on these rows."""
    for name, group in by_machine(mpt_runs(columns)).items():
        if device in (None, name):
            shipped = load_training_stack("fsdp", group[0].machine)
            points = mean_error(group, shipped)
            yield Case(
                table="mpt_training",
                device=name,
                stack="fsdp",
                op_class="FSDP training step",
                measured_s=np.array([run.recorded_step_s for run in group]),
                predicted_s=np.array([run.step_s(shipped) for run in group]),
                band=shipped.band,
                limits=limits_of("FSDP training step", name),
                note=f"MPT; MFU off by {points:.1f} points",
            )


def seqsel(table: Mapping[str, Any], device: str | None, stack: Stack) -> Iterator[Case]:
    """Seconds of Megatron's published training steps, one GEMM efficiency for all; fitted on these four."""
    machine = load_machine(_MEGATRON_MACHINE)
    if device not in (None, machine.id):
        return
    shipped, network = load_training_stack("megatron", machine), default_network(machine)
    steps = [
        (seconds, step_time(*seqsel_run(table, name, mode), machine, shipped, network).step_s)
        for name, modes in table["tab5_batch_seconds_A100_80GB"].items()
        for mode, seconds in modes.items()
    ]
    measured, predicted = np.array(steps).T
    yield Case(
        table="megatron_seqsel",
        device=machine.id,
        stack="megatron",
        op_class="Megatron training step",
        measured_s=measured,
        predicted_s=predicted,
        limits=limits_of("Megatron training step", machine.id),
        note="Megatron, arXiv 2205.05198",
    )
