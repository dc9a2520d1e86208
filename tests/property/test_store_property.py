"""The KV store against lists of arrays: any sequence of appends, forks, marks, resets, cuts and frees."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.cache.pages import decode, encode
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
    """One sequence as it should be: every key and value ever seen, and where each stands."""

    def __init__(self) -> None:
        self.k = np.zeros((LAYERS, 0, HEADS, SIZE), np.float32)
        self.v = np.zeros((LAYERS, 0, HEADS, SIZE), np.float32)
        self.sealed = (0, 0)  # keys and values of a coded head that are coded: never fewer, whatever is cut

    def copy(self) -> Naive:
        other = Naive()
        other.k, other.v, other.sealed = self.k.copy(), self.v.copy(), self.sealed
        return other

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def seal(self) -> None:
        keys, values = self.length // RESIDUAL * RESIDUAL, max(0, self.length - RESIDUAL)
        self.sealed = max(keys, self.sealed[0]), max(values, self.sealed[1])

    def nbytes(self, spec: Any, keeps: tuple[Any, ...]) -> int:
        """Bytes the pages hold."""
        total = 0
        for head, keep in zip(spec.layers[0].cache.heads, keeps, strict=True):
            if keep != CODED:
                total += head.nbytes(self.length).held
                continue
            for form, coded in zip((KEYS, VALUES), self.sealed, strict=True):
                total += form.nbytes(coded, SIZE) + head.tail.nbytes(self.length - coded, SIZE)
        return LAYERS * total


def coded(values: np.ndarray, kind: str, form: PageFormat, count: int) -> np.ndarray:
    """What is read of a coded head: float32 [tokens, SIZE], the first `count` tokens through their codes."""
    landed = stored(values, kind)[None]
    past = decode(form, encode(form, landed[:, :count]), SIZE)
    return np.concatenate(
        (past, decode(PageFormat("fp32"), encode(PageFormat("fp32"), landed[:, count:]), SIZE)), axis=1
    )[0]


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """What a page holds of float32 values."""
    return bfloat16_bits(np.ascontiguousarray(values)) if kind == "bf16" else values


KEEPS = st.tuples(
    *[st.one_of(st.just(All()), st.just(CODED), st.builds(Ring, st.integers(0, 3), st.integers(1, 40)))] * HEADS
)
ACTIONS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(1, 90)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["fp32", "bf16"]), keeps=KEEPS, actions=ACTIONS, seed=st.integers(0, 9))
def test_store_equals_lists_of_arrays(kind: str, keeps: tuple[Any, ...], actions: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    store = KVStore(make_spec(kind, keeps))
    alive: list[tuple[Any, Naive]] = [(store.open(reserve_tokens=seed * 7), Naive())]
    marks: list[tuple[Any, Any, Naive]] = []
    for action, which, amount in actions:
        if not alive:
            alive.append((store.open(), Naive()))
        seq, naive = alive[which % len(alive)]
        if action <= 2:
            rows = alive[: which + 1] if action == 0 else [(seq, naive)]
            append(store, keeps, kind, rows, amount if action else 1, rng)
        elif action == 3:
            alive.append((store.fork(seq), naive.copy()))
        elif action == 4:
            marks.append((seq, store.mark(seq), naive.copy()))
        elif action == 5 and any(mark[0] is seq for mark in marks):
            _, mark, then = next(mark for mark in marks if mark[0] is seq)
            store.reset(seq, mark)
            alive[which % len(alive)] = (seq, then.copy())
        elif action == 6 and which == 0 and len(alive) > 1:
            store.free(seq)
            alive.pop(which % len(alive))
        else:
            cut = min(amount, naive.length)
            overwritten = any(isinstance(keep, Ring) and naive.length > keep.sink + keep.recent for keep in keeps)
            if (overwritten and cut < naive.length) or (CODED in keeps and cut < max(naive.sealed)):
                with pytest.raises(NotRewindable):
                    store.truncate(seq, cut)
            else:
                store.truncate(seq, cut)
                naive.k, naive.v = naive.k[:, :cut], naive.v[:, :cut]
        for one, other in alive:
            assert one.length == other.length
            assert store.nbytes(one).held == other.nbytes(store.spec, keeps)
    for seq, _ in alive:
        store.free(seq)
    for _, mark, _ in marks:
        store.release(mark)
    assert store.nbytes().held == store.nbytes().reserved == store.pages_bytes == 0


def append(store: Any, keeps: Any, kind: str, rows: Any, tokens: int, rng: Any) -> None:
    """Append to several sequences in one step and compare every view with the naive arrays."""
    counts = [tokens + 3 * index for index in range(len(rows))]
    step = Step.of(counts, [naive.length for _, naive in rows], [seq for seq, _ in rows])
    k = rng.standard_normal((LAYERS, sum(counts), HEADS, SIZE), dtype=np.float32)
    v = rng.standard_normal((LAYERS, sum(counts), HEADS, SIZE), dtype=np.float32)
    views = [store.append(layer, k[layer], v[layer], step) for layer in range(LAYERS)]
    for row, (_, naive) in enumerate(rows):
        first, end, past = int(step.cu[row]), int(step.cu[row + 1]), naive.length
        naive.k = np.concatenate((naive.k, k[:, first:end]), axis=1)
        naive.v = np.concatenate((naive.v, v[:, first:end]), axis=1)
        for layer in range(LAYERS):
            seen: set[int] = set()
            for view in views[layer][row]:
                keep = keeps[view.heads[0]]
                seen.update(view.heads)
                # A new token sees itself, its chunk, and of the past what its `keep` leaves in view.
                past_seen = set(range(past))
                if isinstance(keep, Ring):
                    past_seen = {p for p in past_seen if p < keep.sink or p > past - keep.recent}
                wanted = sorted(past_seen | set(range(past, naive.length)))
                if isinstance(keep, Ring) and end - first == 1 and past < keep.sink:
                    wanted = list(range(naive.length))
                order = np.argsort(view.positions)
                assert view.positions[order].tolist() == wanted
                for index, head in enumerate(view.heads):
                    for side, (found, true) in enumerate(((view.k, naive.k), (view.v, naive.v))):
                        expected = stored(true[layer, wanted, head], kind)
                        if keep == CODED and found.dtype == np.float32:
                            expected = coded(true[layer, :, head], kind, (KEYS, VALUES)[side], naive.sealed[side])
                        np.testing.assert_array_equal(found[index, order], expected)
            assert seen == set(range(HEADS))
        naive.seal()


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
