"""A loaded model: a stack of variants that share buffers, and what one does with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.decoder import Decoder
from trimtab.model.flow import filter_prompt
from trimtab.runtime.engine.generate import Output
from trimtab.runtime.engine.generator import Generator
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


class Model(Generator):
    """A model in memory. The variant on top of the stack is the one that answers.

    Args:
        variant: the model as loaded.
        tokenizer: builds the tokenizer when it is first needed; None = ids only.
    """

    def __init__(self, variant: Variant, tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        super().__init__(tokenizer)
        self._variants = [variant]

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

    def runner(self) -> Bound:
        """The variant of this moment as the engine drives it."""
        return Bound(self.variant)

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

    def reduce_prompt(self, ids: Sequence[int]) -> IntArray:
        """Indices of the prompt tokens the model keeps (all, unless a token filter is applied)."""
        return filter_prompt(self.decoder, np.asarray(ids, dtype=np.int64))


@dataclass(frozen=True)
class Bound:
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
