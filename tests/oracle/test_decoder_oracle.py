"""Our decoder against transformers: tiny random models of every family, saved and opened again; logits must agree.

transformers computes a whole sequence at once and without a cache: the plainest reading of a model. Ours is compared
with it three ways: as one pass, through the store with a prompt in uneven chunks, and token by token past every window.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.runtime.engine.generate import Session
from trimtab.runtime.step import Step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from trimtab.model.attention import Attention, eager, sdpa  # noqa: E402  (torch first)
from trimtab.model.variant import Model, Variant  # noqa: E402
from trimtab.runtime.weights.load import open_model  # noqa: E402

#: Every id below the vocabulary; 37 tokens: past all windows, longer than a chunk, not a multiple of anything.
TOKENS, WINDOW = 37, 7
#: Float32 noise of a few layers is 1e-6; a wrong epsilon, mask or scale shows from 1e-3 on.
ATOL = 1e-4

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    **_IDS,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_TINY = {"vocab_size": 101, "n_layer": 3, "n_head": 6, **_IDS}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, "rope_type": kind, **more}}


def _longrope(original: int) -> dict[str, Any]:
    """Phi-3 takes the long factors for sequences beyond `original` tokens."""
    factors = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return {**_rope("longrope", **factors), "original_max_position_embeddings": original}


#: case -> (config class, its arguments). What follows a colon is the peculiarity under test.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama:untied": ("LlamaConfig", {**_GQA, "rms_norm_eps": 1e-3, "rope_theta": 100.0}),
    "llama:mha": ("LlamaConfig", {**_SIZES, "head_dim": 14}),
    "llama:mqa": ("LlamaConfig", {**_SIZES, "num_key_value_heads": 1}),
    "llama:linear": ("LlamaConfig", {**_GQA, **_rope("linear", factor=3.0)}),
    "llama:dynamic": ("LlamaConfig", {**_GQA, **_rope("dynamic", factor=3.0)}),
    "llama:llama3": (
        "LlamaConfig",
        {**_GQA, **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama:yarn": ("LlamaConfig", {**_GQA, **_rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0)}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {**_GQA, "tie_word_embeddings": True}),
    "qwen2:window": ("Qwen2Config", {**_GQA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 14}),
    "qwen3:bias": ("Qwen3Config", {**_GQA, "head_dim": 14, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {**_GQA, "head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.5},
    ),
    "gemma2:no caps": (
        "Gemma2Config",
        {**_GQA, "head_dim": 10, "sliding_window": WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 12, "sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", {**_GQA, "sliding_window": WINDOW}),
    "phi3:partial": ("Phi3Config", {**_GQA, "partial_rotary_factor": 0.5}),
    "phi3:short": ("Phi3Config", {**_GQA, **_longrope(48)}),
    "phi3:long": ("Phi3Config", {**_GQA, **_longrope(16)}),
    "phi": ("PhiConfig", {**_SIZES, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", {**_SIZES, "rotary_pct": 0.25}),
    "gpt2": ("GPT2Config", {**_TINY, "n_embd": 48, "n_positions": 64}),
    "gpt2:untied": ("GPT2Config", {**_TINY, "n_embd": 48, "n_positions": 64, "n_inner": 40, "tie_word_embeddings": False}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 101, "hidden_size": 48, "ffn_dim": 88, "num_hidden_layers": 3, "num_attention_heads": 6,
            "max_position_embeddings": 64, "word_embed_proj_dim": 48, **_IDS,
        },
    ),
    "bloom": ("BloomConfig", {**_TINY, "hidden_size": 48, "seq_length": 64}),
    "bloom:8 heads": ("BloomConfig", {**_TINY, "hidden_size": 48, "n_head": 8, "seq_length": 64}),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2_moe:normed": ("Qwen2MoeConfig", {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": True}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GQA, **_EXPERTS, "head_dim": 14, "norm_topk_prob": True}),
    "qwen3_moe:mixed": ("Qwen3MoeConfig", {**_GQA, **_EXPERTS, "head_dim": 14, "mlp_only_layers": [1]}),
    "gpt_oss": ("GptOssConfig", {**_GQA, "head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "minimax_m2": ("MiniMaxM2Config", {**_GQA, "head_dim": 14, "num_local_experts": 5, "num_experts_per_tok": 2}),
}  # fmt: skip

Case = tuple[Any, Model]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Builds both models of a case once: transformers' own, and ours opened from its folder."""
    made: dict[tuple[str, str], Case] = {}

    def build(case: str, dtype: str = "float32") -> Case:
        if (case, dtype) not in made:
            name, arguments = FAMILIES[case]
            torch.manual_seed(0)
            config = getattr(transformers, name)(**arguments)
            theirs = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation="eager"
            ).eval()
            _stir(theirs)
            folder = tmp_path_factory.mktemp(case.replace(":", "-").replace(" ", "-"))
            theirs.save_pretrained(folder)
            loaded = open_model(folder, dtype)
            made[case, dtype] = theirs, Model(Variant(loaded.spec, loaded.weights))
        return made[case, dtype]

    return build


