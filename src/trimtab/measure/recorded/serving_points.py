"""Recorded serving points, TTFT and TPOT of whole servers: their plans, their prediction, and what a fit needs of them.

A point is a closed loop of requests of fixed lengths on one engine. The engine's stack has ten fitted numbers: factors on
products, attention, experts and collectives, what a captured graph saves per kernel, host time per pass and per sequence, the
interference of prefills, the queue of prefills, and host time before a request's first pass. None belongs to a model or a
machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.graph.passes import Graphs, Pass
from trimtab.graph.shard import shard
from trimtab.measure.recorded.tables import Columns
from trimtab.predict.memory import Footprint
from trimtab.predict.price import Times, factor_of, main_op
from trimtab.predict.request import Requests
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import FACTORS, GRAPH_SHARE, Stack, load_machine, load_stack
from trimtab.spec.parallel import Parallel

Array = npt.NDArray[np.float64]

MODELS = {
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
MACHINES = {"h100_sxm": "h100", "h200_sxm": "h200"}

#: Precision of a row -> weights. The cache is fp8 where the engine quantizes it with fp8 weights (rows say nothing of it; with
#: 16-bit caches TensorRT-LLM would err twice as much), else 16-bit, as vLLM and SGLang do unless asked.
WEIGHTS = {"fp8": "fp8", "fp4": "mxfp4"}
FP8_CACHE = frozenset({"trtllm"})

#: Models without experts, on which an engine's constants are fitted; the factor on experts then comes from the others.
DENSE = frozenset({"llama-3.1-70b", "llama-3.1-8b", "qwen3-32b"})

#: Fitted constants of an engine by name (`_BOUNDS`).
Constants = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Points that differ in nothing but the number of requests.

    Args:
        rows: their row numbers in the table.
        concurrency: [rows] requests at any time.
    """

    model: str
    machine: str
    engine: str
    weights: str
    kv: str
    parallel: Parallel
    prompt: int
    gen: int
    rows: npt.NDArray[np.int64]
    concurrency: npt.NDArray[np.int64]


def points(columns: Columns, without: npt.NDArray[np.bool_] | None = None) -> Iterator[Point]:
    """Group the rows of the table into points; rows without a concurrency or over more than one node are left out.

    Args:
        columns: the table.
        without: [rows] those left out as well.
    """
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in range(len(columns["model_path"])):
        key = None if without is not None and without[row] else _key(columns, row)
        if key is not None:
            found.setdefault(key, []).append(row)
    for (model, machine, engine, weights, kv, tp, dp, ep, prompt, gen), rows in found.items():
        yield Point(
            model=model, machine=machine, engine=engine, weights=weights, kv=kv,
            parallel=Parallel(tp=tp, dp=dp, ep=ep), prompt=prompt, gen=gen, rows=np.asarray(rows),
            concurrency=np.asarray([int(columns["concurrency"][row]) for row in rows]),
        )  # fmt: skip


def _key(columns: Columns, row: int) -> tuple[Any, ...] | None:
    number = {
        name: float(columns[name][row]) if str(columns[name][row]) not in ("", "nan") else 0.0
        for name in ("concurrency", "tp_size", "moe_tp_size", "moe_ep_size", "isl", "osl")
    }
    tp, ep = int(number["tp_size"]), max(int(number["moe_ep_size"]), 1)
    devices = max(tp, int(number["moe_tp_size"]) * ep)
    if not number["concurrency"] or devices > 8:
        return None
    model, engine = MODELS[str(columns["model_path"][row])], str(columns["backend"][row])
    precision = str(columns["precision"][row])
    dp = devices // tp
    if model in DENSE:
        dp, ep = 1, 1
    elif dp > 1:  # experts cut over replicas move and read what experts spread over them would
        ep = devices
    own_scales = str(columns["model_path"][row]).startswith("nvidia/")  # such checkpoints bring scales for an fp8 cache
    kv = "fp8" if precision == "fp8" and (engine in FP8_CACHE or own_scales) else "bfloat16"
    return (
        model, MACHINES[str(columns["system"][row])], engine, WEIGHTS[precision], kv, tp, dp, min(ep, devices),
        int(number["isl"]), int(number["osl"]),
    )  # fmt: skip


