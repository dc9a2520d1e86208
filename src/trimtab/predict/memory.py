"""Bytes: weights, cache, live activations and the engine's reserve against the machine's capacity."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.graph.count import scratch_bytes
from trimtab.graph.ops import IntArray, Kernel, Op, StepShape
from trimtab.graph.passes import Graphs, chunks, prompt_held
from trimtab.spec.cache import CacheSpec, KVBytes, PassPages
from trimtab.spec.machine import Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import ALONE, Parallel
from trimtab.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Live:
    """Activations alive while one kernel runs: bytes per row of each kind, and the ops whose scratch comes on top."""

    tokens: int
    logits: int
    keys: int
    scratch: tuple[Op, ...]

    def nbytes(self, step: StepShape, attention: str) -> IntArray:
        """[...] bytes in the largest of the passes [..., passes]."""
        held = self.tokens * step.tokens + self.logits * step.logits + self.keys * step.keys
        held = held + sum(scratch_bytes(op, step, attention) for op in self.scratch)
        return np.max(np.broadcast_to(held, np.shape(step.logits)), -1)


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
        attends = tuple(op for op in kernel.ops if op.kind.startswith("attend") or op.kind == "scan")
        key = (*held.values(), *(id(op.node) for op in attends))
        found.setdefault(key, Live(held["tokens"], held["logits"], held["keys"], attends))
        for value in ends.get(index, ()):
            held[value.rows] -= value.row_bytes
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at their longest on the device that holds most; numbers, or arrays over cases.

    Args:
        weights: resident weights, ties once.
        kv_held: cache bytes that hold a token, all sequences.
        kv_reserved: whole pages.
        kv_peak: whole pages at their most: a layer holds its prompt whole until what stays of it is chosen.
        activations: peak of live activations over all passes.
        reserve: what the engine takes for itself.
    """

    weights: int
    kv_held: Any
    kv_reserved: Any
    kv_peak: Any
    activations: Any
    reserve: int

    @property
    def peak(self) -> Any:
        """Everything at once."""
        return self.weights + self.kv_peak + self.activations + self.reserve


