"""GGUF metadata of a Hugging Face folder: shapes from the spec, the vocabulary from its tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.rope import frequencies
from trimtab.runtime.weights.export.container import Entry
from trimtab.runtime.weights.export.gguf_tokenizer import tokenizer_metadata
from trimtab.runtime.weights.export.job import Job
from trimtab.runtime.weights.export.places import unsaid
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.configs import spec_from_config
from trimtab.spec.families.gguf import ARCHITECTURES, config_from_gguf
from trimtab.spec.families.names import gguf_spelling
from trimtab.spec.families.sources import Source, places, with_stored_biases
from trimtab.spec.leaves import RopeSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, MoESpec

#: Type of a value in the file (4 uint32, 6 float32, 7 bool, 8 text, 9 array), and the value or, of a copied one, its bytes.
Value = tuple[int, Any]

_ARCHITECTURES = {theirs: ours for ours, theirs in ARCHITECTURES.items()} | {"mistral": "llama", "mixtral": "llama"}


def from_folder(job: Job) -> tuple[dict[str, Value], Mapping[str, Source], list[Entry]]:
    """Metadata, the place of every weight, and the tensors that are no weights (rotary factors of Llama 3).

    Raises:
        SpecError: an architecture, a detail of the model or a tokenizer that GGUF metadata do not express.
    """
    config, base = job.config(), job.base
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise SpecError(
            f"{base.name}: no GGUF metadata are built for {kind}. Known: {', '.join(sorted(_ARCHITECTURES))}."
        )
    architecture = _ARCHITECTURES[kind]
    spelling = gguf_spelling(base.family, architecture)
    found = places(base, spelling, gguf=True)
    metadata = _shapes(base, architecture)
    factors, entries = _rope_factors(base), []
    if factors is not None:
        data = factors.astype(np.float32)
        entries.append(Entry("rope_freqs.weight", "fp32", data.shape, data.nbytes, lambda: data))
    _check(base, metadata, found, architecture, factors is not None)
    return metadata | tokenizer_metadata(job.source, base), found, entries


def _shapes(spec: ModelSpec, architecture: str) -> dict[str, Value]:
    """What `config_from_gguf` reads back."""
    layers = spec.layers
    attention, ffn = layers[0].self_attn, layers[0].mlp
    if not isinstance(attention, AttentionSpec) or spec.norm is None:
        raise SpecError(f"{spec.name}: no GGUF metadata are built for {type(attention).__name__} layers.")
    found: dict[str, Value] = {
        "context_length": (4, spec.max_position_embeddings),
        "embedding_length": (4, spec.hidden_size),
        "block_count": (4, len(layers)),
        "vocab_size": (4, spec.vocab_size),
        "attention.head_count": (4, attention.num_attention_heads),
        "attention.head_count_kv": (4, attention.num_key_value_heads),
        "attention.key_length": (4, attention.head_dim),
        "attention.value_length": (4, attention.head_dim),
        f"attention.layer_norm_{'rms_' if spec.norm.kind == 'rms' else ''}epsilon": (6, spec.norm.eps),
    }
    if isinstance(ffn, FFNSpec):
        found["feed_forward_length"] = 4, ffn.intermediate_size
    elif isinstance(ffn, MoESpec):
        found["feed_forward_length"] = 4, ffn.experts.intermediate_size
        found["expert_count"] = 4, ffn.num_experts
        found["expert_used_count"] = 4, ffn.num_experts_per_tok
        if architecture != "llama":
            found["expert_feed_forward_length"] = 4, ffn.experts.intermediate_size
        if ffn.shared is not None:
            found["expert_shared_feed_forward_length"] = 4, ffn.shared.intermediate_size
    windows = [a.window for a in _attentions(spec) if a.window is not None]
    if windows:
        found["attention.sliding_window"] = 4, windows[0]
    whole = next((a for a in _attentions(spec) if a.window is None), attention)
    if whole.rope is not None:
        found["rope.dimension_count"] = 4, whole.rope.dim
        found["rope.freq_base"] = 6, whole.rope.theta
        found |= _scaling(whole.rope)
    if architecture == "gemma3" and (local := next((a for a in _attentions(spec) if a.window), None)) and local.rope:
        found["rope.freq_base_swa"] = 6, local.rope.theta
    if attention.softcap is not None:
        found["attn_logit_softcapping"] = 6, attention.softcap
    if spec.logit_softcap is not None:
        found["final_logit_softcapping"] = 6, spec.logit_softcap
    named = {"general.architecture": (8, architecture), "general.type": (8, "model"), "general.name": (8, spec.name)}
    return named | {f"{architecture}.{key}": value for key, value in found.items()}


def _attentions(spec: ModelSpec) -> Sequence[AttentionSpec]:
    return [layer.self_attn for layer in spec.layers if isinstance(layer.self_attn, AttentionSpec)]


def _scaling(rope: RopeSpec) -> dict[str, Value]:
    facts = dict(rope.scaling)
    kind = facts.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    found: dict[str, Value] = {"rope.scaling.type": (8, kind), "rope.scaling.factor": (6, facts["factor"])}
    if facts.get("original_max_position_embeddings"):
        found["rope.scaling.original_context_length"] = 4, facts["original_max_position_embeddings"]
    return found


def _rope_factors(spec: ModelSpec) -> np.ndarray | None:
    """One divisor for every frequency where the rope is scaled as Llama 3.1 does, which GGUF keeps as a tensor."""
    for attention in _attentions(spec):
        rope = attention.rope
        if rope is not None and dict(rope.scaling).get("rope_type") == "llama3":
            plain = frequencies(dataclasses.replace(rope, scaling=()), spec.max_position_embeddings).inverse
            return plain / frequencies(rope, spec.max_position_embeddings).inverse
    return None


def _check(
    base: ModelSpec, metadata: Mapping[str, Value], found: Mapping[str, Source], architecture: str, factors: bool
) -> None:
    """Refuse a model that the metadata, read back, do not give.

    Raises:
        SpecError: names the first difference.
    """
    values = {key: value for key, (_, value) in metadata.items()}
    names = {source.tensor: SimpleNamespace(shape=(base.vocab_size, base.hidden_size)) for source in found.values()}
    shared = next((layer.mlp.shared for layer in base.layers if isinstance(layer.mlp, MoESpec)), None)
    if shared is not None:
        names["blk.0.ffn_up_shexp.weight"] = SimpleNamespace(shape=(shared.intermediate_size, base.hidden_size))
    try:
        read = spec_from_config(config_from_gguf(values, names), base.name)
        read = with_stored_biases(read, names, gguf_spelling(read.family, architecture))
    except TrimtabError as error:
        raise SpecError(f"{base.name}: GGUF metadata cannot say what it is ({error})") from None
    read = dataclasses.replace(read, family=base.family).with_dtype("float32", keep_packed=False)
    same = base.with_dtype("float32", keep_packed=False)
    if factors:
        same = _without_scaling(same)
    if why := unsaid(same, read, Weights({})):
        raise SpecError(f"GGUF metadata cannot say this of {base.name}: {why}.")


def _without_scaling(spec: ModelSpec) -> ModelSpec:
    layers = []
    for layer in spec.layers:
        mixer = layer.self_attn
        assert isinstance(mixer, AttentionSpec) and mixer.rope is not None
        rope = dataclasses.replace(mixer.rope, scaling=())
        layers.append(dataclasses.replace(layer, self_attn=dataclasses.replace(mixer, rope=rope)))
    return dataclasses.replace(spec, layers=tuple(layers))
