"""What a scheduler must know of a model: bytes of a sequence, whole pages, whether it can be cut back, whether rows are alike."""

from __future__ import annotations

import math

import numpy as np

from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.step import Step
from trimtab.sched.kv import NBytes, cache_bytes
from trimtab.spec.cache import All, HeadSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.slots import Slots


def rewindable(spec: ModelSpec) -> bool:
    """Whether sequences of a model can be cut back to any length: every head keeps all its tokens as they were written."""
    heads = {head for layer in spec.layers for head in layer.cache.heads}
    plain = all(isinstance(head.keep, All) and not head.seals and head.policy is None for head in heads)
    return plain and not any(layer.cache.state_bytes for layer in spec.layers)


def block_tokens(spec: ModelSpec) -> int:
    """Tokens of the smallest block that is whole pages of every head."""
    pages = {
        size
        for layer in spec.layers
        for head in layer.cache.heads
        for size in (head.block_tokens(head.k_format), head.block_tokens(head.v_format))
    }
    return math.lcm(*pages) if pages else 64


def most_sequences(spec: ModelSpec) -> int | None:
    """Sequences that can be run at a time, whatever the memory; None = any number."""
    return min((slots.batch for slots in _slots(spec)), default=None)


def longest(spec: ModelSpec) -> int:
    """Tokens a sequence can have: those the model was made for, or fewer where slots are shorter."""
    return min((spec.max_position_embeddings, *(slots.tokens for slots in _slots(spec))))


def _slots(spec: ModelSpec) -> set[Slots]:
    return {head.slots for layer in spec.layers for head in layer.cache.heads if head.slots is not None}


def bound_bytes(spec: ModelSpec) -> NBytes:
    """Make the function tokens -> bytes that one sequence never exceeds, also while a prompt runs.

    Exact for caches that keep tokens as they were written. Where tokens are coded or given up later, what is held in the end and
    all tokens as they land, whole, are added: an upper bound that is safe rather than tight.
    """
    if rewindable(spec):
        return cache_bytes(spec)
    heads: dict[HeadSpec, int] = {}
    for layer in spec.layers:
        for head in layer.cache.heads:
            heads[head] = heads.get(head, 0) + 1
    states = sum(layer.cache.state_bytes for layer in spec.layers)

    def nbytes(tokens: int) -> int:
        total = states
        for head, count in heads.items():
            pages = -(-tokens // head.landing_page) + 1
            landing = pages * head.landing_page * head.landing_bytes()
            total += count * (head.nbytes(tokens).reserved + landing)
        return total

    return nbytes


def rows_alike(runner: Runner) -> bool:
    """Whether answers that go on get the same logits to the bit alone and beside others: tried, not proved.

    True of matrices whose products are sums of integers, which no order changes.
    """

    def last(others: int) -> np.ndarray:
        store, logits = runner.open_store(), np.empty((0, 0), np.float32)
        seqs = [store.open() for _ in range(others + 1)]
        for turn in range(4):
            ids = np.array([7 + turn, *[3 + turn] * others], np.int64) % runner.spec.vocab_size
            step = Step.of([1] * len(seqs), [turn] * len(seqs), seqs, None, [4] * len(seqs), [False] * len(seqs))
            logits = runner.forward(ids, step, store, np.arange(len(seqs)))
        return logits[0]

    alone, most = last(0), most_sequences(runner.spec) or 32
    return all(np.array_equal(alone, last(others)) for others in (1, 3, 6, 15, 31) if others < most)
