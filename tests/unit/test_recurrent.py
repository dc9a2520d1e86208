"""Layers that carry a state: their cache, what a scan computes and moves, and what of it holds against loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.graph.build import build, filter_graph
from trimtab.graph.count import KINDS, count, scratch_bytes
from trimtab.graph.ops import Graph, StepShape
from trimtab.graph.shard_recurrent import slice_recurrent
from trimtab.spec.configs import catalogue_entry, load_spec, spec_from_config
from trimtab.spec.nodes import LinearAttentionSpec, MoESpec, StateSpaceSpec, TokenFilter
from trimtab.spec.runnable import check_runnable
from trimtab.spec.tree import Edit, walk

NEMOTRON, QWEN = "nemotron-h-56b", "qwen3-next-80b-a3b"


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A catalogued config with changes; None takes a key away."""
    facts = {key: value for key, value in catalogue_entry(name).items() if not key.startswith("_")} | changes
    return {key: value for key, value in facts.items() if value is not None}


def op_of(graph: Graph, kind: str) -> Any:
    """The first op of a kind."""
    return next(op for op in graph.ops if op.kind == kind)


@pytest.mark.parametrize(
    ("name", "state", "per_token"),
    [
        # 54 Mamba-2 layers of 256 heads of 64 x 256 in fp32 and 3 tokens of 256 x 64 + 2 x 8 x 256 in bf16; 10 attention layers.
        (NEMOTRON, 54 * (256 * 64 * 256 * 4 + 3 * (256 * 64 + 2 * 8 * 256) * 2), 10 * 2 * 8 * 128 * 2),
        # 36 layers of 32 heads of 128 x 128 in fp32 and 3 tokens of 2 x 16 x 128 + 32 x 128; 12 attention layers.
        (QWEN, 36 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2), 12 * 2 * 2 * 256 * 2),
    ],
)
def test_a_state_does_not_grow_and_is_part_of_the_cache(name: str, state: int, per_token: int) -> None:
    spec = load_spec(name)
    assert spec.state_nbytes() == state
    assert [spec.kv_nbytes(tokens) for tokens in (0, 1, 1000)] == [state, state + per_token, state + 1000 * per_token]
    # A coded cache codes keys and values; a state is read and written in full every step and stays as it is.
    assert spec.with_dtype("bfloat16", "fp8").kv_nbytes(10) == state + 10 * per_token // 2
    conv = sum(layer.cache.states[1].nbytes() for layer in spec.layers if layer.cache.states)
    assert spec.with_dtype("float32").state_nbytes() == state + conv


def test_the_state_may_be_kept_in_another_dtype() -> None:
    half = spec_from_config(config(NEMOTRON, mamba_ssm_cache_dtype="bfloat16"), "m")
    assert load_spec(NEMOTRON).state_nbytes() - half.state_nbytes() == 54 * 256 * 64 * 256 * 2


@pytest.mark.parametrize("name", [NEMOTRON, QWEN])
def test_a_step_reads_and_writes_each_state_once_whatever_the_context(name: str) -> None:
    scan, conv = op_of(build(load_spec(name)), "scan"), op_of(build(load_spec(name)), "conv")
    node = scan.node
    for past in (0, 7, 100_000):
        step = StepShape.of([1, 1, 0], [past, 3, 9], copies=2)  # two of three rows take part, four sequences
        moved = count(scan, step)
        assert int(moved.kv_read) == int(moved.kv_written) == 4 * node.state_elements * 4
        assert int(count(conv, step).kv_read) == 4 * 3 * node.conv1d.channels * 2
        per_element = 4 if isinstance(node, StateSpaceSpec) else 6
        assert int(moved.flops) == 4 * per_element * node.state_elements
        # Nothing but inputs and outputs besides.
        assert int(moved.act_read) == 4 * sum(value.width for value in scan.reads) * 2


