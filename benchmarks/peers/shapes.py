"""Write the models that benchmarks/decode.py times: one Llama shape of 1.1 billion random weights, in llama.cpp's formats.

Usage, in .venv-peers: python benchmarks/peers/shapes.py [--cache DIR] [--describe FILE ...]. Files are written only where
absent (about 6 GB). Prints one JSON object: of every file, the types of its tensors, its bytes and its bits per weight.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

CACHE = Path.home() / ".cache" / "trimtab" / "bench"
NAME = "llama-1b-random"
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 2048, 8192, 16, 32, 8, 32000, 8192
#: llama.cpp's file type of each format, and the type of its tensors.
FORMATS = {
    "Q8_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
    "Q4_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, gguf.GGMLQuantizationType.Q4_0),
    "Q4_1": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1, gguf.GGMLQuantizationType.Q4_1),
    "Q4_K": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, gguf.GGMLQuantizationType.Q4_K),
    "Q3_K": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S, gguf.GGMLQuantizationType.Q3_K),
    "Q2_K": (llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K, gguf.GGMLQuantizationType.Q2_K),
    "TQ1_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_TQ1_0, gguf.GGMLQuantizationType.TQ1_0),
    "TQ2_0": (llama_cpp.LLAMA_FTYPE_MOSTLY_TQ2_0, gguf.GGMLQuantizationType.TQ2_0),
}


def tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes, rows first."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        of_layer = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv, HIDDEN),
            "attn_v": (kv, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes | {"output_norm.weight": (HIDDEN,), "output.weight": (VOCABULARY, HIDDEN)}


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Byte-level BPE: one control token, the bytes as GPT-2 writes them, and made-up words of two to four letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(other))]
    words = (word for n in (2, 3, 4) for word in itertools.product("etaoinshrdlucmfwypvbgkqjxz", repeat=n))
    made = ["".join(word) for word in itertools.islice(words, VOCABULARY - 257)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *letters, *made])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (VOCABULARY - 1))
    writer.add_token_merges([f"{word[:-1]} {word[-1]}" for word in made])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_add_bos_token(False)


def write_f16(path: Path, seed: int = 0) -> None:
    """Normal weights of deviation 0.02 in F16, norms of ones in F32; one tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(NAME)
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_F16)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    add_vocabulary(writer)
    shapes = tensors()
    for name, shape in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(seed)
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data((rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(np.float16))
    writer.close()


def quantize(source: Path, target: Path, kind: str) -> None:
    """Every matrix in one type, the embedding and the output too, by llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, tensor_type = FORMATS[kind]
    params.output_tensor_type = params.token_embedding_type = int(tensor_type)
    params.pure = True
    params.nthread = os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not quantize {source.name} to {kind}.")


def describe(path: Path) -> dict[str, object]:
    """Types, bytes and bits per weight. A decoded token reads every weight but the embedding, of which it reads a row."""
    found = gguf.GGUFReader(path).tensors
    nbytes = {tensor.name: int(tensor.n_bytes) for tensor in found}
    total = sum(nbytes.values())
    unread = nbytes["token_embd.weight"] if "output.weight" in nbytes else 0  # without an output, the two are one
    return {
        "path": str(path),
        "types": Counter(tensor.tensor_type.name for tensor in found),
        "tensors": {tensor.name: tensor.tensor_type.name for tensor in found},
        "weight_bytes": total,
        "bytes_per_token": total - unread,
        "bits_per_weight": 8 * total / sum(int(tensor.n_elements) for tensor in found),
    }


def make(cache: Path) -> dict[str, dict[str, object]]:
    cache.mkdir(parents=True, exist_ok=True)
    facts = {}
    for kind in ("F16", *FORMATS):
        path = cache / f"{NAME}.{kind}.gguf"
        if not path.exists():
            print(f"shapes: writing {path.name}", file=sys.stderr)
            draft = path.with_suffix(".draft")
            if kind == "F16":
                write_f16(draft)
            else:
                quantize(cache / f"{NAME}.F16.gguf", draft, kind)
            draft.rename(path)
        known = path.with_suffix(".json")
        if not known.exists():
            known.write_text(json.dumps(describe(path), indent=1) + "\n")
        facts[kind] = json.loads(known.read_text())
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--describe", type=Path, nargs="+", help="tell of these files only, and write none")
    options = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    facts = {str(path): describe(path) for path in options.describe} if options.describe else make(options.cache)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
