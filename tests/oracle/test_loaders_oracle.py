"""Loaders against their makers: ggml's own decoder, models saved by transformers, GGUF files written by the gguf package."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.numerics import decode, matrix
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.runtime.weights.load import open_model
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.configs import load_spec
from trimtab.spec.families.sources import wanted
from trimtab.spec.formats import GGUF_BLOCKS, WeightFormat

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GQA = {**_SIZES, "num_key_value_heads": 2}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

#: family -> (config class, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 16, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Config", {**_GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe:mixed": (
        "Qwen3MoeConfig",
        {**_GQA, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GQA, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", _GQA),
    "phi": ("PhiConfig", {**_SIZES, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96, **_IDS}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96,
            "max_position_embeddings": 64, "word_embed_proj_dim": 64, **_IDS,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, **_IDS}),
    "gpt_neox": ("GPTNeoXConfig", {**_SIZES, "rotary_pct": 0.25}),
    "gpt_oss": ("GptOssConfig", {**_GQA, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_SIZES, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "q_lora_rank": 32, "kv_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny random model of a family once and returns its folder; biases and norms are random too."""
    made: dict[tuple[str, str, str], Path] = {}

    def folder(family: str, *, shard: str = "", dtype: str = "float32") -> Path:
        if (family, shard, dtype) not in made:
            path = tmp_path_factory.mktemp(family.replace(":", "-"))
            name, arguments = FAMILIES[family]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(
                getattr(transformers, name)(**arguments), dtype=getattr(torch, dtype)
            )
            with torch.no_grad():
                for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)]:
                    if tensor.dim() == 1:
                        tensor += 0.1 * torch.randn_like(tensor)
            model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
            made[family, shard, dtype] = path
        return made[family, shard, dtype]

    return folder


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every saved tensor as float32, read by safetensors' own torch reader."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.float().numpy() for file in files for name, tensor in load_file(file).items()}


