"""Recorded Megatron generations on A100 beside the product's prediction with an eager stack.

Batch-1 decoding there takes 0.73 to 0.85 ms per layer whatever the width: the host launches every kernel and collective one by
one, which sets a floor under a pass (`Stack.floor_per_layer_s`, `floor_per_collective_s`) that no roofline of the device
explains. Source: the runs are those of Narayanan et al., arXiv 2305.02440.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trimtab.errors import SpecError
from trimtab.graph.ops import IntArray, StepShape
from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard
from trimtab.measure.recorded.tables import Columns, select
from trimtab.predict.price import num_layers, price_groups
from trimtab.spec.families.sizes import gpt
from trimtab.spec.machine import Machine, Stack
from trimtab.spec.parallel import Parallel

FloatArray = npt.NDArray[np.float64]

#: Vocabulary of the models; its head is the smallest part of a pass, and the table does not say.
_VOCAB, _POSITIONS = 50304, 4096
#: What the fit searches: shares of peak, seconds per layer, seconds per collective.
_EFFICIENCIES = np.arange(0.30, 0.905, 0.01)
_LAYER_S = np.arange(0.0, 1.2e-3, 5e-6)
_COLLECTIVE_S = np.arange(0.0, 1.2e-4, 1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Recorded generations of one dense model, arrays of one length.

    Args:
        graphs: of one device's slice.
        tp: devices every layer is cut over.
        prompt_tokens, output_tokens, seconds: [rows].
    """

    model: str
    graphs: Graphs
    tp: int
    prompt_tokens: IntArray
    output_tokens: IntArray
    seconds: FloatArray

    def passes_s(self, machine: Machine, stack: Stack) -> tuple[FloatArray, FloatArray]:
        """[rows] seconds of the prompt's pass and of the decode step at mean context, as `predict` prices them."""
        first = StepShape.of(self.prompt_tokens[:, None], np.zeros_like(self.prompt_tokens)[:, None], logits=1)
        mean = self.prompt_tokens + np.maximum(self.output_tokens - 2, 0) // 2
        further = StepShape.of(np.ones_like(mean)[:, None], mean[:, None], logits=1)
        groups = self.graphs.groups(self.graphs.prefill, stack)
        first_s, further_s = (
            price_groups(groups, num_layers(groups), step, machine, stack).time_s for step in (first, further)
        )
        return first_s, further_s

    def time_s(self, machine: Machine, stack: Stack) -> FloatArray:
        """[rows] seconds of every generation: the prompt, and a decode step for each token after the first."""
        return self._total(*self.passes_s(machine, stack))

    def error(self, machine: Machine, stack: Stack) -> FloatArray:
        """[rows] relative error, absolute value."""
        return np.abs(self.time_s(machine, stack) / self.seconds - 1)

    def _total(self, first_s: FloatArray, further_s: FloatArray) -> FloatArray:
        return first_s + (self.output_tokens - 1) * further_s


def generations(columns: Columns) -> dict[str, Generation]:
    """Group the table by model."""
    found = {}
    for name in np.unique(columns["model"]):
        rows = select(columns, columns["model"] == name)
        layers, hidden, heads, tp = (int(rows[key][0]) for key in ("layers", "hidden", "heads", "tp"))
        spec = gpt(str(name), layers=layers, hidden=hidden, heads=heads, vocab=_VOCAB, positions=_POSITIONS)
        found[str(name)] = Generation(
            model=str(name),
            graphs=Graphs(shard(spec.with_dtype("float16"), Parallel(tp=tp))),
            tp=tp,
            prompt_tokens=rows["prompt_tokens"].astype(np.int64),
            output_tokens=rows["output_tokens"].astype(np.int64),
            seconds=rows["seconds"].astype(np.float64),
        )
    return found


def without_floor(stack: Stack) -> Stack:
    """The stack as if its host launched for nothing."""
    return replace(stack, floor_per_layer_s=0.0, floor_per_collective_s=0.0)


def with_gemm(stack: Stack, efficiency: float) -> Stack:
    """The stack at another GEMM efficiency; attention keeps its ratio to it."""
    gemm, attention = stack.op_classes["gemm"], stack.op_classes["attention"]
    ratio = attention.compute_efficiency / gemm.compute_efficiency
    changed = {
        "gemm": replace(gemm, compute_efficiency=efficiency),
        "attention": replace(attention, compute_efficiency=ratio * efficiency),
    }
    return replace(stack, op_classes={**stack.op_classes, **changed})


def fit(rows: Sequence[Generation], machine: Machine, stack: Stack, *, floor: bool = True) -> Stack:
    """Fit the GEMM efficiency, the floor per layer and that per collective to the least mean relative error.

    Args:
        rows: recorded generations, on one and on several devices.
        machine: what they ran on.
        stack: the rest of the constants.
        floor: False fits the efficiency alone, to see what the floor is worth.

    Raises:
        SpecError: no rows.
    """
    if not rows:
        raise SpecError("No recorded generation was given to fit to.")
    best: tuple[float, Stack] | None = None
    for share in _EFFICIENCIES:
        bare = without_floor(with_gemm(stack, round(float(share), 4)))
        busy = [each.passes_s(machine, bare) for each in rows]
        layer_s = _least(rows, busy, 1, [_LAYER_S * len(each.graphs.spec.layers) for each in rows]) if floor else 0.0
        beside = [
            layer_s * len(each.graphs.spec.layers) + _COLLECTIVE_S * _collectives(each, stack) for each in rows
        ]  # fmt: skip
        collective_s = _least(rows, busy, 2, beside, _COLLECTIVE_S) if floor else 0.0
        chosen = replace(bare, floor_per_layer_s=layer_s, floor_per_collective_s=collective_s)
        error = float(np.concatenate([each.error(machine, chosen) for each in rows]).mean())
        if best is None or error < best[0]:
            best = error, chosen
    assert best is not None
    return best[1]


def _least(
    rows: Sequence[Generation],
    busy: Sequence[tuple[FloatArray, FloatArray]],
    devices: int,
    floors: Sequence[FloatArray],
    candidates: FloatArray = _LAYER_S,
) -> float:
    """The candidate of least error over the rows on one device (`devices` 1) or on several (2); a floor under a pass each."""
    errors: FloatArray | float = 0.0
    for each, (first, further), floor in zip(rows, busy, floors, strict=True):
        if (each.tp > 1) == (devices > 1):
            times = each._total(np.maximum(first, floor[:, None]), np.maximum(further, floor[:, None]))
            errors = errors + np.abs(times / each.seconds - 1).mean(axis=1)
    return float(candidates[int(np.argmin(errors))]) if np.ndim(errors) else 0.0


def _collectives(rows: Generation, stack: Stack) -> int:
    """Collectives of one pass."""
    kernels = rows.graphs.kernels(rows.graphs.prefill, stack)
    return sum(op.kind.startswith("all_") for kernel in kernels for op in kernel.ops)


def medians(rows: Mapping[str, Generation], machine: Machine, stack: Stack) -> dict[str, float]:
    """Median error of every model."""
    return {name: float(np.median(each.error(machine, stack))) for name, each in rows.items()}
