"""What policies, chosen pieces and sparse prompts cost: counts by hand, against loops, and in a prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_policies import HEADS, KEY, KV_HEADS, LAYERS, PER_HEAD, SIZE, TOKEN, attention, tiny
from trimtab.graph.attention import QUERY_TILE
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Op, StepShape
from trimtab.graph.passes import passes
from trimtab.model.attention import visible
from trimtab.predict.predict import predict
from trimtab.predict.price import price
from trimtab.spec.cache import KEEP_ALL
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import Prefill
from trimtab.spec.workload import Workload
from trimtab.techniques.apply import applied
from trimtab.techniques.plan import make_plan


def op(spec: ModelSpec, name: str = "evict") -> Op:
    return next(each for each in build(spec).ops if each.name == f"layers.0.self_attn.{name}")


def counted(spec: ModelSpec, name: str = "evict", **step: Any) -> tuple[int, int, int]:
    """(flops, kv_read, kv_written) of one op."""
    found = count(op(spec, name), StepShape.of(**step))
    return int(found.flops), int(found.kv_read), int(found.kv_written)


def test_the_op_stands_behind_attention_and_only_where_something_is_chosen() -> None:
    names = build(tiny("snapkv:cap=40")).names
    assert names.count("layers.0.self_attn.evict") == 1
    assert names[names.index("layers.0.self_attn.evict") - 1] == "layers.0.self_attn.attend"
    for text in ("", "streaming-llm", "quest", "kivi:group=8,residual=8", "a-shape", "think:ratio=0"):
        assert not any(name.endswith("evict") for name in build(tiny(text)).names)
    assert not any(name.endswith("evict") for name in build(tiny("snapkv"), cache=False).names)


def test_a_prompt_that_is_cut_by_hand() -> None:
    """12 of 30 tokens stay per head: one look at 30 keys by the last 4 queries, and at most 12 tokens that move."""
    spec = tiny("snapkv:cap=12,window=4")
    flops = KV_HEADS * 2 * 4 * 30 * SIZE * PER_HEAD
    looked, moved = KV_HEADS * 30 * KEY, KV_HEADS * 12 * TOKEN
    assert counted(spec, new=[30], past=[0]) == (flops, looked + moved, moved)
    # In chunks the last one does it, and the tokens of one that is not the last are not touched.
    assert counted(spec, new=[10], past=[20], prompt=[30]) == (flops, looked + moved, moved)
    assert counted(spec, new=[10], past=[10], prompt=[30]) == (0, 0, 0)
    # Not again, and not where nothing has to go.
    assert counted(spec, new=[1], past=[30], prompt=[30]) == (0, 0, 0)
    assert counted(spec, new=[12], past=[0]) == (0, 0, 0)
    # Fewer go than stay: these are what moves at most.
    few = KV_HEADS * 3 * TOKEN
    assert counted(spec, new=[15], past=[0])[2] == few
    observed = {"layers.0.self_attn.evict.moved": 17}
    assert counted(spec, new=[30], past=[0], observed=observed) == (flops, looked + 17 * TOKEN, 17 * TOKEN)
    # Rows by themselves, copies on top.
    two = counted(spec, new=[30, 12], past=[0, 0], copies=3)
    assert two == (3 * flops, 3 * (looked + moved), 3 * moved)


def test_what_attention_reads_behind_a_cut_prompt() -> None:
    spec = tiny("snapkv:cap=12,window=4")
    for attention_kind in ("eager", "tiled"):
        found = count(op(spec, "attend"), StepShape.of([1], [35], prompt=[30]), attention_kind)
        assert int(found.kv_read) == KV_HEADS * (12 + 5 + 1) * TOKEN
        assert int(found.flops) == 2 * HEADS * (12 + 5 + 1) * 2 * SIZE
    running = count(op(spec, "attend"), StepShape.of([10], [10], prompt=[30]))
    assert int(running.kv_read) == KV_HEADS * 20 * TOKEN


def test_policies_of_every_pass_by_hand() -> None:
    spec = tiny("h2o:cap=12")
    # A prompt of 30: every query looks at every key, and 12 stay.
    moved = KV_HEADS * 12 * TOKEN
    assert counted(spec, new=[30], past=[0]) == (
        KV_HEADS * 2 * 30 * 30 * SIZE * PER_HEAD, KV_HEADS * 30 * KEY + moved, moved,
    )  # fmt: skip
    # The next token: 12 held and itself, one has to go.
    step = (KV_HEADS * 2 * 13 * SIZE * PER_HEAD, KV_HEADS * (13 * KEY + TOKEN), KV_HEADS * TOKEN)
    assert counted(spec, new=[1], past=[30], prompt=[30]) == step
    # Below the budget scores are still summed up.
    assert counted(spec, new=[1], past=[5], prompt=[5]) == (KV_HEADS * 2 * 6 * SIZE * PER_HEAD, KV_HEADS * 6 * KEY, 0)
    tova = tiny("tova:cap=12")
    assert counted(tova, new=[1], past=[5], prompt=[5]) == (0, 0, 0)
    assert counted(tova, new=[30], past=[0])[0] == KV_HEADS * 2 * 30 * SIZE * PER_HEAD
    knorm = tiny("knorm:cap=12")
    assert counted(knorm, new=[30], past=[0]) == (0, KV_HEADS * 30 * KEY + moved, moved)


def test_thin_keys_by_hand() -> None:
    """8 channels lose 3; of 30 keys the newest 10 stay whole."""
    spec = tiny("think:ratio=0.4,recent=10")
    assert counted(spec, new=[30], past=[0]) == (0, KV_HEADS * 30 * KEY, KV_HEADS * 20 * 2 * 5)
    assert counted(spec, new=[10], past=[0]) == (0, 0, 0)  # nothing is old enough
    assert counted(spec, new=[20], past=[0], prompt=[30]) == (0, 0, 0)
    assert counted(spec, "append", new=[30], past=[0]) == (0, 0, KV_HEADS * 30 * TOKEN)
    read = KV_HEADS * (20 * (2 * 5 + KEY) + 16 * TOKEN)
    assert counted(spec, "attend", new=[1], past=[35], prompt=[30])[1] == read
    assert spec.kv_nbytes(35, 30) == LAYERS * KV_HEADS * (20 * (2 * 5 + KEY) + 15 * TOKEN + 5)


def test_what_waits_is_coded_where_the_prompt_ends() -> None:
    """kivi codes while a prompt runs; behind a policy it codes what stays, once, and the eviction writes that."""
    kivi, both = tiny("kivi:group=8,residual=8"), tiny("snapkv:cap=20,window=4+kivi:group=8,residual=8")
    landing = KV_HEADS * 30 * TOKEN
    coded = attention(kivi).cache.heads[0]
    whole = KV_HEADS * int(coded.sealed_bytes(0, 30))
    assert counted(kivi, "append", new=[30], past=[0]) == (0, 0, landing + whole)
    assert counted(both, "append", new=[30], past=[0]) == (0, 0, landing)
    stays = KV_HEADS * int(attention(both).cache.heads[0].sealed_bytes(0, 30, 30))
    # 16 keys by channel and 12 values by token in 2 bits, a scale and a minimum for 8 elements.
    assert stays == KV_HEADS * (16 * 2 + 2 * 4 * SIZE + 12 * (2 + 4))
    moved = KV_HEADS * 10 * TOKEN
    assert counted(both, new=[30], past=[0])[2] == stays + moved
    # Later tokens are coded as they come, under `append` again.
    later = counted(both, "append", new=[1], past=[30], prompt=[30])[2]
    assert later == KV_HEADS * (TOKEN + int(attention(both).cache.heads[0].sealed_bytes(30, 1, 30)))
    assert counted(both, new=[1], past=[30], prompt=[30]) == (0, 0, 0)


def test_chosen_pieces_by_hand() -> None:
    """A step behind 100 tokens reads 3 pieces of 16, the last with 5 tokens in it, and bounds of 7 pieces."""
    spec = tiny("quest:budget=48,skip=0")
    keys, bounds = 2 * 16 + 5, 7 * 2 * SIZE * 2
    for kind in ("eager", "tiled"):
        found = count(op(spec, "attend"), StepShape.of([1, 1], [100, 7]), kind)
        assert int(found.kv_read) == KV_HEADS * (keys * TOKEN + bounds + 8 * TOKEN + 2 * SIZE * 2)
        assert int(found.flops) == 4 * HEADS * SIZE * (keys + 8)
    whole = count(op(spec, "attend"), StepShape.of([9], [100]))
    assert int(whole.kv_read) == KV_HEADS * 109 * TOKEN
    assert int(count(op(spec, "attend"), StepShape.of([1], [100]), "tiled", llc_bytes=0).kv_read) == KV_HEADS * (
        keys * TOKEN + bounds
    )


@pytest.mark.parametrize(
    ("new", "past", "prompt"), [(300, 0, 300), (300, 170, 470), (300, 170, 900), (40, 0, 40), (1, 99, 99)]
)
@pytest.mark.parametrize(("sink", "local", "last"), [(0, 16, 0), (7, 30, 0), (7, 30, 10), (20, 100, 200)])
def test_sparse_prompts_against_loops(new: int, past: int, prompt: int, sink: int, local: int, last: int) -> None:
    """Pairs and keys of the pattern where tiles are skipped, the rectangle where not; the decoder's mask is the same."""
    name = f"tri-shape:sink={sink},local={local},last={last}" if last else f"a-shape:sink={sink},local={local}"
    attend = op(tiny(name), "attend")
    step = StepShape.of([new], [past], prompt=[prompt])
    ends = past < prompt <= past + new
    whole = new if new == 1 else min(last, new) * ends
    keys = []
    for query in range(past, past + new):
        near = {key for key in range(query + 1) if key < sink or key > query - local}
        keys.append(set(range(query + 1)) if query >= past + new - whole else near)
    once = count(attend, step, "tiled")
    assert int(once.flops) == 4 * HEADS * SIZE * sum(map(len, keys))
    assert int(once.kv_read) == KV_HEADS * TOKEN * len(set().union(*keys))
    again = count(attend, step, "tiled", llc_bytes=0)
    tiles = [set().union(*keys[at : at + QUERY_TILE]) for at in range(0, new, QUERY_TILE)]
    assert int(again.kv_read) == KV_HEADS * TOKEN * sum(map(len, tiles))
    eager = count(attend, step)
    assert int(eager.flops) == 4 * HEADS * SIZE * new * (past + new)
    queries, at = torch.arange(past, past + new), torch.arange(past + new)
    mask = visible(queries, at, None, KEEP_ALL, Prefill(sink, local, last), ends)
    seen = torch.ones(new, past + new, dtype=torch.bool) if mask is None else mask
    assert [set(row.nonzero().flatten().tolist()) for row in seen] == keys


