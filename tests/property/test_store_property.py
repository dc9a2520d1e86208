"""The KV store against lists of arrays: any sequence of appends, forks, marks, resets, cuts and frees."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.cache.pages import decode, encode, widen
from trimtab.runtime.cache.rows import Merge
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.numerics import bfloat16_bits
from trimtab.runtime.step import Step
from trimtab.spec.cache import All, PageFormat, Ring
from trimtab.spec.configs import spec_from_config
from trimtab.spec.tree import Edit

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LAYERS, HEADS, SIZE = 2, 3, 4
RESIDUAL, KEYS, VALUES = 8, PageFormat("int4", 4, by_channel=True), PageFormat("int2", 4)
CODED = "coded"  # a head that keeps every token, all but the newest in few bits


def make_spec(kind: str, keeps: tuple[Any, ...]) -> Any:
    """A spec of two layers whose three KV heads keep what `keeps` says."""
    spec = spec_from_config(CONFIG, "store").with_dtype("float32", {"fp32": "float32", "bf16": "bfloat16"}[kind])
    edits = []
    for layer in range(LAYERS):
        for head, keep in enumerate(keeps):
            at = f"layers.{layer}.self_attn.cache.heads.{head}"
            fields = {"keep": keep}
            if keep == CODED:
                fields = {"tail": PageFormat(kind), "residual": RESIDUAL, "k_format": KEYS, "v_format": VALUES}
            edits += [Edit(at, field, value) for field, value in fields.items()]
    return spec.edit(edits, by="test")


class Naive:
    """One sequence as it should be: of every head of every layer the tokens in order, their keys, values and positions."""

    def __init__(self) -> None:
        self.k = [[np.zeros((0, SIZE), np.float32) for _ in range(HEADS)] for _ in range(LAYERS)]
        self.v = [[np.zeros((0, SIZE), np.float32) for _ in range(HEADS)] for _ in range(LAYERS)]
        self.at = [[np.zeros(0, np.int64) for _ in range(HEADS)] for _ in range(LAYERS)]
        self.sealed = (0, 0)  # keys and values of a coded head that are coded: never fewer, whatever is cut
        self.length = 0

    def copy(self) -> Naive:
        return copy.deepcopy(self)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Keys and values [LAYERS, tokens, HEADS, SIZE]."""
        at = np.arange(self.length, self.length + k.shape[1])
        for layer, head in np.ndindex(LAYERS, HEADS):
            self.k[layer][head] = np.concatenate((self.k[layer][head], k[layer, :, head]))
            self.v[layer][head] = np.concatenate((self.v[layer][head], v[layer, :, head]))
            self.at[layer][head] = np.concatenate((self.at[layer][head], at))
        self.length += k.shape[1]

    def cut(self, tokens: int) -> None:
        for layer, head in np.ndindex(LAYERS, HEADS):
            for lists in (self.k, self.v, self.at):
                lists[layer][head] = lists[layer][head][:tokens]
        self.length = tokens

    def evict(self, layer: int, head: int, keep: np.ndarray, merges: list[Merge]) -> None:
        k, v = self.k[layer][head].copy(), self.v[layer][head].copy()
        for merge in merges:
            k[merge.target] += np.float32(merge.k_share) * (k[merge.source] - k[merge.target])
            v[merge.target] += np.float32(merge.v_share) * (v[merge.source] - v[merge.target])
        self.k[layer][head], self.v[layer][head] = k[keep], v[keep]
        self.at[layer][head] = self.at[layer][head][keep]

    @property
    def evicted(self) -> bool:
        return any(len(at) < self.length for layer in self.at for at in layer)

    def seal(self) -> None:
        keys, values = self.length // RESIDUAL * RESIDUAL, max(0, self.length - RESIDUAL)
        self.sealed = max(keys, self.sealed[0]), max(values, self.sealed[1])

    def nbytes(self, spec: Any, keeps: tuple[Any, ...], chosen: set[tuple[int, int]]) -> int:
        """Bytes the pages hold; where tokens have been given up, the position of each is kept too."""
        total = 0
        for layer, head in np.ndindex(LAYERS, HEADS):
            node, keep = spec.layers[layer].cache.heads[head], keeps[head]
            if keep != CODED:
                held = len(self.at[layer][head])
                total += keep.held(held) * node.landing_bytes() + ((layer, head) in chosen) * 4 * held
                continue
            for form, coded in zip((KEYS, VALUES), self.sealed, strict=True):
                total += form.nbytes(coded, SIZE) + node.tail.nbytes(self.length - coded, SIZE)
        return total


def coded(values: np.ndarray, kind: str, form: PageFormat, count: int) -> np.ndarray:
    """What is read of a coded head: float32 [tokens, SIZE], the first `count` tokens through their codes."""
    landed = stored(values, kind)[None]
    past = decode(form, encode(form, landed[:, :count]), SIZE)
    return np.concatenate((past, widen(landed[:, count:])), axis=1)[0]


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """What a page holds of float32 values."""
    return bfloat16_bits(np.ascontiguousarray(values)) if kind == "bf16" else values


