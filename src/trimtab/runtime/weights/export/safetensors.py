"""Hugging Face folders: plain floats, or symmetric integers as compressed-tensors packs them.

transformers and vLLM load what is written. A matrix in codes is `weight_packed` (words of 32 bits, code j at bit j * bits,
offset by half the range), `weight_scale` [N, G] in fp16 as it is held, and `weight_shape`. They decode it in the dtype of the
model: bit for bit what Trimtab decodes if that is float32, rounded once more if it is bfloat16 or float16.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `quantization/quant_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics import encode
from trimtab.runtime.numerics.lookup import lay_out
from trimtab.runtime.numerics.tiles import PLAIN_BLOCKS, grid_of
from trimtab.runtime.weights.compressed import METHOD, CompressedFolder, compression_of
from trimtab.runtime.weights.export.container import Entry, Progress, write_json, write_safetensors
from trimtab.runtime.weights.export.job import MANIFEST_FILE, Job, Prepared
from trimtab.runtime.weights.export.places import Part, Whole, one_format, unsaid, wholes
from trimtab.runtime.weights.export.tokenizer import write_tokenizer
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.safetensors import SafetensorsFolder
from trimtab.spec.configs import config_from_gguf, spec_from_config
from trimtab.spec.families.names import HUGGING_FACE, Spelling
from trimtab.spec.families.sources import Source, places, sources
from trimtab.spec.formats import FP32, PLANE_KINDS, WeightFormat
from trimtab.spec.leaves import LinearSpec

#: model_type of a config -> the class of transformers that runs it, for configs that do not say.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM", "phi": "PhiForCausalLM", "gpt2": "GPT2LMHeadModel", "bloom": "BloomForCausalLM",
}  # fmt: skip
_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def scheme(format: WeightFormat, cols: int) -> tuple[int, int] | None:
    """(bits, group) in which compressed-tensors holds exactly what rows of `cols` in `format` hold; group 0 is a row.

    >>> scheme(WeightFormat(kind="int", bits=4, group=32), 64), scheme(WeightFormat(kind="q4_1"), 64)
    ((4, 32), None)
    """
    if type(format) is not WeightFormat:
        return None
    bits, group, sym = format.bits, format.group, format.sym
    if format.kind in PLAIN_BLOCKS:
        (bits, sym), group = PLAIN_BLOCKS[format.kind], 32
    elif format.kind == "ternary":
        bits = 2
    elif format.kind not in ("int", *PLANE_KINDS):
        return None
    if not sym or bits < 2 or (cols % group and group < cols):
        return None
    return bits, 0 if group >= cols else group


def refusal(part: Part) -> str:
    """Why a Hugging Face folder cannot hold a weight as it is; empty if it can."""
    packed = part.packed
    if packed.format.is_float or _as_floats(part):
        return ""
    if scheme(packed.format, packed.shape[1]) is None or packed.layout != "row":
        return "it holds floats and symmetric integers, one scale for a row or for each group that divides it"
    if part.source.transposed or part.want.expert is not None:
        return "transformers has no linear module there, so its codes would not be read"
    return ""


def _as_floats(part: Part) -> bool:
    """Codes outside of linear modules (an embedding in blocks) are written as float32, which holds every value."""
    return not isinstance(part.want.node, LinearSpec) or part.want.vector


def prepare(job: Job) -> Prepared:
    """Lay a model out as a Hugging Face folder; nothing is written yet.

    Raises:
        SpecError: something of the model cannot be said there.
    """
    if why := unsaid(job.spec, job.base, job.weights):
        raise SpecError(f"A Hugging Face folder cannot say this of {job.spec.name}: {why}.")
    config, found = _layout(job)
    tensors = list(wholes(job.spec, job.weights, found, stacked=job.source.suffix != ".gguf"))
    for whole in tensors:
        for part in whole.parts:
            if why := refusal(part):
                raise SpecError(
                    f"A Hugging Face folder cannot hold {part.want.key}, which is in {part.packed.format}"
                    f"{', transposed' if part.packed.layout != 'row' else ''}: {why}."
                )
        one_format(whole, "A Hugging Face folder")
    config = {**config, "torch_dtype": _TORCH[job.spec.act_dtype]}
    config.pop("dtype", None)
    if "architectures" not in config and config.get("model_type") in ARCHITECTURES:
        config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    if compression := quantization_config(tensors):
        config["quantization_config"] = compression
    entries = [entry for whole in tensors for entry in _entries(whole)]

    def write(folder: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", entries, progress)
        write_json(folder / "config.json", config)
        write_tokenizer(job.source, folder)
        write_json(folder / MANIFEST_FILE, manifest)

    return Prepared("safetensors", sum(entry.nbytes for entry in entries), write, _notes(tensors))


def _layout(job: Job) -> tuple[dict[str, Any], Mapping[str, Source]]:
    """The config of the model, without a word on quantization, and where its folder keeps every weight."""
    spec, source = job.spec, job.source
    spelling = HUGGING_FACE.get(spec.family, Spelling())
    if source.suffix == ".gguf":
        file = GgufFile(source)
        config = config_from_gguf(file.metadata, file.tensors)
        # What the config says must be the model: GGUF files may hold more, rotary factors for one.
        plain, same = (
            each.with_dtype("float32", keep_packed=False) for each in (spec_from_config(config, spec.name), job.base)
        )
        if why := unsaid(same, plain, Weights({})):
            raise SpecError(f"A config cannot say this of {source.name}: {why}.")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):  # else transformers takes its family's
            config[f"{role}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return config, places(spec, spelling, gguf=False)
    config = job.config()
    if "text_config" in config:
        raise SpecError(f"{source} holds more than a language model (text_config), and only that would be written.")
    coded = compression_of(config)
    tensors = SafetensorsFolder(source).tensors if coded is None else CompressedFolder(source, coded).tensors
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return kept, sources(spec, tensors, spelling, str(source))


def _notes(tensors: Sequence[Whole]) -> tuple[str, ...]:
    """What a reader of the folder may wonder about."""
    found = []
    grown = [w.name for w in tensors if not w.parts[0].packed.format.is_float and _as_floats(w.parts[0])]
    if grown:
        found.append(f"{', '.join(grown)}: written as float32, which is exact; only linear modules hold codes")
    schemes = {w.name: w.parts[0].packed.format for w in tensors}
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for name, form in schemes.items():
            if not name.endswith(f".{group[0]}.weight"):
                continue
            if any(schemes.get(name.replace(group[0], other), form) != form for other in group[1:]):
                found.append(
                    f"{name} and its neighbours {', '.join(group[1:])} differ in format; vLLM, which joins them, refuses that"
                )
                break
    return tuple(found)


def _entries(whole: Whole) -> Iterator[Entry]:
    first = whole.parts[0]
    form, count = first.packed.format, int(np.prod(whole.dims))
    if form.is_float or _as_floats(first):
        kind = form if form.is_float else FP32
        nbytes = kind.nbytes(1, count)
        yield Entry(whole.name, kind.kind, whole.dims, nbytes, lambda: _floats(whole, kind))
        return
    rows, cols = whole.dims
    found = scheme(form, cols)
    assert found is not None
    bits, group = found
    words, groups = -(-cols * bits // 32), cols // (group or cols)
    name = whole.name
    yield Entry(f"{name}_packed", "int32", (rows, words), rows * words * 4, lambda: _words(whole, bits, words))
    yield Entry(f"{name}_scale", "fp16", (rows, groups), rows * groups * 2, lambda: _scales(whole))
    yield Entry(f"{name}_shape", "int64", (2,), 16, lambda: np.array(whole.dims, np.int64))


def _floats(whole: Whole, kind: WeightFormat) -> np.ndarray:
    return encode(whole.floats().reshape(-1, whole.dims[-1]), kind).buffers["data"]


def _rows(packed: Packed) -> Packed:
    """Ternary weights as integer codes; everything else as it is."""
    return lay_out(packed, "int") if packed.format.kind == "ternary" else packed


def _words(whole: Whole, bits: int, words: int) -> np.ndarray:
    from trimtab.runtime.kernels import pack_codes

    def codes(packed: Packed) -> np.ndarray:
        if packed.format.kind == "int" and not packed.format.tiled:
            return packed.buffers["codes"]
        return pack_codes(grid_of(_rows(packed))[0], bits)

    rows = whole.rows([codes(part.packed) for part in whole.parts])
    padded = np.zeros((len(rows), words * 4), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return padded.view("<i4")


def _scales(whole: Whole) -> np.ndarray:
    return whole.rows([grid_of(_rows(part.packed))[1] for part in whole.parts])


def quantization_config(wholes: Sequence[Whole]) -> dict[str, Any]:
    """What a config says of the matrices in codes, one group for every scheme; empty if all are floats."""
    groups: dict[tuple[int, int], list[str]] = {}
    plain = []
    for whole in wholes:
        first = whole.parts[0]
        if _as_floats(first):
            continue
        module = whole.name.removesuffix(".weight")
        found = None if first.packed.format.is_float else scheme(first.packed.format, whole.dims[1])
        plain.append(module) if found is None else groups.setdefault(found, []).append(module)
    if not groups:
        return {}
    # The head is a linear module even where it has no weight of its own.
    ignored = sorted({*plain, "lm_head"} - {module for modules in groups.values() for module in modules})
    config_groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(groups) == 1 else [f"re:^{re.escape(module)}$" for module in modules],
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
                "strategy": "group" if group else "channel", "group_size": group or None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for index, ((bits, group), modules) in enumerate(groups.items())
    }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
