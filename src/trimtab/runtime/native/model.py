"""A model that runs as a native program: load it, talk to it, time it. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab.runtime.engine.generate import Session
from trimtab.runtime.engine.generator import Generator
from trimtab.runtime.native.program import NativeProgram
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed greedy generation.

    Args:
        prefill_s: from the prompt to the logits of the first new token.
        decode_s: seconds of every later step, [gen - 1].
        ids: the new tokens.
        kv_bytes: of the cache at the end, pages reserved.
    """

    prefill_s: float
    decode_s: tuple[float, ...]
    ids: tuple[int, ...]
    kv_bytes: int


class NativeModel(Generator):
    """A lowered model with its tokenizer.

    Args:
        program: see `lower`.
        tokenizer: builds the tokenizer when it is first needed; None = ids only.
    """

    def __init__(self, program: NativeProgram, tokenizer: Callable[[], Tokenizer] | None = None) -> None:
        super().__init__(tokenizer)
        self.program = program

    @property
    def spec(self) -> ModelSpec:
        """The model as it is held."""
        return self.program.spec

    def runner(self) -> NativeProgram:
        """The program."""
        return self.program

    def time(self, prompt: Sequence[int], gen: int) -> Timed:
        """Generate `gen` tokens greedily, end tokens ignored, and time the prompt and every step; sampling is not timed."""
        session = Session(self.program)
        try:
            start = time.perf_counter()
            logits = session.prefill([np.asarray(prompt, np.int64)], reserve=gen)
            prefill_s = time.perf_counter() - start
            ids, steps = [int(np.argmax(logits[0]))], []
            for _ in range(gen - 1):
                start = time.perf_counter()
                logits = session.decode([ids[-1]])
                steps.append(time.perf_counter() - start)
                ids.append(int(np.argmax(logits[0])))
            return Timed(prefill_s, tuple(steps), tuple(ids), session.store.nbytes().reserved)
        finally:
            session.close()