KEEPS = st.tuples(
    *[st.one_of(st.just(All()), st.just(CODED), st.builds(Ring, st.integers(0, 3), st.integers(1, 40)))] * HEADS
)
ACTIONS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=25)


class World:
    """A store and what it should hold."""

    def __init__(self, kind: str, keeps: tuple[Any, ...], seed: int) -> None:
        self.kind, self.keeps, self.rng = kind, keeps, np.random.default_rng(seed)
        self.store = KVStore(make_spec(kind, keeps))
        self.alive: list[list[Any]] = [[self.store.open(reserve_tokens=seed * 7), Naive(), set()]]
        self.marks: list[tuple[Any, Any, Naive, set[tuple[int, int]]]] = []

    def act(self, action: int, which: int, amount: int) -> None:
        """One operation on one of the sequences."""
        store, alive = self.store, self.alive
        if not alive:
            alive.append([store.open(), Naive(), set()])
        one = alive[which % len(alive)]
        seq, naive, chosen = one
        if action <= 2:
            rows = alive[: which + 1] if action == 0 else [one]
            self.append(rows, amount if action else 1)
        elif action == 3:
            alive.append([store.fork(seq), naive.copy(), set(chosen)])
        elif action == 4:
            self.marks.append((seq, store.mark(seq), naive.copy(), set(chosen)))
        elif action == 5 and any(mark[0] is seq for mark in self.marks):
            _, mark, then, was = next(mark for mark in self.marks if mark[0] is seq)
            store.reset(seq, mark)
            one[1:] = [then.copy(), set(was)]
        elif action == 6 and which == 0 and len(alive) > 1:
            store.free(seq)
            alive.pop(which % len(alive))
        elif action >= 7:
            self.evict(one, amount)
        else:
            self.cut(one, min(amount, naive.length))

    def cut(self, one: list[Any], tokens: int) -> None:
        seq, naive, _ = one
        overwritten = any(isinstance(keep, Ring) and naive.length > keep.sink + keep.recent for keep in self.keeps)
        gone = (overwritten or naive.evicted) and tokens < naive.length
        if gone or (CODED in self.keeps and tokens < max(naive.sealed)):
            with pytest.raises(NotRewindable):
                self.store.truncate(seq, tokens)
        else:
            self.store.truncate(seq, tokens)
            naive.cut(tokens)

    def evict(self, one: list[Any], amount: int) -> None:
        """Give up some tokens of one head, and let some of them go into others first."""
        seq, naive, chosen = one
        layer, head = amount % LAYERS, amount % HEADS
        held = len(naive.at[layer][head])
        if self.keeps[head] != All() or held < 2:
            return
        keep = np.flatnonzero(self.rng.random(held) < self.rng.choice([0.1, 0.5, 0.95]))
        gone = np.setdiff1d(np.arange(held), keep)
        merges = []
        if len(keep) and len(gone) and amount % 2:
            merges = [
                Merge(
                    int(self.rng.choice(gone)),
                    int(self.rng.choice(keep)),
                    float(self.rng.random()),
                    float(self.rng.random()),
                )
                for _ in range(amount % 4)
            ]
        if self.kind == "bf16":  # what is merged is rounded to a page's floats: compared on floats alone
            merges = []
        before = self.store.pages_bytes
        self.store.evict(seq, layer, head, keep, merges)
        assert self.store.pages_bytes <= before + 2 * 64 * SIZE * 4 * -(
            -held // 64
        )  # shared pages may have to be copied
        naive.evict(layer, head, keep, merges)
        chosen.add((layer, head))

    def append(self, rows: list[list[Any]], tokens: int) -> None:
        """Append to several sequences in one step and compare every view with the naive arrays."""
        counts = [tokens + 3 * index for index in range(len(rows))]
        step = Step.of(counts, [naive.length for _, naive, _ in rows], [seq for seq, _, _ in rows])
        k = self.rng.standard_normal((LAYERS, sum(counts), HEADS, SIZE), dtype=np.float32)
        v = self.rng.standard_normal((LAYERS, sum(counts), HEADS, SIZE), dtype=np.float32)
        views = [self.store.append(layer, k[layer], v[layer], step) for layer in range(LAYERS)]
        for row, (_, naive, _) in enumerate(rows):
            first, end, past = int(step.cu[row]), int(step.cu[row + 1]), naive.length
            naive.append(k[:, first:end], v[:, first:end])
            for layer in range(LAYERS):
                seen: set[int] = set()
                for view in views[layer][row]:
                    seen.update(view.heads)
                    for index, head in enumerate(view.heads):
                        self.compare(view, index, head, layer, naive, past, end - first)
                assert seen == set(range(HEADS))
            naive.seal()

    def compare(self, view: Any, index: int, head: int, layer: int, naive: Naive, past: int, new: int) -> None:
        """A new token sees itself, its chunk, and of the past what its head leaves in view."""
        keep, at = self.keeps[head], naive.at[layer][head]
        wanted = np.arange(len(at))
        if isinstance(keep, Ring):
            in_view = (at >= past) | (at < keep.sink) | (at > past - keep.recent)
            wanted = wanted if new == 1 and past < keep.sink else wanted[in_view]
        positions = view.positions[index] if view.positions.ndim == 2 else view.positions
        order = np.argsort(positions)
        assert positions[order].tolist() == at[wanted].tolist()
        for side, (found, true) in enumerate(((view.k, naive.k), (view.v, naive.v))):
            expected = stored(true[layer][head][wanted], self.kind)
            if keep == CODED and found.dtype == np.float32:
                expected = coded(true[layer][head], self.kind, (KEYS, VALUES)[side], naive.sealed[side])
            np.testing.assert_array_equal(found[index, order], expected)

    def check(self) -> None:
        """Lengths and bytes of everything alive."""
        for seq, naive, chosen in self.alive:
            assert seq.length == naive.length
            assert self.store.nbytes(seq).held == naive.nbytes(self.store.spec, self.keeps, chosen)

    def close(self) -> None:
        """When everything is given up, no page is left."""
        for seq, _, _ in self.alive:
            self.store.free(seq)
        for _, mark, _, _ in self.marks:
            self.store.release(mark)
        assert self.store.nbytes().held == self.store.nbytes().reserved == self.store.pages_bytes == 0
        assert all(not arena.owners.any() for arena in self.store._arenas.values())


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["fp32", "bf16"]), keeps=KEEPS, actions=ACTIONS, seed=st.integers(0, 9))
def test_store_equals_lists_of_arrays(kind: str, keeps: tuple[Any, ...], actions: Any, seed: int) -> None:
    world = World(kind, keeps, seed)
    for action, which, amount in actions:
        world.act(action, which, amount)
        world.check()
    world.close()


