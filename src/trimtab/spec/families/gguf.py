"""GGUF metadata as a Hugging Face style config, and what a file's tensors add to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trimtab.errors import SpecError, UnsupportedModelError, did_you_mean
from trimtab.spec.families.names import Spelling, gguf_spelling
from trimtab.spec.families.sources import sources, with_stored_biases, with_stored_formats
from trimtab.spec.gguf_header import GgufHeader
from trimtab.spec.model import ModelSpec

#: general.architecture -> model_type of a Hugging Face config.
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3", "phi2": "phi", "gpt2": "gpt2", "bloom": "bloom",
}  # fmt: skip

#: Keys below the architecture's name -> keys of a Hugging Face config.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "layer_norm_eps": "layer_norm_epsilon",
}  # fmt: skip


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Translate GGUF metadata into the keys of a Hugging Face config.

    Args:
        metadata: keys and values of the file.
        tensors: the file's tensors by name; they tell what metadata do not: whether the head is tied, the vocabulary, the
            width of a shared expert. None assumes an untied head.

    Returns:
        A config for `spec_from_config`. Rotary factors that the file holds as a tensor are not in it.

    Raises:
        SpecError: a key is missing.
        UnsupportedModelError: an architecture that is not built, or heads that differ by layer.
    """
    architecture = metadata.get("general.architecture")
    if architecture is None:
        raise SpecError("The GGUF metadata lacks the key general.architecture. Convert the file again.")
    if architecture not in ARCHITECTURES:
        close = did_you_mean(str(architecture), ARCHITECTURES)
        raise UnsupportedModelError(
            f"GGUF architecture {str(architecture)!r} is not built.{close} Known: {', '.join(sorted(ARCHITECTURES))}."
        )
    config: dict[str, Any] = {"model_type": ARCHITECTURES[architecture], "torch_dtype": "float32"}
    for theirs, ours in _KEYS.items():
        value = metadata.get(f"{architecture}.{theirs}")
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise UnsupportedModelError(f"{architecture}.{theirs} differs by layer, which is not built.")
            value = value[0] if value else None
        if value is not None:
            config[ours] = value
    config["vocab_size"] = _vocabulary(metadata, architecture, tensors)
    _scaling(config, metadata, architecture)
    if tensors is not None:
        config["tie_word_embeddings"] = "output.weight" not in tensors
    _by_family(config, metadata, architecture, tensors)
    return {key: value for key, value in config.items() if value is not None}


def _vocabulary(metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any] | None) -> int | None:
    if tensors is not None and "token_embd.weight" in tensors:
        return int(tensors["token_embd.weight"].shape[0])
    if f"{architecture}.vocab_size" in metadata:
        return int(metadata[f"{architecture}.vocab_size"])
    return len(metadata["tokenizer.ggml.tokens"]) if "tokenizer.ggml.tokens" in metadata else None


def _scaling(config: dict[str, Any], metadata: Mapping[str, Any], architecture: str) -> None:
    kind = metadata.get(f"{architecture}.rope.scaling.type")
    factor = metadata.get(f"{architecture}.rope.scaling.factor")
    original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
    if kind in ("linear", "yarn") and factor:
        config["rope_scaling"] = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    if kind == "longrope" or (architecture == "phi3" and original):
        attention = metadata.get(f"{architecture}.rope.scaling.attn_factor")
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "attention_factor": attention,
            "original_max_position_embeddings": original,
        }


