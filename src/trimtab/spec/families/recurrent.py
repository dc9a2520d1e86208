"""Families with layers that carry a state instead of a growing cache: Nemotron-H (Mamba-2) and Qwen3-Next (gated delta rule)."""

from __future__ import annotations

from trimtab.errors import SpecError, UnsupportedModelError, unknown
from trimtab.spec.families.facts import Facts
from trimtab.spec.families.parts import Parts, shared
from trimtab.spec.formats import dtype_name
from trimtab.spec.leaves import ConvSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec, LinearAttentionSpec, MoESpec, StateSpaceSpec

#: Layers of Nemotron-H by the letter of ``hybrid_override_pattern``, with the name that newer configs give them.
_NEMOTRON_LAYERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}

#: Tokens of one block of the gated delta rule in a prompt; fixed by the kernels, not by the config.
_DELTA_CHUNK = 64


def nemotron_h(facts: Facts) -> ModelSpec:
    """Nemotron-H: every layer is one norm with a Mamba-2 block, an attention without positions, an MLP or experts behind it.

    Raises:
        SpecError: a key is missing, or a layer of another kind.
        UnsupportedModelError: experts behind a latent projection.
    """
    facts.need(
        "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings",
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel",
    )  # fmt: skip
    parts, hidden = Parts(facts.dtype, "rms", float(facts.of("layer_norm_epsilon", 1e-5))), facts["hidden_size"]
    makers = {"M": _mamba, "*": _plain_attention, "-": _nemotron_mlp, "E": _nemotron_experts}
    blocks = {letter: makers[letter](facts, parts) for letter in dict.fromkeys(_nemotron_pattern(facts))}
    layers = [
        LayerSpec(
            input_layernorm=parts.norm(hidden) if letter in "M*" else None,
            self_attn=blocks[letter] if letter in "M*" else None,
            post_attention_layernorm=None if letter in "M*" else parts.norm(hidden),
            mlp=None if letter in "M*" else blocks[letter],
        )
        for letter in _nemotron_pattern(facts)
    ]
    return parts.model(facts, shared(layers), tie=False)


def _nemotron_pattern(facts: Facts) -> str:
    """One letter per layer, from either spelling."""
    if "hybrid_override_pattern" in facts:
        pattern = facts["hybrid_override_pattern"]
    else:
        letters = {name: letter for letter, name in _NEMOTRON_LAYERS.items()} | {"mamba": "M", "attention": "*"}
        kinds = facts.first("layers_block_type", "layer_types")
        for kind in kinds:
            if kind not in letters:
                raise unknown("layer type", str(kind), letters)
        pattern = "".join(letters[kind] for kind in kinds)
    odd = set(pattern) - set(_NEMOTRON_LAYERS)
    if odd or not pattern:
        raise SpecError(
            f"{facts.name}: hybrid_override_pattern has '{''.join(sorted(odd))}'. Allowed: {' '.join(_NEMOTRON_LAYERS)}."
        )
    if facts.of("num_hidden_layers", len(pattern)) != len(pattern):
        raise SpecError(
            f"{facts.name}: hybrid_override_pattern has {len(pattern)} letters for {facts['num_hidden_layers']} layers. "
            "Give one per layer."
        )
    return pattern


def _mamba(facts: Facts, parts: Parts) -> StateSpaceSpec:
    heads, size, state = facts["mamba_num_heads"], facts["mamba_head_dim"], facts["ssm_state_size"]
    hidden, groups, bias = facts["hidden_size"], facts["n_groups"], bool(facts.of("use_bias", False))
    inner = heads * size
    conv = ConvSpec(
        channels=inner + 2 * groups * state,
        kernel=facts["conv_kernel"],
        bias=bool(facts.of("use_conv_bias", True)),
        format=parts.format,
    )
    return StateSpaceSpec(
        num_heads=heads,
        head_dim=size,
        state_size=state,
        num_groups=groups,
        chunk=facts.of("chunk_size", 128),
        in_proj=parts.linear(inner + conv.channels + heads, hidden, bias),
        conv1d=conv,
        norm=parts.norm(inner),
        out_proj=parts.linear(hidden, inner, bias),
        cache=parts.states(inner * state, conv, dtype_name(facts.of("mamba_ssm_cache_dtype", "float32"))),
    )


