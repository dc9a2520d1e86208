"""The forward passes of a request: which graph runs, on how many tokens, how often."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.graph.build import build, filter_graph
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Graph, Group, IntArray, Kernel, StepShape, group
from trimtab.graph.shard import shard
from trimtab.spec.machine import Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import LatentAttentionSpec
from trimtab.spec.plan import Plan
from trimtab.spec.workload import Workload

PassPhase = Literal["filter", "prefill", "decode"]


#: Passes of one kind that are priced; more of them are sampled, evenly and symmetrically, so that whatever is linear in the
#: context (and their mean) stays exact.
SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Pass:
    """Passes that run the same graph.

    Args:
        phase: ``filter`` (layers of a token filter over the whole prompt), ``prefill`` or ``decode``.
        graph: its ops.
        step: rows of [..., passes, 1]; `copies` is the batch.
        weight: [..., passes] how many passes each of them stands for.
    """

    phase: PassPhase
    graph: Graph
    step: StepShape
    weight: npt.NDArray[np.float64]

    @property
    def repeat(self) -> int:
        """How many passes."""
        return round(float(self.weight.sum()))


class Graphs:
    """The graphs of one model's passes, each built once, and their kernels, grouped once per set of fusions.

    Args:
        spec: the model, or one device's slice of it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._kernels: dict[tuple[int, frozenset[str]], tuple[Kernel, ...]] = {}
        self._groups: dict[tuple[int, frozenset[str]], tuple[Group, ...]] = {}

    @functools.cached_property
    def prefill(self) -> Graph:
        """A pass over prompt tokens that wants logits."""
        return build(self.spec, "prefill")

    @functools.cached_property
    def headless(self) -> Graph:
        """A pass over prompt tokens that wants none."""
        return build(self.spec, "prefill", head=False)

    @functools.cached_property
    def decode(self) -> Graph:
        """A decode step; the prefill's unless latent attention changes its form."""
        latent = any(isinstance(layer.self_attn, LatentAttentionSpec) for layer in self.spec.layers)
        return build(self.spec, "decode") if latent else self.prefill

    @functools.cached_property
    def filter(self) -> Graph:
        """The pass of a token filter."""
        return filter_graph(self.spec)

    def kernels(self, graph: Graph, stack: Stack) -> tuple[Kernel, ...]:
        """Kernels of one of these graphs on a stack, in order."""
        key = (id(graph), stack.fused)
        if key not in self._kernels:
            self._kernels[key] = fuse(graph, stack)
        return self._kernels[key]

    def groups(self, graph: Graph, stack: Stack) -> tuple[Group, ...]:
        """Kernels of one of these graphs on a stack, equal ones together."""
        key = (id(graph), stack.fused)
        if key not in self._groups:
            self._groups[key] = group(self.kernels(graph, stack))
        return self._groups[key]

    @functools.cached_property
    def weight_nbytes(self) -> int:
        """Resident bytes of all weights."""
        return self.spec.weight_nbytes()


def prompt_held(spec: ModelSpec, prompt: int) -> int:
    """Prompt tokens the decode steps build on: all, or those a token filter keeps."""
    chosen = spec.flow.filter
    return prompt if chosen is None else min(prompt, chosen.topk)


def passes(plan: Plan) -> tuple[Pass, ...]:
    """Return the passes of a plan in order; of tensor-parallel ranks those of one, of pipeline stages those of all."""
    work = plan.workload
    graphs = Graphs(shard(plan.model, plan.parallel))
    return request_passes(graphs, plan.stack, np.asarray(work.batch), work.prompt, work.gen, work.skew)