class Footprint:
    """Memory of one device as a function of the workload; the graph is built once.

    Args:
        model: the graphs of the model, or of one device's slice of it; a spec stands for its own.
        stack: its fusions, attention, chunk and reserve.
        parallel: stages the layers are cut into, and replicas that share the sequences.
    """

    def __init__(self, model: Graphs | ModelSpec, stack: Stack, parallel: Parallel = ALONE) -> None:
        self.graphs = model if isinstance(model, Graphs) else Graphs(model)
        self.spec, self.stack, self.parallel = self.graphs.spec, stack, parallel
        spec = self.spec
        self._prefill = live(self.graphs.kernels(self.graphs.prefill, stack))
        self._filter = live(self.graphs.kernels(self.graphs.filter, stack)) if spec.flow.filter else ()
        self.stages = stages(len(spec.layers), parallel.pp)
        # Equal caches as one object, so that each is asked once: layers that a technique edited are equal, not the same.
        same: dict[CacheSpec, CacheSpec] = {}
        self._caches = tuple(same.setdefault(layer.cache, layer.cache) for layer in spec.layers)
        self._weights = self.graphs.weight_nbytes if parallel.pp == 1 else _largest_stage(spec, self.stages)

    def at(self, work: Workload) -> Memory:
        """Bytes at `prompt + gen` tokens of every sequence; of a filtered prompt at what is kept of it."""
        found = self.at_batches(np.asarray(work.batch), work.prompt, work.gen)
        return replace(
            found,
            kv_held=int(found.kv_held),
            kv_reserved=int(found.kv_reserved),
            kv_peak=int(found.kv_peak),
            activations=int(found.activations),
        )

    def at_batches(self, batch: IntArray, prompt: int, gen: int) -> Memory:
        """As `at`, for [...] numbers of sequences at once."""
        share = -(-batch // self.parallel.dp)
        held = prompt_held(self.spec, prompt)
        new = self._last_passes(held)
        known: dict[int, tuple[KVBytes, list[PassPages]]] = {}
        for cache in self._caches:
            if id(cache) not in known:
                known[id(cache)] = (
                    cache.nbytes(held + gen, held),
                    [_around(cache, held - past, count, held, held + gen) for past, count in new],
                )
        layers = [known[id(cache)] for cache in self._caches]
        found = []
        for stage in self.stages:
            end = sum((layers[i][0] for i in stage), KVBytes(0, 0))
            most = end.reserved + sum(each.whole for i in stage for each in layers[i][1])
            exact = share.astype(object) if float(np.max(share)) * most > _MOST else share
            found.append((end.held * exact, end.reserved * exact, self._cache_peak(layers, stage, end, exact, held)))
        kv_held, kv_reserved, kv_peak = max(found, key=lambda each: int(np.max(each[2])))
        activations = self._activations(-(-share // self.parallel.pp), prompt, held, gen)
        return Memory(self._weights, kv_held, kv_reserved, kv_peak, activations, self.stack.reserve_bytes)

    def _cache_peak(
        self, layers: list[tuple[KVBytes, list[PassPages]]], stage: range, end: KVBytes, batch: IntArray, prompt: int
    ) -> Any:
        """Most bytes of pages of a stage's layers: at the end, or while the prompt runs through one layer after the other."""
        peak, together = end.reserved * batch, self._together(batch, prompt)
        for which in range(len(layers[0][1])):
            passes = [layers[i][1][which] for i in stage]
            done, left, found = 0, sum(each.before for each in passes), set()
            for each in passes:
                left -= each.before
                found.add((done + each.whole + left, each.moving))
                done += each.after
            # All sequences, and one more whose tokens move: the layer with most of either.
            for running, moving in {max(found), max(found, key=sum)}:
                peak = np.maximum(peak, running * together + moving + (batch - together) * end.reserved)
        return peak

    def _last_passes(self, prompt: int) -> list[tuple[int, int]]:
        """The last passes over a prompt, as (tokens from their start to its end, their tokens): those in which most is held."""
        full, last = chunks(prompt, self._chunk)
        return [(last, last), *([(last + self._chunk, self._chunk)] if full and self._chunk else [])]

    @property
    def _chunk(self) -> int | None:
        budget = self.stack.max_batched_tokens
        return self.stack.prefill_chunk if budget is None else budget

    def _together(self, batch: IntArray, prompt: int) -> IntArray:
        """Sequences whose prompts share a pass."""
        budget = self.stack.max_batched_tokens
        return batch if budget is None else np.minimum(batch, max(budget // prompt, 1))

    def _activations(self, batch: IntArray, prompt: int, held: int, gen: int) -> IntArray:
        attention, chunk = self.stack.attention, self._chunk
        together = self._together(batch, held)
        full, last = chunks(held, chunk)
        # The last chunk has the longest context and the logits, the one before it the most tokens, the last step the longest.
        cases = [(last, held - last, together)]
        if full and chunk:
            cases.append((chunk, held - last - chunk, together))
        if gen > 1:
            cases.append((1, held + gen - 2, batch))
        new, past = (np.array([[int(case[which])] for case in cases]) for which in (0, 1))
        copies = np.stack(np.broadcast_arrays(*(case[2] for case in cases)), -1)
        shape = (*copies.shape, 1)
        step = StepShape.of(
            np.broadcast_to(new, shape), np.broadcast_to(past, shape), logits=copies, copies=copies, prompt=held
        )
        peak = functools.reduce(np.maximum, (state.nbytes(step, attention) for state in self._prefill))
        if held < prompt:
            whole = StepShape.of([[prompt]], [[0]])
            peak = np.maximum(peak, max(int(state.nbytes(whole, attention)) for state in self._filter))
        return peak

    def largest_context(self, batch: int, capacity_bytes: int, gen: int = 1) -> int:
        """Most tokens per sequence (prompt and generated) that fit; 0 if not even one prompt token does."""
        return _largest(
            lambda tokens: self.at(Workload(batch=batch, prompt=tokens, gen=gen)).peak <= capacity_bytes, gen
        )

    def largest_batch(self, prompt: int, gen: int, capacity_bytes: int) -> int:
        """Most sequences that fit; 0 if none does."""
        return _largest(lambda batch: self.at(Workload(batch=batch, prompt=prompt, gen=gen)).peak <= capacity_bytes)


def _around(cache: CacheSpec, past: int, new: int, prompt: int, tokens: int) -> PassPages:
    """What `HeadSpec.pass_pages` says of all heads of a layer, its recurrent state included."""
    state = PassPages(cache.state_bytes, cache.state_bytes, 0, cache.state_bytes)
    return sum((head.pass_pages(past, new, prompt, tokens) for head in cache.heads), state)


#: Products of counts above this are made in Python integers.
_MOST = float(1 << 62)


def stages(layers: int, pp: int) -> tuple[range, ...]:
    """Layers of every pipeline stage, as even as possible, the longer ones in the middle of the model.

    Raises:
        SpecError: more stages than layers.

    >>> stages(10, 4)
    (range(0, 2), range(2, 5), range(5, 8), range(8, 10))
    """
    if pp > layers:
        raise SpecError(f"pp={pp} cuts {layers} layers into more stages than there are. Allowed: 1 to {layers}.")
    # The first and the last stage hold embedding and head, so they get fewer layers where it does not divide.
    base, extra = divmod(layers, pp)
    first = (pp - extra) // 2
    sizes = [base + (first <= stage < first + extra) for stage in range(pp)]
    ends = np.cumsum(sizes).tolist()
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def _largest_stage(spec: ModelSpec, cut: Sequence[range]) -> int:
    """Weight bytes of the stage that holds most: its layers, the embedding on the first and the head on the last one."""
    first, last = cut[0], cut[-1]
    found = []
    for stage in cut:
        part = replace(spec, layers=tuple(spec.layers[i] for i in stage), tie_word_embeddings=False)
        nbytes = part.weight_nbytes()
        tables = sum(node.nbytes() for node in (spec.embed_tokens, spec.embed_positions, spec.embed_norm) if node)
        top = spec.lm_head.nbytes() + (spec.norm.nbytes() if spec.norm else 0)
        found.append(nbytes - (stage is not first) * tables - (stage is not last) * top)
    return max(found)


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
