"""Tokens equal llama.cpp's (recorded, and live where it is installed) and transformers'; so do chat prompts."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from trimtab.runtime.text.gguf_tokenizer import tokenizer_from_gguf
from trimtab.runtime.text.pretokenizers import PRE_TOKENIZERS
from trimtab.runtime.text.tokenizer import Tokenizer, tokenizer_from_folder
from trimtab.spec.gguf_header import GgufHeader

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    """The script that recorded, which also makes the texts."""
    spec = importlib.util.spec_from_file_location("make_llamacpp_ids", FIXTURES / "make_llamacpp_ids.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FIXTURES))  # for mixed_text, which stands beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FIXTURES))
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(gzip.decompress((FIXTURES / "llamacpp_ids.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return tokenizer_from_gguf(GgufHeader(smollm2_path).metadata)


def assert_same(ours: Sequence[int], theirs: Sequence[int], tokenizer: Tokenizer) -> None:
    """Compare; a difference is shown with its surroundings instead of as two lists of 100 000 numbers."""
    if list(ours) == list(theirs):
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    told = [
        [tokenizer.backend.id_to_token(token) for token in ids[max(0, at - 3) : at + 4]]
        for ids in (list(ours), list(theirs))
    ]
    pytest.fail(f"token {at} of {len(ours)} (oracle {len(theirs)}): ours {told[0]}, oracle {told[1]}")


# llama.cpp


@pytest.mark.parametrize("part", ["mixed", "topics", "chat", "chat as plain text"])
def test_the_built_in_model_encodes_as_llamacpp_does(part, smollm2, recorder, record):
    text, special = recorder.texts()[part]
    recorded = record["parts"][part]
    if part == "topics" and recorder.sha256(text) != recorded["sha256"]:
        pytest.skip("this CPython has other help topics than the one recorded with")
    assert recorder.sha256(text) == recorded["sha256"] and special == recorded["special"]
    assert part != "mixed" or len(text.encode()) >= 200_000
    ids = smollm2.encode(text, parse_special=special)
    assert_same(ids, recorded["ids"], smollm2)
    if not special:
        assert len(smollm2.decode(ids)) > 0.99 * len(text)  # a few control characters are not in the vocabulary


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_cuts_as_llamacpp_does(name, record):
    text, key = record["pre"][name]
    tokenizer = tokenizer_from_gguf(record["byte_level"] | {"tokenizer.ggml.pre": name})
    assert_same(tokenizer.encode(record["texts"][text]), record["pre_ids"][key], tokenizer)


def test_the_recorded_vocabulary_tells_pre_tokenizers_apart(record):
    """Names of different groups have different ids, but for the two that differ only in a stage without effect here."""
    groups: dict[str, set[tuple[str, ...]]] = {}
    for name, (_, key) in record["pre"].items():
        groups.setdefault(key, set()).add(PRE_TOKENIZERS[name].stages)
    shared = [stages for stages in groups.values() if len(stages) > 1]
    assert shared == [{PRE_TOKENIZERS["falcon"].stages, PRE_TOKENIZERS["default"].stages}]
    assert record["pre"].keys() == PRE_TOKENIZERS.keys()


@pytest.mark.parametrize("case", [0, 1], ids=["space prefix", "no space prefix"])
def test_sentencepiece_style_encodes_as_llamacpp_does(case, recorder, record):
    recorded = record["sentencepiece"][case]
    tokenizer = tokenizer_from_gguf(recorded["metadata"])
    assert_same(tokenizer.encode(record["texts"]["sentencepiece"]), recorded["ids"]["text"], tokenizer)
    assert_same(tokenizer.encode(recorder.SENTENCEPIECE_CHAT, parse_special=True), recorded["ids"]["chat"], tokenizer)


@pytest.mark.slow
def test_llamacpp_live(smollm2, smollm2_path, recorder):
    """Other texts than the recorded ones, against the library itself."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is no dependency")
    texts = {str(seed): (recorder.mixed_text(100_000, seed=seed), False) for seed in range(100, 104)}
    texts |= {"topics": (recorder.topics_text(), False), "chat": (recorder.CHAT, True)}
    for name, ids in recorder.llama_ids(smollm2_path, texts).items():
        text, special = texts[name]
        assert_same(smollm2.encode(text, parse_special=special), ids, smollm2)


# transformers


def _gpt2_style() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def _llama3_style() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["llama-bpe"].stages[0]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}


def _llama2_style() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}


def _metaspace_style() -> tuple[Backend, dict[str, Any]]:
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, {"bos_token": "<s>", "eos_token": "</s>"}


STYLES = {"gpt2": _gpt2_style, "llama3": _llama3_style, "llama2": _llama2_style, "metaspace": _metaspace_style}


