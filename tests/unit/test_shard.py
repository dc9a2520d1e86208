"""Tensor, expert and pipeline parallelism: parts sum to the whole, one device equals none, the collectives are counted."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import Counts, StepShape
from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard, tp_choices
from trimtab.predict.memory import Footprint, stages
from trimtab.predict.predict import predict
from trimtab.spec.configs import load_spec
from trimtab.spec.machine import load_stack
from trimtab.spec.nodes import MoESpec
from trimtab.spec.parallel import ALONE, Parallel
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import make_plan

STEP = StepShape.of([[5]], [[11]], logits=1)
MODELS = ("llama-3.1-8b", "qwen3-30b-a3b", "gpt-neox-20b", "gemma-2-9b", "deepseek-v3")


def totals(spec, phase: str = "decode", kinds: tuple[str, ...] = ()) -> dict[str, int]:
    found = Counts()
    for op in build(spec, phase).ops:  # type: ignore[arg-type]
        if not kinds or op.kind in kinds:
            found = found + count(op, STEP, "tiled")
    return {name: int(np.sum(getattr(found, name))) for name in Counts.__slots__}


@pytest.mark.parametrize("name", MODELS)
def test_one_device_is_the_model_itself(name: str) -> None:
    spec = load_spec(name)
    assert shard(spec, ALONE) is spec
    assert not any(op.kind.startswith("all_") for op in build(spec, "decode").ops)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", (2, 4))
def test_ranks_sum_to_the_whole(name: str, tp: int) -> None:
    spec = load_spec(name).with_dtype("bfloat16")
    part = shard(spec, Parallel(tp=tp))
    kinds = ("linear", "attend", "expert", "attend_latent", "absorb_q", "absorb_v")
    whole, rank = totals(spec, kinds=kinds), totals(part, kinds=kinds)
    if name == "deepseek-v3":  # the two down projections into the latents and the cache are on every rank
        for kind in ("expert", "absorb_q", "absorb_v", "attend_latent"):
            assert tp * totals(part, kinds=(kind,))["flops"] == totals(spec, kinds=(kind,))["flops"]
        assert part.kv_nbytes(100) == spec.kv_nbytes(100)
        return
    assert tp * rank["flops"] == whole["flops"]
    assert tp * part.kv_nbytes(100) == spec.kv_nbytes(100)
    # Biases of row-parallel matrices are on every rank; everything else is cut.
    over = tp * rank["weight_read"] - whole["weight_read"]
    biases = sum(
        n.bias_format.nbytes(1, n.n) for p, n in spec.linears() if n.bias and p.endswith(("o_proj", "down_proj"))
    )
    assert over == (tp - 1) * biases


def test_experts_are_spread_whole_and_half_as_many_are_read() -> None:
    spec = load_spec("qwen3-30b-a3b").with_dtype("bfloat16")
    cut, spread = (shard(spec, Parallel(tp=4, ep=ep)) for ep in (1, 4))
    assert cut.weight_nbytes() == spread.weight_nbytes()
    moe = spread.layers[0].mlp
    assert isinstance(moe, MoESpec) and moe.ranks == 4 and moe.experts == spec.layers[0].mlp.experts  # type: ignore[union-attr]
    read = totals(spread, kinds=("expert",))["weight_read"]
    assert read == pytest.approx(totals(spec, kinds=("expert",))["weight_read"] / 4, rel=1e-3)


def test_exchanged_tokens_travel_to_their_experts_and_back() -> None:
    spec = shard(load_spec("qwen3-30b-a3b").with_dtype("bfloat16"), Parallel(tp=1, dp=8, ep=8))
    sent = totals(spec, kinds=("all_to_all",))["comm"]
    assert (
        sent == 2 * 5 * 8 * spec.hidden_size * 2 * spec.num_hidden_layers
    )  # both ways, 5 tokens, 8 experts each, bf16


def test_collectives_of_a_dense_layer() -> None:
    spec = shard(load_spec("llama-3.1-8b").with_dtype("bfloat16"), Parallel(tp=8))
    found = totals(spec, kinds=("all_reduce",))["comm"]
    assert found == (2 * 32 + 1) * 5 * 4096 * 2  # two per layer and one behind the embedding
    assert totals(spec, kinds=("all_gather",))["comm"] == 128256 * 2


def test_parallel_blocks_are_summed_once() -> None:
    names = [
        op.name
        for op in build(shard(load_spec("gpt-neox-20b"), Parallel(tp=2)), "decode").ops
        if op.kind == "all_reduce"
    ]
    assert len(names) == 1 + 44


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    spec = load_spec("llama-3.1-8b")
    assert [shard(spec, Parallel(tp=tp)).layers[0].self_attn.num_key_value_heads for tp in (4, 8, 16)] == [2, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        (dict(tp=3), "1, 2, 4, 8"),
        (dict(tp=4, ep=3), "Allowed: [1, 2, 4]"),
        (dict(tp=0), "1 or more"),
        (dict(tp=2, ep=2), "has none"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(parallel: dict[str, int], said: str) -> None:
    with pytest.raises(SpecError) as error:
        shard(load_spec("llama-3.1-8b"), Parallel(**parallel))
    assert said in str(error.value)


def test_groups_of_packed_weights_stay_whole() -> None:
    plan = make_plan("smollm2-135m", "h100", Workload(), ("rtn:bits=4,group=32",))
    with pytest.raises(SpecError, match="does not divide"):
        shard(plan.model, Parallel(tp=9))
    assert 3 in tp_choices(load_spec("smollm2-135m"))


def test_stages_hold_all_layers_once() -> None:
    for layers in (5, 30, 61):
        for pp in (1, 2, 3, 5):
            assert [i for stage in stages(layers, pp) for i in stage] == list(range(layers))
    with pytest.raises(SpecError, match="more stages"):
        stages(2, 3)


def test_stages_share_weights_and_cache() -> None:
    spec, stack = load_spec("llama-3.1-8b").with_dtype("bfloat16"), load_stack("datasheet")
    work = Workload(batch=4, prompt=1000, gen=24)
    one, two = (Footprint(Graphs(spec), stack, Parallel(pp=pp)).at(work) for pp in (1, 2))
    assert two.kv_held * 2 == one.kv_held
    layers = sum(n.nbytes() for p, n in spec.linears() if p != "lm_head")
    assert one.weights / 2 < two.weights < one.weights and two.weights >= layers // 2


def test_more_devices_are_faster_and_hold_less() -> None:
    reports = [
        predict(make_plan("llama-3.1-70b", "h100", Workload(batch=8, prompt=512, gen=8), parallel=Parallel(tp=tp)))
        for tp in (2, 4, 8)
    ]
    tpot = [report.figures["tpot_s"].value for report in reports]
    assert tpot == sorted(tpot, reverse=True)  # type: ignore[type-var]
    held = [report.counts["peak_bytes"] for report in reports]
    assert held == sorted(held, reverse=True)
    assert [report.counts["comm_bytes"] > 0 for report in reports] == [True] * 3


def test_a_machine_without_links_says_so() -> None:
    with pytest.raises(SpecError, match="no link between devices"):
        predict(make_plan("llama-3.1-8b", "rpi4", Workload(), parallel=Parallel(tp=2)))
    with pytest.raises(SpecError, match="do not share a node"):
        predict(make_plan("llama-3.1-70b", "h100", Workload(), parallel=Parallel(tp=16)))
