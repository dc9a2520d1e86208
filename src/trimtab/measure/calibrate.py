"""Fit a Stack to this machine: bandwidth by working set, peaks, then every op of two small decoders, timed one by one.

The decoders have random weights and shapes of their own, larger together than the last-level cache, so that what is fitted
is how this software runs on this machine, not how one model does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.graph.build import build
from trimtab.graph.ops import Kernel, StepShape
from trimtab.measure.calibrate_native import calibrate_native
from trimtab.measure.fit_classes import Sample, fit_classes, predicted_s
from trimtab.model.tensors import linear
from trimtab.model.variant import Model, Variant
from trimtab.predict.price import GEMV_ROWS, op_class, price
from trimtab.runtime.files import write_atomically
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.configs import spec_from_config
from trimtab.spec.formats import WeightFormat
from trimtab.spec.machine import THIS, Efficiency, Machine, Stack, this_machine_path
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import GateFirst
from trimtab.spec.tree import Edit
from trimtab.units import MIB

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]

#: Working sets whose read bandwidth is measured.
_SETS = tuple(MIB << power for power in range(10))
#: (hidden, intermediate, heads, KV heads, layers, vocabulary) of the decoders that are timed.
_SHAPES = ((640, 1728, 10, 2, 10, 16384), (1152, 3072, 18, 6, 3, 8192))
#: New tokens of the prefill passes and past tokens of the decode passes.
_PREFILL, _PAST = (32, 128, 512), (32, 256, 1024)
_REPEATS = 4
_CHUNK = 512
_UNIT = Efficiency(compute_efficiency=1.0, bandwidth_efficiency=1.0, launch_s=1.0)


@dataclass(slots=True)
class Timer(Recorder):
    """A recorder that also keeps the seconds between one op and the next."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = 0.0

    def op(self, name: str, **counts: int) -> None:
        """Add one call and the time since the call before it."""
        now = time.perf_counter()
        Recorder.op(self, name, **counts)
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = time.perf_counter()


@dataclass(frozen=True, slots=True)
class ThreadRate:
    """Rates at a number of threads: fp32 products in FLOP/s and reads of a large working set in bytes/s."""

    threads: int
    gemm_flops_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was found.

    Args:
        machine, stack, native: as `load_machine("this")`, `load_stack("this")` and `load_stack("native")` will give them.
        threads: what one thread, two, four, ... up to all of them reach.
        residuals: P10, P50 and P90 of measured over predicted time of whole passes.
        time_s: what it took.
    """

    machine: Machine
    stack: Stack
    native: Stack
    threads: tuple[ThreadRate, ...]
    residuals: tuple[float, float, float]
    time_s: float


def calibrate(path: Path | None = None, *, progress: Progress | None = None) -> Calibration:
    """Measure this machine and write what was found.

    Args:
        path: of the TOML file; default: where ``this`` is read from.
        progress: shows how far it got.
    """
    progress = progress or (lambda label, items: iter(items))
    start = time.perf_counter()
    table = [(size, read_bandwidth(size)) for size in progress("bandwidth by working set", _SETS)]
    machine = _machine(table)
    threads = thread_scaling()
    unit = Stack(
        name="unit",
        attention="eager",
        op_classes=dict.fromkeys(("gemm", "gemv", "attention", "elementwise", "embedding"), _UNIT),
        bandwidth_by_working_set=tuple((float(a), b) for a, b in table),
    )
    samples: list[Sample] = []
    passes: list[tuple[list[Sample], float]] = []
    jobs = [(shape, dtype, packed) for shape in _SHAPES for dtype in ("fp32", "bf16") for packed in (False, True)]
    for shape, dtype, packed in progress("decoder ops", jobs):
        if packed and dtype == "bf16":
            continue  # packed weights compute in fp32 either way
        for found, wall in _time_decoder(shape, dtype, packed, machine, unit):
            samples += found
            passes.append((found, wall))
    classes = fit_classes(samples)
    for _ in progress("skipped rows", [None]):
        classes["gathered"] = fit_gathered(classes, machine, unit)
    overhead = float(np.median([wall - sum(s.time_s for s in found) for found, wall in passes]))
    predicted = [sum(predicted_s(classes[s.key], s) for s in found) + overhead for found, _ in passes]
    ratios = np.array([wall for _, wall in passes]) / np.array(predicted)
    p10, p50, p90 = (float(np.quantile(ratios, q)) for q in (0.1, 0.5, 0.9))
    stack = dataclasses.replace(
        unit,
        name="this",
        description="Torch decoder and C++ kernels of Trimtab on this machine, fitted by `trimtab calibrate`.",
        op_classes=_with_defaults(classes),
        prefill_chunk=_CHUNK,
        overhead_per_step_s=max(overhead, 0.0),
        band=(min(p10, 1.0), max(p90, 1.0)),
        kind="calibrated",
        source=f"{len(samples)} ops of {len(passes)} passes timed on this machine, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; whole passes: measured over predicted P10 {p10:.2f}, P50 {p50:.2f}, P90 {p90:.2f}",
    )
    native = calibrate_native(machine, dict(table), progress)
    write_atomically(path or this_machine_path(), to_toml(machine, (stack, native), threads))
    return Calibration(
        machine=machine,
        stack=stack,
        native=native,
        threads=threads,
        residuals=(p10, p50, p90),
        time_s=time.perf_counter() - start,
    )


# ------------------------------------------------------------------------------------------------------- machine


def read_bandwidth(nbytes: int) -> float:
    """Bytes per second at which all threads read a working set of `nbytes`: best of several sums over it."""
    data = torch.ones(nbytes // 4)
    budget, best = time.perf_counter() + 0.15, 0.0
    for _ in range(200):
        start = time.perf_counter()
        data.sum()
        best = max(best, nbytes / (time.perf_counter() - start))
        if time.perf_counter() > budget:
            break
    return best


def peak_flops_per_s(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product as the decoder's linears run it: best of several."""
    size = 1024
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        linear(a, b, None)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def thread_scaling() -> tuple[ThreadRate, ...]:
    """Measure one thread, two, four, ... and all of them; the number of threads is put back afterwards."""
    most = torch.get_num_threads()
    counts = sorted({*(1 << power for power in range(most.bit_length()) if 1 << power < most), most})
    found = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(ThreadRate(count, peak_flops_per_s(torch.float32), read_bandwidth(256 * MIB)))
    finally:
        torch.set_num_threads(most)
    return tuple(found)


