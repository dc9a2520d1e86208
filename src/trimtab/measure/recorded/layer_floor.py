"""The stack term of an idealized runtime: a host that launches layer by layer sets a floor under every pass.

    time of a pass = max(flops / (tp peak ec), bytes / (tp bw eb), L t_layer(tp)) + two all-reduces per layer where tp > 1

Batch-1 decoding on the recorded Megatron stack takes 0.73 to 0.85 ms per layer whatever the width, which no roofline of the
device explains. Source: the stack is that of Narayanan et al., arXiv 2305.02440; all-reduce time is that of a ring,
2 (tp - 1) / tp of the message through every device.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.errors import SpecError
from trimtab.spec.machine import Machine

FloatArray = npt.NDArray[np.float64]

_BYTES = 2  # of fp16
#: Share of the link that recorded half-precision all-reduces of 8 A100 reach: 222 of 300 GB/s (aiconfigurator-core 0.12.0).
_LINK_EFFICIENCY = 0.74
#: What is searched: shares of peak, and milliseconds per layer.
_EFFICIENCIES = np.arange(0.20, 0.955, 0.01)
_LAYER_MS = np.arange(0.0, 1.6, 0.005)
_MEASURED_COLUMNS = ("model", "hidden", "layers", "tp", "prompt_tokens", "output_tokens", "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Recorded generations of one dense model: arrays of one length."""

    model: str
    hidden: int
    layers: int
    tp: int
    prompt_tokens: FloatArray
    output_tokens: FloatArray
    seconds: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStack:
    """A stack of three kinds of constants.

    Args:
        compute_efficiency: share of the peak (ec).
        bandwidth_efficiency: share of the bandwidth (eb).
        layer_s: least seconds of one layer in one pass, by tensor-parallel degree.
    """

    compute_efficiency: float
    bandwidth_efficiency: float
    layer_s: Mapping[int, float]

    def pass_time_s(self, shape: Generation, tokens: npt.ArrayLike, machine: Machine) -> FloatArray:
        """Seconds of one pass over `tokens` tokens of one sequence, fp16, batch 1.

        Args:
            shape: hidden size, layers and tensor-parallel degree; twelve h^2 weights a layer.
            tokens: new tokens of the pass (1 = a decode step).
            machine: peak, bandwidth and link of each device.

        Raises:
            SpecError: no constant for that degree.
        """
        if shape.tp not in self.layer_s:
            known = ", ".join(str(tp) for tp in self.layer_s)
            raise SpecError(f"tp={shape.tp} has no fitted layer time. Allowed: {known}.")
        return self._floored(shape, tokens, machine, self.layer_s[shape.tp])

    def time_s(self, rows: Generation, machine: Machine) -> FloatArray:
        """F(p) + (o - 1) g of every row."""
        encode = self.pass_time_s(rows, rows.prompt_tokens, machine)
        return encode + np.maximum(rows.output_tokens - 1, 0) * self.pass_time_s(rows, 1.0, machine)

    def error(self, rows: Generation, machine: Machine) -> FloatArray:
        """Relative error of every row, absolute value."""
        return np.abs(self.time_s(rows, machine) / rows.seconds - 1)

    def _floored(
        self, shape: Generation, tokens: npt.ArrayLike, machine: Machine, layer_s: npt.ArrayLike
    ) -> FloatArray:
        n, weights = np.asarray(tokens, dtype=np.float64), 12 * shape.hidden**2 * shape.layers / shape.tp
        compute = 2 * weights * n / (machine.peak("fp16")[0] * self.compute_efficiency)
        memory = _BYTES * weights / (machine.memory_bandwidth_bytes_per_s * self.bandwidth_efficiency)
        least = shape.layers * np.asarray(layer_s, dtype=np.float64)
        return np.maximum(np.maximum(compute, memory), least) + _all_reduce_s(shape, n, machine)


