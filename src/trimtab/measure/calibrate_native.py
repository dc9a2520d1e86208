"""Fit the stack of the native program to this machine: every kernel of decoders in all widths, timed inside the program."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from trimtab.graph.build import build
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import StepShape
from trimtab.measure.fit_classes import Sample, fit_classes, predicted_s
from trimtab.predict.price import GEMV_ROWS, class_of, main_op, price, variants_of
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.native import NativeProgram, lower, lowered_spec
from trimtab.runtime.numerics.tiles import tiled_format
from trimtab.runtime.step import Recorder, Step
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed, Weights
from trimtab.spec import tree
from trimtab.spec.configs import spec_from_config
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.machine import NATIVE, Efficiency, Machine, Stack
from trimtab.spec.model import ModelSpec
from trimtab.units import MIB

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]

#: Formats of the decoders that are timed, with the cache each runs over.
_FORMATS = (
    (WeightFormat(kind="fp32"), "float32"),
    (WeightFormat(kind="bf16"), "bfloat16"),
    (WeightFormat(kind="int", bits=8, group=128), "float32"),
    (WeightFormat(kind="int", bits=4, group=128), "bfloat16"),
    (WeightFormat(kind="int", bits=3, group=128), "float32"),
    (WeightFormat(kind="int", bits=2, group=128), "float32"),
)
_HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _VOCABULARY = 1024, 2816, 16, 4, 8192
#: Weights of a decoder: well above a last-level cache, so that every step reads them from memory.
_BYTES = 96 * MIB
_PREFILL, _PAST = (32, 256), (32, 512, 4000)
_REPEATS = 7
_CHUNK = 512


def calibrate_native(machine: Machine, table: Mapping[int, float], progress: Progress) -> Stack:
    """Time decoders of random weights in the native program and fit its constants.

    Args:
        machine: as `calibrate` measured it.
        table: bytes/s by working set, from there.
        progress: shows how far it got.
    """
    unit = Stack(
        name=NATIVE,
        attention="tiled",
        op_classes={
            name: Efficiency(compute_efficiency=1.0, bandwidth_efficiency=1.0, launch_s=1.0)
            for name in ("gemm", "gemv", "attention", "elementwise", "embedding")
        },
        bandwidth_by_working_set=tuple((float(size), rate) for size, rate in table.items()),
        fused=frozenset({"native"}),
        prefill_chunk=_CHUNK,
    )
    samples: list[Sample] = []
    passes: list[tuple[list[Sample], float]] = []
    for form, kv_dtype in progress("native kernels", _FORMATS):
        for found, wall in _time(form, kv_dtype, machine, unit):
            samples += found
            passes.append((found, wall))
    classes = fit_classes(samples)
    overhead = max(float(np.median([wall - sum(s.time_s for s in found) for found, wall in passes])), 0.0)
    ratios = [wall / (sum(predicted_s(classes[s.key], s) for s in found) + overhead) for found, wall in passes]
    p10, p50, p90 = (float(np.quantile(ratios, q)) for q in (0.1, 0.5, 0.9))
    plain = {
        name: classes[f"{name}.fp32"] for name in ("gemm", "gemv", "attention_decode", "attention_prefill", "embedding")
    }
    return Stack(
        name=NATIVE,
        description="Native program of Trimtab on this machine, fitted by `trimtab calibrate`.",
        attention="tiled",
        op_classes={**plain, "attention": plain["attention_decode"], "elementwise": plain["gemv"], **classes},
        bandwidth_by_working_set=unit.bandwidth_by_working_set,
        fused=unit.fused,
        prefill_chunk=_CHUNK,
        overhead_per_step_s=overhead,
        band=(min(p10, 1.0), max(p90, 1.0)),
        kind="calibrated",
        source=f"{len(samples)} kernels of {len(passes)} passes timed on this machine; whole passes: measured over predicted "
        f"P10 {p10:.2f}, P50 {p50:.2f}, P90 {p90:.2f}",
    )


def _time(form: WeightFormat, kv_dtype: str, machine: Machine, unit: Stack) -> Iterator[tuple[list[Sample], float]]:
    """Yield the kernels of each pass as samples, and its wall time; medians of a few repeats."""
    program = random_program(form, kv_dtype)
    rng = np.random.default_rng(0)

    def prefill(tokens: int) -> Callable[[], None]:
        ids = rng.integers(0, _VOCABULARY, tokens)

        def run() -> None:
            session = Session(program, chunk=_CHUNK)
            session.record = Recorder()
            session.prefill([ids])
            session.close()

        return run

    for tokens in _PREFILL:
        yield _measure(program, prefill(tokens), StepShape.of([tokens], [0], logits=1), machine, unit, 2)
    for past in _PAST:
        session = Session(program, chunk=_CHUNK)
        session.prefill([[7]], reserve=past + _REPEATS + 4)
        skip(session, past - 1)
        session.record = Recorder()
        middle = StepShape.of([1], [past + _REPEATS // 2], logits=1)
        yield _measure(program, lambda session=session: session.decode([7]), middle, machine, unit, _REPEATS)
        session.close()


def skip(session: Session, tokens: int) -> None:
    """Let a sequence be `tokens` longer without computing them: what its cache holds does not change the time of a step."""
    step = Step.of([tokens], session.lengths, session.seqs)
    session.store.place(step)
    session.store.settle(step)
    session.lengths = [session.lengths[0] + tokens]


def _measure(
    program: NativeProgram, run: Callable[[], Any], step: StepShape, machine: Machine, unit: Stack, repeats: int
) -> tuple[list[Sample], float]:
    run()
    walls, seconds = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        walls.append(time.perf_counter() - start)
        seconds.append([taken for *_, taken in program.metered()])
    by_name = dict(zip((name for name, *_ in program.metered()), np.median(seconds, axis=0), strict=True))
    found = []
    for priced in price(fuse(build(program.spec), unit), step, machine, unit).kernels:
        parts = (priced.compute_s, priced.memory_s, priced.launch_s)
        compute, memory, launches = (float(part) for part in parts)
        key = _key(main_op(priced.group.kernel), step)
        # Kernels alike in size differ by chance alone: their mean stands for each.
        mean = float(np.mean([by_name[name] for name in priced.group.names]))
        found += [Sample(key, compute, memory, launches, mean)] * len(priced.group.names)
    return found, float(np.median(walls))


def _key(op: Any, step: StepShape) -> str:
    name = class_of(op, step)
    if name == "gemm" and step.rows(op.writes[0].rows) <= GEMV_ROWS:
        name = "gemv"
    return f"{name}.{variants_of(op)[0]}"


def random_program(form: WeightFormat, kv_dtype: str = "float32", layers: int = 0) -> NativeProgram:
    """The native program of a Llama shape whose random matrices in `form` are larger than a last-level cache.

    Args:
        form: of every matrix, the embedding aside.
        kv_dtype: of the cache.
        layers: 0 = as many as make the size.
    """
    config = {
        "model_type": "llama", "hidden_size": _HIDDEN, "intermediate_size": _INTERMEDIATE, "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS, "head_dim": _HIDDEN // _HEADS, "num_hidden_layers": 1, "vocab_size": _VOCABULARY,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    one = spec_from_config(config, "calibration").with_dtype("float32", kv_dtype)
    per_layer = sum(form.nbytes(node.n, node.k) for path, node in one.linears() if path != "lm_head")
    config["num_hidden_layers"] = layers or -(-_BYTES // per_layer)
    spec = spec_from_config(config, "calibration").with_dtype("float32", kv_dtype)
    spec = spec.edit([tree.Edit(path, "format", form) for path, _ in spec.linears()], by="calibrate")
    return lower(spec, random_tiles(lowered_spec(spec)))


def random_tiles(spec: ModelSpec, seed: int = 0) -> Weights:
    """Weights of a lowered spec without a detour over floats: random codes, scales that keep activations near 1."""
    rng = np.random.default_rng(seed)
    items: dict[str, Packed] = {}
    for path, node in tree.walk(spec):
        if isinstance(node, NormSpec):
            items[path] = Packed(node.format, (1, node.size), {"data": np.ones((1, node.size), np.float32)})
        elif isinstance(node, LinearSpec | EmbeddingSpec):
            items[path] = _random_matrix(node, rng)
    return Weights(items)


def _random_matrix(node: LinearSpec | EmbeddingSpec, rng: np.random.Generator) -> Packed:
    format = tiled_format(node.format, node.k)
    spread = 1 / np.sqrt(node.k)
    buffers: dict[str, np.ndarray] = {}
    for buffer in format.buffers(node.n, node.k):
        dtype = NUMPY_DTYPES[buffer.dtype]
        if buffer.dtype == "u8":
            made = np.frombuffer(rng.bytes(buffer.nbytes), np.uint8)
        elif buffer.dtype == "bf16":
            made = rng.choice(np.array([0x3C80, 0xBC80], np.uint16), int(np.prod(buffer.shape)))
        elif format.is_float:
            made = rng.standard_normal(int(np.prod(buffer.shape)), np.float32).astype(dtype) * dtype.type(spread)
        else:
            made = np.full(int(np.prod(buffer.shape)), spread / 2 ** (format.bits - 1), dtype)
        buffers[buffer.name] = made.reshape(buffer.shape)
    return Packed(format, (node.n, node.k), buffers)