def test_a_sparse_prompt_in_the_decoder(tiny_model: Any, tiny_materials: Any) -> None:
    """What a query does not see does not matter: other tokens there leave its logits alone."""
    ids = np.random.default_rng(0).integers(0, 131, 40)
    other = ids.copy()
    other[4:14] = (other[4:14] + 1) % 131
    # Three layers pass things on over three times the nearest tokens, so the far ones must be out of reach of all.
    with applied(tiny_model, "a-shape:sink=0,local=8", materials=tiny_materials):
        one, two = (tiny_model.logits(torch.from_numpy(x)[None])[0, -1] for x in (ids, other))
        assert torch.equal(one, two)
    with applied(tiny_model, "tri-shape:sink=0,local=8,last=1", materials=tiny_materials):
        one, two = (tiny_model.logits(torch.from_numpy(x)[None])[0, -1] for x in (ids, other))
        assert not torch.equal(one, two)


@pytest.mark.parametrize("text", ["a-shape:sink=2,local=6", "tri-shape:sink=2,local=6,last=5"])
def test_a_sparse_prompt_is_the_same_in_chunks(tiny_model: Any, tiny_materials: Any, text: str) -> None:
    """In 11 tokens at a time or at once, as long as the last chunk holds the last queries; steps then see all."""
    prompts = [np.random.default_rng(1).integers(0, 131, length) for length in (40, 29)]
    found = []
    with applied(tiny_model, text, materials=tiny_materials) as model:
        for chunk in (11, 512):
            session = model.session(chunk=chunk)
            found.append([session.prefill(prompts), *(session.decode([token] * 2) for token in (5, 6))])
    dense = tiny_model.session().prefill(prompts)
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    assert np.abs(found[0][0] - dense).max() > 1e-3


