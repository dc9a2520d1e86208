"""Recorded training runs as Trimtab prices them: MPT with FSDP (MFU of 118 rows), and Megatron's published steps and memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.measure.recorded.megatron import with_gemm
from trimtab.measure.recorded.tables import Columns
from trimtab.predict.training.time import step_time
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.families.sizes import gpt
from trimtab.spec.machine import Machine, Stack, load_machine
from trimtab.spec.training import RING_EFFICIENCY, Network, TrainingSpec, default_network

# ------------------------------------------------------------------------------------------------------- MPT with FSDP

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

    def step_s(self, stack: Stack) -> float:
        """Seconds of a step, predicted."""
        return step_time(self.work, self.training, self.machine, stack, self.network).step_s

    def predict(self, stack: Stack) -> float:
        """MFU in percent over the dense peak of the run's dtype."""
        return self._mfu(self.step_s(stack))

    @property
    def recorded_step_s(self) -> float:
        """Seconds of a step that the recorded MFU stands for."""
        return self._mfu(self.mfu)

    def _mfu(self, other: float) -> float:
        """Percent of peak from seconds, or seconds from percent of peak: their product is fixed."""
        return 100 * self.model_flops / other / self.training.dp / self.machine.peak(self.training.dtype)[0]


def mpt_runs(columns: Columns) -> list[Run]:
    """Rows of the table ``mpt_training``."""
    works: dict[tuple[str, int, str], TrainingWork] = {}
    found = []
    for values in zip(*(columns[name].tolist() for name in columns), strict=True):
        row = dict(zip(columns, values, strict=True))
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
            spec = gpt(f"mpt-{row['model']}", layers=layers, hidden=hidden, heads=heads, vocab=_VOCAB, positions=seq)
            works[key] = TrainingWork(spec, training)
        name, rate = _GPUS[row["gpu"]]
        machine = load_machine(name)
        network = replace(default_network(machine), inter_bytes_per_s=RING_EFFICIENCY * rate)
        flops = 3 * (2 * int(row["n_params"]) * seq + 4 * layers * hidden * seq**2) * training.global_batch
        found.append(Run(row["model"], machine, network, works[key], training, flops, float(row["mfu"])))
    return found


def by_machine(group: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs by the machine they ran on."""
    found: dict[str, list[Run]] = {}
    for run in group:
        found.setdefault(run.machine.id, []).append(run)
    return found


def mean_error(group: Sequence[Run], stack: Stack) -> float:
    """Mean absolute error of MFU in points."""
    return float(np.mean([abs(run.predict(stack) - run.mfu) for run in group]))


def fit_gemm(group: Sequence[Run], stack: Stack) -> float:
    """The GEMM efficiency, to a hundredth, of least mean absolute error; looked for in steps of 0.05, then of 0.01."""

    def best(hundredths: Iterable[int]) -> int:
        return min(hundredths, key=lambda ec: mean_error(group, with_gemm(stack, ec / 100)))

    near = best(range(30, 96, 5))
    return best(range(near - 4, near + 5)) / 100


# --------------------------------------------------------------------------------- Megatron on A100, arXiv 2205.05198

_MODES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "seq": {"sequence_parallel": True},
    "sel": {"recompute": "selective"},
    "seqsel": {"sequence_parallel": True, "recompute": "selective"},
    "full": {"recompute": "full"},
}


def seqsel_run(table: Mapping[str, Any], name: str, mode: str) -> tuple[TrainingWork, TrainingSpec]:
    """Work and layout of a published run of the table ``megatron_seqsel``.

    Args:
        table: the table.
        name: of the model.
        mode: ``none | seq | sel | seqsel | full``.
    """
    shape, run = table["models"][name], table["exec"][name]
    spec = gpt(
        name, layers=shape["layers"], hidden=shape["hidden"], heads=shape["heads"], vocab=shape["vocab"],
        positions=shape["seq"],
    )  # fmt: skip
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
    return TrainingWork(spec, training), training
