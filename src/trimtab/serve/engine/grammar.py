"""Grammars as masks over tokens, through llguidance."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

#: Compiled grammars that are kept, the least recently used going first.
_KEPT = 64


class Matcher:
    """Where one answer stands in its grammar.

    Args:
        state: llguidance's matcher; owned.
        vocab_size: rows of the embedding, which may be more than the tokenizer knows.
    """

    def __init__(self, state: LLMatcher, vocab_size: int) -> None:
        self._state, self._size = state, vocab_size
        self._words = np.zeros((1, -(-vocab_size // 32)), np.int32)

    def copy(self) -> Matcher:
        """A matcher that stands in the same place."""
        return Matcher(self._state.deep_copy(), self._size)

    def allowed(self) -> NDArray[np.bool_]:
        """Tokens that may come next [V]; end tokens only where the text is complete.

        Raises:
            TrimtabError: the matcher gave up, for example because its limits were passed.
        """
        row = self._words[0]
        self._state.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()
        return np.unpackbits(row.view(np.uint8), bitorder="little")[: self._size].astype(np.bool_)

    def take(self, token: int) -> bool:
        """Take a token that was allowed; True if nothing may follow.

        Raises:
            TrimtabError: it was not allowed.
        """
        self._state.consume_token(token)
        self._check()
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            told = " ".join(self._state.get_error().split())[:300]
            raise TrimtabError(f"The grammar could not be followed any further: {told}. Simplify it.")


class Grammars:
    """Compiled grammars of one tokenizer.

    Args:
        tokenizer: of a base model.
        vocab_size: rows of its embedding.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._size = tokenizer, vocab_size
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a grammar; compiled once.

        Raises:
            SpecError: a grammar that cannot be compiled, or llguidance is not installed.
        """
        found = self._compiled.pop(grammar, None) or self._compile(grammar)
        self._compiled[grammar] = found
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Matcher(found.deep_copy(), self._size)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise SpecError("Grammars need llguidance. Install it: pip install 'trimtab[serve]'.") from None
        ends: Any = sorted(self._tokenizer.eog_ids)
        try:
            if self._tokens is None:
                text = self._tokenizer.backend.to_str()
                self._tokens = LLTokenizer(text, n_vocab=self._size, eos_token=ends or None)
            if grammar.kind == "json_schema":
                source = LLMatcher.grammar_from_json_schema(grammar.text)
            elif grammar.kind == "regex":
                source = LLMatcher.grammar_from_regex(grammar.text)
            else:
                source = LLMatcher.grammar_from_lark(grammar.text)
            made = LLMatcher(self._tokens, source, log_level=0)
        except ValueError as error:
            raise SpecError(f"The grammar cannot be enforced: {error}. Simplify it.") from None
        if made.is_error():
            told = " ".join(made.get_error().split())[:300]
            raise SpecError(f"The grammar cannot be enforced: {told}. Simplify it.")
        return made
