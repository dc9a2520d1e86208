"""FLOPs of forward and backward against torch's own counter on transformers' tiny models, to the last one."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.graph.build import build
from trimtab.graph.ops import StepShape
from trimtab.graph.training import all_weights, no_weights, training_flops, training_ops
from trimtab.predict.training.step import step_flops
from trimtab.predict.training.work import TrainingWork
from trimtab.spec.configs import catalogue_entry, spec_from_config
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.training import TrainingSpec
from trimtab.spec.tree import walk

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BATCH, TOKENS = 2, 23
_GQA = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64, "intermediate_size": 80,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**_GQA, "tie_word_embeddings": False},
    "qwen3": {**_GQA, "head_dim": 16, "tie_word_embeddings": False},
    "gemma2": {**_GQA, "sliding_window": 7, "query_pre_attn_scalar": 12, "hidden_activation": "gelu_pytorch_tanh"},
    "gpt2": {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64},
    "bloom": {"vocab_size": 97, "hidden_size": 48, "n_layer": 3, "n_head": 6},
    "gpt_neox": {
        **_GQA, "num_key_value_heads": 6, "rotary_pct": 0.25, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
    },
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "qwen2_moe": {
        **_GQA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False, "tie_word_embeddings": False,
    },
}  # fmt: skip


def models(family: str, config: dict[str, Any]) -> tuple[ModelSpec, Any]:
    """Our spec and transformers' model of one config."""
    full = {"model_type": family, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1, **config}
    moe = {"experts_implementation": "eager"} if any("experts" in key for key in config) else {}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**full), attn_implementation="eager", dtype=torch.float32, **moe
    )
    return spec_from_config(full, f"tiny-{family}"), theirs


def counted(model: Any, batch: int = BATCH, tokens: int = TOKENS) -> tuple[int, int]:
    """(forward, backward) FLOPs by torch. The loss has no product, so any scalar of the logits does."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.arange(batch * tokens).reshape(batch, tokens) % 90
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
        return forward, counter.get_total_flops() - forward


def ours(spec: ModelSpec, batch: int = BATCH, tokens: int = TOKENS, **learns: Any) -> tuple[int, int]:
    step = StepShape.of([tokens] * batch, [0] * batch, logits=batch * tokens)
    return training_flops(training_ops(build(spec, "prefill", cache=False), step, **learns))


@pytest.mark.parametrize("family", CONFIGS)
def test_training_flops_equal_torch(family: str) -> None:
    spec, model = models(family, CONFIGS[family])
    assert ours(spec) == counted(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_step_flops_are_those_of_the_graph(family: str) -> None:
    """The planner's sum over layer kinds is the graph's sum over ops."""
    spec, model = models(family, CONFIGS[family])
    training = TrainingSpec(micro_batch=BATCH, global_batch=BATCH, seq_len=TOKENS)
    assert step_flops(TrainingWork(spec, training), training) == (sum(counted(model)),) * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bloom", "gpt_neox"])
def test_frozen_weights_with_learned_biases(family: str) -> None:
    """Weights frozen, biases of linears learned: no weight gradients, and input gradients only behind the first bias."""
    spec, model = models(family, CONFIGS[family])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D") and module.bias is not None:
            module.bias.requires_grad_(True)
    biased = {path for path, node in walk(spec) if isinstance(node, LinearSpec) and node.bias}
    assert ours(spec, trainable=no_weights, adapted=biased.__contains__) == counted(model)


def test_frozen_embedding_and_first_layers() -> None:
    """Where nothing before learns, no gradient is asked for."""
    spec, model = models("qwen2", CONFIGS["qwen2"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2." in name or "lm_head" in name)
    learns = lambda path: path.startswith(("layers.2.", "lm_head"))  # noqa: E731
    assert ours(spec, trainable=learns, adapted=no_weights) == counted(model)
    assert ours(spec, trainable=all_weights) != counted(model)


def test_latent_attention_and_its_experts() -> None:
    changes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    facts = {key: value for key, value in catalogue_entry("deepseek-v3").items() if not key.startswith("_")} | changes
    facts.pop("rope_scaling", None)
    spec, model = models("deepseek_v3", {key: value for key, value in facts.items() if key != "model_type"})
    assert ours(spec) == counted(model)
