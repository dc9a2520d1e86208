"""What a cache does to every token: perplexity with the history read back from it, and KL and agreement while decoding.

`trimtab eval text` scores windows without a cache; here each chunk is appended to what the method has kept so far.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab.errors import CalibrationError, SpecError
from trimtab.runtime.engine.generate import Session, check_context

if TYPE_CHECKING:
    from trimtab.runtime.engine.generate import Runner

#: Tokens appended at a time, and decode steps compared.
CHUNK, STEPS = 64, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Decoding under a method beside decoding with the full cache, token by token.

    Args:
        kl_nats: KL(full || method) of the next token, a value for each step of each window.
        agree: 1 where both would choose the same token.
    """

    kl_nats: tuple[tuple[float, ...], ...]
    agree: tuple[tuple[float, ...], ...]


def nll_through_cache(
    runner: Runner, ids: Sequence[int], *, prompt: int | None = None, chunk: int = CHUNK
) -> list[float]:
    """Negative log-likelihood in nats of each token of a window that follows its prompt.

    After the prompt chunks are appended, each reading what the cache has kept of everything before.

    Args:
        runner: the model under a method.
        ids: one window of text.
        prompt: tokens of it that are the prompt; None = half of them.
        chunk: tokens appended at a time.

    Raises:
        SpecError: the window exceeds the context, or nothing precedes or follows the prompt.
        CalibrationError: it is shorter than 4 tokens.
    """
    tokens = np.asarray(ids, np.int64)
    if len(tokens) < 4:
        raise CalibrationError(f"A window of {len(tokens)} tokens cannot be scored. Give at least 4.")
    check_context(runner.spec, len(tokens), 0)
    start = len(tokens) // 2 if prompt is None else prompt
    if not 0 < start < len(tokens):
        raise SpecError(f"prompt={start} of {len(tokens)} tokens: not possible. Allowed: 1..{len(tokens) - 1}.")
    session, found = Session(runner), []
    try:
        rows_TV = session.prefill([tokens[:start]], reserve=len(tokens) - start)
        for first in range(start, len(tokens), chunk):
            piece = tokens[first : first + chunk]
            found.append(_nll(rows_TV[-1:], piece[:1]))
            rows_TV = session.extend([piece])
            found.append(_nll(rows_TV[:-1], piece[1:]))
    finally:
        session.close()
    return np.concatenate(found).tolist()


def perplexity(nll_nats: Sequence[float]) -> float:
    """Perplexity of tokens with these negative log-likelihoods."""
    return math.exp(sum(nll_nats) / len(nll_nats))


def decode_logits(runner: Runner, ids: Sequence[int], *, steps: int = STEPS) -> np.ndarray:
    """Logits [steps, V] of a decode over the last `steps` tokens of a window, fed as they stand in the text.

    Raises:
        SpecError: the window exceeds the context.
        CalibrationError: nothing is left before these tokens.
    """
    tokens = np.asarray(ids, np.int64)
    prompt = len(tokens) - steps
    if prompt < 1:
        raise CalibrationError(
            f"A window of {len(tokens)} tokens has no prompt before {steps} steps. Give a longer one."
        )
    check_context(runner.spec, len(tokens), 0)
    session = Session(runner)
    try:
        session.prefill([tokens[:prompt]], reserve=steps)
        return np.stack([session.decode([token])[0] for token in tokens[prompt:]])
    finally:
        session.close()


def compare(full: Sequence[np.ndarray], method: Sequence[np.ndarray]) -> Compared:
    """Compare logits [windows][T, V] of a method with those of the full cache."""
    kl, agree = [], []
    for base_TV, ours_TV in zip(full, method, strict=True):
        p, q = _log_softmax(base_TV), _log_softmax(ours_TV)
        kl.append(tuple(np.maximum((np.exp(p) * (p - q)).sum(-1), 0).tolist()))
        agree.append(tuple((p.argmax(-1) == q.argmax(-1)).astype(float).tolist()))
    return Compared(kl_nats=tuple(kl), agree=tuple(agree))


def _nll(rows_TV: np.ndarray, next_T: np.ndarray) -> np.ndarray:
    return -_log_softmax(rows_TV)[np.arange(len(next_T)), next_T]


def _log_softmax(rows_TV: np.ndarray) -> np.ndarray:
    rows = rows_TV.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))
