"""A loaded model: a stack of variants that share buffers, and what one does with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.decoder import Decoder
from trimtab.model.flow import filter_prompt
from trimtab.runtime.engine.generate import Output, Session, generate
from trimtab.runtime.engine.sampling import SamplingParams
from trimtab.runtime.step import IntArray, Recorder, Step
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import KVStore
    from trimtab.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Variant:
    """A spec and the weights that fit it: a value; the decoder is built from it when first asked for."""

    spec: ModelSpec
    weights: Weights

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder of this variant."""
        return Decoder(self.spec, self.weights)


class Model:
    """A model in memory. The variant on top of the stack is the one that answers.

    Args:
        variant: the model as loaded.
        tokenizer: builds the tokenizer when it is first needed; None = ids only.
    """

    def __init__(self, variant: Variant, tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        self._variants = [variant]
        self._build_tokenizer = tokenizer

    @property
    def variant(self) -> Variant:
        """The variant that answers."""
        return self._variants[-1]

    @property
    def spec(self) -> ModelSpec:
        """What the model is now."""
        return self.variant.spec

    @property
    def weights(self) -> Weights:
        """What it holds now."""
        return self.variant.weights

    @property
    def decoder(self) -> Decoder:
        """The torch decoder."""
        return self.variant.decoder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            SpecError: the model came without one.
        """
        if self._build_tokenizer is None:
            raise SpecError(f"{self.spec.name} has no tokenizer. Pass token ids instead of text.")
        return self._build_tokenizer()

    def push(self, variant: Variant) -> None:
        """Put a variant on top; the ones below stay as they are."""
        self._variants.append(variant)

    def pop(self) -> Variant:
        """Take the top variant off again.

        Raises:
            SpecError: only the loaded model is left.
        """
        if len(self._variants) == 1:
            raise SpecError("The model as loaded cannot be popped; nothing was pushed on it.")
        return self._variants.pop()

    def logits(self, ids: Any) -> torch.Tensor:
        """Return float32 logits [batch, tokens, V] of every position, without a cache.

        Args:
            ids: [batch, tokens] or [tokens]: lists or a tensor; rows of one length.

        Raises:
            SpecError: rows of different lengths, no token, an id outside the vocabulary, or more tokens than the context.
        """
        rows = self._rows(ids)
        if len({len(row) for row in rows}) > 1:
            raise SpecError("logits wants rows of one length. Call it once per length, or use generate.")
        step = Step.of([len(row) for row in rows], [0] * len(rows))
        flat = np.concatenate(rows)
        wanted = np.arange(len(flat), dtype=np.int64)
        return self.decoder(torch.from_numpy(flat), step, None, wanted).view(len(rows), len(rows[0]), -1)

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
            return _texts(generate(_Bound(self.variant), rows, params, tokenizer))
        outputs = list(generate(_Bound(self.variant), rows, params, tokenizer))[-1]
        return outputs[0] if single else outputs

    def session(self, chunk: int = 512) -> Session:
        """A session on the variant of this moment: prompt, then steps, over a store of its own."""
        return Session(_Bound(self.variant), chunk=chunk)

    def reduce_prompt(self, ids: Sequence[int]) -> IntArray:
        """Indices of the prompt tokens the model keeps (all, unless a token filter is applied)."""
        return filter_prompt(self.decoder, np.asarray(ids, dtype=np.int64))

    def _prompts(self, prompt: Any, chat: bool) -> tuple[list[IntArray], bool]:
        if isinstance(prompt, str):
            return [self._encode(prompt, chat)], True
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str):
            return [self._encode(text, chat) for text in prompt], False
        flat = not (isinstance(prompt, list | tuple) and prompt and not isinstance(prompt[0], int | np.integer))
        return self._rows(prompt), flat and not (isinstance(prompt, torch.Tensor) and prompt.ndim == 2)

    def _encode(self, text: str, chat: bool) -> IntArray:
        if chat and self.tokenizer.chat_template:
            ids = self.tokenizer.encode_chat([{"role": "user", "content": text}])
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=True)
        return self._rows([ids])[0]

    def _rows(self, ids: Any) -> list[IntArray]:
        """Token ids as one array per row, checked."""
        if isinstance(ids, torch.Tensor | np.ndarray):
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


@dataclass(frozen=True)
class _Bound:
    """The engine's view of one variant: numpy in, numpy out. It stays with its variant when others are pushed or popped."""

    variant: Variant

    @property
    def spec(self) -> ModelSpec:
        return self.variant.spec

    def open_store(self) -> KVStore:
        """An empty store for this variant."""
        from trimtab.runtime.cache.store import KVStore

        return KVStore(self.spec)

    def forward(self, tokens: IntArray, step: Step, store: KVStore, logits_rows: IntArray) -> np.ndarray:
        """One pass; float32 logits [R, V]."""
        return self.variant.decoder(torch.from_numpy(tokens), step, store, logits_rows).numpy()

    def keep_tokens(self, ids: IntArray, record: Recorder | None) -> IntArray:
        """Indices of the prompt tokens to prefill."""
        return filter_prompt(self.variant.decoder, ids, record)


__all__ = ["Model", "Output", "Variant"]