def fit_layer_stack(
    rows: Sequence[Generation], machine: Machine, *, bandwidth_efficiency: float = 0.8, floor: bool = True
) -> LayerStack:
    """Fit ec, and t_layer of every tensor-parallel degree, to the least mean relative error.

    Args:
        rows: recorded generations.
        machine: the device they ran on.
        bandwidth_efficiency: eb, given and not fitted: where the floor binds, the rows say nothing about it (0.8 is the share
            that recorded matrix-vector kernels reach).
        floor: False fits the same form with t_layer = 0, to see what the floor is worth.

    Raises:
        SpecError: no rows.
    """
    if not rows:
        raise SpecError("No recorded generation was given to fit to.")
    candidates = _LAYER_MS / 1e3 if floor else np.zeros(1)
    degrees = sorted({each.tp for each in rows})
    best: tuple[float, LayerStack] | None = None
    for share in _EFFICIENCIES:
        stack = LayerStack(compute_efficiency=float(share), bandwidth_efficiency=bandwidth_efficiency, layer_s={})
        total, layer_s = 0.0, {}
        for tp in degrees:  # given ec, the degrees have nothing in common
            errors = sum(_errors(stack, each, machine, candidates) for each in rows if each.tp == tp)
            chosen = int(np.argmin(errors))
            total, layer_s[tp] = total + float(np.asarray(errors)[chosen]), float(candidates[chosen])
        if best is None or total < best[0]:
            best = (
                total,
                LayerStack(
                    compute_efficiency=round(float(share), 4),
                    bandwidth_efficiency=bandwidth_efficiency,
                    layer_s=layer_s,
                ),
            )
    assert best is not None
    return best[1]


def read_generations(path: Path) -> dict[str, Generation]:
    """Read recorded generations by model from a CSV with the columns of `megatron_a100_generation.csv`.

    Raises:
        SpecError: a column is missing or a row is no number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        absent = [name for name in _MEASURED_COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise SpecError(f"{path} has no column {', '.join(absent)}. Wanted: {', '.join(_MEASURED_COLUMNS)}.")
        groups: dict[str, list[dict[str, str]]] = {}
        for row in reader:
            groups.setdefault(row["model"], []).append(row)
    try:
        return {name: _generation(name, group) for name, group in groups.items()}
    except ValueError as error:
        raise SpecError(f"{path}: {error}.") from None


def _generation(name: str, rows: Sequence[Mapping[str, str]]) -> Generation:
    first = rows[0]
    p, o, seconds = (np.array([float(row[c]) for row in rows]) for c in ("prompt_tokens", "output_tokens", "seconds"))
    return Generation(
        model=name, hidden=int(first["hidden"]), layers=int(first["layers"]), tp=int(first["tp"]),
        prompt_tokens=p, output_tokens=o, seconds=seconds,
    )  # fmt: skip


def _errors(stack: LayerStack, rows: Generation, machine: Machine, layer_s: FloatArray) -> FloatArray:
    """Mean relative error of every candidate layer time."""
    encode = stack._floored(rows, rows.prompt_tokens, machine, layer_s[:, None])
    decode = stack._floored(rows, 1.0, machine, layer_s)[:, None]
    times = encode + np.maximum(rows.output_tokens - 1, 0) * decode
    return np.abs(times / rows.seconds - 1).mean(axis=1)


def _all_reduce_s(shape: Generation, tokens: FloatArray, machine: Machine) -> FloatArray:
    """Two all-reduces of the hidden states per layer."""
    if shape.tp == 1:
        return np.zeros_like(tokens)
    if machine.link_bytes_per_s_per_dir is None:
        raise SpecError(f"{machine.id} has no link in the catalogue: tensor parallelism over it cannot be priced.")
    nbytes = 2 * shape.layers * _BYTES * shape.hidden * tokens * 2 * (shape.tp - 1) / shape.tp
    return nbytes / (machine.link_bytes_per_s_per_dir * _LINK_EFFICIENCY)