def _machine(table: Sequence[tuple[int, float]]) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        id="this",
        name=f"this machine ({_processor()}, {torch.get_num_threads()} threads)",
        vendor="this machine",
        kind="cpu",
        year=time.localtime().tm_year,
        flops_per_s={"fp32": peak_flops_per_s(torch.float32), "bf16": peak_flops_per_s(torch.bfloat16)},
        memory_bytes=memory,
        memory_type="RAM",
        memory_bandwidth_bytes_per_s=table[-1][1],
        cores=os.cpu_count(),
        source="measured by `trimtab calibrate`",
        confidence="measured",
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------------------- decoder


def _spec(shape: tuple[int, ...], dtype: str, packed: bool) -> ModelSpec:
    hidden, intermediate, heads, kv_heads, layers, vocabulary = shape
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "num_hidden_layers": layers,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }  # fmt: skip
    spec = spec_from_config(config, "calibration").with_dtype(dtype)
    if not packed:
        return spec
    form = WeightFormat(kind="int", bits=4, group=32)
    return spec.edit([Edit(p, "format", form) for p, _ in spec.linears() if p.startswith("layers.")], by="calibrate")


def _time_decoder(
    shape: tuple[int, ...], dtype: str, packed: bool, machine: Machine, unit: Stack
) -> Iterator[tuple[list[Sample], float]]:
    """Yield for each pass its ops as samples and its wall time; the fastest of a few repeats stands."""
    spec = _spec(shape, dtype, packed)
    model = Model(Variant(spec, random_weights(spec)))
    rng = np.random.default_rng(0)
    for tokens in _PREFILL:
        ids = rng.integers(0, spec.vocab_size, tokens)

        def prefill(ids: np.ndarray = ids) -> Timer:
            session = model.session(chunk=_CHUNK)
            session.record = timer = Timer()
            timer.last = time.perf_counter()
            session.prefill([ids], reserve=1)
            return timer

        yield _samples(spec, StepShape.of([tokens], [0], logits=1), *_best(prefill), machine, unit)
    for past in _PAST:
        session = model.session(chunk=_CHUNK)
        session.prefill([rng.integers(0, spec.vocab_size, past)], reserve=2 * _REPEATS + 4)

        def decode(session: Any = session) -> Timer:
            session.record = timer = Timer()
            timer.last = time.perf_counter()
            session.decode([7])
            return timer

        yield _samples(spec, StepShape.of([1], [past + 2], logits=1), *_best(decode, 2 * _REPEATS), machine, unit)


