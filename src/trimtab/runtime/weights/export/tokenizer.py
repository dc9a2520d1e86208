"""The tokenizer of a model as the files of a Hugging Face folder, which transformers' AutoTokenizer reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.runtime.weights.export.container import write_json
from trimtab.runtime.weights.gguf import GgufFile

#: What a folder may hold of a tokenizer and of how answers end.
_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
)  # fmt: skip
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def write_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer of a folder or a GGUF file into `folder`; a source without one gives none."""
    if source.is_dir():
        for name in _FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    metadata = GgufFile(source).metadata
    if "tokenizer.ggml.tokens" not in metadata:
        return
    from trimtab.runtime.text.gguf_tokenizer import tokenizer_from_gguf

    tokenizer = tokenizer_from_gguf(metadata)
    (folder / "tokenizer.json").write_text(_with_wrapping(tokenizer), encoding="utf-8")
    roles = {role: text for role, text in tokenizer.template_variables.items() if role in _ROLES}
    architecture = metadata.get("general.architecture")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **roles,
    }
    if (context := metadata.get(f"{architecture}.context_length")) is not None:
        config["model_max_length"] = int(context)
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    write_json(folder / "tokenizer_config.json", config)
    ends = sorted(tokenizer.eog_ids, key=lambda index: (index != tokenizer.eos_id, index))
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    write_json(
        folder / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )


def _with_wrapping(tokenizer: Tokenizer) -> str:
    """tokenizer.json, in which a post-processor puts around a text what the GGUF file says."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_str(tokenizer.backend.to_str())
    if tokenizer.prefix or tokenizer.suffix:
        texts = {index: backend.id_to_token(index) for index in (*tokenizer.prefix, *tokenizer.suffix)}
        before, after = ([texts[index] for index in ids] for ids in (tokenizer.prefix, tokenizer.suffix))
        wrapped = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(text, index) for index, text in texts.items()],
        )
        kept = backend.post_processor
        backend.post_processor = wrapped if kept is None else processors.Sequence([kept, wrapped])
    return backend.to_str()