def request_passes(
    graphs: Graphs, stack: Stack, batch: IntArray, prompt: int, gen: int, skew: float = 0.0
) -> tuple[Pass, ...]:
    """Return the passes of `batch` sequences that start together.

    A token filter that drops something runs first: one pass per prompt, over all of it and without a cache. The prompt (what
    is left of it) is prefilled in passes of `stack.max_batched_tokens` tokens, as many whole prompts or as large a part of
    one as that allows; or in chunks of `stack.prefill_chunk` tokens, all sequences side by side. The last part of a prompt
    wants one row of logits. Then come gen - 1 decode steps.

    Args:
        graphs: of the model, or of one device's slice of it.
        stack: its chunks.
        batch: [...] sequences; one number, or many cases at once.
        prompt, gen: tokens of each.
        skew: of the choice of experts (`StepShape.skew`).
    """
    held = prompt_held(graphs.spec, prompt)
    graph = graphs.prefill
    found = []
    if held < prompt:
        found.append(_pass("filter", graphs.filter, [prompt], [0], prompt, [1], batch[..., None], logits=False))
    budget = stack.max_batched_tokens
    if budget is not None and held <= budget:
        together = budget // held
        copies = np.stack([np.minimum(batch, together), batch % together], -1)
        weight = np.stack([batch // together + (batch < together), (batch % together > 0) & (batch > together)], -1)
        found.append(_pass("prefill", graph, [held] * 2, [0] * 2, held, copies, weight))
    else:
        # One prompt after the other, or all side by side.
        copies, times = (batch, 1) if budget is None else (np.ones_like(batch), batch)
        chunk = stack.prefill_chunk if budget is None else budget
        first, last = chunks(held, chunk)
        if first and chunk:
            at, share = samples(first)
            start = [chunk * index for index in at]
            weight = share * np.broadcast_to(times, batch.shape)[..., None]
            found.append(
                _pass(
                    "prefill", graphs.headless, [chunk] * len(at), start, held, copies[..., None], weight, logits=False
                )
            )
        weight = np.broadcast_to(times, batch.shape)[..., None]
        found.append(_pass("prefill", graph, [last], [held - last], held, copies[..., None], weight))
    if gen > 1:
        at, share = samples(gen - 1)
        past = [held + index for index in at]
        found.append(_pass("decode", graphs.decode, [1] * len(at), past, held, batch[..., None], np.asarray(share)))
    if skew:
        found = [replace(each, step=replace(each.step, skew=skew)) for each in found]
    return tuple(found)


def _pass(
    phase: PassPhase,
    graph: Graph,
    new: list[int],
    past: list[int],
    prompt: int,
    copies: npt.ArrayLike,
    weight: npt.ArrayLike,
    logits: bool = True,
) -> Pass:
    """Passes of equal rows: `copies` and `weight` [..., passes] spread over the last axis."""
    shape = np.broadcast_shapes(np.shape(copies), np.shape(weight), (len(new),))
    many = np.broadcast_to(np.asarray(copies, np.int64), shape)
    rows = np.broadcast_to(np.asarray(new, np.int64), shape)[..., None]
    before = np.broadcast_to(np.asarray(past, np.int64), shape)[..., None]
    step = StepShape.of(rows, before, logits=many if logits else 0, copies=many, prompt=prompt)
    return Pass(phase, graph, step, np.broadcast_to(np.asarray(weight, np.float64), shape))


def samples(count: int) -> tuple[list[int], float]:
    """Return (indices below `count`, passes each stands for): all of them, or `SAMPLES` spread symmetrically.

    >>> samples(3), samples(100)
    (([0, 1, 2], 1.0), ([12, 37, 62, 87], 25.0))
    """
    if count <= SAMPLES:
        return list(range(count)), 1.0
    half = [int((index + 0.5) * count / SAMPLES) for index in range(SAMPLES // 2)]
    return [*half, *(count - 1 - index for index in reversed(half))], count / SAMPLES


def chunks(prompt: int, chunk: int | None) -> tuple[int, int]:
    """Return (full chunks before the last one, tokens of the last one).

    >>> chunks(1100, 512), chunks(512, 512), chunks(100, None)
    ((2, 76), (0, 512), (0, 100))
    """
    if chunk is None or prompt <= chunk:
        return 0, prompt
    first = (prompt - 1) // chunk
    return first, prompt - first * chunk


def mean_decode_step(spec: ModelSpec, workload: Workload) -> StepShape:
    """The decode step at mean context: one new token per sequence after the prompt held and half of what is generated."""
    held = prompt_held(spec, workload.prompt)
    past = held + workload.mean_past - workload.prompt
    return StepShape.of([1], [past], logits=workload.batch, copies=workload.batch, skew=workload.skew, prompt=held)