def test_passes_know_the_prompt_and_memory_its_peak() -> None:
    work = Workload(batch=2, prompt=1000, gen=20)
    plan = make_plan(tiny(), "a100", work, ["snapkv:cap=128"], stack="datasheet")
    found = passes(plan)
    assert all((each.step.prompt == 1000).all() for each in found if each.step.prompt is not None)
    assert all(each.step.prompt is not None for each in found)
    report = predict(plan)
    assert report.counts["kv_bytes"] == 2 * LAYERS * KV_HEADS * (128 + 20) * (TOKEN + 4)
    # 16 pages of 64 in the layer that runs, 2 of what was chosen in those before it
    assert report.counts["kv_reserved_bytes"] < report.counts["kv_peak_bytes"]
    assert report.counts["kv_peak_bytes"] == 2 * KV_HEADS * TOKEN * (1024 + (LAYERS - 1) * 128)
    # In passes of 256 nothing is chosen before the last one: the layers behind hold 12 pages.
    stack = replace(plan.stack, prefill_chunk=256)
    whole = 2 * KV_HEADS * TOKEN * (1024 + (LAYERS - 1) * 768)
    assert predict(replace(plan, stack=stack)).counts["kv_peak_bytes"] == whole
    assert report.counts["peak_bytes"] == sum(
        report.counts[name] for name in ("weight_bytes", "kv_peak_bytes", "activation_bytes", "reserve_bytes")
    )
    decode = sum(row.time_s for row in report.ops if row.phase == "decode" and row.name.endswith("evict"))
    assert decode == 0
    assert predict(make_plan(tiny(), "a100", work, ["h2o:cap=128"], stack="datasheet")).observed == {
        f"layers.{layer}.self_attn.evict.moved": 2.0 * KV_HEADS for layer in range(LAYERS)
    }


