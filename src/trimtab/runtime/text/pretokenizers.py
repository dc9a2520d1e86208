"""How byte-level BPE cuts text into words before it merges: one entry per name of ``tokenizer.ggml.pre``.

A stage is a regular expression in Oniguruma syntax; its matches and the text between them become words, which the next
stage cuts further. The expressions are those of the models' own ``tokenizer.json`` files. Where llama.cpp only
approximates one (Tekken, GPT-4o: letter case and marks outside ASCII; DeepSeek-V3: "~"; DeepSeek-LLM: spaces outside
ASCII), the model's expression is the one used.

Source: names and groups from llama.cpp `src/llama-vocab.cpp` (August 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import UnsupportedModelError, did_you_mean

#: Words as GPT-2 cuts them: what a byte-level pre-tokenizer does by itself.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_WORD = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_NOT_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_NOT_WORD}\p{{L}}+|\p{{N}}|{_TAIL}"
_TEKKEN = rf"{_NOT_WORD}{_UPPER}*{_LOWER}+|{_NOT_WORD}{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_GPT4O = rf"{_NOT_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_NOT_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
#: Cased letters as DeepSeek's first tokenizer lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _HAN,
    r"\p{N}+",
)
_WORDS = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """What one ``tokenizer.ggml.pre`` name stands for.

    Args:
        stages: regular expressions, applied one after the other.
        ignore_merges: a word that is itself in the vocabulary becomes that token, whatever the merges say.
        add_bos: begin with the beginning-of-sequence token where the file does not say.
    """

    stages: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GROUPS: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer(stages=(_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", PreTokenizer(stages=(_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan", PreTokenizer(stages=(_QWEN2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer(stages=(_DIGIT, GPT2_WORDS))),
    ("gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion exaone4", PreTokenizer(stages=(GPT2_WORDS,))),
    ("tekken", PreTokenizer(stages=(_TEKKEN,), ignore_merges=True, add_bos=True)),
    ("gpt-4o llama4", PreTokenizer(stages=(_GPT4O,))),
    ("deepseek-llm", PreTokenizer(stages=_DEEPSEEK)),
    ("deepseek-coder", PreTokenizer(stages=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, _DIGIT))),
    ("deepseek-v3 hunyuan-dense", PreTokenizer(stages=_DEEPSEEK3)),
    ("falcon", PreTokenizer(stages=(r"[\p{P}$+<=>^~|`]+", GPT2_WORDS, r"[0-9][0-9][0-9]"))),
    ("bloom poro-chat gpt3-finnish", PreTokenizer(stages=(_WORDS,))),
    ("viking", PreTokenizer(stages=(_WORDS, _DIGIT))),
    ("default", PreTokenizer(stages=(r"[\p{P}$+<=>^~|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"))),
)  # fmt: skip

#: Name in the file -> how to cut.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: pre for names, pre in _GROUPS for name in names.split()}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Look up a ``tokenizer.ggml.pre`` name.

    Raises:
        UnsupportedModelError: the name is not known; guessing would give other tokens than the model was trained on.
    """
    if name not in PRE_TOKENIZERS:
        known = sorted(PRE_TOKENIZERS)
        raise UnsupportedModelError(
            f"The file asks for the pre-tokenizer '{name}' (tokenizer.ggml.pre), which Trimtab does not know."
            f"{did_you_mean(name, known)} Known: {', '.join(known)}. "
            "Use the original model's folder with its tokenizer.json instead."
        )
    return PRE_TOKENIZERS[name]