def _plain_attention(facts: Facts, parts: Parts) -> AttentionSpec:
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    head_dim = facts.of("head_dim", facts.of("attention_head_dim", hidden // heads))
    bias = bool(facts.of("attention_bias", False))
    return parts.attention(hidden, heads, facts["num_key_value_heads"], head_dim, qkv_bias=bias, o_bias=bias)


def _nemotron_mlp(facts: Facts, parts: Parts) -> FFNSpec:
    facts.need("intermediate_size")
    return parts.plain(facts["hidden_size"], facts["intermediate_size"], facts.act("mlp_hidden_act"), _mlp_bias(facts))


def _nemotron_experts(facts: Facts, parts: Parts) -> MoESpec:
    facts.need("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    if "moe_latent_size" in facts:
        raise UnsupportedModelError(
            f"{facts.name}: moe_latent_size={facts['moe_latent_size']} is not built. Allowed: null."
        )
    hidden, act, bias = facts["hidden_size"], facts.act("mlp_hidden_act"), _mlp_bias(facts)
    width = facts.of("moe_shared_expert_intermediate_size", facts["moe_intermediate_size"])
    return MoESpec(
        router=parts.linear(facts["n_routed_experts"], hidden),
        experts=parts.plain(hidden, facts["moe_intermediate_size"], act, bias),
        num_experts=facts["n_routed_experts"],
        num_experts_per_tok=facts["num_experts_per_tok"],
        shared=parts.plain(hidden, width, act, bias),
        scoring="sigmoid",
        norm_topk_prob=bool(facts.of("norm_topk_prob", True)),
        routed_scaling=float(facts.of("routed_scaling_factor", 1.0)),
        correction_bias=True,
        num_groups=facts.of("n_group", 1),
        topk_groups=facts.of("topk_group", 1),
    )


def _mlp_bias(facts: Facts) -> bool:
    return bool(facts.of("mlp_bias", False))


def qwen3_next(facts: Facts) -> ModelSpec:
    """Qwen3-Next: three layers of gated delta rule to one of gated attention, experts with a shared one behind each.

    Raises:
        SpecError: a key is missing.
    """
    facts.need(
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "max_position_embeddings", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
        "shared_expert_intermediate_size",
    )  # fmt: skip
    parts, hidden, layers = Parts.rms(facts, unit_offset=True), facts["hidden_size"], facts["num_hidden_layers"]
    every = facts.of("full_attention_interval", 4)
    kinds = facts.layer_types(
        layers,
        ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)],
        ("linear_attention", "full_attention"),
    )
    mixers = {"linear_attention": _gated_delta(facts, parts), "full_attention": _gated_attention(facts, parts)}
    act, dense = facts.act("hidden_act"), facts.of("mlp_only_layers", ())
    experts = MoESpec(
        router=parts.linear(facts["num_experts"], hidden),
        experts=parts.gated(hidden, facts["moe_intermediate_size"], act),
        num_experts=facts["num_experts"],
        num_experts_per_tok=facts["num_experts_per_tok"],
        shared=parts.gated(hidden, facts["shared_expert_intermediate_size"], act),
        shared_gate=parts.linear(1, hidden),
        norm_topk_prob=bool(facts.of("norm_topk_prob", True)),
    )
    built = []
    for index, kind in enumerate(kinds):
        sparse = index not in dense and (index + 1) % facts.of("decoder_sparse_step", 1) == 0
        mlp = experts if sparse else parts.gated(hidden, facts["intermediate_size"], act)
        built.append(parts.layer(hidden, mixers[kind], mlp))
    return parts.model(facts, shared(built), tie=False)


def _gated_delta(facts: Facts, parts: Parts) -> LinearAttentionSpec:
    hidden = facts["hidden_size"]
    key_heads, heads = facts["linear_num_key_heads"], facts["linear_num_value_heads"]
    key_size, size = facts["linear_key_head_dim"], facts["linear_value_head_dim"]
    keys, values = key_heads * key_size, heads * size
    conv = ConvSpec(channels=2 * keys + values, kernel=facts["linear_conv_kernel_dim"], format=parts.format)
    return LinearAttentionSpec(
        num_heads=heads,
        head_dim=size,
        num_key_heads=key_heads,
        key_head_dim=key_size,
        chunk=_DELTA_CHUNK,
        in_proj_qkvz=parts.linear(2 * keys + 2 * values, hidden),
        in_proj_ba=parts.linear(2 * heads, hidden),
        conv1d=conv,
        norm=NormSpec(size=size, eps=parts.eps, format=parts.format),  # the one norm here that scales by w, not 1 + w
        out_proj=parts.linear(hidden, values),
        cache=parts.states(key_size * values, conv, dtype_name(facts.of("mamba_ssm_dtype", "float32"))),
    )


def _gated_attention(facts: Facts, parts: Parts) -> AttentionSpec:
    head_dim, bias = facts["head_dim"], bool(facts.of("attention_bias", False))
    named = "partial_rotary_factor" in facts or "partial_rotary_factor" in facts.of("rope_parameters", {})
    return parts.attention(
        facts["hidden_size"],
        facts["num_attention_heads"],
        facts["num_key_value_heads"],
        head_dim,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        rope=facts.rope(head_dim if named else head_dim // 4),
        gated=True,
    )
