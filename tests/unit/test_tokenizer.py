"""Tokenizers from GGUF metadata and from folders: what is read, what is refused and how it is said; streams; templates."""

from __future__ import annotations

import enum
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.text.chat import render_chat
from trimtab.runtime.text.gguf_tokenizer import merges_from_scores, tokenizer_from_gguf
from trimtab.runtime.text.pretokenizers import PRE_TOKENIZERS
from trimtab.runtime.text.tokenizer import Tokenizer, tokenizer_from_folder
from trimtab.spec.gguf_header import GgufHeader

LETTERS = {**{chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}}
OTHERS = [byte for byte in range(256) if byte not in LETTERS.values()]
LETTERS |= {chr(256 + place): byte for place, byte in enumerate(OTHERS)}


def byte_level(**changes: Any) -> dict[str, Any]:
    """Every byte, a few merges, two control tokens and a user-defined one."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ġ Ġ"]
    tokens = [*LETTERS, *(merge.replace(" ", "") for merge in merges), "<s>", "<|im_end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<s>"),
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    pieces = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "abc", "▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2, -3, -4, -10, -12, -9, -11, -13],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def pieces(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.backend.id_to_token(token) for token in tokenizer.encode(text, **options)]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return tokenizer_from_gguf(GgufHeader(smollm2_path).metadata)


# The built-in model


def test_smollm2_splits_digits_before_spaces_meet_them(smollm2):
    assert smollm2.encode("a  1") == [81, 256, 33]
    assert smollm2.encode("1024", add_special_tokens=True) == smollm2.encode("1024") == [33, 32, 34, 36]


def test_smollm2_knows_its_tokens(smollm2):
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id) == (49152, 1, 2)
    assert smollm2.eog_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert smollm2.special_ids == set(range(17))


def test_building_is_fast(smollm2_path):
    def build() -> float:
        metadata = dict(GgufHeader(smollm2_path).metadata)
        start = time.perf_counter()
        tokenizer_from_gguf(metadata)
        return time.perf_counter() - start

    assert min(build() for _ in range(3)) < 0.5


def test_a_text_cannot_forge_control_tokens_unless_asked(smollm2):
    text = "<|im_end|>"
    assert smollm2.encode(text, parse_special=True) == [2]
    plain = smollm2.encode(text)
    assert not smollm2.special_ids.intersection(plain)
    assert smollm2.decode(plain) == text
    assert smollm2.decode([2, *plain], skip_special_tokens=True) == text


def test_threads_do_not_mix_their_flags(smollm2):
    text, wrong = "<|im_start|>x<|im_end|>" * 20, []

    def work(parse_special: bool, expected: list[int]) -> None:
        for _ in range(150):
            if smollm2.encode(text, parse_special=parse_special) != expected:
                wrong.append(parse_special)

    threads = [
        threading.Thread(target=work, args=(flag, smollm2.encode(text, parse_special=flag)))
        for flag in (True, False) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


#: The built-in vocabulary lacks a token for some bytes: control characters, and the lead bytes of planes 4 and above.
ASSIGNED = st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])


@settings(deadline=None, max_examples=150)
@given(text=st.text(ASSIGNED, max_size=60))
def test_decoding_returns_every_text(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.one_of(st.integers(0, 400), st.integers(0, 49151)), max_size=30), skip=st.booleans())
def test_a_stream_joined_is_the_decoded_text(smollm2, ids, skip):
    assert "".join(smollm2.stream(skip_special_tokens=skip).all(ids)) == smollm2.decode(ids, skip_special_tokens=skip)


def test_a_stream_shows_whole_characters_at_once(smollm2):
    stream = smollm2.stream()
    text = "a 🏴‍☠️ 世 é"
    shown = [stream.push(token) for token in smollm2.encode(text)]
    assert "".join(shown) == text and stream.finish() == ""
    assert not any("\ufffd" in piece for piece in shown)
    assert "" in shown  # some tokens are parts of a character


def test_half_a_character_at_the_end_is_said(smollm2):
    stream = smollm2.stream()
    first = smollm2.encode("🎉")[0]
    assert stream.push(first) == "" and stream.finish() == "\ufffd" and stream.finish() == ""


def test_bad_input_is_refused_in_words(smollm2):
    with pytest.raises(SpecError, match="surrogate"):
        smollm2.encode("a\ud800")
    with pytest.raises(SpecError, match="not list"):
        smollm2.encode(["a"])
    with pytest.raises(SpecError, match="Allowed: 0..49151"):
        smollm2.decode([-1])
    assert smollm2.encode("") == [] and smollm2.decode([]) == ""


# GGUF metadata


def test_byte_level_metadata():
    tokenizer = tokenizer_from_gguf(byte_level())
    assert pieces(tokenizer, "hello  w123<tool>") == ["hello", "Ġ", "Ġw", "123", "<tool>"]
    assert pieces(tokenizer, "<s>hello", add_special_tokens=True) == ["<", "s", ">", "hello"]  # gpt-2 adds no BOS
    assert pieces(tokenizer, "<s>hello", parse_special=True) == ["<s>", "hello"]
    assert tokenizer.eog_ids == {tokenizer.backend.token_to_id("<|im_end|>"), tokenizer.eos_id}


def test_the_pre_tokenizer_changes_the_tokens():
    assert pieces(tokenizer_from_gguf(byte_level(pre="smollm")), " 123") == ["Ġ", "1", "2", "3"]
    assert pieces(tokenizer_from_gguf(byte_level(pre="qwen2")), "hello  123") == ["hello", "Ġ", "Ġ", "1", "2", "3"]
    assert pieces(tokenizer_from_gguf(byte_level(pre="llama-bpe")), "  123") == ["Ġ", "Ġ", "123"]
    no_name = {key: value for key, value in byte_level().items() if not key.endswith(".pre")}
    assert pieces(tokenizer_from_gguf(no_name), "123") == ["123"]


def test_bos_and_eos_follow_the_file_then_the_family():
    bos = byte_level()["tokenizer.ggml.bos_token_id"]
    assert tokenizer_from_gguf(byte_level(pre="llama-bpe")).prefix == (bos,)
    assert tokenizer_from_gguf(byte_level(pre="llama-bpe", add_bos_token=False)).prefix == ()
    both = tokenizer_from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    assert both.encode("w", add_special_tokens=True) == [bos, *both.encode("w"), bos]
    assert both.encode("w", add_special_tokens=True) != both.encode("w")


def test_a_token_named_like_an_end_is_control_whatever_its_type():
    types = [1] * len(byte_level()["tokenizer.ggml.tokens"])
    tokenizer = tokenizer_from_gguf(byte_level(token_type=types))
    assert pieces(tokenizer, "<|im_end|>", parse_special=True) == ["<|im_end|>"]
    assert pieces(tokenizer, "<s>", parse_special=True) == ["<", "s", ">"]


@pytest.mark.parametrize("name", ["kimi-k2", "jina-v2-de", "superbpe", "chameleon", "qwen-2"])
def test_an_unknown_pre_tokenizer_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match=f"'{name}'.*Known: .*smollm.*tokenizer.json"):
        tokenizer_from_gguf(byte_level(pre=name))


def test_a_near_name_is_offered():
    with pytest.raises(UnsupportedModelError, match="Did you mean 'qwen2'"):
        tokenizer_from_gguf(byte_level(pre="qwen-2"))


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "no_vocab", "new"])
def test_an_unknown_kind_is_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError, match=f"'{kind}'.*Known: gpt2"):
        tokenizer_from_gguf(byte_level(model=kind))


def test_every_known_pre_tokenizer_builds():
    for name in PRE_TOKENIZERS:
        tokenizer = tokenizer_from_gguf(byte_level(pre=name))
        text = "Don't  panic: 12345 世界\n\n\té! "
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": ["a", "b", "a"], "merges": [], "token_type": [1] * 3}, "'a' twice"),
        ({"token_type": [1, 1]}, "2 token types"),
        ({"merges": ["ab"]}, "'ab' is not two tokens"),
        ({"merges": ["x 世"]}, "do not fit together"),
    ],
)
def test_contradictions_in_the_file_are_named(changes, words):
    with pytest.raises(SpecError, match=words):
        tokenizer_from_gguf(byte_level(**changes))


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_a_missing_key_is_named(key):
    metadata = byte_level()
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(SpecError, match=f"no 'tokenizer.ggml.{key}'"):
        tokenizer_from_gguf(metadata)


def test_ids_beyond_the_vocabulary_mean_none():
    tokenizer = tokenizer_from_gguf(byte_level(bos_token_id=2**32 - 1, add_bos_token=True))
    assert tokenizer.bos_id is None and tokenizer.prefix == ()


# SentencePiece-style


def test_sentencepiece_metadata():
    tokenizer = tokenizer_from_gguf(sentencepiece())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.prefix) == (1, 2, (1,))
    # bc has the best score, so "abc" is a + bc, which then is abc.
    assert pieces(tokenizer, "abc ab", add_special_tokens=True) == ["<s>", "▁", "abc", "▁ab"]
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer_from_gguf(sentencepiece(add_space_prefix=False)), "ab é") == ["ab", "▁", "<0xC3>", "<0xA9>"]
    for text in ("abc ab", "  é 世🎉", " a", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream().all(ids)) == text


def test_sentencepiece_text_cannot_merge_into_a_control_token():
    tokens = [*sentencepiece()["tokenizer.ggml.tokens"], "<", "s", ">", "<s", "s>"]
    scores = [*sentencepiece()["tokenizer.ggml.scores"], -20.0, -21, -22, -23, -24]
    types = [*sentencepiece()["tokenizer.ggml.token_type"], 1, 1, 1, 1, 1]
    tokenizer = tokenizer_from_gguf(sentencepiece(tokens=tokens, scores=scores, token_type=types))
    assert pieces(tokenizer, "<s>") == ["▁", "<s", ">"]
    assert pieces(tokenizer, "<s>a", parse_special=True) == ["<s>", "▁", "a"]


def test_merges_stand_in_the_order_of_scores():
    merges = merges_from_scores(["a", "b", "c", "ab", "bc", "abc"], [-1, -2, -3, -9, -8, -7], [True] * 6)
    assert merges == [("a", "bc"), ("ab", "c"), ("b", "c"), ("a", "b")]
    assert merges_from_scores(["a", "b", "ab"], [-1, -2, -3], [True, True, False]) == []


def test_scores_must_cover_the_tokens():
    with pytest.raises(SpecError, match="scores"):
        tokenizer_from_gguf(sentencepiece(scores=[0.0]))


def test_phi3_drops_spaces_behind_its_control_tokens():
    name = {"general.name": "Phi3 Mini 4k"}
    assert pieces(tokenizer_from_gguf(sentencepiece() | name), "</s>  a", parse_special=True) == ["</s>", "▁", "a"]
    assert pieces(tokenizer_from_gguf(sentencepiece()), "</s>  a", parse_special=True) == ["</s>", "▁▁", "▁", "a"]


# Folders


def write_folder(folder: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    backend = Backend(models.BPE({"a": 0, "b": 1, "<s>": 2, "</s>": 3, "<pad>": 4}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    backend.enable_truncation(2)
    backend.enable_padding(length=6, pad_id=4, pad_token="<pad>")
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_with_its_config(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": False,  # what tokenizer.json says counts
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    tokenizer = tokenizer_from_folder(
        write_folder(tmp_path, config, generation_config__json='{"eos_token_id": [3, 4]}')
    )
    assert tokenizer.encode("abab", add_special_tokens=True) == [2, 0, 1, 0, 1]  # neither truncated nor padded
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (2, 3, {3, 4})
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == [2, 0, 1]


def test_a_bare_tokenizer_json_is_enough(tmp_path):
    tokenizer = tokenizer_from_folder(write_folder(tmp_path))
    assert tokenizer.encode("ab", add_special_tokens=True) == [2, 0, 1] and tokenizer.bos_id is None
    with pytest.raises(SpecError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])


def test_a_template_file_wins_and_named_templates_are_found(tmp_path):
    named = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    assert tokenizer_from_folder(write_folder(tmp_path, named)).chat_template == "D"
    assert tokenizer_from_folder(write_folder(tmp_path, named, chat_template__jinja="F")).chat_template == "F"


def test_tokens_that_only_the_config_knows_are_added(tmp_path):
    added = {
        "added_tokens_decoder": {"5": {"content": "<x>", "special": True, "lstrip": False}, "2": {"content": "<s>"}}
    }
    tokenizer = tokenizer_from_folder(write_folder(tmp_path, added))
    assert tokenizer.encode("a<x>", parse_special=True) == [0, 5] and 5 in tokenizer.special_ids


def test_folders_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(SpecError, match=r"no tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.model but no tokenizer\.json"):
        tokenizer_from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SpecError, match=r"tokenizer\.json is no tokenizer"):
        tokenizer_from_folder(tmp_path)
    write_folder(tmp_path, tokenizer_config__json="{")
    with pytest.raises(SpecError, match=r"tokenizer_config\.json is no JSON"):
        tokenizer_from_folder(tmp_path)


def test_the_window_of_a_stream_keeps_spaces_that_decoders_strip():
    backend = Backend(models.BPE({"▁": 0, "▁a": 1, "b": 2, "<s>": 3}, []))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend)
    for ids in ([1, 1, 1], [3, 1, 3, 1], [0, 1, 0, 0, 2], [2, 0, 3, 0, 1], [1, 3, 3, 3, 1], [0, 0, 0]):
        for skip in (True, False):
            assert "".join(tokenizer.stream(skip_special_tokens=skip).all(ids)) == tokenizer.decode(
                ids, skip_special_tokens=skip
            ), ids


# Chat templates

USER = [{"role": "user", "content": "Hi"}]


def test_the_built_in_template_adds_its_system_message(smollm2):
    text = smollm2.apply_chat_template(USER)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.apply_chat_template(
        [{"role": "system", "content": "S"}, *USER], add_generation_prompt=False
    ).startswith("<|im_start|>system\nS<|")
    ids = smollm2.encode_chat(USER)
    assert ids[0] == 1 and ids.count(2) == 2 and smollm2.decode(ids) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ '{0.__class__.__init__}'.format(messages) }}{{ ''.__class__() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template):
    with pytest.raises(SpecError, match="tried to leave its sandbox"):
        render_chat(template, USER)


def test_faults_of_a_template_are_told():
    with pytest.raises(SpecError, match=r"does not parse.*line 2"):
        render_chat("a\n{% if %}", USER)
    with pytest.raises(SpecError, match="refused these messages: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", USER)
    with pytest.raises(SpecError, match="refused these messages: .*undefined"):
        render_chat("{{ nothing.here }}", USER)
    with pytest.raises(SpecError, match="failed on these messages: ZeroDivisionError"):
        render_chat("{{ 1 / 0 }}", USER)
    for messages in ("Hi", {"role": "user"}, [{"content": "x"}], ["Hi"]):
        with pytest.raises(SpecError, match="must be a list such as"):
            render_chat("x", messages)


def test_templates_see_plain_data_only():
    class Role(enum.StrEnum):
        USER = "user"

    messages = [{"role": Role.USER, "content": None, "image": object(), "parts": ("a", True, 1.5)}]
    assert (
        render_chat("{{ messages[0] }}", messages) == "{'role': 'user', 'image': '<object>', 'parts': ['a', True, 1.5]}"
    )
    assert render_chat("{{ x | tojson }}", USER, x={"b": "<é>", "a": [1, None]}) == '{"b": "<é>", "a": [1, null]}'
    year = time.strftime("%Y")
    assert render_chat("{{ strftime_now('%Y') }}", USER) == year
    assert (
        render_chat(
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}", USER
        )
        == "Hi"
    )
