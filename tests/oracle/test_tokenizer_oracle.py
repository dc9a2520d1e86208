"""Tokenizers against what llama.cpp recorded (fixtures/tokenizer/make_llamacpp_ids.py) and against transformers."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.runtime.text.gguf_tokenizer import tokenizer_from_gguf
from trimtab.runtime.text.tokenizer import Tokenizer, tokenizer_from_folder
from trimtab.runtime.weights.gguf import GgufFile

FOLDER = Path(__file__).parents[1] / "fixtures" / "tokenizer"
MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4.  "},
    {"role": "user", "content": "And\n\n<b>3</b> + é?"},
]
#: Styles of chat templates, each with something that is easy to get wrong.
TEMPLATES = {
    "built-in": "",
    "loop variables": "{% for m in messages %}{% if loop.first %}<s>{% endif %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "blocks on lines of their own": "{%- for m in messages %}\n    {{- '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{%- endfor %}\n",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}|{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}:{{ m.content }};{% endfor %}",
}


def load_maker() -> Any:
    """The script that recorded the fixture: its texts are made by code."""
    import sys

    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("make_llamacpp_ids", FOLDER / "make_llamacpp_ids.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


MAKER = load_maker()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What llama.cpp made of the texts."""
    return json.loads(gzip.decompress((FOLDER / "llamacpp_ids.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """The built-in model's tokenizer."""
    return tokenizer_from_gguf(GgufFile(smollm2_path).metadata)


@pytest.mark.parametrize("part", ["mixed", "topics", "chat", "chat as plain text"])
def test_built_in_model_equals_llama_cpp(record: dict[str, Any], smollm2: Tokenizer, part: str) -> None:
    text, special = MAKER.texts()[part]
    wanted = record["parts"][part]
    if hashlib.sha256(text.encode()).hexdigest() != wanted["sha256"]:
        assert part == "topics", "only CPython's own topics may differ from the recorded text"
        pytest.skip("this CPython's topics are not the recorded ones")
    assert smollm2.encode(text, parse_special=special) == wanted["ids"]


def test_mixed_text_is_200_kb_of_everything() -> None:
    text = MAKER.texts()["mixed"][0]
    assert len(text.encode()) >= 200_000
    for letters in ("😀", "漢" if "漢" in text else "の", "def ", "12", "   "):
        assert letters in text


def test_two_spaces_before_a_digit(smollm2: Tokenizer) -> None:
    assert smollm2.encode("a  1") == [81, 256, 33]


@pytest.mark.parametrize("pre", MAKER.PRE_NAMES)
def test_every_pre_tokenizer_cuts_as_llama_cpp(record: dict[str, Any], pre: str) -> None:
    """The vocabulary's merges know no word boundaries, so each cut shows in the ids."""
    text, key = record["pre"][pre]
    tokenizer = tokenizer_from_gguf({**record["byte_level"], "tokenizer.ggml.pre": pre})
    assert tokenizer.encode(record["texts"][text]) == record["pre_ids"][key]


@pytest.mark.parametrize("prefix", [0, 1])
def test_sentencepiece_equals_llama_cpp(record: dict[str, Any], prefix: int) -> None:
    wanted = record["sentencepiece"][prefix]
    tokenizer = tokenizer_from_gguf(wanted["metadata"])
    assert tokenizer.encode(record["texts"]["sentencepiece"]) == wanted["ids"]["text"]
    assert tokenizer.encode(MAKER.SENTENCEPIECE_CHAT, parse_special=True) == wanted["ids"]["chat"]


@pytest.mark.slow
def test_built_in_model_equals_llama_cpp_live(smollm2: Tokenizer, smollm2_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="install llama-cpp-python for the live comparison")
    llama = llama_cpp.Llama(str(smollm2_path), vocab_only=True, verbose=False)
    for text, special in MAKER.texts().values():
        assert smollm2.encode(text, parse_special=special) == llama.tokenize(
            text.encode(), add_bos=False, special=special
        )


@pytest.mark.parametrize("style", ["byte-level", "sentencepiece"])
def test_tokenizer_json_equals_transformers(tmp_path: Path, style: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE(byte_fallback=style == "sentencepiece", unk_token=None))
    if style == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>", "<|x|>"], initial_alphabet=[])
    corpus = MAKER.texts()["mixed"][0][:30_000]
    backend.train_from_iterator(corpus.splitlines() + alphabet, trainer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = tokenizer_from_folder(tmp_path)
    text = MAKER.texts()["mixed"][0][30_000:34_000]
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_equals_transformers(smollm2: Tokenizer, name: str, prompt: bool) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    from trimtab.runtime.text.chat import render_chat

    template = TEMPLATES[name] or smollm2.chat_template
    assert template is not None
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE({"a": 0}, [])), **tokens)
    wanted = theirs.apply_chat_template(MESSAGES, chat_template=template, add_generation_prompt=prompt, tokenize=False)
    if name == "built-in":
        assert smollm2.apply_chat_template(MESSAGES, add_generation_prompt=prompt) == wanted
    assert render_chat(template, MESSAGES, add_generation_prompt=prompt, **tokens) == wanted