def _by_family(
    config: dict[str, Any], metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, Any] | None
) -> None:
    """What differs by family; the rules are those of llama.cpp's loader."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if architecture == "llama" and config.get("num_experts"):
        config |= {"model_type": "mixtral", "num_local_experts": config.pop("num_experts")}
    if architecture in ("qwen2", "qwen2moe"):
        config["attention_bias"] = True
    if architecture == "qwen3moe":
        config["norm_topk_prob"] = True
    if architecture == "qwen2moe" and tensors is not None and "shared_expert_intermediate_size" not in config:
        shared = tensors.get("blk.0.ffn_up_shexp.weight")
        config["shared_expert_intermediate_size"] = shared.shape[0] if shared else None
    if architecture in ("gemma2", "gemma3"):
        config["tie_word_embeddings"] = True
        config["hidden_activation"] = "gelu_pytorch_tanh"
        largest = config.get("num_hidden_layers") == (46 if architecture == "gemma2" else 62)
        if largest and hidden and heads:  # the 27B models scale by hidden_size / heads, the others by head_dim
            config["query_pre_attn_scalar"] = hidden // heads
        else:
            config["query_pre_attn_scalar"] = config.get("head_dim")
    if architecture == "gemma3":
        config["rope_local_base_freq"] = metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    dim = metadata.get(f"{architecture}.rope.dimension_count")
    head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if dim and head_dim and dim != head_dim:
        config["partial_rotary_factor"] = dim / head_dim
    if architecture == "phi2":
        config["hidden_act"] = "gelu_new"
    if architecture in ("gpt2", "bloom"):
        for theirs, ours in _GPT2_KEYS.items():
            if theirs in config:
                config[ours] = config[theirs]
        config |= {"activation_function": "gelu_new", "seq_length": config.get("max_position_embeddings")}


def refuse_parts(header: GgufHeader) -> None:
    """Refuse a file that cannot hold the whole model, before anything as large as it announces is built.

    Raises:
        SpecError: it is one part of several, lacks whole blocks, or is shorter than one row of what it announces.
    """
    if header.metadata.get("split.count", 0) > 1:
        raise SpecError(
            f"{header.path} is one part of {header.metadata['split.count']}. Merge the parts first (llama-gguf-split --merge)."
        )

    def size(key: str) -> int:
        return header.metadata.get(f"{header.metadata.get('general.architecture')}.{key}", 0)

    heads = ("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length")
    for key in ("embedding_length", "feed_forward_length", "expert_count", *heads):
        if isinstance(size(key), float):
            raise SpecError(f"{header.path} announces {key} {size(key)}, which is no whole number. Fetch it again.")
        if isinstance(size(key), int) and size(key) > header.size:
            raise SpecError(f"{header.path} announces {key} {size(key)} and has {header.size} bytes. Fetch it again.")
    announced = size("block_count")
    held = len({name.split(".")[1] for name in header.tensors if name.startswith("blk.")})
    if announced > held:
        raise SpecError(f"{header.path} announces {announced} blocks and holds tensors of {held}. Fetch it again.")


def from_header(spec: ModelSpec, header: GgufHeader) -> ModelSpec:
    """Return `spec` as the file holds it: formats of its tensors, and the rotary factors it holds as tensors.

    Raises:
        SpecError: the file lacks a weight.
        UnsupportedModelError: a weight type Trimtab does not read.
    """
    spelling = spelling_of(spec, header)
    spec = with_stored_biases(spec, header.tensors, spelling)
    found = sources(spec, header.tensors, spelling, str(header.path))
    kinds = {name: info.kind for name, info in header.tensors.items()}
    return with_rope_factors(with_stored_formats(spec, found, kinds, str(header.path)), header)


def spelling_of(spec: ModelSpec, header: GgufHeader) -> Spelling:
    """How this file names its tensors."""
    return gguf_spelling(spec.family, header.metadata["general.architecture"])


def with_rope_factors(spec: ModelSpec, header: GgufHeader) -> ModelSpec:
    """Put rotary factors that the file holds as tensors into the rope of every layer, as ``longrope`` factors.

    Llama 3.1's scaling arrives as ``rope_freqs``: one divisor per frequency, for every length. Phi-3's arrive as a short and
    a long list.
    """
    import struct

    def floats(name: str) -> tuple[float, ...] | None:
        info = header.tensors.get(name)
        return (
            struct.unpack_from(f"<{info.shape[1]}f", header.buffer, info.offset)
            if info and info.kind == "fp32"
            else None
        )

    every, long, short = (
        floats("rope_freqs.weight"),
        floats("rope_factors_long.weight"),
        floats("rope_factors_short.weight"),
    )
    if every is None and long is None:
        return spec
    layers = []
    for layer in spec.layers:
        mixer = layer.self_attn
        rope = getattr(mixer, "rope", None)
        if mixer is not None and rope is not None:
            scaling = dict(rope.scaling)
            if every is not None:
                scaling = {
                    "attention_factor": 1.0,
                    "factor": 1.0,
                    "original_max_position_embeddings": spec.max_position_embeddings,
                }
            scaling |= {"rope_type": "longrope", "long_factor": long or every, "short_factor": short or long or every}
            ordered = (("rope_type", "longrope"), *sorted((k, v) for k, v in scaling.items() if k != "rope_type"))
            attention = dataclasses.replace(mixer, rope=dataclasses.replace(rope, scaling=ordered))
            layer = dataclasses.replace(layer, self_attn=attention)
        layers.append(layer)
    return dataclasses.replace(spec, layers=tuple(layers))
