"""A tokenizer from the metadata of a GGUF file, token for token what llama.cpp makes of the same file.

Source: ggml `docs/gguf.md` ("tokenizer.ggml.*"); behaviour of llama.cpp `src/llama-vocab.cpp` (August 2025). Like llama.cpp,
no Unicode normalisation is applied, because the file does not say whether the model had one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.text.pretokenizers import pre_tokenizer
from trimtab.runtime.text.tokenizer import END_TEXTS, Tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
#: Other values of tokenizer.ggml.model, for the message.
_REFUSED = {
    "bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV trie", "plamo2": "PLaMo-2", "no_vocab": "no vocabulary", "none": "no vocabulary",
}  # fmt: skip
_SPACE = "\u2581"  # SentencePiece writes a space so
#: Tokens of Phi-3 after which spaces stay; behind its other control tokens they are dropped.
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that `metadata` describes.

    Args:
        metadata: keys of the file; read are ``tokenizer.ggml.{model, pre, tokens, merges, scores, token_type, *_token_id,
            add_bos_token, add_eos_token, add_space_prefix}``, ``tokenizer.chat_template`` and ``general.name``.

    Raises:
        UnsupportedModelError: a kind of tokenizer or pre-tokenizer that Trimtab does not know, by name.
        SpecError: a key is missing or contradicts another.
    """
    kind = _required(metadata, "model")
    if kind not in ("gpt2", "llama"):
        told = f" ({_REFUSED[kind]})" if kind in _REFUSED else ""
        raise UnsupportedModelError(
            f"The file's tokenizer is of the kind '{kind}'{told} (tokenizer.ggml.model), which Trimtab does not know. "
            "Known: gpt2 (byte-level BPE), llama (SentencePiece BPE)."
        )
    # Empty tokens would be one key; the names are llama.cpp's.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(_required(metadata, "tokens"))]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise SpecError(
            f"The file's vocabulary holds {twice!r} twice. Each token must be there once; convert the model again."
        )
    types = _types(metadata, tokens)
    ids = {role: _token_id(metadata, key, len(tokens)) for role, key in _TOKEN_KEYS.items()}
    if kind == "gpt2":
        pre = pre_tokenizer(metadata.get("tokenizer.ggml.pre") or "default")
        backend, add_bos = _byte_level(vocab, _required(metadata, "merges"), pre.stages, pre.ignore_merges), pre.add_bos
    else:
        ids = {"bos_token": 1, "eos_token": 2, "unk_token": 0} | {
            role: index for role, index in ids.items() if index is not None
        }
        space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        backend = _sentencepiece(
            vocab, tokens, types, _required(metadata, "scores"), tokens[ids["unk_token"] or 0], space_prefix
        )
        add_bos = True
    _add_tokens(
        backend, tokens, types, strip="phi-3" in str(metadata.get("general.name", "")).lower().replace("phi3", "phi-3")
    )
    bos_id, eos_id = ids.get("bos_token"), ids.get("eos_token")
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=[index for role in _END_ROLES if (index := ids.get(role)) is not None],
        prefix=_wrap(metadata, "add_bos_token", add_bos, bos_id),
        suffix=_wrap(metadata, "add_eos_token", False, eos_id),
        chat_template=metadata.get("tokenizer.chat_template"),
        template_variables={
            role: tokens[index] for role, index in ids.items() if index is not None and role not in _END_ROLES
        },
    )


_END_ROLES = ("eot_token", "eom_token")
_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "eot_token": "eot_token_id",
    "eom_token": "eom_token_id",
}


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], usable: Sequence[bool]) -> list[tuple[str, str]]:
    """Turn SentencePiece scores into ordered merges: the better a piece's score, the earlier any two pieces become it.

    Args:
        tokens: pieces by id.
        scores: of each piece, higher is better.
        usable: False for pieces that text must not become (control tokens).

    Returns:
        Pairs, first merged first. Pairs that make the same piece stand in the order of their own ids, as transformers has it.
    """
    vocab = {token: index for index, token in enumerate(tokens) if usable[index]}
    ranked: list[tuple[float, int, int, int]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _byte_level(vocab: dict[str, int], merges: Sequence[str], stages: Sequence[str], ignore_merges: bool) -> Backend:
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)  # the first character is part of a token, even a space
        if cut < 0:
            raise SpecError(
                f"The file's merge {merge!r} is not two tokens with a space between. Convert the model again."
            )
        pairs.append((merge[:cut], merge[cut + 1 :]))
    backend = Backend(_bpe(vocab, pairs, ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(stage), "isolated") for stage in stages]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    vocab: dict[str, int],
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    unknown: str,
    space_prefix: bool,
) -> Backend:
    if len(scores) != len(tokens):
        raise SpecError(
            f"The file has {len(tokens)} tokens and {len(scores)} scores. There must be one each; convert the model again."
        )
    # A text that spells a control token must not become it by merging, so those take no part. (llama.cpp lets them.)
    pairs = merges_from_scores(tokens, scores, [kind not in (_CONTROL, _UNKNOWN) for kind in types])
    backend = Backend(_bpe(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if space_prefix else spaces
    tail = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return backend


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab, merges, **options)
    except Exception as error:  # the library raises a bare Exception
        raise SpecError(
            f"The file's vocabulary and merges do not fit together: {error}. Convert the model again."
        ) from None


def _add_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int], *, strip: bool) -> None:
    """Control tokens are found only where special tokens are parsed, user-defined ones in any text."""
    control = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, rstrip=strip and token not in _PHI3_KEEPS_SPACE)
            for token in control
        ]
    )
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """Type of each token; one that reads like an end of text is a control token even where the file says otherwise."""
    types = list(metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise SpecError(
            f"The file has {len(tokens)} tokens and {len(types)} token types. There must be one each; convert the model again."
        )
    return [_CONTROL if token in END_TEXTS else kind for token, kind in zip(tokens, types, strict=True)]


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in metadata:
        raise SpecError(
            f"The file has no '{key}', so no text can be tokenized. Convert the model again, or use its tokenizer.json."
        )
    return metadata[key]


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    index = metadata.get(f"tokenizer.ggml.{name}")
    return int(index) if index is not None and 0 <= index < count else None  # converters write 2**32 - 1 for "none"


def _wrap(metadata: Mapping[str, Any], name: str, default: bool, index: int | None) -> list[int]:
    wanted = metadata.get(f"tokenizer.ggml.{name}", default)
    return [index] if wanted and index is not None else []