class Features:
    """What the fit needs of every row: each kernel's seconds alone, and numbers of passes, layers and sequences.

    Args:
        columns: the table.
        stack: whose kernels are used; its overheads and factors are left out.
        engine: whose rows.
        models: whose rows; None = all.
        without: [table rows] those left out.
    """

    def __init__(
        self,
        columns: Columns,
        stack: Stack,
        engine: str,
        models: frozenset[str] | None = None,
        without: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        plain = without_overheads(stack)
        parts: list[tuple[Point, _Kernels, _Kernels, Any, Any, float, int]] = []
        graphs: dict[Any, Graphs] = {}
        for point in points(columns, without):
            if point.engine == engine and (models is None or point.model in models):
                requests = requests_of(point, plain, graphs)
                share = -(-point.concurrency // point.parallel.dp)
                running = requests.running(
                    share, requests.footprint.at_batches(point.concurrency, point.prompt, point.gen)
                )
                prefill = requests.timed(np.asarray(1), None)
                count = sum(float(each.weight.sum()) for each, _ in prefill)
                decode = _Kernels.of(requests.timed(None, running), len(point.rows), 1 / (point.gen - 1))
                before = _Kernels.of(prefill, len(point.rows), 1.0)
                parts.append((point, decode, before, running, share / running, count, len(requests.graphs.spec.layers)))
        self.rows = np.concatenate([p.rows for p, *_ in parts])
        self.point = np.concatenate([np.full(len(part[0].rows), i) for i, part in enumerate(parts)])
        self.models = [p.model for p, *_ in parts for _ in p.rows]
        self.decode = _Kernels.join([part[1] for part in parts])
        self.prefill = _Kernels.join([part[2] for part in parts])
        self.running = np.concatenate([part[3] for part in parts]).astype(float)
        self.crowd = np.concatenate([part[4] for part in parts])
        self.passes, self.layers, self.gen = (
            np.concatenate([np.full(len(p.rows), value, float) for p, value in pairs])
            for pairs in (
                [(part[0], part[5]) for part in parts],
                [(part[0], part[6]) for part in parts],
                [(part[0], part[0].gen) for part in parts],
            )
        )
        self.ttft_s = np.asarray(columns["silicon_ttft_ms"], float)[self.rows] / 1e3
        self.tpot_s = np.asarray(columns["silicon_tpot_ms"], float)[self.rows] / 1e3

    def step_and_prefill(self, c: Constants) -> tuple[Array, Array]:
        """Seconds of a decode step and of the prompt passes of every row; the arithmetic of `predict.request`."""
        step = self.decode.seconds(c) + self._host(c, self.running)
        prefill = self.prefill.seconds(c) + self.passes * self._host(c, np.ones_like(self.running))
        return step, prefill

    def tpot(self, c: Constants) -> Array:
        """TPOT of every row; the arithmetic of `predict.serving`."""
        step, prefill = self.step_and_prefill(c)
        return step + c["interference"] * prefill * (self.running - 1) / self.gen

    def ttft(self, c: Constants) -> Array:
        """TTFT of every row; likewise."""
        step, prefill = self.step_and_prefill(c)
        ttft = (prefill + c["overhead_per_prefill_s"]) * (1 + c["queue"] * (self.running - 1)) + step / 2
        tpot = step + c["interference"] * prefill * (self.running - 1) / self.gen
        return ttft + (self.crowd - 1) * (ttft + (self.gen - 1) * tpot)

    @property
    def dense(self) -> npt.NDArray[np.bool_]:
        """[rows] of models without experts."""
        return np.isin(self.models, list(DENSE))

    def _host(self, c: Constants, sequences: Array) -> Array:
        return c["overhead_per_step_s"] + c["overhead_per_sequence_s"] * sequences


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Kernels of rows, each padded to the same number: how often they run, seconds of one, and index of their factor."""

    times: Array
    seconds_alone: Array
    factor: npt.NDArray[np.int64]

    @staticmethod
    def of(done: Sequence[tuple[Pass, Times]], rows: int, share: float) -> _Kernels:
        times, seconds, factor = [], [], []
        for each, priced in done:
            weight = np.broadcast_to(each.weight, (rows, each.weight.shape[-1]))
            for kernel in priced.kernels:
                name = factor_of(main_op(kernel.group.kernel))
                times.append(kernel.times * share * weight)
                seconds.append(np.broadcast_to(kernel.time_s, weight.shape))
                factor.append(np.full(weight.shape, FACTORS.index(name) if name in FACTORS else len(FACTORS)))
        return _Kernels(*(np.concatenate(parts, -1) for parts in (times, seconds, factor)))

    @staticmethod
    def join(parts: Sequence[_Kernels]) -> _Kernels:
        width = max(part.times.shape[-1] for part in parts)

        def padded(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[-1]))) for a in arrays])

        return _Kernels(padded("times"), padded("seconds_alone"), padded("factor"))

    def seconds(self, c: Constants) -> Array:
        """Seconds of all of them inside the engine; the arithmetic of `predict.price`."""
        factors = np.array([*(c[name] for name in FACTORS), 1.0])
        time = factors[self.factor] * self.seconds_alone
        time = time - np.minimum(c["graph_saving_s"], GRAPH_SHARE * time)
        return (self.times * time).sum(-1)


def without_overheads(stack: Stack) -> Stack:
    """The stack with its kernels alone."""
    return replace(
        stack, factors={}, graph_saving_s=0.0, overhead_per_step_s=0.0, overhead_per_layer_s=0.0,
        overhead_per_sequence_s=0.0, overhead_per_prefill_s=0.0, serving=replace(stack.serving, interference=0.0, queue=0.0),
    )  # fmt: skip


def with_constants(stack: Stack, c: Constants) -> Stack:
    """The stack with fitted constants put in."""
    return replace(
        without_overheads(stack),
        factors={name: c[name] for name in FACTORS},
        graph_saving_s=c["graph_saving_s"],
        overhead_per_step_s=c["overhead_per_step_s"],
        overhead_per_sequence_s=c["overhead_per_sequence_s"],
        overhead_per_prefill_s=c["overhead_per_prefill_s"],
        serving=replace(stack.serving, interference=c["interference"], queue=c["queue"]),
    )


def requests_of(point: Point, stack: Stack, graphs: dict[Any, Graphs]) -> Requests:
    """The requests of a point on a stack; `graphs` keeps slices that several points share."""
    key = (point.model, point.weights, point.kv, point.parallel)
    if key not in graphs:
        spec = load_spec(point.model).with_dtype(point.weights, point.kv)
        graphs[key] = Graphs(shard(spec, point.parallel))
    machine = load_machine(point.machine)
    fitted = stack.on(machine)
    footprint = Footprint(graphs[key], fitted, point.parallel)
    return Requests(
        graphs[key], machine, fitted, point.parallel,
        prompt=point.prompt, gen=point.gen, concurrent=True, footprint=footprint,
    )  # fmt: skip


def predict_points(
    columns: Columns, stacks: dict[str, Stack], rows: Sequence[int] | None = None
) -> tuple[Array, Array]:
    """Predict (TTFT, TPOT) of every row in seconds; nan where a row is left out.

    Args:
        columns: the table.
        stacks: engine name -> its stack.
        rows: those wanted; None = all.
    """
    ttft, tpot = (np.full(len(columns["model_path"]), np.nan) for _ in range(2))
    graphs: dict[Any, Graphs] = {}
    wanted = None if rows is None else set(map(int, rows))
    for point in points(columns):
        if point.engine not in stacks or (wanted is not None and not wanted.intersection(point.rows.tolist())):
            continue
        costs = requests_of(point, stacks[point.engine], graphs).costs(point.concurrency)
        ttft[point.rows], tpot[point.rows] = costs.ttft_s, costs.tpot_s
    return ttft, tpot


def impossible(columns: Columns) -> npt.NDArray[np.bool_]:
    """Rows that took less time than the prompts and tokens they name need on perfect hardware, by more than 2 %.

    In the time of one request its device has to do the prefill of all requests and every step. Such rows contradict their own
    description (a prefix cache answered, most likely): they are counted and shown, and nothing is fitted to them.
    """
    found = np.zeros(len(columns["model_path"]), bool)
    ttft, tpot = (np.asarray(columns[name], float) / 1e3 for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
    ideal, graphs = load_stack("ideal"), {}
    for point in points(columns):
        # Whatever the cache was held in, its bytes are not what makes a row impossible.
        requests = requests_of(replace(point, kv="fp8" if point.weights == "fp8" else point.kv), ideal, graphs)
        share = -(-point.concurrency // point.parallel.dp)
        step = sum((times.time_s * each.weight).sum(-1) for each, times in requests.timed(None, share)) / (
            point.gen - 1
        )
        need = share * requests.prefill_s() + point.gen * step
        found[point.rows] = need > _IMPOSSIBLE * (ttft[point.rows] + (point.gen - 1) * tpot[point.rows])
    return found


#: A measurement may be this much faster than the datasheet allows before it is called impossible.
_IMPOSSIBLE = 1.02
