"""What one does with a model that runs, whatever runs it: text or ids in, text or ids out. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.engine.generate import Output, Runner, Session, generate
from trimtab.runtime.engine.sampling import SamplingParams
from trimtab.runtime.step import IntArray
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer


class Generator(ABC):
    """Generation over a runner.

    Args:
        tokenizer: builds the tokenizer when it is first needed; None = ids only.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        self._build_tokenizer = tokenizer

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """What the model is now."""

    @abstractmethod
    def runner(self) -> Runner:
        """What runs passes, as of this moment."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            SpecError: the model came without one.
        """
        if self._build_tokenizer is None:
            raise SpecError(f"{self.spec.name} has no tokenizer. Pass token ids instead of text.")
        return self._build_tokenizer()

    def generate(
        self, prompt: Any, *, max_new_tokens: int = 128, stream: bool = False, chat: bool = False, **sampling: Any
    ) -> Any:
        """Continue one prompt or several of different lengths.

        Args:
            prompt: text, a list of texts, token ids, or a list of lists of ids.
            max_new_tokens: most tokens to generate for each.
            stream: True returns an iterator of text pieces (one prompt only).
            chat: True wraps text in the model's chat template.
            sampling: see `SamplingParams`: temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, ignore_eos.

        Returns:
            `Output` (.text, .ids), a list of them for several prompts, or an iterator of text.

        Raises:
            SpecError: a bad parameter, or prompt plus new tokens beyond the context.
        """
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
        rows, single = self._prompts(prompt, chat)
        tokenizer = self.tokenizer if self._build_tokenizer else None
        if stream:
            if not single or tokenizer is None:
                raise SpecError("stream=True wants one prompt and a model with a tokenizer.")
            return _texts(generate(self.runner(), rows, params, tokenizer))
        outputs = list(generate(self.runner(), rows, params, tokenizer))[-1]
        return outputs[0] if single else outputs

    def session(self, chunk: int = 512) -> Session:
        """A session on the model of this moment: prompt, then steps, over a store of its own."""
        return Session(self.runner(), chunk=chunk)

    def _prompts(self, prompt: Any, chat: bool) -> tuple[list[IntArray], bool]:
        if isinstance(prompt, str):
            return [self._encode(prompt, chat)], True
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
            return [self._encode(text, chat) for text in prompt], False
        flat = not (isinstance(prompt, list | tuple) and prompt and not isinstance(prompt[0], int | np.integer))
        return self._rows(prompt), flat and getattr(prompt, "ndim", 1) != 2

    def _encode(self, text: str, chat: bool) -> IntArray:
        if chat and self.tokenizer.chat_template:
            ids = self.tokenizer.encode_chat([{"role": "user", "content": text}])
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=True)
        return self._rows([ids])[0]

    def _rows(self, ids: Any) -> list[IntArray]:
        """Token ids (lists, an array or a tensor) as one array per row, checked."""
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        rows = [ids] if not ids or isinstance(ids[0], int | np.integer) else ids
        found = [np.asarray(row, dtype=np.int64) for row in rows]
        for row in found:
            if len(row) == 0:
                raise SpecError("A prompt has no token. Give at least one.")
            if row.min() < 0 or row.max() >= self.spec.vocab_size:
                raise SpecError(f"Token ids must lie in 0..{self.spec.vocab_size - 1}; got {row.min()}..{row.max()}.")
            if len(row) > self.spec.max_position_embeddings:
                raise SpecError(
                    f"The prompt has {len(row)} tokens, the context of {self.spec.name} is "
                    f"{self.spec.max_position_embeddings}. Shorten the prompt."
                )
        return found


def _texts(steps: Iterator[list[Output]]) -> Iterator[str]:
    """The text of one prompt, piece by piece."""
    shown = 0
    for outputs in steps:
        text = outputs[0].text
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