def test_ten_thousand_operations_leak_no_page() -> None:
    world = World("fp32", (All(), CODED, Ring(2, 20)), 3)
    rng = np.random.default_rng(5)
    for turn in range(10_000):
        action, which, amount = int(rng.integers(0, 9)), int(rng.integers(0, 4)), int(rng.integers(1, 40))
        if len(world.alive) > 6 or max(naive.length for _, naive, _ in world.alive) > 400:
            world.store.free(world.alive.pop(0)[0])
        while len(world.marks) > 4:
            world.store.release(world.marks.pop(0)[1])
        world.act(action, which, amount)
        if turn % 500 == 0:
            world.check()
            taken = sum(int((arena.owners > 0).sum()) * arena.page_bytes for arena in world.store._arenas.values())
            assert taken == world.store.pages_bytes
    world.close()


def test_capacity_is_refused_before_pages_are_taken() -> None:
    spec = make_spec("fp32", (All(),) * HEADS)
    store = KVStore(spec, capacity_bytes=spec.kv_nbytes(128))
    store.open(reserve_tokens=64)
    with pytest.raises(CapacityError, match=r"wanted.*still fit"):
        store.open(reserve_tokens=65)
    assert store.pages_bytes == spec.kv_nbytes(64)


def test_a_decode_step_over_reserved_pages_copies_nothing() -> None:
    store = KVStore(make_spec("fp32", (All(), Ring(1, 7), All())))
    seq = store.open(reserve_tokens=100)
    views = []
    for token in range(40):
        kv = np.ones((1, HEADS, SIZE), np.float32)
        views.append(store.append(0, kv, kv, Step.of([1], [token], [seq]))[0])
    first, last = views[20], views[-1]
    for early, late in zip(first, last, strict=True):
        assert np.shares_memory(early.k, late.k) and np.shares_memory(early.v, late.v)


def test_a_ring_is_bounded_and_a_strangers_sequence_refused() -> None:
    spec = make_spec("bf16", (Ring(2, 30),) * HEADS)
    store, other = KVStore(spec), KVStore(spec)
    seq = store.open()
    step = Step.of([500], [0], [seq])
    kv = np.ones((500, HEADS, SIZE), np.float32)
    for layer in range(LAYERS):
        store.append(layer, kv, kv, step)
    assert store.nbytes().held == 32 * spec.kv_nbytes(1)
    assert store.nbytes().reserved == 64 * spec.kv_nbytes(1)  # one page
    with pytest.raises(SpecError, match="another model or store"):
        other.append(0, kv, kv, step)


def test_page_format_of_a_head_is_what_pages_hold() -> None:
    spec = make_spec("fp32", (All(),) * HEADS)
    spec = spec.edit([Edit("layers.*.self_attn.cache.heads.1", "k_format", PageFormat("fp16"))], by="test")
    store = KVStore(spec)
    seq = store.open()
    kv = np.full((3, HEADS, SIZE), 0.1, np.float32)
    views = store.append(0, kv, kv, Step.of([3], [0], [seq]))[0]
    kinds = {view.heads: (view.k.dtype, view.v.dtype) for view in views}
    assert kinds == {(0, 2): (np.float32, np.float32), (1,): (np.float16, np.float32)}
    assert dataclasses.astuple(store.nbytes(seq))[0] == 3 * (2 * 32 + 8 + 16)
