"""Recorded llama.cpp decode speeds against two constants per device: share of bandwidth and seconds per layer.

    seconds of a token = (weight bytes + cache bytes) / (bandwidth * eb) + layers * t_layer

Bytes are the graph's own count of one decode step. Apple GPUs unpack quantized weights slower than they read them, so there
those weights have a share of their own. The runs start from an empty cache and generate `tokens` tokens, so the mean context
is half of that; attention in that release (May 2024, no Flash kernel) takes about twice the time its bytes need on every
device, so the whole length is charged.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trimtab.errors import unknown
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import StepShape
from trimtab.measure.recorded.tables import Columns, select
from trimtab.predict.price import price
from trimtab.spec.configs import load_spec
from trimtab.spec.formats import FP16, WeightFormat
from trimtab.spec.machine import Stack, load_machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit

FloatArray = npt.NDArray[np.float64]

#: `model` of the table -> (model of the catalogue, file format).
MODELS = {
    "8B Q4_K_M": ("llama-3-8b", "Q4_K_M"),
    "8B F16": ("llama-3-8b", "F16"),
    "70B Q4_K_M": ("llama-3-70b", "Q4_K_M"),
    "70B F16": ("llama-3-70b", "F16"),
}

#: Devices of the table that the machine catalogue lacks: bandwidth in bytes/s (NVIDIA data sheets).
BANDWIDTH_BYTES_PER_S = {"rtx-3070": 448e9, "rtx-3080": 760e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """How llama.cpp uses one device.

    Args:
        bandwidth_efficiency: share of the datasheet bandwidth.
        layer_s: seconds per layer and token that no byte explains (launches).
        quantized_efficiency: share for block-quantized weights, where it is another one.
        mean_error, max_error: of predicted / measured - 1 over the `rows` it was fitted on.
    """

    bandwidth_efficiency: float
    layer_s: float
    quantized_efficiency: float | None = None
    rows: int = 0
    mean_error: float = 0.0
    max_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps of rows: bytes and layers, and what was measured.

    Args:
        device: [rows] machine ids.
        model: [rows] names as in the table.
        quantized_bytes, other_bytes: [rows] bytes of block-quantized weights, and of everything else read.
        layers: [rows] layers.
        bandwidth_bytes_per_s: [rows] datasheet.
        measured_s: [rows] seconds per token.
    """

    device: npt.NDArray[np.str_]
    model: npt.NDArray[np.str_]
    quantized_bytes: FloatArray
    other_bytes: FloatArray
    layers: FloatArray
    bandwidth_bytes_per_s: FloatArray
    measured_s: FloatArray

    def of(self, rows: npt.NDArray[np.bool_]) -> Steps:
        """The rows of a mask."""
        return Steps(*(getattr(self, name)[rows] for name in self.__slots__))


def decode_steps(columns: Columns) -> Steps:
    """Decode rows of the table as steps.

    Raises:
        SpecError: a model or a device nobody knows.
    """
    rows = columns["phase"] == "decode"
    model, device = columns["model"][rows], columns["hardware_id"][rows]
    context = columns["tokens"][rows]
    found = np.array([_step_bytes(name, int(tokens)) for name, tokens in zip(model, context, strict=True)], float)
    rates = {name: BANDWIDTH_BYTES_PER_S.get(name) or _bandwidth(name) for name in np.unique(device)}
    return Steps(
        device,
        model,
        found[:, 0],
        found[:, 1],
        found[:, 2],
        np.array([rates[name] for name in device]),
        1.0 / columns["tok_per_s"][rows],
    )


def q4_k_m(spec: ModelSpec) -> ModelSpec:
    """The model with the block formats llama.cpp gives a Q4_K_M file: q4_k, and q6_k for the head and for `v_proj` and
    `down_proj` of the first eighth, the last eighth and every third layer between (the value matrices of an 80-layer model
    are q5_k instead of q4_k). With the q4_k embedding the files come out at 4.91 and 42.51 GB (published: 4.92 and 42.52).
    """
    layers = spec.num_hidden_layers
    kinds = {"lm_head": "q6_k", "embed_tokens": "q4_k"}
    for path, _ in spec.linears():
        if path == "lm_head":
            continue
        index, name = int(path.split(".")[1]), path.rpartition(".")[2]
        more = index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2
        if name in ("v_proj", "down_proj") and more:
            kinds[path] = "q6_k"
        else:
            kinds[path] = "q5_k" if name == "v_proj" and layers == 80 else "q4_k"
    return spec.edit((Edit(path, "format", WeightFormat(kind=kind)) for path, kind in kinds.items()), by="Q4_K_M")


