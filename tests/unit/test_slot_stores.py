"""A store in slots against one in pages: whatever is done to both, both read the same, and nothing is left at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import CapacityError
from trimtab.runtime.cache.store import KVStore, Mark
from trimtab.runtime.step import Step
from trimtab.spec.configs import spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped to fixed addresses on Linux alone")

#: 3 KV heads of 64 in 16 bits: 384 bytes of a token, which divide no page.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 192, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
BATCH = 4
KINDS = ("open", "append", "append", "append", "append", "fork", "mark", "reset", "release", "truncate", "free")
ACTS = st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 100))


@cache
def spec_of(text: str) -> ModelSpec:
    spec = spec_from_config(CONFIG, "slots").with_dtype("float32", "float16")
    return compose(spec, parse_all([text])) if text else spec


@dataclass
class Twin:
    """The same sequence in both stores, and what it may come back to."""

    seqs: tuple[Any, Any]
    marks: list[tuple[Mark, Mark]]


class Stores:
    """A store in slots and one in pages."""

    def __init__(self, text: str, groups: int | None) -> None:
        spec = spec_of(text)
        first = spec.layers[0].cache.heads[0].slots
        assert first is not None
        tensors = 4 if first.heads == 3 else 2
        self.slots = KVStore(spec, None if groups is None else groups * tensors * first.page)
        self.pages = KVStore(spec_of(""))
        self.both = self.slots, self.pages
        self.twins: list[Twin] = []
        self.rng = np.random.default_rng(0)

    def act(self, kind: str, which: int, amount: int) -> None:
        if kind == "open" or not self.twins:
            self.twins.append(Twin((self.slots.open(), self.pages.open()), []))
            return
        twin = self.twins[which % len(self.twins)]
        one, other = twin.seqs
        assert one.length == other.length
        if kind == "append":
            self.append([twin, *self.twins[: amount % 3]], 1 + amount // 3)
        elif kind == "fork":
            self.twins.append(Twin((self.slots.fork(one), self.pages.fork(other)), []))
        elif kind == "mark":
            twin.marks.append((self.slots.mark(one), self.pages.mark(other)))
        elif kind == "reset" and twin.marks:
            for store, seq, mark in zip(self.both, twin.seqs, twin.marks[amount % len(twin.marks)], strict=True):
                store.reset(seq, mark)
        elif kind == "release" and twin.marks:
            for store, mark in zip(self.both, twin.marks.pop(amount % len(twin.marks)), strict=True):
                store.release(mark)
        elif kind == "truncate":
            for store, seq in zip(self.both, twin.seqs, strict=True):
                store.truncate(seq, min(amount, seq.length))
        elif kind == "free":
            self.free(twin)

    def free(self, twin: Twin) -> None:
        """End a sequence and what it could come back to."""
        self.twins = [each for each in self.twins if each is not twin]
        for marks in twin.marks:
            for store, mark in zip(self.both, marks, strict=True):
                store.release(mark)
        for store, seq in zip(self.both, twin.seqs, strict=True):
            store.free(seq)

    def append(self, twins: list[Twin], count: int) -> None:
        """New tokens for several sequences at once; where slots or pool are used up, the last of them goes and the rest try again."""
        twins = list({id(twin): twin for twin in twins}.values())
        twins = [twin for twin in twins if twin.seqs[0].length + count <= 128]
        while twins:
            past = [twin.seqs[1].length for twin in twins]
            k, v = self.rng.standard_normal((2, 2, count * len(twins), 3, 64), np.float32)
            steps = [Step.of([count] * len(twins), past, [twin.seqs[side] for twin in twins]) for side in range(2)]
            try:
                found = [self.slots.append(layer, k[layer], v[layer], steps[0]) for layer in range(2)]
            except CapacityError:
                assert [twin.seqs[0].length for twin in twins] == past, "refused, and yet longer"
                self.free(twins.pop())
                continue
            wanted = [self.pages.append(layer, k[layer], v[layer], steps[1]) for layer in range(2)]
            for layer in range(2):
                for got, right in zip(found[layer], wanted[layer], strict=True):
                    assert np.array_equal(got[0].k, right[0].k) and np.array_equal(got[0].v, right[0].v)
            return

    def check(self) -> None:
        """Bytes of tokens are the same; those of pages are what the pool says, and not more than it has."""
        pool = self.slots.slots
        assert pool is not None
        for twin in self.twins:
            one, other = (store.nbytes(seq).held for store, seq in zip(self.both, twin.seqs, strict=True))
            assert one == other
        assert self.slots.pages_bytes == pool.counts()["used_groups"] * pool.group_bytes
        needed = sum(self.slots.nbytes(twin.seqs[0]).reserved for twin in self.twins)
        for mark, _ in (marks for twin in self.twins for marks in twin.marks):
            needed += sum(layer.cache.nbytes(mark.rows[0][0].seen).reserved for layer in self.slots.spec.layers)
        assert self.slots.pages_bytes <= needed, "pages of nobody"
        assert pool.counts()["file_bytes"] <= pool.pool_groups * pool.group_bytes


@given(
    acts=st.lists(ACTS, max_size=30),
    how=st.sampled_from(
        [
            "page=4096",
            "page=4096,async=false",
            "layout=mega",
            "page=4096,backend=static",
            "page=8192,deferred_reclaim=false",
        ]
    ),
    groups=st.sampled_from([None, 14, 30]),
)
def test_slots_read_what_pages_read(acts: list[tuple[str, int, int]], how: str, groups: int | None) -> None:
    stores = Stores(f"vattn:max_batch={BATCH},max_len=128,{how}", groups)
    for act in acts:
        stores.act(*act)
        stores.check()
    while stores.twins:
        stores.free(stores.twins[0])
    assert stores.slots.pages_bytes == stores.pages.pages_bytes == 0


def test_what_a_fork_shares_is_not_written_over() -> None:
    stores = Stores(f"vattn:max_batch={BATCH},max_len=128,page=4096,async=false", None)
    for act in (
        ("open", 0, 0),
        ("append", 0, 60),
        ("fork", 0, 0),
        ("truncate", 0, 11),
        ("append", 0, 15),
        ("append", 1, 0),
    ):
        stores.act(*act)
        stores.check()
