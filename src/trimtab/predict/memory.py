"""Bytes: weights, cache, live activations and the engine's reserve against the machine's capacity."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from trimtab.graph.build import build, filter_graph
from trimtab.graph.count import scratch_bytes
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Kernel, Op, StepShape
from trimtab.graph.passes import chunks, prompt_held
from trimtab.spec.machine import Stack
from trimtab.spec.nodes import ModelSpec
from trimtab.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Live:
    """Activations alive while one kernel runs: bytes per row of each kind, and the ops whose scratch comes on top."""

    tokens: int
    logits: int
    keys: int
    scratch: tuple[Op, ...]

    def nbytes(self, step: StepShape, attention: str) -> int:
        """Bytes in the largest of the passes."""
        held = self.tokens * step.tokens + self.logits * step.logits + self.keys * step.keys
        held = held + sum(scratch_bytes(op, step, attention) for op in self.scratch)
        return int(np.max(held))


def live(kernels: Iterable[Kernel]) -> tuple[Live, ...]:
    """Return the distinct live sets of a pass: a value lives from the kernel that writes it to the last that reads it."""
    order = tuple(kernels)
    last = {value: index for index, kernel in enumerate(order) for value in (*kernel.writes, *kernel.reads)}
    ends: dict[int, list] = {}
    for value, index in last.items():
        ends.setdefault(index, []).append(value)
    held = {"tokens": 0, "logits": 0, "keys": 0}
    found: dict[tuple, Live] = {}
    for index, kernel in enumerate(order):
        for value in kernel.writes:
            held[value.rows] += value.row_bytes
        attends = tuple(op for op in kernel.ops if op.kind.startswith("attend"))
        key = (*held.values(), *(id(op.node) for op in attends))
        found.setdefault(key, Live(held["tokens"], held["logits"], held["keys"], attends))
        for value in ends.get(index, ()):
            held[value.rows] -= value.row_bytes
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one plan at its longest.

    Args:
        weights: resident weights, ties once.
        kv_held: cache bytes that hold a token, all sequences.
        kv_reserved: whole pages.
        activations: peak of live activations over all passes.
        reserve: what the engine takes for itself.
    """

    weights: int
    kv_held: int
    kv_reserved: int
    activations: int
    reserve: int

    @property
    def peak(self) -> int:
        """Everything at once."""
        return self.weights + self.kv_reserved + self.activations + self.reserve


class Footprint:
    """Memory of a model on a stack as a function of the workload; the graph is built once.

    Args:
        spec: the model.
        stack: its fusions, attention, chunk and reserve.
    """

    def __init__(self, spec: ModelSpec, stack: Stack) -> None:
        self.spec, self.stack = spec, stack
        self._prefill = live(fuse(build(spec, "prefill"), stack))
        self._filter = live(fuse(filter_graph(spec), stack)) if spec.flow.filter else ()
        self._weights = spec.weight_nbytes()

    def at(self, work: Workload) -> Memory:
        """Bytes at `prompt + gen` tokens of every sequence; of a filtered prompt at what is kept of it."""
        held = prompt_held(self.spec, work.prompt)
        # Equal layers are equal objects more often than not: each is asked once.
        caches: dict[int, list] = {}
        for layer in self.spec.layers:
            caches.setdefault(id(layer.self_attn.cache), [layer.self_attn.cache, 0])[1] += 1
        kv_held = kv_reserved = 0
        for cache, times in caches.values():
            nbytes = cache.nbytes(held + work.gen)
            kv_held += times * work.batch * nbytes.held
            kv_reserved += times * work.batch * nbytes.reserved
        return Memory(self._weights, kv_held, kv_reserved, self._activations(work, held), self.stack.reserve_bytes)

    def _activations(self, work: Workload, held: int) -> int:
        attention = self.stack.attention
        full, last = chunks(held, self.stack.prefill_chunk)
        # The last chunk has the longest context and the logits, the one before it the most tokens, the last step the longest.
        new, past = [[last]], [[held - last]]
        if full:
            new, past = [*new, [self.stack.prefill_chunk]], [*past, [held - last - self.stack.prefill_chunk]]  # type: ignore[operator]
        if work.gen > 1:
            new, past = [*new, [1]], [*past, [held + work.gen - 2]]
        step = StepShape.of(new, past, logits=work.batch, copies=work.batch)
        peak = max(state.nbytes(step, attention) for state in self._prefill)
        if held < work.prompt:
            whole = StepShape.of([[work.prompt]], [[0]])
            peak = max(peak, *(state.nbytes(whole, attention) for state in self._filter))
        return peak

    def largest_context(self, batch: int, capacity_bytes: int, gen: int = 1) -> int:
        """Most tokens per sequence (prompt and generated) that fit; 0 if not even one prompt token does."""
        return _largest(
            lambda tokens: self.at(Workload(batch=batch, prompt=tokens, gen=gen)).peak <= capacity_bytes, gen
        )

    def largest_batch(self, prompt: int, gen: int, capacity_bytes: int) -> int:
        """Most sequences that fit; 0 if none does."""
        return _largest(lambda batch: self.at(Workload(batch=batch, prompt=prompt, gen=gen)).peak <= capacity_bytes)


#: Contexts and batches beyond this are called unbounded (a ring cache never grows).
UNBOUNDED = 1 << 24


def _largest(fits, extra: int = 0) -> int:
    """Largest n >= 1 with fits(n), plus `extra`; 0 if fits(1) is false. `fits` must be monotone."""
    if not fits(1):
        return 0
    if fits(UNBOUNDED):
        return UNBOUNDED
    low, high = 1, UNBOUNDED
    for _ in range(math.ceil(math.log2(UNBOUNDED)) + 1):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low + extra
