"""Text to token ids and back: one class over the `tokenizers` library, whatever file the vocabulary came from."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.text.chat import render_chat

#: Texts of tokens that end an answer, by the convention of model families (llama.cpp keeps the same list).
END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>",
    "<|end_of_text|>", "<end_of_utterance>",
})  # fmt: skip
_HARMONY_ENDS = {"<|return|>", "<|call|>"}  # where both exist, "<|end|>" only closes one of several messages
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Encodes and decodes; safe to share between threads.

    Args:
        backend: the `tokenizers` object, with neither truncation nor padding.
        bos_id, eos_id: beginning and end of sequence, where the model has them.
        end_ids: further ids that end generation; `eos_id` and special tokens named like an end (`END_TEXTS`) are added.
        prefix, suffix: ids that `add_special_tokens` puts around a text.
        chat_template: Jinja2 source, if the model has one.
        template_variables: special tokens by role (`bos_token`, ...), for the template.

    Attributes:
        eog_ids: all ids that end generation.
        special_ids: control tokens; `skip_special_tokens` leaves them out of the text.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        end_ids: Iterable[int] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.prefix = tuple(prefix)
        self.suffix = tuple(suffix)
        self.chat_template = chat_template
        self.template_variables = dict(template_variables or {})
        special = {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special}
        ends = {index for index, text in special.items() if text in END_TEXTS}
        if set(special.values()) >= _HARMONY_ENDS:
            ends -= {index for index, text in special.items() if text == "<|end|>"}
        self.special_ids = frozenset(special)
        self.eog_ids = frozenset(ends | set(end_ids) | ({eos_id} if eos_id is not None else set()))
        self._lock = threading.Lock()

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`.

        Args:
            text: any Unicode text.
            add_special_tokens: put the model's `prefix` and `suffix` (usually BOS) around it.
            parse_special: read the spelling of a control token, such as ``<|im_end|>``, as that token. Right for a
                rendered chat template; with False a user's text cannot forge one.

        Raises:
            SpecError: `text` is not a string, or holds half of a surrogate pair.
        """
        if not isinstance(text, str):
            raise SpecError(f"encode takes a text, not {type(text).__name__}. Pass a str.")
        try:
            with self._lock:  # the flag belongs to the backend, not to the call
                self.backend.encode_special_tokens = not parse_special
                ids = self.backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise SpecError(
                "The text holds half of a surrogate pair, which is no character. Decode with errors='replace'."
            ) from None
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        Raises:
            SpecError: a negative id.
        """
        listed = [int(i) for i in ids]
        try:
            return self.backend.decode(listed, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise SpecError(
                f"{min(listed)}..{max(listed)} holds ids that no vocabulary has. Allowed: 0..{self.vocab_size - 1}."
            ) from None

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Return a decoder that takes one id at a time."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the model's prompt for `messages`; encode it with ``parse_special=True``.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the header of the answer to come.
            chat_template: use this template instead of the model's.
            variables: what else the template may ask for, e.g. `tools` or `enable_thinking`.

        Raises:
            SpecError: the model has no template, or the template fails (see `render_chat`).
        """
        template = chat_template or self.chat_template
        if not template:
            raise SpecError("This model has no chat template. Pass plain text, or a template with chat_template=...")
        return render_chat(
            template, messages, add_generation_prompt=add_generation_prompt, **(self.template_variables | variables)
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Return the ids of the rendered chat template; it names its own BOS, so none is added."""
        text = self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, parse_special=True)


class TextStream:
    """Text of a growing list of ids; a character appears once all its bytes are there.

    The pieces joined equal `Tokenizer.decode` of all ids, except that SentencePiece-style vocabularies decode a run of
    byte tokens as a whole: there one bad byte voids a run that the stream has partly shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # shown ids that the next ones lean on, then those still to show
        self._shown = 0  # how many of `_ids` are shown

    def push(self, token: int) -> str:
        """Take one id, return the text that is now certain (often empty)."""
        if token in self._skipped:
            return ""
        self._ids.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return after[len(before) :]

    def finish(self) -> str:
        """Return what is left: an unfinished character shows as U+FFFD."""
        before, after = self._texts()
        self._ids, self._shown = [], 0
        return after[len(before) :]

    def all(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the non-empty pieces of `tokens`, to the end."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
        if piece := self.finish():
            yield piece

    def _texts(self) -> tuple[str, str]:
        """Text of the shown ids, and of all of them: decoders may treat the first token differently, so both begin there."""
        decode = self._tokenizer.decode
        return decode(self._ids[: self._shown]), decode(self._ids)


def tokenizer_from_folder(folder: str | Path) -> Tokenizer:
    """Read `tokenizer.json` and, where present, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`.

    Ids equal those of transformers' fast tokenizer. As there (version 5), what goes around a text is what the
    post-processor of tokenizer.json says; `add_bos_token` and `add_eos_token` of the config do not matter.
    `clean_up_tokenization_spaces` is not applied: decoding changes no text.

    Raises:
        SpecError: a file is missing or is no JSON.
        UnsupportedModelError: the folder has a vocabulary, but not as tokenizer.json.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in _OTHER_VOCABULARIES if (folder / name).is_file()]
        if others:
            raise UnsupportedModelError(
                f"{folder} has {', '.join(others)} but no tokenizer.json. Convert it once: "
                f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...)."
            )
        raise SpecError(f"{folder} has no tokenizer.json. Give a model folder as it is on the hub.")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for every fault of the file
        raise SpecError(f"{path} is no tokenizer.json that the tokenizers library reads: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    config = _json(folder / "tokenizer_config.json")
    _add_missing(backend, config.get("added_tokens_decoder") or {})
    tokens = {role: _text(config[role]) for role in _ROLES if config.get(role)}
    ids = {role: backend.token_to_id(text) for role, text in tokens.items()}
    bos_id, eos_id = ids.get("bos_token"), ids.get("eos_token")
    prefix, suffix = _wrapping(backend)
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_id=eos_id,
        end_ids=ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [],
        prefix=prefix,
        suffix=suffix,
        chat_template=_chat_template(folder, config),
        template_variables=tokens,
    )


_OTHER_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SpecError(f"{path} is no JSON: {error}. Fetch it again.") from None
    if not isinstance(found, dict):
        raise SpecError(f"{path} must hold a JSON object, not {type(found).__name__}.")
    return found


def _text(token: str | Mapping[str, Any]) -> str:
    """Spelling of a token that configs write as a string or as an object."""
    return token if isinstance(token, str) else token["content"]


def _add_missing(backend: Backend, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Add tokens that only the config knows, in the order of their ids."""
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            flags = {
                name: bool(token[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token
            }
            added = AddedToken(token["content"], special=bool(token.get("special", True)), **flags)
            (backend.add_special_tokens if added.special else backend.add_tokens)([added])


def _wrapping(backend: Backend) -> tuple[list[int], list[int]]:
    """Ids that the file's post-processor puts before and behind a text."""
    if not backend.num_special_tokens_to_add(False):
        return [], []
    encoded = backend.encode("a", add_special_tokens=True)
    inner = [place for place, added in enumerate(encoded.special_tokens_mask) if not added]
    if not inner:
        return encoded.ids, []
    return encoded.ids[: inner[0]], encoded.ids[inner[-1] + 1 :]


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The file `chat_template.jinja` wins; a config may hold one template or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        return named.get("default") or next(iter(named.values()), None)
    return found
