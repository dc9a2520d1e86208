"""Checks of Optimizing Distributed Training on Frontier (arXiv 2312.12705): memory, step times, utilisation of real training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.measure.recorded.megatron import with_gemm
from trimtab.measure.recorded.tables import load_json, load_table
from trimtab.measure.recorded.training_runs import MPT, Run, by_machine, fit_gemm, mean_error, mpt_runs, seqsel_run
from trimtab.papers.claims import Bench, Line, Outcome
from trimtab.predict.training.memory import stage_memory
from trimtab.predict.training.time import step_time
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.machine import load_machine
from trimtab.spec.training import TrainingSpec, default_network, load_training_stack
from trimtab.units import GIB

#: How far step times may be off.
_TIME_BARS = {"megatron-22B": 0.12, "gpt3-175B": 0.10}
#: Bytes of a parameter there: weight, fp32 gradient, optimizer.
_STATE = 18


# ------------------------------------------------------------------------------- b4: Megatron on A100, arXiv 2205.05198


def _megatron(bench: Bench) -> dict[str, Any]:
    return bench.once("frontier.megatron", lambda: load_json("megatron_seqsel", bench.tables))


def _megatron_run(bench: Bench, name: str, mode: str) -> tuple[TrainingWork, TrainingSpec]:
    """Work and layout of one published run."""
    return bench.once(f"frontier.{name}.{mode}", lambda: seqsel_run(_megatron(bench), name, mode))


def _first_stage(bench: Bench, name: str, mode: str) -> tuple[float, float]:
    """(weights, gradients and optimizer; activations) of the first stage's layers in GiB, embeddings apart as published."""
    memory = stage_memory(*_megatron_run(bench, name, mode), 0)
    return _STATE * memory.layer_parameters / GIB, memory.layer_activations / GIB


def memory_exact(bench: Bench) -> Outcome:
    """GiB per GPU of states and activations, with and without sequence parallelism and selective recomputation."""
    table, worst, shown = _megatron(bench), 0.0, []
    for name, modes in table["fig1_GiB_per_GPU"].items():
        for mode, wanted in modes.items():
            states, activations = _first_stage(bench, name, mode)
            worst = max(worst, abs(states / wanted["par_opt"] - 1), abs(activations / wanted["act"] - 1))
            shown.append(f"{name} {mode}: {states:.4f} + {activations:.4f}")
    return Outcome(predicted=f"{'; '.join(shown)} GiB; off by at most {worst:.3%}", met=worst <= 0.001)


def percentages(bench: Bench) -> Outcome:
    """Activations as a percentage of those without sequence parallelism and recomputation."""
    table, worst, shown = _megatron(bench), 0.0, []
    for name, modes in table["fig7_act_percent_of_none"].items():
        base = _first_stage(bench, name, "none")[1]
        found = {mode: 100 * _first_stage(bench, name, mode)[1] / base for mode in modes}
        worst = max(worst, *(abs(found[mode] - wanted) for mode, wanted in modes.items()))
        shown.append(f"{name} " + ", ".join(f"{mode} {value:.2f}" for mode, value in found.items()))
    return Outcome(predicted=f"{'; '.join(shown)}; off by at most {worst:.2f} points", met=worst <= 0.2)


def step_times(bench: Bench) -> Outcome:
    """Seconds of a step on A100 with one GEMM efficiency for all four."""
    table, machine = _megatron(bench), load_machine("a100-sxm4-80gb")
    stack, network = load_training_stack("megatron", machine), default_network(machine)
    met, shown = True, []
    for name, modes in table["tab5_batch_seconds_A100_80GB"].items():
        for mode, wanted in modes.items():
            found = step_time(*_megatron_run(bench, name, mode), machine, stack, network).step_s
            met &= abs(found / wanted - 1) <= _TIME_BARS[name]
            shown.append(f"{name} {mode} {found:.2f} s of {wanted:g} ({found / wanted - 1:+.1%})")
    return Outcome(predicted="; ".join(shown), met=met)


# --------------------------------------------------------------------------------------------- b5: MPT with FSDP, 118 rows


def recorded_runs(bench: Bench) -> list[Run]:
    """All rows of the data folder.

    Raises:
        Needs: the table is not there.
    """
    return bench.once("frontier.runs", lambda: mpt_runs(load_table("mpt_training", bench.tables)))


def utilisation(bench: Bench) -> Outcome:
    """MFU of all rows with the shipped constants, one per GPU type."""
    total, shown = 0.0, []
    everything = recorded_runs(bench)
    for name, group in by_machine(everything).items():
        stack = load_training_stack("fsdp", group[0].machine)
        error = mean_error(group, stack)
        total += error * len(group)
        shown.append(
            f"{name} ({len(group)} rows, ec {stack.op_classes['gemm'].compute_efficiency:g}) {error:.2f} points"
        )
    mean = total / len(everything)
    return Outcome(predicted=f"{'; '.join(shown)}; all {mean:.2f}", met=mean <= 5)


def held_out(bench: Bench) -> Outcome:
    """The constant fitted on every other model of the family, the error taken on the others; both ways."""
    total, rows, shown = 0.0, 0, []
    for name, group in by_machine(recorded_runs(bench)).items():
        stack = load_training_stack("fsdp", group[0].machine)
        for parity in (0, 1):
            half = {model for index, model in enumerate(MPT) if index % 2 == parity}
            fitted = [run for run in group if run.model in half]
            tested = [run for run in group if run.model not in half]
            efficiency = fit_gemm(fitted, stack)
            error = mean_error(tested, with_gemm(stack, efficiency))
            total, rows = total + error * len(tested), rows + len(tested)
            shown.append(f"{name} ec {efficiency:g} from {len(fitted)} rows: {error:.2f} points on {len(tested)}")
    return Outcome(predicted=f"{'; '.join(shown)}; all {total / rows:.2f}", met=total / rows <= 5)


def _line(id: str, text: str, needed: str, check: Callable[[Bench], Outcome]) -> Line:
    return Line(id=id, text=text, needed=needed, check=check)


LINES = (
    _line("b4.1", "Megatron 22B and 175B on A100: GiB of states and activations per GPU", "within 0.1 %", memory_exact),
    _line("b4.2", "activations as percentage of no recomputation", "within 0.2 points", percentages),
    _line("b4.3", "step times, one GEMM efficiency", "175B within 10 %, 22B within 12 %", step_times),
    _line("b5.1", "MFU of 118 MPT runs, one constant per GPU", "mean error <= 5 points", utilisation),
    _line("b5.2", "the same, fitted on half of the models", "mean error on the others <= 5 points", held_out),
)
