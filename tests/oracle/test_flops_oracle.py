"""FLOPs of every architecture against what torch counts on transformers' models, which hold no weights, to the last one.

Prefill, decode and five tokens behind a prompt with logits for all of them (speculative verification, a chunk of a prompt), at
the models' own widths and with a few layers. Where transformers computes something else than an engine does, the difference
is worked out by hand in `_differs`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.spec.configs import catalogue_entry, spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import LinearAttentionSpec, MoESpec, StateSpaceSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: Every architecture, with what shortens it: layers, and patterns over them.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"num_hidden_layers": 2},
    "mistral-7b-v0.1": {"num_hidden_layers": 2},
    "qwen2.5-0.5b": {"num_hidden_layers": 2, "layer_types": None},
    "qwen3-0.6b": {"num_hidden_layers": 2, "layer_types": None},
    "gemma-2-2b": {"num_hidden_layers": 2, "layer_types": None},
    "gemma-3-1b": {"num_hidden_layers": 7, "layer_types": None},
    "phi-3-mini-4k": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "opt-125m": {"num_hidden_layers": 2},
    "bloom-560m": {"n_layer": 2},
    "phi-2": {"num_hidden_layers": 2},
    "gpt-neox-20b": {"num_hidden_layers": 2},
    "mixtral-8x7b": {"num_hidden_layers": 2},
    "qwen1.5-moe-a2.7b": {"num_hidden_layers": 2, "layer_types": None},
    "qwen3-30b-a3b": {"num_hidden_layers": 2, "layer_types": None},
    "minimax-m2.5": {"num_hidden_layers": 2, "layer_types": None},
    "gpt-oss-20b": {"num_hidden_layers": 2, "layer_types": None},
    "deepseek-v3": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    "llama-4-scout": {"num_hidden_layers": 5, "no_rope_layers": None, "layer_types": None, "moe_layers": [1, 3, 4]},
    "gemma-4-26b-a4b": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "nemotron-h-56b": {"num_hidden_layers": 6, "hybrid_override_pattern": "M-M*-M"},
    "qwen3-next-80b-a3b": {"num_hidden_layers": 5},
}

BATCH, PROMPT, MORE = 2, 70, 5  # more than one chunk of the gated delta rule, one of Mamba-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_flops_equal_torch(name: str) -> None:
    facts = {key: value for key, value in catalogue_entry(name).items() if not key.startswith("_")}
    facts = {**facts.get("text_config", facts), **MODELS[name]}
    facts.pop("rope_scaling", None)  # of some models the catalogue leaves out its factors; no shape depends on it
    facts = {key: value for key, value in facts.items() if value is not None}
    spec, config = spec_from_config(facts, name), transformers.AutoConfig.for_model(**facts)
    with torch.device("meta"):
        # Every token times the matrices of its own experts: the form of which torch counts the products.
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="batched_mm", dtype=torch.bfloat16
        )
    cache, past = None, 0
    for new in (PROMPT, 1, MORE):
        step = StepShape.of([new] * BATCH, [past] * BATCH, logits=BATCH * new)
        theirs, cache = counted(model, new, cache)
        # transformers expands the latents of all keys in every step, which is our form of a prompt.
        graph = build(spec, "prefill")
        assert theirs - _differs(spec, new) == sum(int(count(op, step).flops) for op in graph.ops), (new, past)
        past += new


def counted(model: Any, new: int, cache: Any) -> tuple[int, Any]:
    """FLOPs torch counts for `new` tokens of every sequence, less those of convolutions, and the cache after them."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(BATCH, new, dtype=torch.int64, device="meta")
    with warnings.catch_warnings(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # names of arguments that change with the version
        found = model(ids, past_key_values=cache, use_cache=True).past_key_values
    by_op = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    return counter.get_total_flops() - by_op.get("aten.convolution", 0), found


def _differs(spec: ModelSpec, new: int) -> int:
    """FLOPs that transformers computes in products and an engine does not, less those it computes elsewise."""
    more = 0
    for layer in spec.layers:
        node, tokens = layer.self_attn, BATCH * new
        if isinstance(node, StateSpaceSpec):
            state = node.inner_size * node.state_size
            if new == 1:  # the update of the state is written with elementwise operations
                more -= 2 * BATCH * state
            else:  # C B' per head instead of per group, and the states between chunks as a product with all others
                chunks = -(-new // node.chunk)
                more += 2 * BATCH * chunks * node.chunk**2 * (node.num_heads - node.num_groups) * node.state_size
                more += 2 * BATCH * (chunks + 1) ** 2 * state
        if isinstance(node, LinearAttentionSpec):
            if new == 1:  # all of it elementwise
                more -= 6 * BATCH * node.inner_size * node.key_head_dim
            else:  # triangular systems are solved, not multiplied with an inverse; torch does not count that
                padded = -(-new // node.chunk) * node.chunk
                more -= 2 * BATCH * padded * node.chunk * node.num_heads * (node.key_head_dim + node.head_dim)
        if isinstance(layer.mlp, MoESpec) and spec.family == "llama4":  # every token through every expert
            up, idle = layer.mlp.experts.up_proj, layer.mlp.num_experts - layer.mlp.num_experts_per_tok
            more += 2 * tokens * 3 * up.n * up.k * idle
    return more


def test_absorbed_latent_attention_is_the_same_function_by_arithmetic() -> None:
    """transformers has no absorbed form. For one query over n keys it saves the expansion of the earlier keys and pays wider dots."""
    facts = {key: value for key, value in catalogue_entry("deepseek-v3").items() if not key.startswith("_")}
    spec = spec_from_config({**facts, "num_hidden_layers": 1}, "one-layer")
    node: Any = spec.layers[0].self_attn
    step, keys, heads = StepShape.of([1], [99], logits=1), 100, node.num_attention_heads
    expanded, absorbed = (
        sum(int(count(op, step).flops) for op in build(spec, phase).ops)  # type: ignore[arg-type]
        for phase in ("prefill", "decode")
    )
    nope, rotary, value, rank = node.qk_nope_head_dim, node.qk_rope_head_dim, node.v_head_dim, node.kv_lora_rank
    saved = 2 * (keys - 1) * rank * heads * (nope + value)
    paid = 2 * heads * keys * ((2 * rank + rotary) - (nope + rotary + value))
    assert absorbed == expanded - saved + paid
    # What is expanded is written out for every key in view, not for the new ones alone.
    expand = next(op for op in build(spec, "prefill").ops if op.kind == "expand")
    assert int(count(expand, step).act_written) == keys * heads * (nope + value) * 2
