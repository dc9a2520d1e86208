"""Text of a growing list of tokens, in constant time a token where the vocabulary is one of bytes."""

from __future__ import annotations

import codecs
import functools
from typing import Protocol

from trimtab.runtime.text.tokenizer import Tokenizer


class Stream(Protocol):
    """Takes tokens, gives text."""

    def push(self, token: int) -> str:
        """Take one id, return the text that is now certain (often empty)."""
        ...

    def finish(self) -> str:
        """Return what is left: an unfinished character shows as U+FFFD."""
        ...


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


class TokenBytes:
    """Bytes of the tokens of a byte-level vocabulary; made once, shared by all streams.

    Args:
        tokenizer: whose tokens.

    Attributes:
        usable: False where decoding is more than joining bytes; `TextStream` serves those.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # The decoder's own text; one inside a sequence of decoders would not be joining bytes alone.
        self.usable = str(tokenizer.backend.decoder).lstrip().startswith("ByteLevel")
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        """The bytes of a token; none of an id beyond the vocabulary."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._spelled(token)
        return found

    def _spelled(self, token: int) -> bytes:
        text = self.tokenizer.backend.id_to_token(token)
        if text is None:
            return b""
        alphabet = byte_alphabet()
        if all(char in alphabet for char in text):
            return bytes(alphabet[char] for char in text)
        return text.encode()

    def stream(self, *, skip_special_tokens: bool = True) -> Stream:
        """Return a decoder that takes one id at a time; its pieces joined equal `Tokenizer.decode` of all ids."""
        if self.usable:
            return _ByteStream(self, self.tokenizer.special_ids if skip_special_tokens else frozenset())
        return self.tokenizer.stream(skip_special_tokens=skip_special_tokens)


class _ByteStream:
    """Holds back the bytes of an unfinished character, nothing else."""

    __slots__ = ("_bytes", "_decoder", "_skipped")

    def __init__(self, tokens: TokenBytes, skipped: frozenset[int]) -> None:
        self._bytes, self._skipped = tokens, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Take one id, return the text that is now certain."""
        return "" if token in self._skipped else self._decoder.decode(self._bytes.of(token))

    def finish(self) -> str:
        """Return what is left."""
        return self._decoder.decode(b"", True)
