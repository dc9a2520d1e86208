"""How the files of every family, Hugging Face and GGUF, spell the paths of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a family's files name things.

    Args:
        layers: the folder of the layers.
        prefixes: what may stand before every name but the head's; the first that fits the file is used.
        names: our path (less ``layers.i.``) -> the file's. Paths not listed are spelt alike.
        fused: our path -> (the file's tensor, its place: ``q k v gate up``, and ``q/h k/h v/h`` where heads are interleaved).
        experts: our projection -> the file's name of one expert's matrix, ``{e}`` its index.
        stacked: our projection -> (tensor that stacks all experts, place in a fused one or empty).
        transposed: names of the file whose matrices are stored [in, out].
        swapped: the file keeps rotary pairs side by side, so rows of q and k are put back in order.
        norm_shift: added to norm weights (GGUF stores 1 + w for Gemma).
        stack_suffix: endings of the weight and the bias of a stack.
    """

    layers: str = "layers"
    prefixes: tuple[str, ...] = ("model.", "", "model.language_model.", "language_model.model.")
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    swapped: bool = False
    norm_shift: float = 0.0
    stack_suffix: tuple[str, str] = ("", "_bias")


_QKV = {
    name: place for name, place in (("self_attn.q_proj", "q"), ("self_attn.k_proj", "k"), ("self_attn.v_proj", "v"))
}


def _fused_qkv(tensor: str, interleaved: bool = False) -> dict[str, tuple[str, str]]:
    return {path: (tensor, place + ("/h" if interleaved else "")) for path, place in _QKV.items()}


def _experts(gate: str, up: str, down: str) -> dict[str, str]:
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


_STACKS = {
    "gate_proj": ("mlp.experts.gate_up_proj", "gate"),
    "up_proj": ("mlp.experts.gate_up_proj", "up"),
    "down_proj": ("mlp.experts.down_proj", ""),
}
_PLAIN_EXPERTS = _experts("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")
_W123 = _experts(
    "block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3", "block_sparse_moe.experts.{e}.w2"
)
_SHARED = ("gate_proj", "up_proj", "down_proj")
_GEMMA = {
    "attn_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}

#: Hugging Face spellings by family; a family not listed spells everything as Trimtab does.
HUGGING_FACE: dict[str, Spelling] = {
    "phi3": Spelling(
        fused={
            **_fused_qkv("self_attn.qkv_proj"),
            "mlp.gate_proj": ("mlp.gate_up_proj", "gate"),
            "mlp.up_proj": ("mlp.gate_up_proj", "up"),
        }
    ),
    "mixtral": Spelling(names={"mlp.router": "block_sparse_moe.gate"}, experts=_W123, stacked=_STACKS),
    "minimax_m2": Spelling(
        names={
            "mlp.router": "block_sparse_moe.gate",
            "mlp.correction_bias": "block_sparse_moe.e_score_correction_bias",
        },
        experts=_W123,
        stacked=_STACKS,
    ),
    "qwen2_moe": Spelling(
        names={
            "mlp.router": "mlp.gate",
            "mlp.shared_gate": "mlp.shared_expert_gate",
            **{f"mlp.shared.{name}": f"mlp.shared_expert.{name}" for name in _SHARED},
        },
        experts=_PLAIN_EXPERTS,
        stacked=_STACKS,
    ),
    "qwen3_moe": Spelling(names={"mlp.router": "mlp.gate"}, experts=_PLAIN_EXPERTS, stacked=_STACKS),
    "deepseek_v3": Spelling(
        names={
            "mlp.router": "mlp.gate",
            "mlp.correction_bias": "mlp.gate.e_score_correction_bias",
            **{f"mlp.shared.{name}": f"mlp.shared_experts.{name}" for name in _SHARED},
        },
        experts=_PLAIN_EXPERTS,
        stacked=_STACKS,
    ),
    "gpt_oss": Spelling(
        stacked={
            "gate_proj": ("mlp.experts.gate_up_proj", "even"),
            "up_proj": ("mlp.experts.gate_up_proj", "odd"),
            "down_proj": ("mlp.experts.down_proj", ""),
        },
        transposed=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "gemma2": Spelling(names=_GEMMA),
    "gemma3": Spelling(names=_GEMMA),
    "phi": Spelling(
        names={
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
            "norm": "final_layernorm",
        }
    ),
    "opt": Spelling(
        prefixes=("model.decoder.", "decoder.", ""),
        names={
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
            "norm": "final_layer_norm",
        },
    ),
    "gpt2": Spelling(
        layers="h",
        prefixes=("transformer.", ""),
        names={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
            "norm": "ln_f",
        },
        fused=_fused_qkv("attn.c_attn"),
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "bloom": Spelling(
        layers="h",
        prefixes=("transformer.", ""),
        names={
            "embed_tokens": "word_embeddings",
            "embed_norm": "word_embeddings_layernorm",
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "norm": "ln_f",
        },
        fused=_fused_qkv("self_attention.query_key_value", interleaved=True),
    ),
    "gpt_neox": Spelling(
        prefixes=("gpt_neox.", ""),
        names={
            "embed_tokens": "embed_in",
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
        },
        fused=_fused_qkv("attention.query_key_value", interleaved=True),
    ),
}
HUGGING_FACE["kimi_k2"] = HUGGING_FACE["deepseek_v3"]


def gguf_spelling(family: str, architecture: str) -> Spelling:
    """The spelling of a GGUF file; `architecture` is its ``general.architecture``."""
    gemma = family in ("gemma2", "gemma3")
    names = {
        "embed_tokens": "token_embd", "embed_positions": "position_embd", "embed_norm": "token_embd_norm",
        "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "attn_output_norm": "post_attention_norm", "mlp_output_norm": "post_ffw_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.sinks": "attn_sinks",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "mlp.router": "ffn_gate_inp", "mlp.shared_gate": "ffn_gate_inp_shexp", "mlp.correction_bias": "exp_probs_b",
        "mlp.shared.gate_proj": "ffn_gate_shexp", "mlp.shared.up_proj": "ffn_up_shexp", "mlp.shared.down_proj": "ffn_down_shexp",
    }  # fmt: skip
    # Phi-3 fuses gate and up in what GGUF calls ffn_up.
    pair = {"mlp.gate_proj": ("ffn_up", "gate"), "mlp.up_proj": ("ffn_up", "up")} if family == "phi3" else {}
    return Spelling(
        layers="blk",
        prefixes=("",),
        names={our: theirs for our, theirs in names.items() if our not in pair},
        fused={**_fused_qkv("attn_qkv"), **pair},
        experts=_experts("ffn_gate.{e}", "ffn_up.{e}", "ffn_down.{e}"),
        stacked={
            "gate_proj": ("ffn_gate_exps", ""),
            "up_proj": ("ffn_up_exps", ""),
            "down_proj": ("ffn_down_exps", ""),
        },
        stack_suffix=(".weight", ".bias"),
        swapped=architecture == "llama",
        norm_shift=-1.0 if gemma else 0.0,
    )