def _expected(family: str, tensors: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The values of one of our keys, looked up in transformers' terms."""
    bias = key.endswith(".bias")
    path, ending = key.removesuffix(".bias"), ".bias" if bias else ".weight"
    head = _rename(family, path)
    for prefix in ("model.decoder.", "transformer.", "gpt_neox.", "model.", ""):
        if prefix + head + ending in tensors:
            found = tensors[prefix + head + ending]
            return found.T if family == "gpt2" and found.ndim == 2 and ".h." in prefix + head else found
        if prefix + head in tensors:
            return tensors[prefix + head]
    layer, local = re.fullmatch(r"layers\.(\d+)\.(.*)", path).groups()  # type: ignore[union-attr]
    return _fused(family, tensors, layer, local, ending)


def _rename(family: str, path: str) -> str:
    gemma = [
        ("post_attention_layernorm", "pre_feedforward_layernorm"),
        ("attn_output_norm", "post_attention_layernorm"),
        ("mlp_output_norm", "post_feedforward_layernorm"),
    ]
    shared = "shared_expert." if family == "qwen2_moe" else "shared_experts."
    moe = [
        ("mlp.router", "mlp.gate"),
        ("mlp.shared_gate", "mlp.shared_expert_gate"),
        ("mlp.shared.", f"mlp.{shared}"),
        ("mlp.correction_bias", "mlp.gate.e_score_correction_bias"),
    ]
    rules = {
        "gemma2": gemma, "gemma3": gemma, "qwen2_moe": moe, "qwen3_moe": moe, "deepseek_v3": moe,
        "mixtral": [("mlp.router", "block_sparse_moe.gate"), ("mlp.experts", "block_sparse_moe.experts"), ("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")],
        "phi": [("o_proj", "dense"), ("up_proj", "fc1"), ("down_proj", "fc2"), ("norm", "final_layernorm")],
        "gpt2": [("layers.", "h."), ("embed_tokens", "wte"), ("embed_positions", "wpe"), ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"), ("self_attn.o_proj", "attn.c_proj"), ("up_proj", "c_fc"), ("down_proj", "c_proj"), ("norm", "ln_f")],
        "opt": [("input_layernorm", "self_attn_layer_norm"), ("post_attention_layernorm", "final_layer_norm"), ("o_proj", "out_proj"), ("mlp.up_proj", "fc1"), ("mlp.down_proj", "fc2"), ("norm", "final_layer_norm")],
        "bloom": [("layers.", "h."), ("embed_tokens", "word_embeddings"), ("embed_norm", "word_embeddings_layernorm"), ("self_attn.o_proj", "self_attention.dense"), ("up_proj", "dense_h_to_4h"), ("down_proj", "dense_4h_to_h"), ("norm", "ln_f")],
        "gpt_neox": [("embed_tokens", "embed_in"), ("self_attn.o_proj", "attention.dense"), ("up_proj", "dense_h_to_4h"), ("down_proj", "dense_4h_to_h"), ("norm", "final_layer_norm"), ("lm_head", "embed_out")],
    }.get(family, [])  # fmt: skip
    for ours, theirs in rules:
        if ours == "norm":
            path = theirs if path == "norm" else path
        elif ours in path:
            path = path.replace(ours, theirs)
            if family in ("gemma2", "gemma3"):
                break
    return path


def _fused(family: str, tensors: dict[str, np.ndarray], layer: str, local: str, ending: str) -> np.ndarray:
    heads = 4
    if family == "phi3":
        if local.startswith("mlp"):
            return np.split(tensors[f"model.layers.{layer}.mlp.gate_up_proj{ending}"], 2)["gate" not in local]
        q, k, v = np.split(tensors[f"model.layers.{layer}.self_attn.qkv_proj{ending}"], [64, 96])
        return {"q": q, "k": k, "v": v}[local.split(".")[1][0]]
    which = "qkv".index(local.split(".")[1][0]) if local.startswith("self_attn") else 0
    if family == "gpt2":  # Conv1D stores [in, out]
        return np.split(tensors[f"transformer.h.{layer}.attn.c_attn{ending}"], 3, axis=-1)[which].T
    if family in ("bloom", "gpt_neox"):
        name = f"transformer.h.{layer}.self_attention" if family == "bloom" else f"gpt_neox.layers.{layer}.attention"
        fused = tensors[f"{name}.query_key_value{ending}"]
        split = fused.reshape(heads, 3, 16, *fused.shape[1:])[:, which]
        return split.reshape(64, *fused.shape[1:])
    if family == "gpt_oss":
        expert, projection = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", local).groups()  # type: ignore[union-attr]
        stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
        found = tensors[f"model.layers.{layer}.mlp.experts.{stack}{'_bias' if ending == '.bias' else ''}"][int(expert)]
        found = found if projection == "down_proj" else found[..., projection == "up_proj" :: 2]
        return found.T
    raise AssertionError(f"no rule for {family} {local}")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_of_a_saved_model_arrives(family: str, folders: Callable[..., Path]) -> None:
    folder = folders(family)
    loaded, tensors, family = open_model(folder), _tensors(folder), family.partition(":")[0]
    assert [*loaded.weights] == [want.key for want in wanted(loaded.spec)]
    for key, packed in loaded.weights.items():
        np.testing.assert_array_equal(matrix(packed).squeeze(), _expected(family, tensors, key).squeeze(), err_msg=key)
    # Nothing is left over: as many elements as the file holds.
    assert sum(packed.shape[0] * packed.shape[1] for packed in loaded.weights.values()) == sum(
        t.size for t in tensors.values()
    )
    assert loaded.spec.num_parameters() == sum(t.size for t in tensors.values())
    assert loaded.weights.nbytes == loaded.spec.weight_nbytes()


@pytest.mark.parametrize("family", ["llama", "mixtral", "bloom"])
def test_sharded_folder_equals_single_file(family: str, folders: Callable[..., Path]) -> None:
    sharded = folders(family, shard="60KB")
    assert len([*sharded.glob("*.safetensors")]) > 1
    one, many = open_model(folders(family)), open_model(sharded)
    assert dict(one.weights).keys() == dict(many.weights).keys()
    for key in one.weights:
        np.testing.assert_array_equal(decode(one.weights[key]), decode(many.weights[key]), err_msg=key)


def test_stored_dtype_is_a_view_and_another_is_converted(folders: Callable[..., Path]) -> None:
    folder = folders("qwen3", dtype="bfloat16")
    for dtype in ("file", "bfloat16"):
        loaded = open_model(folder, dtype)
        for key, packed in loaded.weights.items():
            assert packed.format.kind == "bf16"
            assert not packed.buffers["data"].flags.owndata, key
    single = open_model(folder, "float32")
    tensors = _tensors(folder)
    for key, packed in single.weights.items():
        assert packed.format.kind == "fp32"
        np.testing.assert_array_equal(matrix(packed).squeeze(), _expected("qwen3", tensors, key).squeeze(), err_msg=key)


def test_specs_agree_with_transformers_on_what_has_no_weights(folders: Callable[..., Path]) -> None:
    for family in FAMILIES:
        spec = load_spec(str(folders(family)))
        config = transformers.AutoConfig.from_pretrained(folders(family))
        windows = [getattr(layer.self_attn, "window", None) for layer in spec.layers]
        kinds = getattr(config, "layer_types", None)
        if kinds and family != "deepseek_v3":
            assert windows == [config.sliding_window if kind == "sliding_attention" else None for kind in kinds], family
        assert spec.tie_word_embeddings == config.tie_word_embeddings, family
        ropes = [layer.self_attn.rope for layer in spec.layers]
        if family == "gemma3" and kinds:
            assert [rope.theta for rope in ropes if rope] == [
                config.rope_parameters[kind]["rope_theta"] for kind in kinds
            ]


def test_folder_with_a_tensor_missing_names_it(folders: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folders("llama") / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders("llama") / "config.json").read_text())
    with pytest.raises(SpecError, match=r"lacks weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(tmp_path)


def test_config_that_does_not_belong_to_the_weights(folders: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((folders("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    (tmp_path / "model.safetensors").write_bytes((folders("llama") / "model.safetensors").read_bytes())
    with pytest.raises(SpecError, match="do not belong together"):
        open_model(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- GGUF


def _random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes whose fp16 scales are finite and of either sign: every exponent below the largest."""
    nbytes = GGUF_BLOCKS[kind][1]
    rng = np.random.default_rng(sorted(GGUF_BLOCKS).index(kind))
    data = rng.integers(0, 256, (rows * blocks, nbytes), dtype=np.uint8)
    places = {"q6_k": [208]}.get(kind, [0, 2] if kind in ("q4_1", "q5_1", "q4_k", "q5_k") else [0])
    for place in places:
        scales = (rng.standard_normal(rows * blocks) * 0.1).astype(np.float16)
        data[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return data.reshape(rows, blocks * nbytes)


@pytest.mark.parametrize("kind", sorted(GGUF_BLOCKS))
def test_blocks_decode_as_ggml_does(kind: str) -> None:
    elements, _ = GGUF_BLOCKS[kind]
    blocks = _random_blocks(kind, 7, 3)
    packed = Packed(WeightFormat(kind=kind), (7, 3 * elements), {"blocks": blocks})
    theirs = gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind.upper()))
    np.testing.assert_array_equal(decode(packed), theirs)


def test_built_in_file_decodes_as_ggml_does(smollm2_path: Path) -> None:
    """Every kind of tensor of the file, rows of q and k put back into Hugging Face order as transformers does it."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    file, loaded = GgufFile(smollm2_path), open_model("smollm2-135m")
    undo = LlamaTensorProcessor()._reverse_permute_weights
    ours = {
        "token_embd": "embed_tokens", "blk.0.attn_q": "layers.0.self_attn.q_proj", "blk.29.attn_k": "layers.29.self_attn.k_proj",
        "blk.3.attn_v": "layers.3.self_attn.v_proj", "blk.7.attn_output": "layers.7.self_attn.o_proj", "blk.2.ffn_gate": "layers.2.mlp.gate_proj",
        "blk.2.ffn_up": "layers.2.mlp.up_proj", "blk.29.ffn_down": "layers.29.mlp.down_proj", "blk.5.attn_norm": "layers.5.input_layernorm",
        "blk.5.ffn_norm": "layers.5.post_attention_layernorm", "output_norm": "norm",
    }  # fmt: skip
    for theirs, path in ours.items():
        info = file.tensors[f"{theirs}.weight"]
        (raw,) = file.packed(info.name).buffers.values()
        values = (
            raw
            if info.kind == "fp32"
            else gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, info.kind.upper()))
        )
        if "attn_q" in theirs:
            values = undo(values, 9, 9)
        elif "attn_k" in theirs:
            values = undo(values, 9, 3)
        np.testing.assert_array_equal(decode(loaded.weights[path]), values, err_msg=path)
    assert loaded.spec == load_spec("smollm2-135m").with_dtype("float32")
    assert loaded.weights.nbytes == loaded.spec.weight_nbytes() == 134_515_008 * 4


def test_file_formats_are_kept_when_asked(smollm2_path: Path) -> None:
    packed, floats = open_model("smollm2-135m", "file"), open_model("smollm2-135m", "float32")
    assert packed.weights.nbytes == packed.spec.weight_nbytes() < 97e6
    assert str(packed.spec.layers[0].mlp.up_proj.format) == "q4_1"  # type: ignore[union-attr]
    for path in ("embed_tokens", "layers.4.self_attn.q_proj", "layers.4.self_attn.k_proj", "layers.29.mlp.down_proj"):
        np.testing.assert_array_equal(decode(packed.weights[path]), decode(floats.weights[path]))


#: family -> (gguf architecture, metadata as convert_hf_to_gguf writes it beyond the common keys)
_GGUF: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LLAMA", {}),
    "mixtral": ("LLAMA", {"expert_count": 4, "expert_used_count": 2}),
    "qwen2": ("QWEN2", {}),
    "qwen2_moe": (
        "QWEN2MOE",
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3": ("QWEN3", {"attention.key_length": 32, "attention.value_length": 32}),
    "qwen3_moe": (
        "QWEN3MOE",
        {"attention.key_length": 32, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma2": (
        "GEMMA2",
        {
            "attention.key_length": 32,
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": ("GEMMA3", {"attention.key_length": 32, "attention.sliding_window": 16}),
    "phi3": ("PHI3", {}),
    "phi": ("PHI2", {"rope.dimension_count": 8}),
    "gpt2": ("GPT2", {}),
    "bloom": ("BLOOM", {}),
}


def _write_gguf(family: str, folder: Path, path: Path, quantize: str = "") -> None:
    """Write a folder's model as convert_hf_to_gguf does; names come from the gguf package's own map."""
    name, more = _GGUF[family]
    architecture = getattr(gguf.MODEL_ARCH, name)
    names = gguf.get_tensor_name_map(architecture, 3)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    arch = writer.arch
    kv = 4 if family in ("phi", "gpt2", "bloom") else 2
    width = 256 if family in ("gpt2", "bloom") else 96
    common = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": width,
        "attention.head_count": 4,
        "attention.head_count_kv": kv,
    }
    for key, value in (common | more).items():
        writer.add_float32(f"{arch}.{key}", value) if isinstance(value, float) else writer.add_uint32(
            f"{arch}.{key}", value
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    writer.add_float32(
        f"{arch}.attention.layer_norm{'' if kv == 4 else '_rms'}_epsilon", getattr(config, "rms_norm_eps", 1e-5)
    )
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in rope.get("full_attention", rope):
        writer.add_float32(f"{arch}.rope.freq_base", rope.get("full_attention", rope)["rope_theta"])
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for theirs, values in _tensors(folder).items():
        tensor = theirs.removeprefix("transformer.") if family == "bloom" else theirs
        expert = re.search(r"experts\.(\d+)\.", tensor)
        tensor = tensor.replace(expert.group(0), "experts.") if expert else tensor
        ours = names.get_name(tensor, (".weight", ".bias"))
        assert ours is not None, theirs
        ours, values = _as_converted(family, ours, values)
        if expert:
            stacks.setdefault(ours, {})[int(expert.group(1))] = values
        else:
            _add(writer, ours, values, quantize)
    for ours, parts in stacks.items():
        _add(writer, ours, np.stack([parts[index] for index in sorted(parts)]), quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_converted(family: str, ours: str, values: np.ndarray) -> tuple[str, np.ndarray]:
    """What convert_hf_to_gguf changes of a tensor before it writes it."""
    if family in ("llama", "mixtral") and ("attn_q." in ours or "attn_k." in ours):
        heads = 4 if "attn_q." in ours else 2
        values = (
            values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            .swapaxes(1, 2)
            .reshape(values.shape)
        )
    if family in ("gemma2", "gemma3") and "norm" in ours:
        values = values + 1
    if family == "gpt2" and values.ndim == 2 and ours.startswith("blk"):
        values = values.T
    if family == "bloom" and "attn_qkv" in ours:
        split = values.reshape(4, 3, 16, *values.shape[1:])
        values = np.concatenate([split[:, part].reshape(64, *values.shape[1:]) for part in range(3)])
    return ours, np.ascontiguousarray(values)


def _add(writer: Any, name: str, values: np.ndarray, quantize: str) -> None:
    if quantize and values.ndim > 1 and "norm" not in name and values.shape[-1] % 32 == 0:
        kind = getattr(gguf.GGMLQuantizationType, quantize)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values)


@pytest.mark.parametrize("family", sorted(_GGUF))
def test_gguf_of_a_family_equals_its_folder(family: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    _write_gguf(family, folders(family), tmp_path / "m.gguf")
    theirs, ours = open_model(folders(family)), open_model(tmp_path / "m.gguf")
    assert [*ours.weights] == [*theirs.weights]
    for key, packed in theirs.weights.items():
        # Gemma: (1 + w) - 1 loses the last bits of a small w.
        np.testing.assert_allclose(
            matrix(ours.weights[key]), matrix(packed), rtol=0, atol=1e-7 if "gemma" in family else 0, err_msg=key
        )
    for mine, other in zip(ours.spec.layers, theirs.spec.layers, strict=True):
        assert type(mine.mlp) is type(other.mlp)
        # GGUF says nothing of Qwen2's windows, of the context-long ones and of the epsilon's default; all else is equal.
        for field in (
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "rope",
            "scale",
            "softcap",
            "alibi",
            "q_norm",
        ):
            assert getattr(mine.self_attn, field) == getattr(other.self_attn, field), (family, field)
        if family != "qwen2":
            assert mine.self_attn.window == other.self_attn.window  # type: ignore[union-attr]
        assert (mine.parallel, mine.input_layernorm) == (other.parallel, other.input_layernorm)
    for field in (
        "tie_word_embeddings",
        "logit_softcap",
        "vocab_size",
        "hidden_size",
        "embed_tokens",
        "embed_positions",
        "lm_head",
        "norm",
    ):
        assert getattr(ours.spec, field) == getattr(theirs.spec, field), (family, field)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_rows_move_in_packed_form_as_in_floats(kind: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("llama", "phi3", "mixtral"):
        _write_gguf(family, folders(family), tmp_path / f"{family}.gguf", kind)
        packed, floats = open_model(tmp_path / f"{family}.gguf", "file"), open_model(tmp_path / f"{family}.gguf")
        stored = {"Q4_0": "q4_0", "Q8_0": "q8_0", "F16": "fp16", "BF16": "bf16"}[kind]
        assert packed.spec.layers[0].self_attn.q_proj.format.kind == stored  # type: ignore[union-attr]
        assert packed.weights.nbytes == packed.spec.weight_nbytes()
        original = open_model(folders(family))
        for key in packed.weights:
            np.testing.assert_array_equal(decode(packed.weights[key]), decode(floats.weights[key]), err_msg=key)
            atol = 0.02 if kind == "Q4_0" else 2e-3
            np.testing.assert_allclose(
                decode(floats.weights[key]), decode(original.weights[key]), atol=atol, rtol=0.01, err_msg=key
            )


def test_a_type_that_is_not_read_is_named(folders: Callable[..., Path], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {
        "context_length": 64,
        "embedding_length": 256,
        "block_count": 0,
        "feed_forward_length": 96,
        "attention.head_count": 4,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    kind = gguf.GGMLQuantizationType.Q2_K
    writer.add_tensor("token_embd.weight", np.zeros((32, 84), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="q2_k"):
        GgufFile(tmp_path / "m.gguf").packed("token_embd.weight")