def train(style: str, folder: Path, text: str) -> None:
    """Train a tiny tokenizer of this style and save it as a model folder."""
    backend, config = STYLES[style]()
    byte_level = style in ("gpt2", "llama3")
    special = list(dict.fromkeys(["<unk>", *(value for value in config.values() if isinstance(value, str))]))
    special += [] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, max_token_length=12, show_progress=False
    )
    lines = text.splitlines(keepends=True)
    # One line would be one word without a pre-tokenizer; training cuts it, the tokenizer does not.
    backend.train_from_iterator(lines if byte_level else [word for line in lines for word in line.split(" ")], trainer)
    if style != "gpt2":
        single = f"{config['bos_token']} $A" + (f" {config['eos_token']}" if style == "metaspace" else "")
        around = [(token, backend.token_to_id(token)) for token in (config["bos_token"], config["eos_token"])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    if not byte_level:  # the trainer marks byte tokens as special; in real files they are ordinary
        state = json.loads(backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Backend.from_str(json.dumps(state))
    backend.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    backend.save(str(folder / "tokenizer.json"))
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("style", STYLES)
def test_folders_encode_and_decode_as_transformers_does(style, tmp_path, recorder):
    transformers = pytest.importorskip("transformers")
    train(style, tmp_path, recorder.mixed_text(30_000, seed=21))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, clean_up_tokenization_spaces=False)
    ours = tokenizer_from_folder(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    marks = "".join(token for token in (theirs.bos_token, theirs.eos_token, "<tool>"))
    texts = [recorder.mixed_text(400, seed=seed) for seed in range(300, 340)]
    texts += ["", " ", "a", "\n", f"x {marks} y", f"{marks}{marks}", f" {marks}  z\n"]
    for text in texts:
        for around in (False, True):
            expected = theirs.encode(text, add_special_tokens=around)
            assert_same(ours.encode(text, add_special_tokens=around, parse_special=True), expected, ours)
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert_same(ours.encode(text), plain, ours)
        ids = theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
            assert "".join(ours.stream(skip_special_tokens=skip).all(ids)) == theirs.decode(
                ids, skip_special_tokens=skip
            )
    messages = [{"role": "user", "content": "say  <tool> 123"}]
    assert ours.encode_chat(messages) == theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_metadata_equals_the_tokenizer_json_made_from_it(space_prefix, record, recorder):
    """The Llama-style file that transformers' converter builds from the same pieces and scores."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    metadata = record["sentencepiece"][0 if space_prefix else 1]["metadata"]
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = convert.generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    ours = tokenizer_from_gguf(metadata)
    for seed in range(400, 430):
        text = recorder.mixed_text(600, seed=seed)
        ids = backend.encode(text).ids
        assert_same(ours.encode(text), ids, ours)
        assert ours.decode(ids) == backend.decode(ids)


# Chat templates

TEMPLATES = {
    "llama2, strips and alternates": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = false %}{% endif %}\n{% for message in messages %}\n"
        "    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n{{ raise_exception('roles must alternate') }}{% endif %}\n"
        "    {% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}\n"
        "    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}\n{% endfor %}"
    ),
    "chatml with tools and json": (
        "{%- if tools %}\n    {{- '<|im_start|>system\\n# Tools\\n' }}\n    {%- for tool in tools %}\n"
        "        {{- \"\\n\" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n{%- endif %}"
    ),
    "headers with a namespace and defaults": (
        "{{- bos_token }}\n{%- set ns = namespace(system='You are helpful.', count=0) %}\n{%- for m in messages if m.role == 'system' %}"
        "{%- set ns.system = m.content | trim %}{%- endfor %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + ns.system + '<|eot_id|>' }}\n"
        "{%- for m in messages if m.role != 'system' %}\n    {%- set ns.count = ns.count + 1 %}\n"
        "    {{- '<|start_header_id|>' ~ m.role ~ ns.count ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}\n{%- endfor %}\n"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt else '' }}"
    ),
    "turns with a macro, loop controls and an indented json": (
        "{% macro turn(role, text) %}<start_of_turn>{{ 'model' if role == 'assistant' else role }}\n{{ text }}<end_of_turn>\n{% endmacro %}\n"
        "{% for message in messages %}\n  {% if message.role == 'system' %}{% continue %}{% endif %}\n  {% if loop.index > 6 %}{% break %}{% endif %}\n"
        "{{ turn(message.role, message.content) }}{% endfor %}\n{{ {'b': [1, 'é<'], 'a': none} | tojson(indent=2, sort_keys=true) }}\n"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "generation marks, tests and parts": (
        "{% for message in messages %}{% if message.content is string %}{% set text = message.content %}{% else %}{% set text %}"
        "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endset %}{% endif %}"
        "{% if message.role == 'assistant' %}{% generation %}{{ text }}{{ eos_token }}{% endgeneration %}"
        "{% else %}<|{{ message.role | upper }}|>{{ text }}{% endif %}{{ message.tool_calls is defined }}{% endfor %}{{ messages | length }}"
    ),
}  # fmt: skip
CHATS = {
    "one question": [{"role": "user", "content": "Hi\n  there "}],
    "own system": [{"role": "system", "content": " Be <brief>. "}, {"role": "user", "content": "1 < 2 & 'é'?"}],
    "turns": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": " b ", "tool_calls": None}, {"role": "user", "content": "🎉\t"},
    ],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "ä <b>", "parameters": {"x": [1, 2.5, None, True]}},
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["built-in", *TEMPLATES])
def test_chat_prompts_equal_transformers(name, chat, smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=smollm2.backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )
    template = smollm2.chat_template if name == "built-in" else TEMPLATES[name]
    messages = CHATS[chat]
    for prompt in (True, False):
        for more in ({}, {"tools": [TOOL]}, {"enable_thinking": False}):
            options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": prompt, **more}
            expected = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert smollm2.apply_chat_template(messages, **options) == expected
    ids = theirs.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False)
    assert smollm2.encode_chat(messages, chat_template=template) == ids
