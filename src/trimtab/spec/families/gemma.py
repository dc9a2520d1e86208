"""Gemma 2, 3 and 4: local and global layers, norms around attention and MLP, scaled embeddings."""

from __future__ import annotations

from dataclasses import replace

from trimtab.errors import UnsupportedModelError
from trimtab.spec.families.facts import Facts
from trimtab.spec.families.llama import REQUIRED
from trimtab.spec.families.parts import Parts
from trimtab.spec.leaves import RopeSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec, MoESpec


def gemma2(facts: Facts) -> ModelSpec:
    """Gemma 2: every other layer sees a window; scores and logits are soft-capped.

    Raises:
        SpecError: a key is missing.
    """
    layers = facts["num_hidden_layers"]
    kinds = facts.layer_types(layers, ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    return _gemma(
        facts,
        kinds,
        score_cap=facts.given("attn_logit_softcapping", 50.0),
        logit_cap=facts.given("final_logit_softcapping", 30.0),
    )


def gemma3(facts: Facts) -> ModelSpec:
    """Gemma 3: one global layer after every few local ones, each kind with its own rope; q and k are normed.

    Raises:
        SpecError: a key is missing.
    """
    layers, every = facts["num_hidden_layers"], facts.of("sliding_window_pattern", 6)
    kinds = facts.layer_types(
        layers, ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    )
    return _gemma(
        facts,
        kinds,
        score_cap=facts.of("attn_logit_softcapping", None),
        logit_cap=facts.of("final_logit_softcapping", None),
        qk_norm="head",
    )


def gemma4(facts: Facts) -> ModelSpec:
    """Gemma 4: global layers have fewer and longer heads, whose values are their keys; experts stand beside a dense MLP.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: layers that share a cache or read embeddings of their own (the small models).
    """
    facts.need(*REQUIRED, "intermediate_size", "num_key_value_heads", "head_dim", "sliding_window", "rope_parameters")
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if facts.of(key, 0):
            raise UnsupportedModelError(f"{facts.name}: {key}={facts[key]} is not built. Allowed: 0.")
    parts, hidden, layers = Parts.rms(facts), facts["hidden_size"], facts["num_hidden_layers"]
    act = facts.act("hidden_activation", "hidden_act")
    mlp: FFNSpec | MoESpec = parts.gated(hidden, facts["intermediate_size"], act)
    if facts.of("enable_moe_block", False):
        facts.need("num_experts", "top_k_experts", "moe_intermediate_size")
        mlp = MoESpec(
            router=parts.linear(facts["num_experts"], hidden),
            experts=parts.gated(hidden, facts["moe_intermediate_size"], act),
            num_experts=facts["num_experts"],
            num_experts_per_tok=facts["top_k_experts"],
            shared=mlp,
            router_norm=parts.norm(hidden),
            expert_norm=parts.norm(hidden),
            expert_output_norm=parts.norm(hidden),
            shared_output_norm=parts.norm(hidden),
            expert_scale=True,
        )
    kinds = facts.layer_types(layers, ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)])
    by_kind = {
        kind: LayerSpec(
            input_layernorm=parts.norm(hidden),
            self_attn=_gemma4_attention(facts, parts, kind == "sliding_attention"),
            attn_output_norm=parts.norm(hidden),
            post_attention_layernorm=parts.norm(hidden),
            mlp=mlp,
            mlp_output_norm=parts.norm(hidden),
        )
        for kind in dict.fromkeys(kinds)
    }
    return parts.model(
        facts,
        tuple(by_kind[kind] for kind in kinds),
        tie=True,
        embed_tokens=parts.embedding(facts["vocab_size"], hidden, scale=hidden**0.5),
        logit_softcap=facts.of("final_logit_softcapping", None),
    )


def _gemma4_attention(facts: Facts, parts: Parts, local: bool) -> AttentionSpec:
    heads, tied = facts["num_key_value_heads"], not local and bool(facts.of("attention_k_eq_v", False))
    head_dim = facts["head_dim"] if local else facts.of("global_head_dim", facts["head_dim"])
    rope = facts["rope_parameters"]["sliding_attention" if local else "full_attention"]
    kind, bias = rope.get("rope_type", "default"), bool(facts.of("attention_bias", False))
    attention = parts.attention(
        facts["hidden_size"],
        facts["num_attention_heads"],
        facts.of("num_global_key_value_heads", heads) if tied else heads,
        head_dim,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        rope=RopeSpec(
            dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
            theta=float(rope["rope_theta"]),
            scaling=() if kind == "default" else (("rope_type", kind),),
        ),
        window=facts.window(facts["sliding_window"]) if local else None,
        scale=1.0,
    )
    return replace(attention, v_norm=parts.norm(head_dim, weight=False), tied_values=tied)


def _gemma(
    facts: Facts, kinds: list[str], *, score_cap: float | None, logit_cap: float | None, qk_norm: str = ""
) -> ModelSpec:
    facts.need(*REQUIRED, "intermediate_size", "num_key_value_heads", "head_dim", "sliding_window")
    parts, hidden, bias = (
        Parts.rms(facts, unit_offset=True),
        facts["hidden_size"],
        bool(facts.of("attention_bias", False)),
    )
    head_dim = facts["head_dim"]
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        local = kind == "sliding_attention"
        # Gemma 3 alone has a base of its own, unscaled, for local layers; its older spelling is rope_local_base_freq.
        old_local = local and "rope_local_base_freq" in facts
        rope = facts.rope(
            head_dim, kind, theta=facts["rope_local_base_freq"] if old_local else None, scaled=not old_local
        )
        attention = parts.attention(
            hidden,
            facts["num_attention_heads"],
            facts["num_key_value_heads"],
            head_dim,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=qk_norm,
            rope=rope,
            window=facts.window(facts["sliding_window"]) if local else None,
            softcap=score_cap,
            scale=float(facts.of("query_pre_attn_scalar", 256)) ** -0.5,
        )
        by_kind[kind] = LayerSpec(
            input_layernorm=parts.norm(hidden),
            self_attn=attention,
            attn_output_norm=parts.norm(hidden),
            post_attention_layernorm=parts.norm(hidden),
            mlp=parts.gated(hidden, facts["intermediate_size"], facts.act("hidden_activation", "hidden_act")),
            mlp_output_norm=parts.norm(hidden),
        )
    return parts.model(
        facts,
        tuple(by_kind[kind] for kind in kinds),
        tie=True,
        embed_tokens=parts.embedding(facts["vocab_size"], hidden, scale=hidden**0.5),
        logit_softcap=logit_cap,
    )