def fit_gathered(classes: Mapping[str, Efficiency], machine: Machine, unit: Stack) -> Efficiency:
    """Bandwidth efficiency of rows picked by a gate, from decode steps of a gate-first decoder.

    One kernel runs the whole block: what it takes beyond the dense gate is set against the bytes of the rows it touched.
    """
    base = _spec(_SHAPES[1], "fp32", packed=False)
    edits = [Edit("layers.*.mlp", "executor", GateFirst(0.5)), Edit("layers.*.mlp.down_proj", "layout", "transposed")]
    spec = base.edit(edits, by="calibrate")
    model = Model(Variant(spec, random_weights(spec)))
    shares = []
    session = model.session(chunk=_CHUNK)
    session.prefill([np.arange(16)], reserve=16)
    for repeat in range(8):
        session.record = timer = Timer()
        timer.last = time.perf_counter()
        session.decode([repeat])
        step = StepShape.of([1], [16 + repeat], logits=1, observed=timer.observed)
        kernels = [Kernel((op,), op.reads, op.writes, False) for op in build(spec).ops]
        priced = {name: each for each in price(kernels, step, machine, unit).kernels for name in each.group.names}
        for index in range(len(spec.layers)):
            block = f"layers.{index}.mlp"
            gate = priced[f"{block}.gate_proj"]
            dense = float(gate.memory_s) / classes["gemv.fp32"].bandwidth_efficiency + classes["gemv.fp32"].launch_s
            taken = sum(timer.seconds[f"{block}.{name}"] for name in ("gate_proj", "act", "up_proj", "down_proj"))
            rows = sum(float(priced[f"{block}.{name}"].memory_s) for name in ("up_proj", "down_proj"))
            shares.append(rows / max(taken - dense, rows / 4))
    return Efficiency(
        compute_efficiency=classes["gemv.fp32"].compute_efficiency,
        bandwidth_efficiency=float(np.median(shares[len(spec.layers) :])),  # the first step warms up
        launch_s=1e-7,
    )


def _best(run: Callable[[], Timer], repeats: int = _REPEATS) -> tuple[Timer, float]:
    """One warm-up, then the fastest of a few runs: what else the machine does only ever adds time."""
    run()
    found: list[tuple[float, Timer]] = []
    for _ in range(repeats):
        start = time.perf_counter()
        timer = run()
        found.append((time.perf_counter() - start, timer))
    wall, timer = min(found, key=lambda pair: pair[0])
    return timer, wall


def _samples(
    spec: ModelSpec, step: StepShape, timer: Timer, wall: float, machine: Machine, unit: Stack
) -> tuple[list[Sample], float]:
    found = []
    kernels = [Kernel((op,), op.reads, op.writes, False) for op in build(spec).ops]
    for priced in price(kernels, step, machine, unit).kernels:
        op = priced.group.kernel.ops[0]
        for name in priced.group.names:
            key = class_key(op, int(step.rows(op.writes[0].rows)) if op.writes else 1)
            compute, memory, launches = (float(part) for part in (priced.compute_s, priced.memory_s, priced.launch_s))
            found.append(Sample(key, compute, memory, launches, timer.seconds[name]))
    return found, wall


def class_key(op: Any, rows: int) -> str:
    """Key of the constants that price an op: ``gemm.bf16``, ``gemv.int``, ``attention.fp32``, ..."""
    name = op_class(op)
    if name == "linear":
        name = "gemv" if rows <= GEMV_ROWS else "gemm"
        kind = getattr(getattr(op.node, "format", None), "kind", op.dtype)
        return f"{name}.{kind}"
    return f"{name}.{op.dtype}"


def _with_defaults(classes: Mapping[str, Efficiency]) -> dict[str, Efficiency]:
    """Add the plain class names, which price dtypes that were not timed: those of fp32."""
    plain = {name: classes[f"{name}.fp32"] for name in ("gemm", "gemv", "attention", "elementwise", "embedding")}
    return {**plain, **classes}


# ----------------------------------------------------------------------------------------------------------- file


def to_toml(machine: Machine, stacks: Sequence[Stack], threads: Sequence[ThreadRate] = ()) -> str:
    """Write machine and stacks as the TOML that `spec.machine` reads, and the thread scaling for people."""
    lines = ["# Written by `trimtab calibrate`. Run it again after the machine or Trimtab changed.", "", "[machine]"]
    lines += [f"{name} = {_value(value)}" for name, value in dataclasses.asdict(machine).items() if _written(value)]
    for stack in stacks:
        table = "stack" if stack.name == THIS else stack.name
        lines += ["", f"[{table}]"]
        for name in ("description", "attention", "prefill_chunk", "overhead_per_step_s", "kind", "source"):
            lines.append(f"{name} = {_value(getattr(stack, name))}")
        lines.append(f"fused = {_value(sorted(stack.fused))}")
        lines.append(f"bandwidth_by_working_set = {_value([list(pair) for pair in stack.bandwidth_by_working_set])}")
        lines += ["", f"[{table}.band]", f"p10 = {stack.band[0]!r}", f"p90 = {stack.band[1]!r}"]
        for name, constants in stack.op_classes.items():
            lines += ["", f'[{table}.op_class."{name}"]']
            lines += [
                f"{key} = {_value(value)}" for key, value in dataclasses.asdict(constants).items() if _written(value)
            ]
    for rate in threads:
        lines += ["", "[[threads]]"]
        lines += [f"{key} = {value!r}" for key, value in dataclasses.asdict(rate).items()]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> bool:
    """Whether a value says more than that there is none."""
    return value is not None and value != () and value != {} and value != ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
