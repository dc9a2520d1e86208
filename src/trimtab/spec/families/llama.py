"""Llama and its relatives: RMSNorm, rotary positions, gated FFN or experts."""

from __future__ import annotations

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.spec.families.facts import Facts
from trimtab.spec.families.parts import Parts, shared
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import FFNSpec, LayerSpec, MoESpec

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


def llama(facts: Facts) -> ModelSpec:
    """Llama 1-3, Mistral, Qwen2, Qwen3, Phi-3, MiMo, Mixtral, Qwen2-MoE, Qwen3-MoE and MiniMax-M2: they differ in a few keys.

    Raises:
        SpecError: a key is missing.
    """
    kind = facts["model_type"]
    facts.need(*REQUIRED, *_EXTRA.get(kind, ("intermediate_size",)))
    hidden, heads, layers = facts["hidden_size"], facts["num_attention_heads"], facts["num_hidden_layers"]
    head_dim = facts.of("head_dim", hidden // heads)
    parts = Parts.rms(facts)
    bias = bool(facts.of("attention_bias", facts.of("qkv_bias", kind in ("qwen2", "qwen2_moe"))))
    # MiniMax names the rotated elements of a head in its older spelling only.
    rotated = facts.of("rotary_dim", head_dim) if kind == "minimax_m2" and "rope_parameters" not in facts else head_dim
    norms = (
        "all"
        if kind == "minimax_m2" and facts.of("use_qk_norm", True)
        else "head"
        if kind in ("qwen3", "qwen3_moe")
        else ""
    )
    built = []
    for index, window in enumerate(_windows(facts, kind, layers)):
        attention = parts.attention(
            hidden,
            heads,
            facts.of("num_key_value_heads", heads),
            head_dim,
            qkv_bias=bias,
            o_bias=bias and kind not in ("qwen2", "qwen2_moe", "mimo"),
            qk_norm=norms,
            rope=facts.rope(rotated),
            window=window,
        )
        built.append(parts.layer(hidden, attention, _mlp(facts, parts, kind, index)))
    return parts.model(facts, shared(built), tie=False)


_EXTRA = {
    "mixtral": ("intermediate_size", "num_local_experts", "num_experts_per_tok"),
    "minimax_m2": ("intermediate_size", "num_local_experts", "num_experts_per_tok"),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_experts_per_tok"),
    "qwen3_moe": ("moe_intermediate_size", "num_experts", "num_experts_per_tok"),
}


def _windows(facts: Facts, kind: str, layers: int) -> list[int | None]:
    """The sliding window of every layer; None where all tokens are seen."""
    size = facts.window(facts.of("sliding_window", None))
    if kind in ("mistral", "phi3", "mixtral"):
        return [size] * layers
    if kind in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mimo") and facts.of("use_sliding_window", False):
        if "layer_types" not in facts:
            first = facts.of("max_window_layers", layers) if kind in ("qwen2", "qwen3", "mimo") else 0
            return [size if index >= first else None for index in range(layers)]
        return [size if t == "sliding_attention" else None for t in facts.layer_types(layers, [])]
    return [None] * layers


def _mlp(facts: Facts, parts: Parts, kind: str, index: int) -> FFNSpec | MoESpec:
    hidden, act = facts["hidden_size"], facts.act("hidden_act")
    if kind in ("mixtral", "minimax_m2"):
        minimax = kind == "minimax_m2"
        return MoESpec(
            router=parts.linear(facts["num_local_experts"], hidden),
            experts=parts.gated(hidden, facts["intermediate_size"], act),
            num_experts=facts["num_local_experts"],
            num_experts_per_tok=facts["num_experts_per_tok"],
            scoring=facts.of("scoring_func", "sigmoid") if minimax else "softmax",
            correction_bias=minimax and bool(facts.of("use_routing_bias", True)),
        )
    sparse = kind in ("qwen2_moe", "qwen3_moe") and index not in facts.of("mlp_only_layers", ())
    if sparse and (index + 1) % facts.of("decoder_sparse_step", 1) == 0:
        always = kind == "qwen2_moe"
        return MoESpec(
            router=parts.linear(facts["num_experts"], hidden),
            experts=parts.gated(hidden, facts["moe_intermediate_size"], act),
            num_experts=facts["num_experts"],
            num_experts_per_tok=facts["num_experts_per_tok"],
            shared=parts.gated(hidden, facts["shared_expert_intermediate_size"], act) if always else None,
            shared_gate=parts.linear(1, hidden) if always else None,
            norm_topk_prob=bool(facts.of("norm_topk_prob", False)),
        )
    return parts.gated(hidden, facts["intermediate_size"], act, bool(facts.of("mlp_bias", False)))


def deepseek(facts: Facts) -> ModelSpec:
    """DeepSeek-V3 and Kimi-K2: latent attention, experts with shared ones after a few dense layers; MTP layers are left out.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: experts in every n-th layer only.
    """
    from trimtab.spec.nodes import LatentAttentionSpec

    facts.need(
        *REQUIRED, "intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace",
    )  # fmt: skip
    if facts.of("moe_layer_freq", 1) != 1:
        raise UnsupportedModelError(f"{facts.name}: moe_layer_freq={facts['moe_layer_freq']} is not known. Allowed: 1.")
    parts, hidden, heads = Parts.rms(facts), facts["hidden_size"], facts["num_attention_heads"]
    nope, rotary, value = facts["qk_nope_head_dim"], facts["qk_rope_head_dim"], facts["v_head_dim"]
    q_rank, kv_rank, bias = (
        facts.of("q_lora_rank", None),
        facts["kv_lora_rank"],
        bool(facts.of("attention_bias", False)),
    )
    act, experts, width = facts.act("hidden_act"), facts["n_routed_experts"], facts["moe_intermediate_size"]
    rope = facts.rope(rotary)
    attention = LatentAttentionSpec(
        num_attention_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=value,
        q_a_proj=parts.linear(q_rank, hidden, bias) if q_rank else None,
        q_a_layernorm=parts.norm(q_rank) if q_rank else None,
        q_b_proj=parts.linear(heads * (nope + rotary), q_rank or hidden),
        kv_a_proj_with_mqa=parts.linear(kv_rank + rotary, hidden, bias),
        kv_a_layernorm=parts.norm(kv_rank),
        kv_b_proj=parts.linear(heads * (nope + value), kv_rank),
        o_proj=parts.linear(hidden, heads * value, bias),
        rope=rope,
        scale=(nope + rotary) ** -0.5 * _mscale(dict(rope.scaling)) ** 2,
        cache=parts.cache(1, kv_rank + rotary, 0),
    )
    always = facts.of("n_shared_experts", 0)
    moe = MoESpec(
        router=parts.linear(experts, hidden),
        experts=parts.gated(hidden, width, act),
        num_experts=experts,
        num_experts_per_tok=facts["num_experts_per_tok"],
        shared=parts.gated(hidden, width * always, act) if always else None,
        scoring=facts.of("scoring_func", "sigmoid"),
        norm_topk_prob=bool(facts.of("norm_topk_prob", True)),
        routed_scaling=float(facts.of("routed_scaling_factor", 1.0)),
        correction_bias=facts.of("topk_method", "noaux_tc") == "noaux_tc",
        num_groups=facts.of("n_group", 1),
        topk_groups=facts.of("topk_group", 1),
    )
    dense = parts.gated(hidden, facts["intermediate_size"], act)

    def layer(mlp: FFNSpec | MoESpec) -> LayerSpec:
        return LayerSpec(
            input_layernorm=parts.norm(hidden),
            self_attn=attention,
            post_attention_layernorm=parts.norm(hidden),
            mlp=mlp,
        )

    first, count = facts["first_k_dense_replace"], facts["num_hidden_layers"]
    return parts.model(facts, (layer(dense),) * min(first, count) + (layer(moe),) * max(count - first, 0), tie=False)


def _mscale(scaling: dict[str, object]) -> float:
    """YaRN's factor on the softmax scale (DeepSeek: ``0.1 * mscale_all_dim * ln(factor) + 1``), applied once to q and once to k."""
    import math

    factor, mscale = float(scaling.get("factor", 1.0)), float(scaling.get("mscale_all_dim", 0.0))  # type: ignore[arg-type]
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 and mscale else 1.0


def gpt_oss(facts: Facts) -> ModelSpec:
    """gpt-oss: sink logits, biases, a window on every other layer, experts with a clamped gate (act ``swiglu_oai``).

    The clamp must be 7, which is part of that activation: ``g = min(g, 7); u = clip(u, -7, 7); (u + 1) * g * sigmoid(1.702 g)``.

    Raises:
        SpecError: a key is missing.
    """
    facts.need(
        *REQUIRED,
        "intermediate_size",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
    )
    if facts.of("swiglu_limit", 7.0) != 7.0:
        raise SpecError(f"{facts.name}: swiglu_limit={facts['swiglu_limit']} is not known. Allowed: 7.0.")
    parts, hidden, count, experts = (
        Parts.rms(facts),
        facts["hidden_size"],
        facts["num_hidden_layers"],
        facts["num_local_experts"],
    )
    bias = bool(facts.of("attention_bias", True))
    built = []
    for kind in facts.layer_types(count, ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]):
        attention = parts.attention(
            hidden,
            facts["num_attention_heads"],
            facts["num_key_value_heads"],
            facts["head_dim"],
            qkv_bias=bias,
            o_bias=bias,
            rope=facts.rope(facts["head_dim"]),
            window=facts.window(facts["sliding_window"]) if kind == "sliding_attention" else None,
            sinks=True,
        )
        moe = MoESpec(
            router=parts.linear(experts, hidden, bias=True),
            experts=parts.gated(hidden, facts["intermediate_size"], "swiglu_oai", bias=True),
            num_experts=experts,
            num_experts_per_tok=facts["num_experts_per_tok"],
        )
        built.append(parts.layer(hidden, attention, moe))
    return parts.model(facts, shared(built), tie=False)


