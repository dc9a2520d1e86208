"""Files against those who load them: transformers with compressed-tensors, ggml's own decoder, llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trimtab
from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.numerics import decode, encode, matrix
from trimtab.runtime.numerics.blocks import carrier, from_blocks, to_blocks
from trimtab.runtime.weights.export import job, save
from trimtab.runtime.weights.load import open_model
from trimtab.spec.formats import FILE_BLOCKS, WeightFormat
from trimtab.spec.tree import Edit
from trimtab.techniques.apply import reencode

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GQA = {**_SIZES, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 10000.0,
}  # fmt: skip

#: family -> (config class, its arguments, whether a GGUF file says all of it)
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}, True),
    "llama-3": ("LlamaConfig", {**_GQA, "rope_parameters": _LLAMA3}, True),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": None, "head_dim": 32}, True),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, True),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_GQA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        True,
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_GQA, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        True,
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96}, True),
    "qwen2": ("Qwen2Config", _GQA, True),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 32}, True),
    "gemma2": ("Gemma2Config", {**_GQA, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}, True),
    "gemma3": ("Gemma3TextConfig", {**_GQA, "head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}, True),
    "phi3": ("Phi3Config", {**_GQA, "pad_token_id": 0}, True),
    "phi": ("PhiConfig", {**_SIZES, "partial_rotary_factor": 0.5}, True),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96}, True),
    "opt": (
        "OPTConfig",
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96,
         "max_position_embeddings": 64, "word_embed_proj_dim": 64},
        False,
    ),
}  # fmt: skip
_PROMPT = [[3, 17, 45, 80, 9, 33, 71, 5, 12, 60, 28, 14]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a tiny random model of a family once and returns its folder."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / family
            name, arguments, _ = FAMILIES[family]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**arguments))
            with torch.no_grad():
                for tensor in model.parameters():
                    if tensor.dim() == 1:
                        tensor += 0.1 * torch.randn_like(tensor)
            model.save_pretrained(made[family])
        return made[family]

    return folder


def _logits(folder: Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        return model(torch.tensor(_PROMPT)).logits


# ---------------------------------------------------------------------------------------------------- ggml's own decoder


@pytest.mark.parametrize(
    "format",
    [
        *(WeightFormat(kind="int", bits=bits, group=32) for bits in (2, 3, 4, 5, 6, 8)),
        *(WeightFormat(kind="int", bits=bits, group=64, sym=False) for bits in (2, 4, 5)),
        WeightFormat(kind="int", bits=4, group=512), WeightFormat(kind="mxfp4"), WeightFormat(kind="ternary", group=256, tiled=True),
        WeightFormat(kind="ternary", group=32, tiled=True), WeightFormat(kind="bitplane", bits=3, group=64, tiled=True),
    ],
    ids=str,
)  # fmt: skip
def test_ggml_decodes_our_blocks_to_our_values(format: WeightFormat) -> None:
    packed = encode(np.random.default_rng(0).standard_normal((37, 512), dtype=np.float32), format)
    kind = carrier(format, 512)
    assert kind is not None
    blocks = np.ascontiguousarray(to_blocks(packed))
    elements, size = FILE_BLOCKS[kind]
    assert blocks.shape == (37, 512 // elements * size) and blocks.dtype == np.uint8
    theirs = gguf.quants.dequantize(blocks, getattr(gguf.GGMLQuantizationType, kind.upper()))
    np.testing.assert_array_equal(theirs, decode(packed))


@pytest.mark.parametrize("kind", ["MXFP4", "TQ1_0", "TQ2_0"])
def test_we_decode_blocks_of_ggml_to_its_values(kind: str) -> None:
    values = np.random.default_rng(1).standard_normal((9, 512), dtype=np.float32)
    quantization = getattr(gguf.GGMLQuantizationType, kind)
    blocks = gguf.quants.quantize(values, quantization)
    theirs = gguf.quants.dequantize(blocks, quantization)
    np.testing.assert_array_equal(decode(from_blocks(kind.lower(), blocks, 512)), theirs)


def test_a_file_of_ternary_and_mxfp4_blocks_is_read(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Rows of 256 in a file the gguf package wrote; q and k rows are put in order in packed form."""
    sizes = {
        "context_length": 64,
        "embedding_length": 256,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
    }
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    rng, expected = np.random.default_rng(0), {}
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name, kind in zip(names, ["TQ2_0", "MXFP4", "TQ1_0", "TQ2_0", "MXFP4", "TQ1_0", "TQ2_0"], strict=True):
        quantization = getattr(gguf.GGMLQuantizationType, kind)
        blocks = gguf.quants.quantize(rng.standard_normal((256, 256), dtype=np.float32), quantization)
        expected[name] = gguf.quants.dequantize(blocks, quantization)
        writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=quantization)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.add_tensor("token_embd.weight", rng.standard_normal((40, 256), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for dtype in ("file", "float32"):
        found = open_model(tmp_path / "m.gguf", dtype)
        attention, ffn = found.spec.layers[0].self_attn, found.spec.layers[0].mlp
        kinds = [attention.q_proj.format.kind, ffn.gate_proj.format.kind]  # type: ignore[union-attr]
        assert kinds == (["ternary", "mxfp4"] if dtype == "file" else ["fp32", "fp32"])
        np.testing.assert_array_equal(matrix(found.weights["layers.0.mlp.down_proj"]), expected["ffn_down"])
        np.testing.assert_array_equal(matrix(found.weights["layers.0.mlp.up_proj"]), expected["ffn_up"])
        halves = expected["attn_k"].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
        np.testing.assert_array_equal(matrix(found.weights["layers.0.self_attn.k_proj"]), halves)
    # And back into a file: the same blocks, but that five-in-a-byte ternary ones become two-bit ones.
    again = trimtab.convert(tmp_path / "m.gguf", tmp_path / "again.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(again.out).tensors}
    for name, values in expected.items():
        tensor = tensors[f"blk.0.{name}.weight"]
        np.testing.assert_array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), values)
    assert tensors["blk.0.attn_v.weight"].tensor_type == gguf.GGMLQuantizationType.TQ2_0


@pytest.mark.parametrize("family", [name for name, (*_, said) in FAMILIES.items() if said])
def test_a_family_goes_through_gguf_and_back_to_transformers(
    family: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = _logits(folders(family))
    there = trimtab.convert(folders(family), tmp_path / "m.gguf")
    ours = trimtab.load(there.out)
    # Gemma: (1 + w) - 1 loses the last bits of a small w. Elsewhere the weights are the same, and sums differ by rounding.
    torch.testing.assert_close(ours.logits(_PROMPT), expected, rtol=1e-4, atol=1e-4)
    if family == "llama-3":  # a config has no words for factors of single frequencies in every length
        with pytest.raises(SpecError, match="rope"):
            trimtab.convert(there.out, tmp_path / "back", to="safetensors")
        return
    back = trimtab.convert(there.out, tmp_path / "back")
    assert back.manifest["target"] == "safetensors"
    torch.testing.assert_close(_logits(back.out), expected, rtol=1e-5, atol=1e-5)


def test_gguf_refuses_what_its_metadata_do_not_say(folders: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no GGUF metadata are built for opt.*--to safetensors"):
        trimtab.convert(folders("opt"), tmp_path / "m.gguf")
    path = tmp_path / "windowed"
    transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**{**_GQA, "sliding_window": 16})
    ).save_pretrained(path)
    with pytest.raises(SpecError, match=r"window.*--to safetensors"):
        trimtab.convert(path, tmp_path / "m.gguf")


# ------------------------------------------------------------------------------------- transformers with compressed-tensors


def _compressed_tensors() -> Any:
    return pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed; it is no dependency")


def _dequantized(folder: Path, weights: Any, spec: Any) -> Any:
    """transformers with our decoded weights, without a word on quantization: the reference of a coded folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config)
    fused = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    state = {}
    for path, packed in weights.items():
        values = torch.from_numpy(np.array(matrix(packed)))
        name = path if path == "lm_head" else f"model.{path}"
        assert name in fused, name
        state[f"{name}.weight"] = values[0] if len(values) == 1 else values
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {*missing} <= ({"lm_head.weight"} if spec.tie_word_embeddings else set())
    model.tie_weights()
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # of the library's own
@pytest.mark.parametrize("specs", ["rtn", "rtn:bits=3", "rtn:bits=8,group=32", "rtn:bits=4,group=16", "mixed"])
def test_transformers_loads_codes_bit_for_bit(specs: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    _compressed_tensors()
    source, out = folders("llama"), tmp_path / "out"
    if specs == "mixed":
        loaded = open_model(source)
        forms = {"q_proj": (8, 64), "k_proj": (8, 64), "v_proj": (4, 64)}
        edits = [
            Edit(f"layers.*.self_attn.{name}", "format", WeightFormat(kind="int", bits=bits, group=group))
            for name, (bits, group) in forms.items()
        ]
        edits += [Edit("layers.1.mlp.down_proj", "format", WeightFormat(kind="int", bits=3, group=32))]
        spec = loaded.spec.edit(edits, "by hand")
        prepared = save.prepare(job.Job(spec, loaded.spec, reencode(loaded.weights, spec), source), out, "safetensors")
        save.write(prepared, out, {"trimtab": 1}, lambda label, items: iter(items))
    else:
        trimtab.convert(source, out, techniques=[specs], to="safetensors")
    ours = trimtab.load(out)
    scales = [packed.buffers["scale"] for packed in ours.weights.values() if packed.format.kind == "int"]
    assert scales and any((scale < 0).any() for scale in scales)  # ours may be negative, and load as they are
    theirs = _logits(out)
    with torch.no_grad():
        reference = _dequantized(out, ours.weights, ours.spec)(torch.tensor(_PROMPT)).logits
    assert torch.equal(theirs, reference)
    torch.testing.assert_close(ours.logits(_PROMPT), theirs, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "strategy", "group", "dtype"),
    [(4, "group", 32, "float32"), (4, "channel", None, "bfloat16"), (8, "channel", None, "float32"), (3, "group", 16, "float16")],
)  # fmt: skip
def test_what_compressed_tensors_wrote_is_read_as_it_decodes_it(
    bits: int, strategy: str, group: int | None, dtype: str, tmp_path: Path
) -> None:
    _compressed_tensors()
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    form = "int-quantized" if bits == 8 else "pack-quantized"
    arguments = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_GQA))
    state, expected = {}, {}
    for name, tensor in plain.state_dict().items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            state[name] = tensor.to(getattr(torch, dtype))
            continue
        grouped = tensor.reshape(len(tensor), -1, group or tensor.shape[1])
        scale = (grouped.abs().amax(-1) / (2 ** (bits - 1) - 1)).to(getattr(torch, dtype))
        coded = compressor.compress({"weight": tensor.to(scale.dtype), "weight_scale": scale}, scheme)
        state |= {f"{module}.{part}": value.contiguous() for part, value in coded.items()}
        wide = {**coded, "weight_scale": scale.float()}  # decoded without the rounding of a narrow product
        expected[module.removeprefix("model.")] = compressor.decompress(wide, scheme)["weight"].numpy()
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads(plain.config.to_json_string())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": dtype}))
    for kept in ("auto", "float32"):
        found = open_model(tmp_path, kept)
        for path, values in expected.items():
            # Scales of float32 that are no fp16 numbers have no codes here: such a matrix is read as floats.
            assert found.weights[path].format.kind == ("int" if kept == "auto" and dtype != "float32" else "fp32")
            np.testing.assert_array_equal(matrix(found.weights[path]), values, err_msg=path)
    state["model.layers.0.mlp.up_proj.weight_zero_point"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"up_proj.* is coded with zero points"):
        open_model(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_built_in_model_loads_in_transformers_bit_for_bit(smollm2_path: Path, tmp_path: Path) -> None:
    _compressed_tensors()
    out = trimtab.convert("smollm2-135m", tmp_path / "out", techniques=["rtn"]).out
    ours = trimtab.load(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    text = "The trim tab is the small surface that turns a big ship with little effort, isn't it? 2026!"
    assert tokenizer(text)["input_ids"] == ours.tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == ours.tokenizer.apply_chat_template(
        chat, add_generation_prompt=False
    )
    ids = torch.tensor([ours.tokenizer.encode(text)])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out)(ids).logits
        reference = _dequantized(out, ours.weights, ours.spec)(ids).logits
    assert torch.equal(theirs, reference)
    # Sums of other orders: 1e-4 of logits of up to 30.
    torch.testing.assert_close(ours.logits(ids), theirs, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- llama.cpp


def _llama_cpp(repository: Path) -> str:
    """A python that has llama-cpp-python: this one, or that of the peers."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return sys.executable
    peers = repository / ".venv-peers" / "bin" / "python"
    if not (peers.is_file() and subprocess.run([peers, "-c", "import llama_cpp"], capture_output=True).returncode == 0):
        pytest.skip("llama-cpp-python is not installed; it is no dependency (benchmarks/peers/setup.sh compiles it)")
    return str(peers)


@pytest.mark.slow
@pytest.mark.parametrize("specs", ["", "rtn:bits=4,group=32", "rtn:bits=5,group=32,sym=false", "rtn:bits=8,group=32"])
def test_llama_cpp_finds_the_perplexity_that_we_find(
    specs: str, smollm2_path: Path, shared_data: Path, repository: Path, tmp_path: Path
) -> None:
    python = _llama_cpp(repository)
    out = trimtab.convert("smollm2-135m", tmp_path / "m.gguf", techniques=[specs] if specs else []).out
    ours = trimtab.load(out)
    ids = ours.tokenizer.encode((shared_data / "weights" / "cfi_public.txt").read_text("utf-8"))
    windows = [ids[start : start + 512] for start in range(0, 8 * 512, 512)]
    (tmp_path / "windows.json").write_text(json.dumps(windows))
    script = repository / "benchmarks" / "peers" / "llama_cpp_nll.py"
    done = subprocess.run(
        [python, script, out, tmp_path / "windows.json"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout)
    total = 0.0
    for window in windows:
        logs = ours.logits([window])[0].double().log_softmax(-1)[:-1]
        total -= float(logs.gather(-1, torch.tensor(window[1:])[:, None]).sum())
    assert theirs["tokens"] == 8 * 511
    # llama.cpp codes the inputs of products in 8 bits and keeps keys and values in fp16.
    assert math.exp(theirs["nats"] - total / theirs["tokens"]) == pytest.approx(1, abs=0.005)