@torch.no_grad()
def _stir(model: Any) -> None:
    """Make every parameter matter: norms away from 1, biases from 0, matrices large enough for peaked attention."""
    buffers = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
    for tensor in [*model.parameters(), *buffers]:
        if tensor.dim() == 1:
            tensor += 0.3 * torch.randn_like(tensor)
        else:
            tensor *= 5  # initialised at 0.02: scores would all be near 0 and the mask would hardly show


def _ids(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 101, count)


@torch.no_grad()
def _theirs(model: Any, ids: np.ndarray) -> torch.Tensor:
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].float()


def _backend(model: Model, backend: Callable[..., torch.Tensor]) -> None:
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            module.backend = backend


def _stepwise(session: Session, ids: np.ndarray, prompt: int) -> torch.Tensor:
    """Logits after each token from the last of the prompt on, one token at a time."""
    found = [session.prefill([ids[:prompt]], reserve=len(ids) - prompt)[0]]
    found += [session.decode([token])[0] for token in ids[prompt:]]
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("backend", [eager, sdpa])
@pytest.mark.parametrize("case", FAMILIES)
def test_one_pass(models: Callable[..., Case], case: str, backend: Callable[..., torch.Tensor]) -> None:
    theirs, ours = models(case)
    _backend(ours, backend)
    ids = _ids(TOKENS)
    wanted = _theirs(theirs, ids)
    assert wanted.std() > 0.05  # else an absolute tolerance says nothing
    torch.testing.assert_close(ours.logits(ids)[0], wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", [eager, sdpa])
@pytest.mark.parametrize("case", FAMILIES)
def test_prompt_in_chunks_then_token_by_token(
    models: Callable[..., Case], case: str, backend: Callable[..., torch.Tensor]
) -> None:
    """A prompt of 23 in chunks of 11 and 10, then 14 tokens one by one, twice past the window."""
    theirs, ours = models(case)
    _backend(ours, backend)
    ids = _ids(TOKENS)
    found = _stepwise(ours.session(chunk=11), ids, 23)
    torch.testing.assert_close(found, _theirs(theirs, ids)[22:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_from_the_first_token_on(models: Callable[..., Case], case: str) -> None:
    """A prompt of one token; every later one through the store alone."""
    theirs, ours = models(case)
    _backend(ours, sdpa)
    ids = _ids(TOKENS, seed=2)
    torch.testing.assert_close(_stepwise(ours.session(), ids, 1), _theirs(theirs, ids), atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", FAMILIES)
def test_rows_of_different_lengths_side_by_side(models: Callable[..., Case], case: str) -> None:
    theirs, ours = models(case)
    _backend(ours, sdpa)
    rows = [_ids(count, seed) for seed, count in enumerate((1, 29, 12))]
    session = ours.session(chunk=9)
    found = [session.prefill(rows, reserve=2), session.decode([5, 6, 7]), session.decode([8, 9, 10])]
    for row, ids in enumerate(rows):
        whole = np.concatenate((ids, [5 + row, 8 + row]))
        mine = torch.from_numpy(np.stack([logits[row] for logits in found]))
        torch.testing.assert_close(mine, _theirs(theirs, whole)[-3:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "gemma3", "mixtral", "opt"])
def test_bfloat16_rounds_where_transformers_rounds(models: Callable[..., Case], case: str) -> None:
    """In bfloat16 two right programs differ by rounding alone: as much as transformers' two attentions differ."""
    theirs, ours = models(case, "bfloat16")
    ids = _ids(TOKENS)
    wanted, exact = _theirs(theirs, ids), _theirs(models(case)[0], ids)
    found = ours.logits(ids)[0]
    noise = (wanted - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.5 * noise
    assert (found - wanted).abs().mean() < 1.5 * noise


def test_chunks_of_one_pass_do_not_change_the_passes_of_others(models: Callable[..., Case]) -> None:
    """Two rows packed in one pass without a store equal each of them alone."""
    _, ours = models("mistral")
    rows = [_ids(13, 5), _ids(8, 6)]
    step = Step.of([13, 8], [0, 0])
    packed = ours.decoder(torch.from_numpy(np.concatenate(rows)), step, None, np.arange(21))
    alone = torch.cat([ours.logits(row)[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_routing_of_deepseek(groups: tuple[int, int]) -> None:
    """Sigmoid scores, a correction that only chooses, groups of experts, a shared expert: the block of DeepSeek-V3."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    from trimtab.model.ffn import MoE
    from trimtab.runtime.weights.packed import Weights, packed_float
    from trimtab.spec.formats import FP32
    from trimtab.spec.leaves import LinearSpec
    from trimtab.spec.nodes import FFNSpec, MoESpec

    total, kept = groups
    config = transformers.DeepseekV3Config(
        hidden_size=24, moe_intermediate_size=20, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
        n_group=total, topk_group=kept, routed_scaling_factor=2.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = DeepseekV3MoE(config).eval()
    with torch.no_grad():
        for tensor in [*theirs.parameters(), theirs.gate.e_score_correction_bias]:
            tensor.normal_(std=0.3)

    def linear(n: int, k: int) -> LinearSpec:
        return LinearSpec(n=n, k=k, format=FP32)

    def gated(width: int) -> FFNSpec:
        return FFNSpec(gate_proj=linear(width, 24), up_proj=linear(width, 24), down_proj=linear(24, width))

    spec = MoESpec(
        router=linear(8, 24), experts=gated(20), num_experts=8, num_experts_per_tok=3, shared=gated(40), scoring="sigmoid",
        routed_scaling=2.5, correction_bias=True, num_groups=total, topk_groups=kept,
    )  # fmt: skip
    state = theirs.state_dict()
    tensors = {"m.router": state["gate.weight"], "m.correction_bias": state["gate.e_score_correction_bias"]}
    tensors |= {
        f"m.shared.{name}": state[f"shared_experts.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")
    }
    for expert in range(8):
        gate, up = state["experts.gate_up_proj"][expert].chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": state["experts.down_proj"][expert]}
        tensors |= {f"m.experts.{expert}.{name}": tensor for name, tensor in parts.items()}
    ours = MoE(
        "m",
        spec,
        Weights({path: packed_float(tensor.contiguous().numpy(), "fp32") for path, tensor in tensors.items()}),
    )
    x = torch.randn(33, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, Step.of([33], [0])), theirs(x[None])[0], atol=ATOL, rtol=0)


#: Prose, code, figures, another script, a list: none ends its answer within 64 tokens in the same way as another.
PROMPTS = (
    "The history of the lighthouse begins",
    "def fibonacci(n):\n    ",
    "In 2023 the population of 14 cities grew by 3.5 %, while",
    "La capitale de la France est",
    "Three rules for writing clear documentation:\n1.",
)


@pytest.mark.slow  # 64 decode steps of 135M parameters and five passes of transformers: 20 s on one core
def test_smollm2_writes_what_transformers_writes(smollm2_path: Path) -> None:
    """64 greedy tokens of five prompts, fed as ids.

    One pass of transformers over prompt and answer decides for all 64: as long as its likeliest token is ours everywhere,
    its own greedy answer is ours too. Where its two likeliest are within 1e-3 either may come first.
    """
    loaded = open_model(smollm2_path)
    ours = Model(Variant(loaded.spec, loaded.weights), loaded.tokenizer)
    prompts = [ours.tokenizer.encode(text) for text in PROMPTS]
    answers = ours.generate(prompts, max_new_tokens=64, ignore_eos=True)
    theirs = _smollm2_in_transformers(loaded)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.ids) == 64 and len(set(answer.ids)) > 8
        logits = _theirs(theirs, np.array([*prompt, *answer.ids]))[len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        for place, token in enumerate(answer.ids):
            first, second = best.values[place].tolist()
            assert token == best.indices[place, 0] or first - second < 1e-3, f"token {place} of {prompt}"


def _smollm2_in_transformers(loaded: Any) -> Any:
    """LlamaForCausalLM around our decoded weights: its own GGUF loader takes half a minute."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {
        f"model.{path}.weight": torch.tensor(packed.buffers["data"]).squeeze(0)
        for path, packed in loaded.weights.items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no weights and stayed on "meta"
    return model.eval()
