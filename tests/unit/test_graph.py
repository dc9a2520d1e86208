"""Graph: names and order of the ops, counts against brute force, fusion, passes of a request."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trimtab.graph.attention import QUERY_TILE
from trimtab.graph.build import build, filter_graph
from trimtab.graph.count import KINDS, count, count_all
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import Counts, Op, StepShape
from trimtab.graph.passes import chunks, mean_decode_step, passes
from trimtab.spec.cache import Ring
from trimtab.spec.configs import load_spec, model_ids, spec_from_config
from trimtab.spec.machine import load_machine, load_stack
from trimtab.spec.model import ModelSpec, owned
from trimtab.spec.nodes import GateFirst, TokenFilter
from trimtab.spec.plan import Plan
from trimtab.spec.tree import Edit
from trimtab.spec.workload import Workload

LLAMA = {
    "model_type": "llama", "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}


def tiny(config: dict[str, Any] = LLAMA, dtype: str = "float32") -> ModelSpec:
    return spec_from_config(config, "tiny").with_dtype(dtype)


def plan_of(spec: ModelSpec, workload: Workload, stack: str = "datasheet", **stack_fields: Any) -> Plan:
    held = dataclasses.replace(load_stack(stack), **stack_fields)
    return Plan(base=spec, model=spec, machine=load_machine("a100"), stack=held, workload=workload)


def op_at(spec: ModelSpec, name: str, **options: Any) -> Op:
    return next(op for op in build(spec, **options).ops if op.name == name)


def ints(counts: Counts) -> dict[str, int]:
    return {name: int(getattr(counts, name)) for name in Counts.__slots__}


# -------------------------------------------------------------------------------------------------------------- names


def test_names_of_a_llama_pass_in_order() -> None:
    layer = [
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.rope",
        "self_attn.append", "self_attn.attend", "self_attn.o_proj", "add_attn", "post_attention_layernorm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.act", "mlp.down_proj", "add_mlp",
    ]  # fmt: skip
    expected = ["embed_tokens", *(f"layers.{i}.{name}" for i in range(3) for name in layer), "norm", "lm_head"]
    assert list(build(tiny()).names) == expected
    assert list(build(tiny(), head=False).names) == expected[:-2]


def test_names_of_a_gate_first_layer() -> None:
    spec = tiny().edit([Edit("layers.*.mlp", "executor", GateFirst(0.5))], by="test")
    names = [n for n in build(spec).names if n.startswith("layers.0.mlp")]
    assert names == [f"layers.0.mlp.{n}" for n in ("gate_proj", "act", "up_proj", "down_proj")]


def test_filter_pass_runs_the_first_layers_without_cache_and_scores() -> None:
    spec = tiny().edit([Edit("flow", "filter", TokenFilter(layer=1, topk=4, pool=3))], by="test")
    names = filter_graph(spec).names
    last = [name.removeprefix("layers.1.") for name in names if not name.startswith(("embed", "layers.0."))]
    assert last == ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.rope", "flow.score"]
    assert "layers.0.add_mlp" in names
    assert not any(name.endswith("append") for name in names)
    read = sum(int(count(op, StepShape.of([7], [0])).kv_read) for op in filter_graph(spec).ops)
    assert read == 0
    score = count(filter_graph(spec).ops[-1], StepShape.of([7, 5], [0, 0]))
    assert score.flops == 2 * 2 * 16 * (7 + 5)


def test_every_model_of_the_catalogue_that_has_a_spec_builds_and_counts() -> None:
    from trimtab.errors import UnsupportedModelError

    built, eager = 0, dataclasses.replace(load_stack("datasheet"), fused=frozenset())
    for name in model_ids():
        try:
            spec = load_spec(name)
        except UnsupportedModelError:
            continue
        built += 1
        for phase in ("prefill", "decode"):
            graph = build(spec, phase)
            assert len(set(graph.names)) == len(graph.names), name
            assert {op.kind for op in graph.ops} <= set(KINDS)
            # Every weight of the model is read by some op: a step of many tokens reads all matrices and norms.
            step = StepShape.of([1 << 16], [0], logits=1)
            kernels = [kernel for kernel in fuse(graph, eager) if kernel.ops[0].kind != "embed"]
            read = sum(int(counts.weight_read) * len(same.names) for same, counts in count_all(kernels, step))
            resident = sum(
                _bytes(node) * times
                for path, node, times in owned(spec)
                if not path.startswith("embed_t") and not path.startswith("embed_p")
            )
            head = spec.lm_head.nbytes() if spec.tie_word_embeddings else 0
            assert read == resident + head, (name, phase)
    assert built >= 40


def _bytes(node: Any) -> int:
    from trimtab.spec.model import weight_nbytes

    return weight_nbytes(node)


# -------------------------------------------------------------------------------------------------- counts, brute force


@pytest.mark.parametrize(("new", "past"), [([5], [0]), ([1], [9]), ([4, 1, 6], [3, 12, 0])])
def test_attention_counts_are_those_of_the_pairs_one_by_one(new: list[int], past: list[int]) -> None:
    window = 6
    spec = tiny(LLAMA | {"model_type": "mistral", "sliding_window": window})
    op = op_at(spec, "layers.1.self_attn.attend")
    step = StepShape.of(new, past)
    pairs_full = pairs_causal = keys_full = keys_window = 0
    for s, c in zip(new, past, strict=True):
        seen = set()
        for query in range(c, c + s):
            pairs_full += c + s
            inside = [key for key in range(c + s) if key <= query and key > query - window]
            pairs_causal += len(inside)
            seen.update(inside)
        keys_full += c + s
        keys_window += len(seen)
    heads, groups, size, item = 6, 2, 16, 4
    eager, tiled = count(op, step, "eager"), count(op, step, "tiled")
    assert eager.flops == 2 * 2 * size * heads * pairs_full
    assert tiled.flops == 2 * 2 * size * heads * pairs_causal
    assert eager.kv_read == groups * keys_full * 2 * size * item
    assert tiled.kv_read == groups * keys_window * 2 * size * item


def test_a_ring_bounds_what_is_read() -> None:
    spec = tiny().edit([Edit("layers.*.self_attn.cache.heads.*", "keep", Ring(2, 6))], by="test")
    op = op_at(spec, "layers.0.self_attn.attend")
    token = 2 * 16 * 4
    assert count(op, StepShape.of([1], [5])).kv_read == 2 * 6 * token
    assert count(op, StepShape.of([1], [500])).kv_read == 2 * 8 * token
    assert count(op_at(spec, "layers.0.self_attn.append"), StepShape.of([1], [500])).kv_written == 2 * token


def test_keys_that_leave_the_last_level_cache_are_read_once_per_query_tile() -> None:
    op = op_at(tiny(), "layers.0.self_attn.attend")
    step = StepShape.of([3 * QUERY_TILE + 1], [10])
    token, length = 2 * 16 * 4, 3 * QUERY_TILE + 1
    per_tile = sum(10 + min(end, length) for end in (QUERY_TILE, 2 * QUERY_TILE, 3 * QUERY_TILE, 4 * QUERY_TILE))
    assert count(op, step, "tiled", llc_bytes=1).kv_read == 2 * token * per_tile
    assert count(op, step, "tiled", llc_bytes=1 << 30).kv_read == 2 * token * (10 + length)


def test_linear_reads_bias_and_matrix_once_and_nothing_without_rows() -> None:
    spec = tiny({"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64})
    op = op_at(spec, "layers.0.mlp.up_proj")
    assert ints(count(op, StepShape.of([3], [0]))) | {"vector_flops": 0} == {
        "flops": 2 * 3 * 128 * 32, "vector_flops": 0, "weight_read": (128 * 32 + 128) * 4, "kv_read": 0, "kv_written": 0,
        "act_read": 3 * 32 * 4, "act_written": 3 * 128 * 4, "comm": 0,
    }  # fmt: skip
    head = op_at(spec, "lm_head")
    assert count(head, StepShape.of([3], [0], logits=0)).weight_read == 0
    assert count(head, StepShape.of([3], [0], logits=1)).weight_read == 64 * 32 * 4


def test_embedding_reads_the_rows_it_looks_up() -> None:
    op = op_at(tiny(), "embed_tokens")
    assert count(op, StepShape.of([3, 2], [0, 5])).weight_read == 5 * 48 * 4


def test_experts_read_the_distinct_ones_and_observed_counts_are_exact() -> None:
    op = op_at(tiny(MIXTRAL), "layers.2.mlp.experts.up_proj")
    matrix = 48 * 80 * 4
    one = count(op, StepShape.of([1], [0]))
    assert (one.flops, one.weight_read) == (2 * 2 * 48 * 80, 2 * matrix)
    many = count(op, StepShape.of([8], [0]))
    assert many.weight_read == round(8 * (1 - (1 - 2 / 8) ** 8) * matrix)
    seen = count(
        op, StepShape.of([8], [0], observed={"layers.2.mlp.experts_touched": 5, "layers.1.mlp.experts_touched": 3})
    )
    assert seen.weight_read == 5 * matrix
    assert seen.flops == many.flops == 8 * one.flops


def gate_first(down_layout: str = "transposed") -> ModelSpec:
    edits = [Edit("layers.*.mlp", "executor", GateFirst(0.5)), Edit("layers.*.mlp.down_proj", "layout", down_layout)]
    return tiny().edit(edits, by="test")


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_gate_first_skips_rows_for_few_tokens_only(name: str) -> None:
    op = op_at(gate_first(), f"layers.1.mlp.{name}")
    observed = {"layers.1.mlp.active_rows": 31, "layers.1.mlp.active_pairs": 50}
    sparse = count(op, StepShape.of([2], [9], observed=observed))
    assert (sparse.weight_read, sparse.flops) == (31 * 48 * 4, 2 * 48 * 50)
    expected = count(op, StepShape.of([1], [9]))
    assert (expected.weight_read, expected.flops) == (40 * 48 * 4, 2 * 48 * 40)
    dense = count(op, StepShape.of([5], [9], observed=observed))
    assert (dense.weight_read, dense.flops) == (80 * 48 * 4, 2 * 5 * 48 * 80)


def test_a_down_projection_stored_by_output_cannot_skip() -> None:
    op = op_at(gate_first("row"), "layers.1.mlp.down_proj")
    assert count(op, StepShape.of([1], [9])).weight_read == 80 * 48 * 4


def test_latent_attention_reads_its_cache_once_for_all_heads() -> None:
    spec = load_spec("deepseek-v3")
    decode = build(spec, "decode")
    names = [
        op.name.removeprefix("layers.0.self_attn.") for op in decode.ops if op.name.startswith("layers.0.self_attn")
    ]
    assert names == [
        "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "rope", "append", "q_absorb",
        "attend", "v_absorb", "o_proj",
    ]  # fmt: skip
    attend = next(op for op in decode.ops if op.name == "layers.0.self_attn.attend")
    step = StepShape.of([1], [99])
    # Per head: scores over rank 512 + rope 64, values over rank 512.
    assert count(attend, step).flops == 2 * 128 * 100 * (576 + 512)
    assert count(attend, step).kv_read == 100 * 576 * 2
    absorbed = sum(
        int(count(op, step).weight_read) for op in decode.ops if op.name.startswith("layers.0.") and "absorb" in op.name
    )
    assert absorbed == spec.layers[0].self_attn.kv_b_proj.nbytes()  # type: ignore[union-attr]
    prefill = {op.name: op for op in build(spec, "prefill").ops}
    whole = StepShape.of([10], [20])
    # A chunk behind 20 cached tokens expands the latents of all 30.
    assert count(prefill["layers.0.self_attn.kv_b_proj"], whole).flops == 2 * 30 * 512 * 128 * (128 + 128)
    assert count(prefill["layers.0.self_attn.attend"], whole, "tiled").flops == 2 * 128 * (10 * 20 + 55) * (
        128 + 64 + 128
    )


def test_counts_over_arrays_of_steps_equal_those_of_each_step() -> None:
    for spec in (tiny(), tiny(MIXTRAL), gate_first()):
        many = StepShape.of([[3], [1], [1]], [[0], [3], [4]], logits=[0, 1, 1], copies=2)
        for op in build(spec).ops:
            together = count(op, many)
            for i, (s, c, rows) in enumerate([(3, 0, 0), (1, 3, 1), (1, 4, 1)]):
                alone = count(op, StepShape.of([s, s], [c, c], logits=rows))
                for name in Counts.__slots__:
                    value = getattr(together, name)
                    assert int(value[i] if getattr(value, "ndim", 0) else value) == int(getattr(alone, name)), (
                        op.name,
                        name,
                    )


def test_huge_passes_do_not_overflow() -> None:
    op = op_at(load_spec("llama-3.1-405b"), "layers.0.self_attn.attend")
    tokens, batch = 1 << 20, 1 << 9
    assert int(count(op, StepShape.of([tokens], [0], copies=batch)).flops) == 2 * batch * tokens * tokens * 128 * 256


# ------------------------------------------------------------------------------------------------------------- fusion


def test_eager_runs_one_kernel_per_op_with_equal_counts() -> None:
    graph = build(tiny())
    step = StepShape.of([4], [3], logits=1)
    kernels = fuse(graph, dataclasses.replace(load_stack("datasheet"), fused=frozenset()))
    assert [kernel.name for kernel in kernels] == list(graph.names)
    assert [ints(count(k, step)) for k in kernels] == [ints(count(op, step)) for op in graph.ops]


def test_fusion_saves_activations_and_launches_and_nothing_else() -> None:
    graph = build(tiny())
    step = StepShape.of([4], [3], logits=1)
    fused = fuse(graph, load_stack("ideal"))
    assert len(fused) < len(graph.ops)
    alone = sum((count(op, step) for op in graph.ops), Counts())
    together = sum((count(kernel, step) for kernel in fused), Counts())
    for name in ("flops", "vector_flops", "weight_read", "kv_read", "kv_written"):
        assert int(getattr(alone, name)) == int(getattr(together, name))
    kernel = next(k for k in fused if "q_proj" in k.name)
    assert kernel.name == "layers.0.self_attn.q_proj+k_proj+v_proj"
    assert count(kernel, step).act_read == 4 * 48 * 4  # the input once, not three times
    gated = next(k for k in fused if "up_proj" in k.name)
    assert count(gated, step).act_written == 4 * 80 * 4  # the gated product alone; gate and up stay inside
    residual = next(k for k in fused if k.name == "layers.0.add_attn+post_attention_layernorm")
    moved = count(residual, step)
    assert (moved.act_read, moved.act_written) == (2 * 4 * 48 * 4, 2 * 4 * 48 * 4)


def test_equal_layers_are_counted_once() -> None:
    graph = build(load_spec("llama-3.1-405b"))
    grouped = count_all(fuse(graph, load_stack("ideal")), StepShape.of([1], [9], logits=1))
    assert len(grouped) < 12
    assert sum(len(same.names) for same, _ in grouped) > 126 * 5


# ------------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize(
    ("prompt", "chunk", "expected"),
    [(1, 512, (0, 1)), (512, 512, (0, 512)), (513, 512, (1, 1)), (1024, 512, (1, 512)), (1100, None, (0, 1100))],
)
def test_chunks(prompt: int, chunk: int | None, expected: tuple[int, int]) -> None:
    assert chunks(prompt, chunk) == expected


def test_passes_cover_the_prompt_and_every_step() -> None:
    plan = plan_of(tiny(), Workload(batch=3, prompt=70, gen=5), prefill_chunk=32)
    found = passes(plan)
    assert [(p.phase, p.repeat) for p in found] == [("prefill", 2), ("prefill", 1), ("decode", 4)]
    assert [p.step.new.ravel().tolist() for p in found] == [[32, 32], [6], [1, 1, 1, 1]]
    assert [p.step.past.ravel().tolist() for p in found] == [[0, 32], [64], [70, 71, 72, 73]]
    assert [p.step.logits.tolist() for p in found] == [[0, 0], [3], [3, 3, 3, 3]]
    assert "lm_head" not in found[0].graph.names
    assert int(mean_decode_step(plan.model, plan.workload).past[0]) == 71  # steps at 70, 71, 72, 73


def test_a_filter_runs_only_on_prompts_longer_than_it_keeps() -> None:
    spec = tiny().edit([Edit("flow", "filter", TokenFilter(layer=1, topk=20, pool=3))], by="test")
    found = passes(plan_of(spec, Workload(batch=2, prompt=70, gen=3), prefill_chunk=16))
    assert [(p.phase, p.step.new.ravel().tolist()) for p in found] == [
        ("filter", [70]), ("prefill", [16]), ("prefill", [4]), ("decode", [1, 1]),
    ]  # fmt: skip
    assert found[-1].step.past.ravel().tolist() == [20, 21]
    assert [p.phase for p in passes(plan_of(spec, Workload(prompt=20, gen=1)))] == ["prefill"]
