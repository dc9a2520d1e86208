"""The tokenizer of a Hugging Face folder as GGUF metadata: byte-level BPE whose cuts a name of ``tokenizer.ggml.pre`` stands for.

What is written is read back and must give the same tokens, or nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.text.gguf_tokenizer import tokenizer_from_gguf
from trimtab.runtime.text.pretokenizers import GPT2_WORDS, PRE_TOKENIZERS
from trimtab.runtime.text.tokenizer import tokenizer_from_folder
from trimtab.spec.model import ModelSpec

#: Words, numbers, scripts, spaces and signs that tokenizers cut in different ways.
_PROBE = (
    "It's 12345.67 apples, don't they'LL say?  Hello\n\n\tWorld!! naïve Straße été 你好世界 こんにちは 한국어 русский "
    "a_b(c[0])+=1; // x\r\n   trailing  \n🙂👍🏽 ½ ² x² mixedCASEWord ABCdef 3rd 1st\u00a0nbsp ~`^|$#@ 100%"
)


def tokenizer_metadata(folder: Path, spec: ModelSpec) -> dict[str, tuple[int, Any]]:
    """Keys and typed values of ``tokenizer.ggml``; of a folder without a tokenizer, that there is none.

    Raises:
        SpecError: a kind of tokenizer that is not expressed, or one that would give other tokens.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {"tokenizer.ggml.model": (8, "none")}
    data = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = tokenizer_from_folder(folder)
    model = data.get("model") or {}
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or "merges" not in model:
        raise SpecError(f"{folder}: its tokenizer is no byte-level BPE, the only kind that is written into GGUF files.")
    pre = _pre(data, bool(model.get("ignore_merges")), folder)
    backend = tokenizer.backend
    tokens = [backend.id_to_token(index) for index in range(backend.get_vocab_size(with_added_tokens=True))]
    added = backend.get_added_tokens_decoder()
    kinds = [1 if index not in added else 3 if added[index].special else 4 for index in range(len(tokens))]
    if None in tokens:
        raise SpecError(f"{folder}: its vocabulary has no token {tokens.index(None)}, and GGUF knows no gaps.")
    unused = range(len(tokens), spec.vocab_size)  # rows of the embedding beyond the vocabulary
    tokens += [f"[PAD{index}]" for index in unused]
    kinds += [5] * len(unused)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (8, "gpt2"),
        "tokenizer.ggml.pre": (8, pre),
        "tokenizer.ggml.tokens": (9, (8, tokens)),
        "tokenizer.ggml.token_type": (9, (5, kinds)),
        "tokenizer.ggml.merges": (9, (8, merges)),
        "tokenizer.ggml.add_bos_token": (7, tokenizer.bos_id is not None and tokenizer.bos_id in tokenizer.prefix),
        "tokenizer.ggml.add_eos_token": (7, tokenizer.eos_id is not None and tokenizer.eos_id in tokenizer.suffix),
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for role, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        text = tokenizer.template_variables.get(role)
        ids[key] = backend.token_to_id(text) if text else None
    found |= {f"tokenizer.ggml.{role}_token_id": (4, index) for role, index in ids.items() if index is not None}
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = 8, tokenizer.chat_template
    _compare(found, tokenizer, folder)
    return found


def _pre(data: dict[str, Any], ignore_merges: bool, folder: Path) -> str:
    """The name that stands for the cuts of a tokenizer.json."""
    stages = tuple(_stages(data.get("pre_tokenizer") or {}))
    for name, known in PRE_TOKENIZERS.items():
        if known.stages == stages and known.ignore_merges == ignore_merges:
            return name
    raise SpecError(f"{folder}: no name of tokenizer.ggml.pre stands for how its tokenizer cuts text into words.")


def _stages(found: dict[str, Any]) -> Iterator[str]:
    kind = found.get("type")
    if kind == "Sequence":
        for part in found["pretokenizers"]:
            yield from _stages(part)
    elif kind == "Digits" and found.get("individual_digits"):
        yield r"\p{N}"
    elif kind == "Split" and found.get("behavior") == "Isolated" and not found.get("invert"):
        yield found["pattern"].get("Regex", "")
    elif kind == "ByteLevel" and not found.get("add_prefix_space"):
        if found.get("use_regex", True):
            yield GPT2_WORDS
    else:
        yield f"<{kind}>"  # equal to no stage


def _compare(found: dict[str, tuple[int, Any]], tokenizer: Any, folder: Path) -> None:
    values = {key: value[1] if kind == 9 else value for key, (kind, value) in found.items()}
    try:
        read = tokenizer_from_gguf(values)
        same = read.encode(_PROBE) == tokenizer.encode(_PROBE) and read.prefix == tokenizer.prefix
    except TrimtabError as error:
        raise SpecError(f"{folder}: its tokenizer cannot be written into a GGUF file: {error}") from None
    if not same:
        raise SpecError(f"{folder}: written into a GGUF file, its tokenizer would cut text into other tokens.")