def predict_s(steps: Steps, constants: Mapping[str, Constants] | Constants) -> FloatArray:
    """Seconds per token of every row, from one set of constants or one per device."""
    names = np.unique(steps.device)
    by_device = {n: constants for n in names} if isinstance(constants, Constants) else constants
    out = np.empty(len(steps.device))
    for name in names:
        if name not in by_device:
            raise unknown("llama.cpp device", str(name), by_device)
        rows, c = steps.device == name, by_device[name]
        for_codes = c.quantized_efficiency or c.bandwidth_efficiency
        nbytes = steps.quantized_bytes[rows] / for_codes + steps.other_bytes[rows] / c.bandwidth_efficiency
        out[rows] = nbytes / steps.bandwidth_bytes_per_s[rows] + steps.layers[rows] * c.layer_s
    return out


def priced_s(columns: Columns, stack: Stack) -> tuple[Steps, FloatArray]:
    """Decode rows of devices a stack has constants for, and their seconds as `predict` prices them."""
    known = select(columns, (columns["phase"] == "decode") & np.isin(columns["hardware_id"], list(stack.devices)))
    seconds = np.empty(len(known["tokens"]))
    for device, model in sorted(set(zip(known["hardware_id"].tolist(), known["model"].tolist(), strict=True))):
        rows = (known["hardware_id"] == device) & (known["model"] == model)
        machine = load_machine(device)
        own = stack.on(machine)
        past = known["tokens"][rows] // 2 - 1  # the mean context of a run that starts empty
        step = StepShape.of(new=np.ones((len(past), 1)), past=past[:, None], logits=1)
        seconds[rows] = price(fuse(build(_spec(model)), own), step, machine, own).time_s
    return decode_steps(known), seconds


def fit(steps: Steps, *, three: bool = False) -> Constants:
    """Least squares of the relative error; constants stay in their physical range.

    Args:
        steps: rows of one device (or of many, to see that one set does not do).
        three: with a share of their own for quantized weights.
    """
    quantized = steps.quantized_bytes / steps.bandwidth_bytes_per_s
    other = steps.other_bytes / steps.bandwidth_bytes_per_s
    columns = [quantized, other, steps.layers] if three else [quantized + other, steps.layers]
    a = np.stack(columns, 1) / steps.measured_s[:, None]
    least = np.array([1.0] * (len(columns) - 1) + [0.0])  # seconds per second at full bandwidth; no share is above 1
    x = least + _positive_least_squares(a, 1.0 - a @ least)
    shares = [1.0 / float(value) for value in x[:-1]]
    found = Constants(
        bandwidth_efficiency=shares[-1],
        layer_s=float(x[-1]),
        quantized_efficiency=shares[0] if three else None,
        rows=len(steps.measured_s),
    )
    error = np.abs(predict_s(steps, found) / steps.measured_s - 1)
    return replace(found, mean_error=float(error.mean()), max_error=float(error.max()))


def fit_devices(steps: Steps) -> dict[str, Constants]:
    """Constants of every device; three on Apple devices with rows of both formats, else two."""
    found = {}
    for name in np.unique(steps.device):
        mine = steps.of(steps.device == name)
        formats = {MODELS[model][1] for model in mine.model}
        found[str(name)] = fit(mine, three=is_apple(str(name)) and len(formats) > 1)
    return found


def is_apple(device: str) -> bool:
    """Whether a machine id is one of Apple's."""
    return device not in BANDWIDTH_BYTES_PER_S and load_machine(device).vendor == "Apple"


def _bandwidth(device: str) -> float:
    return load_machine(device).memory_bandwidth_bytes_per_s


@functools.cache
def _step_bytes(model: str, context: int) -> tuple[int, int, int]:
    """(bytes of quantized weights, other bytes, layers) of one decode step at a context."""
    spec = _spec(model)
    step = StepShape.of(new=[1], past=[context - 1], logits=1)
    quantized = other = 0
    for op in build(spec).ops:
        found = count(op, step)
        weights = int(found.weight_read)
        is_codes = not getattr(getattr(op.node, "format", FP16), "is_float", True) and op.kind == "linear"
        quantized += weights if is_codes else 0
        other += int(found.kv_read) + (0 if is_codes else weights)
    return quantized, other, spec.num_hidden_layers


@functools.cache
def _spec(model: str) -> ModelSpec:
    if model not in MODELS:
        raise unknown("llama.cpp model", model, MODELS)
    name, kind = MODELS[model]
    spec = load_spec(name).with_dtype("float16")
    return q4_k_m(spec) if kind == "Q4_K_M" else spec


def _positive_least_squares(a: FloatArray, wanted: FloatArray) -> FloatArray:
    """The x >= 0 that brings a x nearest to `wanted`: the best over every set of columns in use (three at most)."""
    best, best_error = np.zeros(a.shape[1]), float((wanted**2).sum())
    for mask in range(1, 1 << a.shape[1]):
        used = [index for index in range(a.shape[1]) if mask >> index & 1]
        x = np.zeros(a.shape[1])
        x[used] = np.linalg.lstsq(a[:, used], wanted, rcond=None)[0]
        error = float(((a @ x - wanted) ** 2).sum())
        if (x >= 0).all() and error < best_error - 1e-12:
            best, best_error = x, error
    return best
