"""Checks of Optimizing Distributed Training on Frontier (arXiv 2312.12705): memory, step times, utilisation of real training."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.papers.claims import Bench, Line, Needs, Outcome
from trimtab.predict.training.memory import stage_memory
from trimtab.predict.training.time import step_time
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.configs import spec_from_config
from trimtab.spec.machine import Machine, Stack, load_machine
from trimtab.spec.nodes import ModelSpec
from trimtab.spec.training import RING_EFFICIENCY, Network, TrainingSpec, default_network, load_training_stack
from trimtab.units import GIB


@functools.cache
def gpt(name: str, layers: int, hidden: int, heads: int, vocab: int, positions: int) -> ModelSpec:
    """A GPT of these sizes: LayerNorm with biases, plain FFN four times as wide, learned positions, tied embedding."""
    return spec_from_config(
        {
            "model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads, "vocab_size": vocab,
            "n_positions": positions, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        },
        name,
    )  # fmt: skip


def _file(bench: Bench, name: str) -> Path:
    """A table of the data folder, or of its folder `analyze`."""
    if bench.data is not None:
        for path in (bench.data / name, bench.data / "analyze" / name):
            if path.is_file():
                return path
    raise Needs("data")


# ------------------------------------------------------------------------------- b4: Megatron on A100, arXiv 2205.05198

_MODES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "seq": {"sequence_parallel": True},
    "sel": {"recompute": "selective"},
    "seqsel": {"sequence_parallel": True, "recompute": "selective"},
    "full": {"recompute": "full"},
}
#: How far step times may be off.
_TIME_BARS = {"megatron-22B": 0.12, "gpt3-175B": 0.10}
#: Bytes of a parameter there: weight, fp32 gradient, optimizer.
_STATE = 18


def _megatron(bench: Bench) -> dict[str, Any]:
    return bench.once("frontier.megatron", lambda: json.loads(_file(bench, "megatron_seqsel.json").read_text("utf-8")))


def _megatron_layout(table: Mapping[str, Any], name: str, mode: str) -> tuple[ModelSpec, TrainingSpec]:
    shape, run = table["models"][name], table["exec"][name]
    spec = gpt(name, shape["layers"], shape["hidden"], shape["heads"], shape["vocab"], shape["seq"])
    chunks = run["interleave"]
    training = TrainingSpec(
        micro_batch=run["microbatch"],
        global_batch=run["global_batch"],
        seq_len=shape["seq"],
        tp=run["tp"],
        pp=run["pp"],
        dp=run["dp"],
        schedule="interleaved" if chunks > 1 else "1f1b",
        chunks=chunks,
        flash=False,
        gradient_bytes=4,
        **_MODES[mode],
    )
    return spec, training


def _megatron_run(bench: Bench, name: str, mode: str) -> tuple[TrainingWork, TrainingSpec]:
    """Work and layout of one published run; the work is the same for all modes."""
    spec, training = _megatron_layout(_megatron(bench), name, mode)
    return bench.once(f"frontier.work.{name}", lambda: TrainingWork(spec, training)), training


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

#: Layers, width and heads of the MPT family; vocabulary 50368. Parameters of every row follow exactly.
MPT = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 12), "1b": (24, 2048, 16), "3b": (32, 2560, 20),
    "7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56), "70b": (80, 8192, 64),
}  # fmt: skip
_VOCAB = 50368
#: Name of a GPU in the table -> (machine, bytes/s of a node's adapters: 1600 Gbit/s as stated; 3200 on H100, assumed).
_GPUS = {
    "h100_80gb": ("h100-sxm5-80gb", 400e9),
    "a100_80gb": ("a100-sxm4-80gb", 200e9),
    "a100_40gb": ("a100-sxm4-40gb", 200e9),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded training run as Trimtab prices it.

    Args:
        model: name in the table.
        machine, network: what it ran on.
        work, training: model and layout.
        model_flops: of a step by the table's own convention, 3 (2 N s + 4 L d s^2) per sequence.
        mfu: recorded, in percent.
    """

    model: str
    machine: Machine
    network: Network
    work: TrainingWork
    training: TrainingSpec
    model_flops: float
    mfu: float

    def predict(self, stack: Stack) -> float:
        """MFU in percent over the dense peak of the run's dtype."""
        step = step_time(self.work, self.training, self.machine, stack, self.network).step_s
        return 100 * self.model_flops / step / self.training.dp / self.machine.peak(self.training.dtype)[0]


