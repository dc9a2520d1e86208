"""Requests that come and go over one cache, and steps of attention alone over many sequences: what caches are compared by."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CapacityError
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.step import Step
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.native.program import NativeProgram

#: Requests that run at a time.
TOGETHER = 12


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, the step at which it comes, and how many tokens are wanted."""

    prompt: np.ndarray
    at: int
    gen: int


def ragged(count: int, seed: int, vocab: int, prompt: tuple[int, int], gen: tuple[int, int]) -> list[Request]:
    """Requests of random tokens; lengths of prompts and answers in half-open ranges, at most one comes with every step."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.integers(0, 2, count))
    return [
        Request(rng.integers(5, vocab, rng.integers(*prompt)), int(at[i]), int(rng.integers(*gen)))
        for i in range(count)
    ]


@dataclass(slots=True)
class Served:
    """What came of some requests: their tokens, the logits of every step, and how often one had to start again."""

    tokens: list[list[int]]
    logits: list[np.ndarray]
    preempted: int = 0


def serve(runner: NativeProgram, store: KVStore, requests: Sequence[Request], together: int = TOGETHER) -> Served:
    """Run requests greedily, several in every pass: they come when they come and leave when they are done.

    When the cache is full, the newest one gives its pages up and is run again later, answers so far included.
    """
    done = Served([[] for _ in requests], [])
    waiting: list[int] = list(range(len(requests)))
    running: dict[int, Any] = {}
    now, full = 0, False
    while waiting or running:
        joining = [] if full else [i for i in waiting if requests[i].at <= now][: together - len(running)]
        running |= {i: store.open() for i in joining}
        waiting = [i for i in waiting if i not in running]
        now, full = now + 1, full and bool(running)
        while running:
            ids, past = [], []
            for i, seq in running.items():
                all_of_it = np.concatenate((requests[i].prompt, np.array(done.tokens[i], np.int64)))
                past.append(seq.length)
                ids.append(all_of_it[seq.length :])
            new = [len(part) for part in ids]
            step = Step.of(new, past, list(running.values()), None, [256] * len(new), [n > 1 for n in new])
            try:
                logits = runner.forward(np.concatenate(ids), step, store, np.cumsum(new) - 1)
            except CapacityError:
                if len(running) == 1:
                    raise
                last = next(reversed(running))
                store.free(running.pop(last))
                waiting.insert(0, last)
                done.preempted += 1
                full = True  # until one has ended
                continue
            break
        else:
            continue
        done.logits.append(logits)
        for i, row in zip(list(running), logits, strict=True):
            done.tokens[i].append(int(row.argmax()))
            if len(done.tokens[i]) == requests[i].gen:
                store.free(running.pop(i))
                full = False
    return done


class Decode:
    """Steps of attention alone, all layers, over several sequences of one store, each with one new token."""

    def __init__(self, spec: ModelSpec, batch: int, tokens: int, *, scattered: bool = False, seed: int = 0) -> None:
        from trimtab.runtime.cache.rows import head_forms
        from trimtab.runtime.kernels import _core
        from trimtab.spec.nodes import AttentionSpec

        self.spec, self.store = spec, KVStore(spec)
        attn = spec.layers[0].self_attn
        assert isinstance(attn, AttentionSpec)
        self.attn, self.batch, self.past = attn, batch, tokens
        rng = np.random.default_rng(seed)
        heads, kv = attn.num_attention_heads, attn.num_key_value_heads
        self.x = rng.standard_normal((batch, (heads + 2 * kv) * attn.head_dim), np.float32)
        some = rng.standard_normal((2, 512, kv, attn.head_dim), np.float32)
        self.seqs = [self.store.open(0 if scattered else tokens + 1) for _ in range(batch)]
        chunk = 64 if scattered else 512
        for past in range(0, tokens, chunk):
            count = min(chunk, tokens - past)
            step = Step.of([count] * batch, [past] * batch, self.seqs)
            at = past % 512
            k, v = (np.concatenate([part[at : at + count]] * batch) for part in some)
            for layer in range(len(spec.layers)):
                self.store.append(layer, k, v, step)
        self._core = _core.Program(1)
        qkv = self._core.values(self.x.shape[1], False)
        out = self._core.values(heads * attn.head_dim, False)
        for layer in range(len(spec.layers)):
            self._core.attend_heads(
                f"layers.{layer}.attend", layer, qkv, out, -1, heads, kv, attn.head_dim, 0,
                [head_forms(head) for head in attn.cache.heads], None, None, attn.scale, 0.0, None, True,
            )  # fmt: skip
        self._ends, self.records = (qkv, out), None

    def step(self, grow: bool = False) -> tuple[np.ndarray, float]:
        """Output [B, N * H] of the last layer, and processor seconds of the kernel.

        With `grow` the seconds are those of a clock, room for the token included, and the next token comes behind this one.
        """
        clock = time.perf_counter if grow else time.thread_time
        start = clock()
        if grow or self.records is None:
            step = Step.of([1] * self.batch, [self.past] * self.batch, self.seqs)
            self.records = self.store.place(step)
        out = np.empty((self.batch, self.attn.num_attention_heads * self.attn.head_dim), np.float32)
        starts, past = np.arange(self.batch + 1), np.full(self.batch, self.past)
        begun = start if grow else clock()
        self._core.run_on(starts, past, self.records, self._ends[0], self.x, self._ends[1], out)
        seconds = clock() - begun
        self.past += grow
        return out, seconds

    def sdpa(self) -> float:
        """Processor seconds of torch's attention over every layer's keys and values: gathered from pages, or as they lie in slots."""
        import torch
        from torch.nn import functional as F

        heads, kv, size = self.attn.num_attention_heads, self.attn.num_key_value_heads, self.attn.head_dim
        q = torch.from_numpy(self.x[:, : heads * size]).view(self.batch, kv, heads // kv, size)
        start = time.thread_time()
        for layer in range(len(self.spec.layers)):
            for index, seq in enumerate(self.seqs):
                (row,) = seq._held[layer]
                k, v = (torch.from_numpy(row.read(side)) for side in range(2))
                F.scaled_dot_product_attention(q[index][None], k[None], v[None], scale=self.attn.scale)
        return time.thread_time() - start


def timed(arms: Mapping[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, one after the other in every round, every other round backwards."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            times[name].append(arms[name]())
    return {name: np.array(found[2:]) for name, found in times.items()}
