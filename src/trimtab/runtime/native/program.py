"""A lowered model as the engine drives it: numpy in, numpy out, the step itself in C++.

Legend: B rows, T new tokens of all rows, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trimtab.errors import CapacityError, SpecError
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.kernels import _core
from trimtab.runtime.native.arena import Arena
from trimtab.runtime.step import IntArray, Recorder, Step
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec


class NativeProgram:
    """A `Runner` whose passes run in C++. Built by `lower`.

    Attributes:
        spec: the model as it is held (see `lowered_spec`).
        native_s: seconds in C++, of all passes so far.
        weight_bytes: bytes of the live weight buffers, ties once; those shared with an earlier program count there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        core: _core.Program,
        arena: Arena,
        logits: int,
        weight_bytes: int,
        kept: list[object],
        coded: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.spec, self.weight_bytes, self._coded = spec, weight_bytes, coded
        self._core, self._arena, self._logits, self._kept = core, arena, logits, kept
        self._watched = 0
        self.native_s = 0.0

    @property
    def threads(self) -> int:
        """Workers."""
        return self._core.threads

    @property
    def isa(self) -> str:
        """Instruction set the kernels run with."""
        return _core.isa()

    @property
    def recomputed(self) -> int:
        """Rows of attention computed again because their scores left the safe interval, since the program was built."""
        return self._core.recomputed

    def open_store(self) -> KVStore:
        """An empty store that fits the model."""
        store = KVStore(self.spec)
        self._watched = max((store.watches(layer) for layer in range(len(self.spec.layers))), default=0)
        if any(store.watches(layer) < 0 for layer in range(len(self.spec.layers))):
            self._watched = -1
        self._core.watch(max(self._watched, 0))
        return store

    def keep_tokens(self, ids: IntArray, record: Recorder | None) -> IntArray:
        """Every token of a prompt."""
        return np.arange(len(ids))

    def forward(self, tokens: IntArray, step: Step, store: KVStore, logits_rows: IntArray) -> np.ndarray:
        """Run one pass over packed tokens [T]; float32 logits [R, V] of the rows wanted.

        Raises:
            CapacityError: the pages do not fit.
            SpecError: a key or value that the pages cannot hold.
        """
        if self._watched < 0:  # every query of the pass
            self._core.watch(int(np.diff(step.cu).max()))
        out = np.empty((len(logits_rows), self.spec.vocab_size), np.float32)
        tells = step.record is not None or not store.idle(step)

        def run(records: IntArray, first: int = 0, end: int = -1) -> None:
            past, timed = step.positions[step.cu[:-1]], step.record is not None
            began = time.perf_counter()
            try:
                self._core.run(
                    tokens, step.cu, past, step.reaches, logits_rows, records, self._logits, timed, out, self._whole(step),
                    first, end,
                )  # fmt: skip
            except MemoryError as error:
                raise CapacityError(f"{error} Prefill in smaller chunks.") from None
            except ValueError as error:  # a key or value that the pages cannot hold
                raise SpecError(str(error)) from None
            finally:
                self.native_s += time.perf_counter() - began

        if store.layered(step):  # what a layer gives up is free before the next one needs room
            records, first = store.records(step), 0
            for layer, end in enumerate(self._core.attends):
                store.place_layer(layer, step, records)
                run(records, first, end)
                store.settle(step, layer)
                if tells:
                    self._tell(store, step, layer)
                first = end
            run(records, first)
        else:
            run(store.place(step))
            store.settle(step)
            for layer in range(len(self.spec.layers) if tells else 0):
                self._tell(store, step, layer)
        if step.record is not None:
            self._report(step.record)
        return out

    def _whole(self, step: Step) -> IntArray | None:
        """How many of the last new tokens of each row see what a pattern over the prompt would hide."""
        blocks = (layer.self_attn for layer in self.spec.layers)
        last = max((b.prefill.last for b in blocks if isinstance(b, AttentionSpec) and b.prefill), default=0)
        if not last or step.ends is None:
            return None
        return np.minimum(np.diff(step.cu), last) * step.ends

    def _tell(self, store: KVStore, step: Step, layer: int) -> None:
        """Let the policies of a layer act on what the pass has attended to."""
        if not store.acts(layer):
            return
        new, attn = np.diff(step.cu), self.spec.layers[layer].self_attn
        found = self._core.queries(layer) if self._watched else np.zeros((len(new), 0, *_heads(attn)), np.float32)
        done = store.attended(layer, [q[max(len(q) - count, 0) :] for q, count in zip(found, new, strict=True)], step)
        if step.record is not None:
            path = f"layers.{layer}.self_attn.evict"
            step.record.op(path, flops=done.flops, kv_read=done.read, kv_written=done.written)
            step.record.observe(f"{path}.moved", done.moved)

    def _report(self, record: Recorder) -> None:
        for name, weight_read, kv_read, kv_written, flops, _ in self._core.metered():
            record.op(name, flops=flops, weight_read=weight_read, kv_read=kv_read, kv_written=kv_written)
        for name, rows, pairs in self._core.observed():
            path = f"{'.'.join(name.split('.')[:2])}.mlp"
            record.observe(f"{path}.active_rows", rows)
            record.observe(f"{path}.active_pairs", pairs)
        for name, count in self._core.outliers():
            for path in self._coded[name]:
                record.observe(f"{path}.outliers", count)

    def metered(self) -> list[tuple[Any, ...]]:
        """(name, weight bytes, KV bytes read, written, FLOPs, seconds) of every kernel in the last pass."""
        return self._core.metered()


def _heads(attn: object) -> tuple[int, int]:
    assert isinstance(attn, AttentionSpec)
    return attn.num_attention_heads, attn.head_dim