def runs(rows: Iterable[Mapping[str, str]]) -> list[Run]:
    """Read rows of the table."""
    works: dict[tuple[str, int, str], TrainingWork] = {}
    found = []
    for row in rows:
        layers, hidden, heads = MPT[row["model"]]
        seq, gpus, micro = int(row["seq_len"]), int(row["n_gpus"]), int(row["micro_batch"])
        nbytes = 2 if row["mp_mode"] == "PURE" else 4  # else gradients are reduced in fp32
        training = TrainingSpec(
            micro_batch=micro,
            global_batch=-(-int(row["global_batch"]) // (gpus * micro)) * gpus * micro,  # the last one may be smaller
            seq_len=seq,
            dp=gpus,
            zero=3 if row["sharding"] == "FULL_SHARD" else 2,
            recompute="full" if row["act_ckpt"] == "True" else "none",
            dtype="fp8" if row["precision"] == "amp_fp8" else "bf16",
            dropout=False,
            gradient_bytes=nbytes,  # type: ignore[arg-type]
        )
        key = (row["model"], seq, training.dtype)
        if key not in works:
            works[key] = TrainingWork(gpt(f"mpt-{row['model']}", layers, hidden, heads, _VOCAB, seq), training)
        name, rate = _GPUS[row["gpu"]]
        machine = load_machine(name)
        network = replace(default_network(machine), inter_bytes_per_s=RING_EFFICIENCY * rate)
        flops = 3 * (2 * int(row["n_params"]) * seq + 4 * layers * hidden * seq**2) * training.global_batch
        found.append(Run(row["model"], machine, network, works[key], training, flops, float(row["mfu"])))
    return found


def with_gemm(stack: Stack, efficiency: float) -> Stack:
    """The stack at another GEMM efficiency; attention keeps its ratio to it."""
    gemm, attention = stack.op_classes["gemm"], stack.op_classes["attention"]
    ratio = attention.compute_efficiency / gemm.compute_efficiency
    changed = {
        "gemm": replace(gemm, compute_efficiency=efficiency),
        "attention": replace(attention, compute_efficiency=ratio * efficiency),
    }
    return replace(stack, op_classes={**stack.op_classes, **changed})


def mean_error(group: Sequence[Run], stack: Stack) -> float:
    """Mean absolute error of MFU in points."""
    return sum(abs(run.predict(stack) - run.mfu) for run in group) / len(group)


def fit(group: Sequence[Run], stack: Stack) -> float:
    """The GEMM efficiency, to a hundredth, of least mean absolute error; looked for in steps of 0.05, then of 0.01."""

    def best(hundredths: Iterable[int]) -> int:
        return min(hundredths, key=lambda ec: mean_error(group, with_gemm(stack, ec / 100)))

    near = best(range(30, 96, 5))
    return best(range(near - 4, near + 5)) / 100


def recorded_runs(bench: Bench) -> list[Run]:
    """All rows of the data folder.

    Raises:
        Needs: the table is not there.
    """

    def read() -> list[Run]:
        with _file(bench, "mpt_training.csv").open(encoding="utf-8", newline="") as file:
            return runs(csv.DictReader(file))

    return bench.once("frontier.runs", read)


def _by_machine(group: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in group:
        found.setdefault(run.machine.id, []).append(run)
    return found


def utilisation(bench: Bench) -> Outcome:
    """MFU of all rows with the shipped constants, one per GPU type."""
    total, shown = 0.0, []
    everything = recorded_runs(bench)
    for name, group in _by_machine(everything).items():
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
    for name, group in _by_machine(recorded_runs(bench)).items():
        stack = load_training_stack("fsdp", group[0].machine)
        for parity in (0, 1):
            half = {model for index, model in enumerate(MPT) if index % 2 == parity}
            fitted = [run for run in group if run.model in half]
            tested = [run for run in group if run.model not in half]
            efficiency = fit(fitted, stack)
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
