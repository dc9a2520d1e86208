"""Sequences in slots: what is mapped, what is shared, what stays; the same numbers as pages give."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import CapacityError, SpecError
from trimtab.model.variant import Model
from trimtab.runtime.cache import rows, slots
from trimtab.runtime.cache.slots import SlotRow
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.kernels import _core
from trimtab.runtime.native import lower
from trimtab.runtime.step import Step
from trimtab.spec.configs import spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, parse_technique, spec_string

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped to fixed addresses on Linux alone")

#: 3 KV heads of 64 in 16 bits: 384 bytes of a token, which divide no page.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 192, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TENSORS = 4


def spec_of(text: str, kv: str = "float16") -> ModelSpec:
    spec = spec_from_config(CONFIG, "slots").with_dtype("float32", kv)
    return compose(spec, parse_all([text])) if text else spec


def store_of(text: str, kv: str = "float16", capacity_bytes: int | None = None) -> KVStore:
    return KVStore(spec_of(text, kv), capacity_bytes)


def append(store: KVStore, seq: Any, past: int, count: int, seed: int) -> list[Any]:
    rng = np.random.default_rng([seed, past])
    views = []
    for layer in range(2):
        k, v = rng.standard_normal((2, count, 3, 64), np.float32)
        views.append(store.append(layer, k, v, Step.of([count], [past], [seq]))[0][0])
    return views


def same(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a.k, b.k) and np.array_equal(a.v, b.v) for a, b in zip(one, other, strict=True))


def core(**options: Any) -> tuple[_core.SlotMemory, Any]:
    memory = _core.SlotMemory(
        [384] * TENSORS, **{"slots": 3, "tokens": 512, "page": 4096, "pool_groups": 144, **options}
    )

    def step(seq: int, first: int, end: int) -> tuple[int, int]:
        found = np.empty((1, 2), np.int64)
        memory.step(np.array([seq]), np.array([first]), np.array([end]), found)
        return int(found[0, 0]), int(found[0, 1])

    return memory, step


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "float16", "fp8"])
@pytest.mark.parametrize(
    "text", ["vattn:page=4096", "vattn:layout=mega", "vattn:backend=static", "vattn:page=65536,async=false"]
)
def test_reads_what_pages_read(text: str, kv: str) -> None:
    store, plain = store_of(f"{text}{',' if ':' in text else ':'}max_batch=2,max_len=300", kv), store_of("", kv)
    seq, twin = store.open(), plain.open()
    for past, count in ((0, 70), (70, 1), (71, 1), (72, 130), (202, 1)):
        assert same(append(store, seq, past, count, 1), append(plain, twin, past, count, 1))
    assert store.nbytes(seq).held == plain.nbytes(twin).held == store.spec.kv_nbytes(203)


def test_is_mapped_by_bytes() -> None:
    store = store_of("vattn:page=4096,async=false")
    seq, pool = store.open(), store.slots
    assert pool is not None
    for past in range(100):
        append(store, seq, past, 1, 2)
        groups = -(-(past + 1) * 384 // 4096)  # tokens straddle pages
        assert pool.core.used_groups == groups
        assert pool.counts()["file_bytes"] == groups * TENSORS * 4096
    assert store.pages_bytes == store.peak_bytes == 10 * TENSORS * 4096


@pytest.mark.parametrize("layout", ["per_layer", "mega"])
def test_predicted_bytes_are_those_of_the_file(layout: str) -> None:
    store = store_of(f"vattn:layout={layout},max_len=1024,async=false")
    for tokens in (1, 159, 160, 161, 900):
        append(store, seq := store.open(), 0, tokens, 3)
        predicted = sum(layer.cache.nbytes(tokens).reserved for layer in store.spec.layers)
        assert store.slots is not None
        assert predicted == store.nbytes(seq).reserved == store.slots.counts()["file_bytes"]
        store.free(seq)
        store = store_of(f"vattn:layout={layout},max_len=1024,async=false")


def test_a_sequence_never_moves() -> None:
    store = store_of("vattn:page=4096")
    seq, at = store.open(), set()
    for past in range(0, 640, 32):
        append(store, seq, past, 32, 4)
        row = seq._rows[1][0]
        assert isinstance(row, SlotRow)
        at.add(row.array(0).ctypes.data)
    assert len(at) == 1


def test_forks_share_pages_until_one_writes() -> None:
    store, plain = store_of("vattn:page=4096,async=false"), store_of("")
    seq, twin = store.open(), plain.open()
    append(store, seq, 0, 200, 5), append(plain, twin, 0, 200, 5)
    assert store.slots is not None
    alone = store.slots.core.used_groups
    others = [(store.fork(seq), plain.fork(twin)) for _ in range(4)]
    assert store.slots.core.used_groups == alone
    for index, (one, other) in enumerate(others):
        assert same(append(store, one, 200, 3, 10 + index), append(plain, other, 200, 3, 10 + index))
    assert store.slots.core.used_groups == alone + 4 * 2  # the page with the last tokens, and one more
    assert same(append(store, seq, 200, 1, 5), append(plain, twin, 200, 1, 5))
    store.free(seq)
    for index, (one, other) in enumerate(others):
        assert same(append(store, one, 203, 1, 20 + index), append(plain, other, 203, 1, 20 + index))
        store.free(one)
    assert store.slots.core.used_groups == 0


def test_marks_and_cuts() -> None:
    store, plain = store_of("vattn:page=4096"), store_of("")
    seq, twin = store.open(), plain.open()
    append(store, seq, 0, 100, 6), append(plain, twin, 0, 100, 6)
    marks = store.mark(seq), plain.mark(twin)
    for turn in range(3):
        assert same(append(store, seq, 100, 40, 30 + turn), append(plain, twin, 100, 40, 30 + turn))
        store.reset(seq, marks[0]), plain.reset(twin, marks[1])
        assert seq.length == 100
    store.truncate(seq, 55), plain.truncate(twin, 55)
    assert same(append(store, seq, 55, 30, 7), append(plain, twin, 55, 30, 7))
    store.reset(seq, marks[0]), plain.reset(twin, marks[1])
    assert same(append(store, seq, 100, 1, 8), append(plain, twin, 100, 1, 8))
    store.release(marks[0])
    store.free(seq)
    assert store.slots is not None and store.slots.core.used_groups == 0


@pytest.mark.parametrize(
    "text", ["vattn:max_len=256,page=4096", "vattn:max_len=256,layout=mega", "vattn:max_len=256,backend=static"]
)
def test_the_native_program_computes_the_same(tiny_model: Model, text: str) -> None:
    logits = []
    for techniques in ([], [text]):
        spec = compose(tiny_model.spec, parse_all(techniques))
        runner = lower(spec, tiny_model.weights, 1)
        store = runner.open_store()
        seqs, past = [store.open() for _ in range(3)], [40, 3, 17]
        ids = np.arange(60) % 131
        found = [runner.forward(ids, Step.of(past, [0] * 3, seqs), store, np.array([39, 42, 59]))]
        seqs.append(store.fork(seqs[0]))
        past.append(40)
        for _ in range(70):
            step = Step.of([1] * 4, past, seqs)
            found.append(runner.forward(np.array([5, 6, 7, 8]), step, store, np.arange(4)))
            past = [p + 1 for p in past]
        logits.append(found)
    for one, other in zip(*logits, strict=True):
        assert np.array_equal(one, other)


def test_what_a_sequence_leaves_is_used_again() -> None:
    memory, step = core()
    for _ in range(5):
        seq = memory.open()
        assert step(seq, 0, 200)[0] == 0
        memory.close(seq)
    counts = memory.counts()
    assert counts["map_calls"] == TENSORS and counts["unmap_calls"] == 0 and counts["kept_groups"] == 19
    memory, step = core(deferred=False)
    seq = memory.open()
    step(seq, 0, 200)
    memory.close(seq)
    assert memory.counts()["file_bytes"] == 0


def test_the_best_fitting_slot_is_taken() -> None:
    memory, step = core()
    seqs = [memory.open() for _ in range(3)]
    for seq, tokens in zip(seqs, (300, 30, 100), strict=True):
        step(seq, 0, tokens)
    for seq in seqs:
        memory.close(seq)
    assert step(memory.open(), 0, 90)[0] == 2
    assert step(memory.open(), 0, 90)[0] == 0
    with pytest.raises(MemoryError, match="max_batch"):
        step(memory.open(), 0, 1), step(memory.open(), 0, 1)


def test_a_full_pool_takes_from_idle_slots_then_refuses() -> None:
    memory, step = core(pool_groups=50)
    first, second = memory.open(), memory.open()
    step(first, 0, 500), memory.close(first)
    step(second, 0, 10)
    third = memory.open()
    step(third, 0, 500)
    with pytest.raises(MemoryError, match="no page left"):
        step(second, 10, 100)
    memory.close(third)
    step(second, 10, 100)
    assert memory.counts()["file_bytes"] <= 50 * TENSORS * 4096


def test_pages_are_mapped_ahead() -> None:
    memory, step = core(background=True, eager_steps=10, eager_groups=1)
    seq = memory.open()
    step(seq, 0, 22)
    memory.settle()
    assert memory.counts()["kept_groups"] == 0  # 32 tokens fill the 3 pages that are there
    step(seq, 22, 25)
    memory.settle()
    assert memory.counts()["kept_groups"] == 1
    before = memory.counts()["map_calls"]
    step(seq, 25, 33)
    memory.settle()
    # The page of token 33 was there; that of 43 is mapped by now.
    assert memory.counts()["map_calls"] == before + TENSORS and memory.counts()["used_groups"] == 4


def test_others_never_see_what_was_written() -> None:
    store = store_of("vattn:secure=true,async=false,max_batch=1")
    seq = store.open()
    append(store, seq, 0, 100, 9)
    store.free(seq)
    seq = store.open()
    step = Step.of([100], [0], [seq])
    store.place(step)
    row = seq._rows[0][0]
    assert isinstance(row, SlotRow) and not row.array(0)[:, :100].any()


def test_a_child_process_shares_no_page() -> None:
    store = store_of("vattn:async=false,max_batch=1")
    seq = store.open()
    append(store, seq, 0, 10, 1)
    row = seq._rows[0][0]
    assert isinstance(row, SlotRow)
    smaps = Path("/proc/self/smaps").read_text().split(f"\n{row.array(0).ctypes.data:x}-")[1]
    assert " dc" in smaps.split("VmFlags:")[1].split("\n")[0]


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for text, match in (
        ("vattn+kivi", "every token"), ("kivi+vattn", "every token"), ("streaming-llm+vattn", "whole|every token"), ("h2o+vattn", "every token"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=match):
            compose(spec_of(""), parse_all([text]))
    with pytest.raises(SpecError, match=r"page=5000.*4096.*page=4096"):
        spec_of("vattn:page=5000")
    with pytest.raises(CapacityError, match=r"max_len=1024.*lower max_len"):
        store_of("vattn", capacity_bytes=1 << 16)
    store = store_of("vattn:max_len=64")
    with pytest.raises(CapacityError, match="max_len"):
        append(store, store.open(), 0, 65, 1)
    seq = store.open()
    append(store, seq, 0, 9, 1)
    with pytest.raises(SpecError, match="every token"):
        store.evict(seq, 0, 0, np.array([0]))
    limit = tmp_path / "max_map_count"
    limit.write_text("120")
    monkeypatch.setattr(slots, "MAX_MAP_COUNT", limit)
    with pytest.raises(CapacityError, match=r"vm.max_map_count is 120.*sysctl"):
        store_of("vattn")


def test_other_systems_keep_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SLOTS", False)
    with pytest.warns(UserWarning, match="kept in pages"):
        store = store_of("vattn")
    assert store.slots is None
    plain = store_of("")
    assert same(append(store, store.open(), 0, 70, 1), append(plain, plain.open(), 0, 70, 1))


def test_the_parameter_async_is_spelled_as_in_the_paper() -> None:
    technique = parse_technique("vattn:async=false")
    assert spec_string(technique) == "vattn:async=false"
    assert not dataclasses.asdict(technique)["async_"]
