"""What the store does on behalf of policies: budgets, thin keys, pieces, and what they weigh."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from trimtab.errors import CapacityError, NotRewindable, SpecError
from trimtab.runtime.cache.eviction import choose_pieces
from trimtab.runtime.cache.pages import bounds_of, decode, encode
from trimtab.runtime.cache.policy import Evidence
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.numerics import bfloat16_to_float32
from trimtab.runtime.step import Step
from trimtab.spec.cache import Budget, PageFormat, Pieces, PolicySpec, Thin
from trimtab.spec.configs import spec_from_config
from trimtab.spec.tree import Edit

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LAYERS, HEADS, SIZE, QUERIES = 2, 3, 16, 6


class EveryThird:
    """Keeps every third slot of each head, from a place of its own, and the newest; notes what it was shown."""

    shown: ClassVar[list[Evidence]] = []

    def keep(self, seen: Evidence, count: int) -> np.ndarray:
        EveryThird.shown.append(seen)
        slots = seen.k.shape[1]
        kept = []
        for head in seen.heads:
            order = [*range(head, slots, 3), *[s for s in range(slots) if s % 3 != head % 3]]
            kept.append(sorted(order[:count]))
        return np.array(kept, np.int64)


class Counts:
    """Adds one to the score of every token in each pass; gives up the oldest of those with the largest."""

    def keep(self, seen: Evidence, count: int) -> np.ndarray:
        assert seen.score is not None
        seen.score[...] += 1
        order = np.argsort(seen.score, axis=1, kind="stable")[:, :count]
        return np.sort(order, axis=1)


class Odd:
    """Keeps the odd channels, and as many even ones as are asked for beyond."""

    def keep(self, seen: Evidence, count: int) -> np.ndarray:
        order = [*range(1, SIZE, 2), *range(0, SIZE, 2)]
        return np.broadcast_to(np.sort(order[:count]), (len(seen.heads), count)).astype(np.int64)


def policy(kind: type, **named: Any) -> PolicySpec:
    return PolicySpec(f"{__name__}:{kind.__name__}", **named)


def make_spec(**fields: Any) -> Any:
    edits = [Edit("layers.*.self_attn.cache.heads.*", field, value) for field, value in fields.items()]
    return spec_from_config(CONFIG, "evicts").with_dtype("float32", "float32").edit(edits, by="test")


class Feed:
    """One sequence that grows pass by pass."""

    def __init__(self, spec: Any, seed: int = 0) -> None:
        self.store = KVStore(spec)
        self.seq = self.store.open()
        self.rng = np.random.default_rng(seed)
        self.k, self.v = (np.zeros((HEADS, 0, SIZE), np.float32) for _ in range(2))
        self.q = np.zeros((0, QUERIES, SIZE), np.float32)

    def push(self, count: int, ends: bool = False) -> Any:
        """Views of the last layer, and what its policies did."""
        k, v = (self.rng.standard_normal((count, HEADS, SIZE), dtype=np.float32) for _ in range(2))
        q = self.rng.standard_normal((count, QUERIES, SIZE), dtype=np.float32)
        step = Step.of([count], [self.k.shape[1]], [self.seq], ends=[ends])
        self.k, self.v = (np.concatenate((a, b.transpose(1, 0, 2)), axis=1) for a, b in ((self.k, k), (self.v, v)))
        self.q = np.concatenate((self.q, q))
        views, done = [], None
        for layer in range(LAYERS):
            views = self.store.append(layer, k, v, step, q)[0]
            views = [(view.k.copy(), view.v.copy(), view.positions.copy(), view.nbytes) for view in views]
            done = self.store.attended(layer, [q], step)
        return views[0], done

    @property
    def row(self) -> Any:
        return self.seq._rows[-1][0]


def test_a_budget_acts_once_when_the_prompt_ends_and_what_follows_is_kept() -> None:
    EveryThird.shown.clear()
    spec = make_spec(keep=Budget(20), policy=policy(EveryThird, queries=8, products=True))
    feed = Feed(spec)
    feed.push(30)
    assert feed.row.held == 30 and not EveryThird.shown
    _, done = feed.push(3, ends=True)
    shown = EveryThird.shown[-1]
    # The window reaches back into the chunk before.
    np.testing.assert_array_equal(shown.q, feed.q[-8:].reshape(8, HEADS, 2, SIZE).transpose(1, 2, 0, 3))
    assert shown.q_positions.tolist() == list(range(25, 33))
    weights = shown.weights()
    assert (weights[:, :, 0, 26:] == 0).all() and np.allclose(weights.sum(-1), 1)
    assert feed.row.held == 20 and len(EveryThird.shown) == LAYERS
    assert done.flops == 2 * 8 * QUERIES * SIZE * 33
    (k, v, at, _), _ = feed.push(1)
    for head in range(HEADS):
        wanted = EveryThird().keep(shown, 20)[head].tolist()
        assert at[head].tolist() == [*wanted, 33]
        np.testing.assert_array_equal(k[head], feed.k[head, at[head]])
        np.testing.assert_array_equal(v[head], feed.v[head, at[head]])
    feed.push(40)
    assert feed.row.held == 61
    assert feed.store.nbytes(feed.seq).held == spec.kv_nbytes(74, 33)
    with pytest.raises(NotRewindable, match="EveryThird"):
        feed.store.truncate(feed.seq, 40)


@pytest.mark.parametrize("chunks", [[50], [20, 29, 1], [1] * 50])
def test_tokens_wait_in_the_tail_until_the_prompt_has_ended_then_are_evicted_then_coded(chunks: list[int]) -> None:
    tail, keys, values = PageFormat("fp32"), PageFormat("int2", 8, by_channel=True), PageFormat("int4", 8)
    spec = make_spec(keep=Budget(37), policy=policy(EveryThird), tail=tail, residual=16, k_format=keys, v_format=values)
    feed = Feed(spec)
    past = 0
    for index, count in enumerate(chunks):
        past += count
        feed.push(count, ends=index == len(chunks) - 1)
        found = feed.store.nbytes(feed.seq)
        wanted = [layer.cache.nbytes(past, 50) for layer in spec.layers]
        assert (found.held, found.reserved) == (sum(w.held for w in wanted), sum(w.reserved for w in wanted))
    assert feed.row.sealed == (32, 21)
    (k, v, at, read), _ = feed.push(1)
    for head in range(HEADS):
        kept = feed.k[head : head + 1, at[head]], feed.v[head : head + 1, at[head]]
        np.testing.assert_array_equal(k[head, :32], decode(keys, encode(keys, kept[0][:, :32]), SIZE)[0])
        np.testing.assert_array_equal(v[head, :21], decode(values, encode(values, kept[1][:, :21]), SIZE)[0])
        np.testing.assert_array_equal(k[head, 32:], kept[0][0, 32:])
    assert read == sum(head.read_bytes(50, 1, 50) for head in spec.layers[0].cache.heads)


def test_a_budget_for_every_pass_moves_what_it_scored() -> None:
    spec = make_spec(keep=Budget(8, "pass"), policy=policy(Counts, queries=-1, score=True))
    feed = Feed(spec)
    for count in (5, 9, 1, 1, 30):
        (_, _, _, read), _ = feed.push(count, ends=count == 9)
        assert feed.row.held == min(feed.row.seen, 8)
        assert read == sum(head.read_bytes(feed.row.seen - count, count) for head in spec.layers[0].cache.heads)
        assert feed.store.nbytes(feed.seq).held == spec.kv_nbytes(feed.row.seen)
    assert feed.row.score[:, :8].tolist() == [[1.0] * 8] * HEADS  # the newest have been counted once


@pytest.mark.parametrize("coded", [False, True])
def test_thin_keys_hold_some_channels_of_old_tokens_and_all_of_new_ones(coded: bool) -> None:
    thin = Thin(10, 4, policy(Odd, queries=4))
    fields = {"thin": thin}
    keys = PageFormat("int4", 8, by_channel=True)
    if coded:
        fields |= {"tail": PageFormat("fp32"), "residual": 16, "k_format": keys, "v_format": PageFormat("int4", 8)}
    spec = make_spec(**fields)
    feed = Feed(spec)
    feed.push(30)
    feed.push(20, ends=True)
    sealed = 48 if coded else 46
    assert feed.row.sealed[0] == sealed
    found, wanted = feed.store.nbytes(feed.seq), [layer.cache.nbytes(50, 50) for layer in spec.layers]
    assert (found.held, found.reserved) == (sum(w.held for w in wanted), sum(w.reserved for w in wanted))
    if not coded:
        assert found.held == LAYERS * HEADS * (4 * (46 * 10 + 4 * 16 + 50 * 16) + 10)
    (k, _, _, _), _ = feed.push(1)
    kept = Odd().keep(Evidence(0, (0,), *[np.zeros((1, 1, 1, 1))] * 5, 1.0), 10)[0]  # type: ignore[arg-type]
    old = feed.k[:, :sealed, kept]
    np.testing.assert_array_equal(k[:, :sealed, kept], decode(keys, encode(keys, old), 10) if coded else old)
    assert not np.delete(k[:, :sealed], kept, axis=2).any()
    np.testing.assert_array_equal(k[:, sealed:], feed.k[:, sealed:])
    other = feed.store.fork(feed.seq)
    feed.push(9)
    feed.store.end_turn(feed.seq)
    assert feed.row.sealed[0] == (48 if coded else 56)
    feed.store.free(feed.seq)
    feed.store.free(other)
    assert feed.store.pages_bytes == 0


def test_pieces_are_chosen_by_bounds_and_only_they_are_read() -> None:
    spec = make_spec(select=Pieces(12, 4))
    feed = Feed(spec)
    feed.push(33)
    for _ in range(5):
        (k, v, at, read), _ = feed.push(1)
        held = feed.row.held
        q = feed.q[-1].reshape(HEADS, 2, SIZE)
        for head in range(HEADS):
            starts = range(0, held - (held - 1) % 4 - 1, 4)
            promise = []
            for start in starts:
                keys = feed.k[head, start : start + 4]
                low, high = bfloat16_to_float32(bounds_of(keys[None], 4)[0, 0])
                assert (low <= keys.min(0)).all() and (high >= keys.max(0)).all()
                promise.append(max(float(np.maximum(one * low, one * high).sum()) for one in q[head]))
            best = sorted(np.argsort(-np.array(promise), kind="stable")[:2])
            wanted = [slot for piece in best for slot in range(4 * piece, 4 * piece + 4)]
            wanted += list(range((held - 1) // 4 * 4, held))
            assert at[head].tolist() == wanted
            np.testing.assert_array_equal(k[head], feed.k[head, wanted])
            np.testing.assert_array_equal(v[head], feed.v[head, wanted])
        assert read == sum(head.read_bytes(held - 1, 1) for head in spec.layers[0].cache.heads)
        assert feed.store.nbytes(feed.seq).held == spec.kv_nbytes(held)
    (k, _, at, _), _ = feed.push(3)
    assert at.tolist() == list(range(feed.row.held))  # several tokens read everything


def test_everything_is_read_while_it_fits() -> None:
    bounds = np.zeros((1, 4, 2, SIZE), np.uint16)
    assert choose_pieces(Pieces(16, 4), np.zeros((1, 2, 1, SIZE), np.float32), bounds, 15).tolist() == [list(range(15))]


def test_an_eviction_makes_the_heads_of_a_layer_differ_and_frees_their_pages() -> None:
    feed = Feed(make_spec())
    feed.push(300)
    freed = feed.store.evict(feed.seq, 1, 2, np.arange(10))
    assert freed == 2 * 4  # of five pages of keys and five of values one stays
    assert [row.held for row in feed.seq._rows[1]] == [300, 300, 10] and feed.seq._rows[0][0].held == 300
    for bad in ([5, 4], [0, 300], [-1]):
        with pytest.raises(SpecError, match="ascend"):
            feed.store.evict(feed.seq, 0, 0, np.array(bad))
    feed.push(1)
    assert [row.held for row in feed.seq._rows[1]] == [301, 301, 11]


def test_a_full_store_says_how_many_tokens_fit() -> None:
    spec = make_spec(
        tail=PageFormat("fp32"),
        residual=16,
        k_format=PageFormat("int2", 8, by_channel=True),
        v_format=PageFormat("int2", 8),
    )
    room = sum(layer.cache.nbytes(1000, 1000).reserved for layer in spec.layers)
    store = KVStore(spec, capacity_bytes=room)
    with pytest.raises(CapacityError, match=r"(\d+) tokens of evicts still fit") as refused:
        store.open(4000)
    fits = int(str(refused.value).rpartition("taken. ")[2].split()[0])
    assert 1000 <= fits < 1200
    store.open(fits)