def llama4(facts: Facts) -> ModelSpec:
    """Llama 4: most layers attend within chunks and norm rotated q and k; every fourth has no positions and sees all.

    Raises:
        SpecError: a key is missing.
    """
    facts.need(
        *REQUIRED, "num_key_value_heads", "intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok"
    )  # fmt: skip
    parts, hidden, layers = Parts.rms(facts), facts["hidden_size"], facts["num_hidden_layers"]
    heads, act, bias = facts["num_attention_heads"], facts.act("hidden_act"), bool(facts.of("attention_bias", False))
    head_dim, every, step = (
        facts.of("head_dim", hidden // heads),
        facts.of("no_rope_layer_interval", 4),
        facts.of("interleave_moe_layer_step", 1),
    )
    rotated = facts.of("no_rope_layers", None) or [int((i + 1) % every != 0) for i in range(layers)]
    chunk = facts.window(facts.of("attention_chunk_size", 8192))
    kinds = facts.layer_types(
        layers,
        ["chunked_attention" if rotates and chunk else "full_attention" for rotates in rotated[:layers]],
        ("chunked_attention", "full_attention"),
    )
    sparse = facts.of("moe_layers", range(step - 1, layers, step))
    expert = parts.gated(hidden, facts["intermediate_size"], act)
    moe = MoESpec(
        router=parts.linear(facts["num_local_experts"], hidden),
        experts=expert,
        num_experts=facts["num_local_experts"],
        num_experts_per_tok=facts["num_experts_per_tok"],
        shared=expert,
        scoring="sigmoid",
        norm_topk_prob=False,
    )
    dense = parts.gated(hidden, facts["intermediate_size_mlp"], act)
    built = []
    for index, (kind, rotates) in enumerate(zip(kinds, rotated, strict=False)):
        attention = parts.attention(
            hidden,
            heads,
            facts["num_key_value_heads"],
            head_dim,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm="bare" if rotates and facts.of("use_qk_norm", True) else "",
            rope=facts.rope(head_dim) if rotates else None,
            chunk=chunk if kind == "chunked_attention" else None,
        )
        built.append(parts.layer(hidden, attention, moe if index in sparse else dense))
    return parts.model(facts, shared(built), tie=False)
