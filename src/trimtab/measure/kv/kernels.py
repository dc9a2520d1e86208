"""The attention of one decode step alone, over a cache as the store holds it: what the kernels return, and how long they take.

One thread runs it, and its own processor time is taken: others who use the machine make it wait, not work.

Legend: N query heads, G KV heads, P queries that share a KV head, S keys, H head size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.cache.pages import widen
from trimtab.runtime.cache.rows import head_forms
from trimtab.runtime.cache.store import GroupView, KVStore
from trimtab.runtime.kernels import _core
from trimtab.runtime.native.attention import unified_limits
from trimtab.runtime.step import Step
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec


class DecodeAttention:
    """One sequence of random keys and values in a store, and a program of nothing but the attention of its layers.

    Every layer holds the same values and attends with the same queries: kernels read pages, whatever stands in them.

    Args:
        spec: the model; every layer keeps keys and values per head.
        tokens: of the prompt that fills the cache.
        seed: of keys, values and queries.

    Raises:
        SpecError: a layer without a cache per head.
    """

    def __init__(self, spec: ModelSpec, tokens: int, *, seed: int = 0) -> None:
        layers = [layer.self_attn for layer in spec.layers]
        attentions = [attn for attn in layers if isinstance(attn, AttentionSpec)]
        if len(attentions) < len(layers):
            raise SpecError(
                f"{spec.name} has layers without keys and values per head. Choose a model that caches all of them."
            )
        self.spec, self.tokens, self.attention = spec, tokens, attentions[0]
        attn, rng = self.attention, np.random.default_rng(seed)
        self._q, self._k, self._v = (
            rng.standard_normal((tokens + 1, heads, attn.head_dim), np.float32)
            for heads in (attn.num_attention_heads, attn.num_key_value_heads, attn.num_key_value_heads)
        )
        self.store = KVStore(spec)
        self.seq = self.store.open(reserve_tokens=tokens + 1)
        prompt = Step.of([tokens], [0], [self.seq], ends=[True])
        for layer in range(len(layers)):
            self.store.append(layer, self._k[:tokens], self._v[:tokens], prompt)
            if self.store.acts(layer):
                self.store.attended(layer, [self._q[:tokens]], prompt)
        self._before = self.store.fork(self.seq)
        self.records = self.store.place(Step.of([1], [tokens], [self.seq]))
        program = _core.Program(1)
        width = attn.num_attention_heads * attn.head_dim
        qkv = program.values(width + 2 * attn.num_key_value_heads * attn.head_dim, False)
        out = program.values(width, False)
        for layer, own in enumerate(attentions):
            program.attend_heads(
                f"layers.{layer}.attend", layer, qkv, out, -1, own.num_attention_heads, own.num_key_value_heads, own.head_dim,
                own.window or 0, [head_forms(head) for head in own.cache.heads], None, None, own.scale, own.softcap or 0.0,
                unified_limits(own), True,
            )  # fmt: skip
        self._program, self._ends = program, (qkv, out)

    def run(self) -> tuple[np.ndarray, float]:
        """Attend with one new token in every layer; the last layer's output [N, H], and processor seconds of all of them.

        A run leaves the cache as the next one wants it: it writes the same token to the same slot.
        """
        attn = self.attention
        x = np.concatenate([part[-1].reshape(1, -1) for part in (self._q, self._k, self._v)], axis=1)
        y = np.empty((1, attn.num_attention_heads * attn.head_dim), np.float32)
        starts, past = np.array([0, 1], np.int64), np.array([self.tokens], np.int64)
        before = time.thread_time()
        self._program.run_on(starts, past, self.records, self._ends[0], x, self._ends[1], y)
        seconds = time.thread_time() - before
        return y.reshape(attn.num_attention_heads, attn.head_dim), seconds

    def view(self) -> list[GroupView]:
        """What the step may read in the last layer, codes as the floats they stand for, channels that are gone as zeros."""
        seq = self.store.fork(self._before)
        step = Step.of([1], [self.tokens], [seq])
        (views,) = self.store.append(len(self.spec.layers) - 1, self._k[-1:], self._v[-1:], step)
        found = [
            GroupView(view.heads, widen(view.k).copy(), widen(view.v).copy(), view.positions, view.nbytes)
            for view in views
        ]
        self.store.free(seq)
        return found

    def queries(self, kv_head: int) -> np.ndarray:
        """Queries of the step that share a KV head [P, H]."""
        per_head = self.attention.num_attention_heads // self.attention.num_key_value_heads
        return self._q[-1, kv_head * per_head : (kv_head + 1) * per_head]

    def reference(self) -> np.ndarray:
        """The last layer's output [N, H]: attention in float64 over what `view` says."""
        attn = self.attention
        found = np.empty((attn.num_key_value_heads, len(self.queries(0)), attn.head_dim))
        for view in self.view():
            for place, head in enumerate(view.heads):
                scores = self.queries(head).astype(np.float64) @ view.k[place].T.astype(np.float64) * attn.scale
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                found[head] = weights / weights.sum(axis=1, keepdims=True) @ view.v[place].astype(np.float64)
        return found.reshape(attn.num_attention_heads, attn.head_dim)

    def close(self) -> None:
        """Free both sequences."""
        self.store.free(self.seq)
        self.store.free(self._before)


def median_seconds(arms: Mapping[str, DecodeAttention], rounds: int = 9, warm: int = 2) -> dict[str, float]:
    """Median processor seconds of a step of each, one after the other in every round, so that a slow moment slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(warm + rounds):
        for name, arm in arms.items():
            times[name].append(arm.run()[1])
    return {name: float(np.median(found[warm:])) for name, found in times.items()}
