"""Tokenizers of the served models, and what tokens look like alone: their bytes, for log-probabilities."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.messages import TokenLogprob
from trimtab.serve.types.common import Logprob, TopLogprob

_BYTE = re.compile(r"<0x([0-9A-F]{2})>\Z")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


class TokenTexts:
    """A tokenizer and the bytes of its tokens.

    Args:
        tokenizer: of a base model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._byte_level = "ByteLevel" in str(tokenizer.backend.decoder)
        self._added = {index: token.content for index, token in tokenizer.backend.get_added_tokens_decoder().items()}

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - lives as long as the server
    def token(self, index: int) -> tuple[str, tuple[int, ...]]:
        """(text, bytes) of a token; bytes of half a character show as U+FFFD in the text."""
        raw = self._bytes(index)
        return raw.decode("utf-8", errors="replace"), tuple(raw)

    def _bytes(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].encode()
        spelled = self.tokenizer.backend.id_to_token(index)
        if spelled is None:
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            if all(char in alphabet for char in spelled):
                return bytes(alphabet[char] for char in spelled)
        if found := _BYTE.match(spelled):
            return bytes([int(found.group(1), 16)])
        return spelled.replace("\u2581", " ").encode()  # SentencePiece's space

    def logprob(self, entry: TokenLogprob) -> Logprob:
        """OpenAI's form of a log-probability."""
        text, raw = self.token(entry.id)
        tops = [TopLogprob(*_pair(self.token(index), value)) for index, value in entry.top]
        return Logprob(text, _finite(entry.logprob), list(raw), tops)

    def logprobs(self, entries: Iterable[TokenLogprob]) -> list[Logprob]:
        """Of several tokens."""
        return [self.logprob(entry) for entry in entries]


def _pair(token: tuple[str, tuple[int, ...]], value: float) -> tuple[str, float, list[int]]:
    return token[0], _finite(value), list(token[1])


def _finite(value: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return max(value, -9999.0) if value == value else -9999.0


def tokenizer_source(tokenizer: Path | None) -> Callable[[str], Tokenizer]:
    """Return a function from a base model's name to its tokenizer; `tokenizer` replaces that of every base."""

    def load(base: str) -> Tokenizer:
        from trimtab.runtime.weights.load import find, read_tokenizer

        return read_tokenizer(tokenizer if tokenizer is not None else find(base))

    return load
