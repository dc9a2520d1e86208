"""Families with LayerNorm and biases: GPT-2, OPT, BLOOM, Phi-1.5/Phi-2 and GPT-NeoX."""

from __future__ import annotations

from trimtab.errors import UnsupportedModelError
from trimtab.spec.families.facts import Facts
from trimtab.spec.families.parts import Parts
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import LayerSpec


def gpt2(facts: Facts) -> ModelSpec:
    """GPT-2: learned positions, tied head.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: scores scaled by layer index.
    """
    facts.need("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")
    _refuse(facts, "scale_attn_by_inverse_layer_idx", False)
    _refuse(facts, "scale_attn_weights", True)
    parts, hidden, heads = Parts.layer_norm(facts, "layer_norm_epsilon"), facts["n_embd"], facts["n_head"]
    attention = parts.attention(hidden, heads, heads, hidden // heads, qkv_bias=True, o_bias=True)
    mlp = parts.plain(hidden, facts.of("n_inner", 4 * hidden), facts.act("activation_function"))
    return parts.model(
        facts,
        (parts.layer(hidden, attention, mlp),) * facts["n_layer"],
        tie=True,
        embed_positions=parts.embedding(facts["n_positions"], hidden),
        max_position_embeddings=facts["n_positions"],
    )


def opt(facts: Facts) -> ModelSpec:
    """OPT: learned positions whose table starts two rows in, ReLU.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: norms after the blocks or a narrower embedding (OPT-350M).
    """
    facts.need(
        "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size"
    )
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    _refuse(facts, "word_embed_proj_dim", hidden)
    _refuse(facts, "do_layer_norm_before", True)
    _refuse(facts, "layer_norm_elementwise_affine", True)
    _refuse(facts, "_remove_final_layer_norm", False)
    parts, bias = Parts.layer_norm(facts, "layer_norm_eps"), bool(facts.of("enable_bias", True))
    attention = parts.attention(hidden, heads, heads, hidden // heads, qkv_bias=bias, o_bias=bias)
    mlp = parts.plain(hidden, facts["ffn_dim"], facts.act("activation_function"), bias)
    # The first two rows are unused: a left-over of fairseq's padding index.
    positions = parts.embedding(facts["max_position_embeddings"] + 2, hidden, offset=2)
    return parts.model(
        facts, (parts.layer(hidden, attention, mlp),) * facts["num_hidden_layers"], tie=True, embed_positions=positions
    )


def bloom(facts: Facts) -> ModelSpec:
    """BLOOM: ALiBi, a norm after the embedding.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: residuals taken after the norm.
    """
    facts.need("vocab_size")
    _refuse(facts, "apply_residual_connection_post_layernorm", False)
    hidden = facts.first("hidden_size", "n_embed")
    layers, heads = facts.first("n_layer", "num_hidden_layers"), facts.first("n_head", "num_attention_heads")
    parts = Parts.layer_norm(facts, "layer_norm_epsilon")
    attention = parts.attention(hidden, heads, heads, hidden // heads, qkv_bias=True, o_bias=True, alibi=True)
    mlp = parts.plain(hidden, 4 * hidden, "gelu_tanh")
    return parts.model(
        facts,
        (parts.layer(hidden, attention, mlp),) * layers,
        tie=True,
        embed_norm=parts.norm(hidden),
        max_position_embeddings=facts.of("seq_length", 2048),  # the length it was trained on; ALiBi itself has no end
    )


def phi(facts: Facts) -> ModelSpec:
    """Phi-1.5 and Phi-2: attention and MLP in parallel behind one norm, rotary positions on part of a head, biases everywhere.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: norms on q and k.
    """
    facts.need(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    _refuse(facts, "qk_layernorm", False)
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    head_dim, parts = hidden // heads, Parts.layer_norm(facts, "layer_norm_eps")
    # Phi's own default is half a head.
    rope = facts.rope(head_dim) if _says_share(facts) else facts.rope(head_dim // 2)
    attention = parts.attention(
        hidden, heads, facts.of("num_key_value_heads", heads), head_dim, qkv_bias=True, o_bias=True, rope=rope
    )
    layer = LayerSpec(
        input_layernorm=parts.norm(hidden),
        self_attn=attention,
        post_attention_layernorm=None,
        mlp=parts.plain(hidden, facts["intermediate_size"], facts.act("hidden_act")),
        parallel=True,
    )
    head = parts.linear(facts["vocab_size"], hidden, bias=True)
    return parts.model(facts, (layer,) * facts["num_hidden_layers"], tie=False, lm_head=head)


def gpt_neox(facts: Facts) -> ModelSpec:
    """GPT-NeoX and Pythia: attention and MLP in parallel, each behind its own norm; rotary positions on part of a head.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: without the parallel residual.
    """
    facts.need(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "vocab_size",
    )
    _refuse(facts, "use_parallel_residual", True)
    hidden, heads = facts["hidden_size"], facts["num_attention_heads"]
    head_dim, parts, bias = (
        hidden // heads,
        Parts.layer_norm(facts, "layer_norm_eps"),
        bool(facts.of("attention_bias", True)),
    )
    share = 1.0 if _says_share(facts) else float(facts.of("rotary_pct", 0.25))
    theta = facts.of("rotary_emb_base", None) if "rope_parameters" not in facts else None
    attention = parts.attention(
        hidden, heads, heads, head_dim, qkv_bias=bias, o_bias=bias, rope=facts.rope(int(head_dim * share), theta=theta)
    )
    layer = LayerSpec(
        input_layernorm=parts.norm(hidden),
        self_attn=attention,
        post_attention_layernorm=parts.norm(hidden),
        mlp=parts.plain(hidden, facts["intermediate_size"], facts.act("hidden_act")),
        parallel=True,
    )
    return parts.model(facts, (layer,) * facts["num_hidden_layers"], tie=False)


def _says_share(facts: Facts) -> bool:
    return "partial_rotary_factor" in facts or "partial_rotary_factor" in facts.of("rope_parameters", {})


def _refuse(facts: Facts, key: str, allowed: object) -> None:
    if facts.of(key, allowed) != allowed:
        raise UnsupportedModelError(f"{facts.name}: {key}={facts[key]} is not built. Allowed: {allowed}.")