@pytest.mark.parametrize("name", [NEMOTRON, QWEN])
@pytest.mark.parametrize("new", [2, 63, 64, 65, 128, 129, 1000])
def test_a_prompt_is_worked_on_in_chunks(name: str, new: int) -> None:
    """FLOPs by loops over chunks: inside one, what the mask leaves; eager, whole padded squares."""
    scan = op_of(build(load_spec(name), "prefill"), "scan")
    node = scan.node
    chunks = [min(node.chunk, new - at) for at in range(0, new, node.chunk)]
    for attention, lengths, pairs in (
        ("tiled", chunks, [n * (n + 1) // 2 for n in chunks]),
        ("eager", [node.chunk] * len(chunks), [node.chunk**2] * len(chunks)),
    ):
        if isinstance(node, StateSpaceSpec):
            # C B' per group, its product with x per head; state update and readout of every token.
            inside = 2 * sum(pairs) * (node.num_groups * node.state_size + node.num_heads * node.head_dim)
            outside = 2 * sum(lengths) * 2 * node.num_heads * node.head_dim * node.state_size
        else:
            # K K', Q K' and the product with v; the inverse with k and v; three products with the state per token.
            keys, values = node.key_head_dim, node.head_dim
            inside = 2 * sum(pairs) * node.num_heads * ((2 * keys + values) + (keys + values))
            outside = 2 * sum(lengths) * 3 * node.num_heads * keys * values
        counts = count(scan, StepShape.of([new], [5]), attention)
        assert int(counts.flops) == inside + outside
        # The states between chunks are written, passed on and read: twice each way.
        between = 2 * len(chunks) * node.state_elements * 4
        assert int(counts.act_written) == between + new * node.inner_size * 2
    assert scratch_bytes(scan, StepShape.of([new], [0], copies=3), "tiled") == 3 * len(chunks) * node.state_elements * 4
    assert scratch_bytes(scan, StepShape.of([1], [0]), "tiled") == 0


def test_chunks_of_a_prompt_sum_to_the_whole_where_they_end_on_chunks_of_the_scan() -> None:
    for name in (NEMOTRON, QWEN):
        scan = op_of(build(load_spec(name), "prefill"), "scan")
        whole = count(scan, StepShape.of([1024], [0]), "tiled")
        parts = [count(scan, StepShape.of([256], [at]), "tiled") for at in range(0, 1024, 256)]
        assert sum(int(part.flops) for part in parts) == int(whole.flops)
        assert sum(int(part.kv_read) for part in parts) == 4 * int(whole.kv_read)  # the state once per pass


def test_ops_of_the_layers_in_order() -> None:
    names = [op.name for op in build(load_spec(NEMOTRON)).ops]
    assert names[1:12] == [
        "layers.0.input_layernorm", "layers.0.self_attn.in_proj", "layers.0.self_attn.conv1d", "layers.0.self_attn.scan",
        "layers.0.self_attn.norm", "layers.0.self_attn.out_proj", "layers.0.add_attn", "layers.1.post_attention_layernorm",
        "layers.1.mlp.up_proj", "layers.1.mlp.act", "layers.1.mlp.down_proj",
    ]  # fmt: skip
    names = [
        op.name.removeprefix("layers.0.") for op in build(load_spec(QWEN)).ops if op.name.startswith("layers.0.self")
    ]
    assert [name.removeprefix("self_attn.") for name in names] == [
        "in_proj_qkvz", "in_proj_ba", "conv1d", "scan", "norm", "out_proj"
    ]  # fmt: skip
    gated = [op.name for op in build(load_spec(QWEN)).ops if op.name.startswith("layers.3.self_attn")]
    assert [name.rpartition(".")[2] for name in gated] == [
        "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "rope", "append", "attend", "gate", "o_proj"
    ]  # fmt: skip
    assert {"conv", "scan", "gate"} <= set(KINDS)


@pytest.mark.parametrize("name", [NEMOTRON, QWEN, "llama-4-scout", "gemma-4-26b-a4b"])
def test_every_matrix_is_read_once_per_step_and_every_value_is_written_before_it_is_read(name: str) -> None:
    spec = load_spec(name)
    graph, written = build(spec), set()
    for op in graph.ops:
        assert all(value.name in written for value in op.reads), op.name
        written |= {value.name for value in op.writes}
    step = StepShape.of([1], [50], logits=1, observed={
        f"layers.{i}.mlp.experts_touched": x.mlp.num_experts for i, x in enumerate(spec.layers) if isinstance(x.mlp, MoESpec)
    })  # fmt: skip
    read = sum(int(count(op, step).weight_read) for op in graph.ops)
    # All weights but the table, of which one row, and the head, which a tied model does not own, on top.
    head = spec.lm_head.nbytes() if spec.tie_word_embeddings else 0
    assert read == spec.weight_nbytes() - spec.embed_tokens.nbytes() + spec.embed_tokens.k * 2 + head


@pytest.mark.parametrize(("name", "tp"), [(NEMOTRON, 2), (NEMOTRON, 8), (NEMOTRON, 32), (QWEN, 4), (QWEN, 32)])
def test_slices_of_a_layer_make_up_the_whole(name: str, tp: int) -> None:
    """Heads are cut; with fewer groups than ranks each rank has a whole group, so that groups alone are held more than once."""
    spec = load_spec(name)
    node: Any = spec.layers[0].self_attn
    cut: Any = slice_recurrent(node, tp, replace(node.out_proj, k=node.out_proj.k // tp))
    size = node.state_size if isinstance(node, StateSpaceSpec) else node.key_head_dim
    # Rows of the projection, channels of the convolution and its kept inputs that belong to groups held again.
    again = 2 * max(tp - node.num_groups, 0) * size

    def weights(layer: Any) -> int:
        return layer.num_parameters() + sum(getattr(part, "num_parameters", int)() for _, part in walk(layer))

    norm = (
        node.norm.num_parameters() if isinstance(node, LinearAttentionSpec) else 0
    )  # over one head: every rank has it
    more = again * (spec.hidden_size + node.conv1d.kernel + node.conv1d.bias) + (tp - 1) * norm
    assert tp * weights(cut) == weights(node) + more
    assert tp * cut.cache.states[0].nbytes() == node.cache.states[0].nbytes()
    assert tp * cut.cache.state_bytes == node.cache.state_bytes + again * (node.conv1d.kernel - 1) * 2
    assert cut.in_proj_qkvz.n == cut.conv1d.channels + cut.inner_size if norm else cut.in_proj.n > cut.conv1d.channels
    # Its ops fit together: what the projection yields is what convolution, scan and norm read.
    ops = {
        op.name.rpartition(".")[2]: op
        for op in build(replace(spec, layers=(replace(spec.layers[0], self_attn=cut),))).ops
    }
    projected = ops["in_proj_qkvz" if norm else "in_proj"]
    assert sum(value.width for value in projected.writes) == projected.node.n  # type: ignore[attr-defined]
    step = StepShape.of([1], [9])
    assert int(count(ops["scan"], step).flops) * tp == int(count(op_of(build(spec), "scan"), step).flops)


def test_layers_of_nemotron_by_either_spelling() -> None:
    letters = load_spec(NEMOTRON)
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    kinds = [names[letter] for letter in catalogue_entry(NEMOTRON)["hybrid_override_pattern"]]
    spelt = spec_from_config(config(NEMOTRON, hybrid_override_pattern=None, layers_block_type=kinds), NEMOTRON)
    assert spelt == letters


def test_experts_of_nemotron_stand_where_the_pattern_says() -> None:
    facts = config(
        NEMOTRON, hybrid_override_pattern="ME*", num_hidden_layers=3, n_routed_experts=16, num_experts_per_tok=3,
        moe_intermediate_size=96, moe_shared_expert_intermediate_size=160,
    )  # fmt: skip
    spec = spec_from_config(facts, "m")
    moe = spec.layers[1].mlp
    assert isinstance(moe, MoESpec) and moe.shared is not None and moe.experts.gate_proj is None
    assert (moe.experts.up_proj.n, moe.shared.up_proj.n, moe.num_parameters()) == (96, 160, 16)
    with pytest.raises(UnsupportedModelError, match="moe_latent_size=64"):
        spec_from_config({**facts, "moe_latent_size": 64}, "m")


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        (NEMOTRON, {"hybrid_override_pattern": "M-X"}, "has 'X'"),
        (NEMOTRON, {"hybrid_override_pattern": "M-"}, "2 letters for 118 layers"),
        (NEMOTRON, {"ssm_state_size": None}, "ssm_state_size"),
        (NEMOTRON, {"hybrid_override_pattern": None, "layers_block_type": ["conv"]}, "conv"),
        (QWEN, {"layer_types": ["full_attention"]}, "1 entries for 48 layers"),
        (QWEN, {"layer_types": ["sliding_attention"] * 48}, "linear_attention"),
        (QWEN, {"linear_key_head_dim": None}, "linear_key_head_dim"),
        ("gemma-4-26b-a4b", {}, "num_kv_shared_layers=2"),
    ],
)
def test_what_a_config_must_say(name: str, changes: dict[str, Any], told: str) -> None:
    facts = config(name, **changes)
    if "text_config" in facts:
        facts["text_config"] = {**facts["text_config"], "num_kv_shared_layers": 2}
    with pytest.raises(SpecError, match=told):
        spec_from_config(facts, "m")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (NEMOTRON, r"state-space layer \(Mamba-2\) \(layers.0.self_attn\)"),
        (QWEN, r"linear attention \(gated delta rule\) \(layers.0.self_attn\)"),
        ("llama-4-scout", "attention within chunks"),
        ("gemma-4-26b-a4b", r"norm without weights \(layers.0.self_attn.v_norm\)"),
    ],
)
def test_layers_the_decoder_lacks_are_refused_by_name(name: str, told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        check_runnable(load_spec(name))


def test_a_token_filter_needs_attention_in_its_layer() -> None:
    spec = load_spec(NEMOTRON).edit([Edit("flow", "filter", TokenFilter(layer=0, topk=4, pool=1))], "test")
    with pytest.raises(SpecError, match="layer 0"):
        filter_graph(spec)


def test_values_that_are_keys_are_neither_held_nor_projected() -> None:
    """Gemma 4: 26B with tied values; untied, its five global layers have one more matrix of 2 x 512 by 2816."""
    tied = load_spec("gemma-4-26b-a4b")
    facts = config("gemma-4-26b-a4b")
    facts["text_config"] = {**facts["text_config"], "attention_k_eq_v": False, "num_key_value_heads": 2}
    local = 25 * (8 - 2) * 2 * 256 * 2816  # fewer heads in the local layers, which had keys and values of their own
    assert spec_from_config(facts, "m").num_parameters() == tied.num_parameters() - local + 5 * 1024 * 2816
    reads = {op.name: {value.name for value in op.reads} for op in build(tied).ops}
    assert reads["layers.0.mlp.router_norm"] == reads["layers.0.mlp.expert_norm"] == {"layers.0.add_attn"}
    assert reads["layers.0.mlp.shared.up_proj"] == {"layers.0.post_attention_layernorm"}
    names = {op.name for op in build(tied).ops}
    assert "layers.0.self_attn.v_proj" in names and "layers.5.self_attn.v_proj" not in names
