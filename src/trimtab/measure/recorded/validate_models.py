"""How recorded runs of whole models are predicted: columns -> cases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from trimtab.measure.recorded import llamacpp
from trimtab.measure.recorded.layer_floor import Generation, fit_layer_stack
from trimtab.measure.recorded.scoreboard import Case, limits_of
from trimtab.measure.recorded.tables import Columns, select
from trimtab.spec.machine import Stack, load_machine, load_stack, stack_names

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
    """Seconds per layer fitted on two models, judged on the others; without that floor the form must not do."""
    machine = load_machine(_MEGATRON_MACHINE)
    if device not in (None, machine.id):
        return
    rows = {str(name): _generation(select(columns, columns["model"] == name)) for name in np.unique(columns["model"])}
    fitted = [rows[name] for name in _MEGATRON_FITTED if name in rows]
    judged = [found for name, found in rows.items() if name not in _MEGATRON_FITTED]
    if not fitted or not judged:
        return
    measured = np.concatenate([found.seconds for found in judged])
    for op_class, floor in (("Megatron generation", True), ("Megatron generation, no time per layer", False)):
        constants = fit_layer_stack(fitted, machine, floor=floor)
        yield Case(
            table="megatron_a100_generation",
            device=machine.id,
            stack="Megatron 2022",
            op_class=op_class,
            measured_s=measured,
            predicted_s=np.concatenate([constants.time_s(found, machine) for found in judged]),
            held_out=True,
            limits=limits_of(op_class, machine.id),
            contrast=not floor,
        )


def _generation(rows: Columns) -> Generation:
    return Generation(
        model=str(rows["model"][0]),
        hidden=int(rows["hidden"][0]),
        layers=int(rows["layers"][0]),
        tp=int(rows["tp"][0]),
        prompt_tokens=rows["prompt_tokens"].astype(float),
        output_tokens=rows["output_tokens"].astype(float),
        seconds=rows["seconds"].astype(float),
    )
