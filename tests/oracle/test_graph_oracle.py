"""Parameters, cache bytes and FLOPs of the catalogue's models against transformers' own models, which hold no weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.graph.build import build, filter_graph
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.spec.configs import catalogue_entry, load_spec, model_ids, spec_from_config
from trimtab.spec.nodes import TokenFilter
from trimtab.spec.tree import Edit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# One model of every architecture; `make test-all` takes all of them.
ONE_EACH = (
    "smollm2-135m", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-2b", "gemma-3-1b", "phi-3-mini-4k", "gpt2",
    "opt-125m", "bloom-560m", "phi-2", "gpt-neox-20b", "mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "gpt-oss-20b",
    "deepseek-v3", "gemma-4-26b-a4b", "llama-4-scout", "nemotron-h-56b", "qwen3-next-80b-a3b",
)  # fmt: skip
#: Of these transformers has no class without code from the hub, or our catalogue has shapes only.
ABSENT = {"mimo-7b", "kimi-k2", "bitnet-3b"}


def config_of(name: str, **changes: Any) -> Any:
    facts = {key: value for key, value in catalogue_entry(name).items() if not key.startswith("_")}
    facts = facts.get("text_config", facts)
    facts.pop("rope_scaling", None)  # of some models the catalogue leaves out its factors; no shape depends on it
    return transformers.AutoConfig.for_model(**(facts | changes))


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.bfloat16)


def parameters_of(model: Any) -> int:
    return sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for n, b in model.named_buffers() if "correction_bias" in n
    )


@pytest.mark.parametrize("name", ONE_EACH)
def test_parameters_and_cache_bytes(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_ids() if name not in (*ONE_EACH, *ABSENT)])
def test_parameters_and_cache_bytes_of_the_rest(name: str) -> None:
    check(name)


def check(name: str) -> None:
    spec = load_spec(name)
    model = on_meta(config_of(name))
    assert spec.num_parameters() == parameters_of(model)
    tokens = 7
    with torch.no_grad():
        cache = model(torch.zeros(2, tokens, dtype=torch.int64, device="meta"), use_cache=True).past_key_values
    assert sum(map(cache_bytes, cache.layers)) == 2 * spec.with_dtype("bfloat16").kv_nbytes(tokens)


def cache_bytes(layer: Any) -> int:
    """Bytes of one layer's cache: keys and values, or state and inputs of the convolution, or nothing."""
    if getattr(layer, "keys", None) is not None:
        return layer.keys.nbytes + layer.values.nbytes
    states = getattr(layer, "conv_states", None)
    if not states:
        return 0
    # Of the convolution's inputs transformers holds the newest as well, which the next step does not read.
    conv, state = states[0], layer.recurrent_states[0]
    return conv.nbytes // conv.shape[-1] * (conv.shape[-1] - 1) + state.nbytes


def test_flops_of_expanded_latent_attention_equal_torch() -> None:
    """Our decoder does not run latent attention yet, so a tiny DeepSeek-V3 of transformers is the oracle of its graph."""
    from torch.utils.flop_counter import FlopCounterMode

    changes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    facts = {key: value for key, value in catalogue_entry("deepseek-v3").items() if not key.startswith("_")} | changes
    spec = spec_from_config(facts, "tiny-deepseek")
    config = config_of("deepseek-v3", **changes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32, experts_implementation="eager"
    )
    assert spec.num_parameters() == parameters_of(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(19)[None])
    step = StepShape.of([19], [0], logits=19)
    ours = sum(int(count(op, step).flops) for op in build(spec, "prefill").ops)
    assert counter.get_total_flops() == ours


def test_flops_of_the_filter_pass_equal_torch(tiny_model: Any) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from trimtab.model.attention import Attention, eager
    from trimtab.model.flow import filter_prompt
    from trimtab.model.variant import Model, Variant

    spec = tiny_model.spec.edit([Edit("flow", "filter", TokenFilter(layer=2, topk=5, pool=3))], by="test")
    decoder = Model(Variant(spec, tiny_model.weights)).decoder
    for module in decoder.modules():
        if isinstance(module, Attention):
            module.backend = eager
    with FlopCounterMode(display=False) as counter:
        filter_prompt(decoder, np.arange(21))
    assert counter.get_total_flops() == sum(
        int(count(op, StepShape.of([21], [0])).flops) for op in filter_graph(spec).ops
    )