def test_price_of_an_eviction_is_paid_once() -> None:
    spec = tiny("snapkv:cap=12,window=4")
    stack = load_stack("datasheet").on(load_machine("a100"))
    kernels = [k for k in fuse(build(spec), stack) if k.name.endswith("evict")]
    step = StepShape.of([[30], [1]], [[0], [30]], prompt=[[30], [30]])
    times = price(kernels, step, load_machine("a100"), stack).kernels[0].time_s
    assert times[0] > 0 and times[1] == 0


def test_recorded_kernels_price_sparse_prompts_and_chosen_pages() -> None:
    """A stack whose attention was recorded knows neither; both are priced as fewer keys."""
    work = Workload(batch=8, prompt=32_000, gen=50)
    plain, shaped, chosen = (
        predict(make_plan("llama-3.1-8b", "a100", work, names, stack="vllm")).figures
        for names in ([], ["a-shape"], ["quest"])
    )
    assert (shaped["ttft_s"].value or 0) < 0.7 * (plain["ttft_s"].value or 0)
    assert (chosen["tpot_s"].value or 0) < 0.6 * (plain["tpot_s"].value or 0)
    for one, other, name in ((shaped, plain, "tpot_s"), (chosen, plain, "ttft_s")):
        assert one[name].value == other[name].value
