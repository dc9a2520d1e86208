"""From logits to the next token, and from text to the place where it must stop. Numpy only.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import SpecError, TrimtabError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request draws its tokens.

    Args:
        temperature: logits are divided by it; 0 = greedy. At least 0.
        top_k: keep the k likeliest tokens, and those tied with the last of them; 0 = all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it. In (0, 1].
        min_p: drop tokens less likely than this share of the likeliest. In [0, 1].
        repetition_penalty: logits of tokens seen before are divided by it where positive, multiplied where negative.
            Above 0; 1 = off.
        seed: of the row's random numbers; None = another text each time.
        stop: texts that end the answer and are not part of it; one text or several.
        max_new_tokens: at most this many, at least 1.
        ignore_eos: go on behind a token that ends generation.

    Raises:
        SpecError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 128
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        checks = (
            ("temperature", _real(self.temperature) and self.temperature >= 0, "0 or more; 0 is greedy", "0.7"),
            ("top_k", _whole(self.top_k) and self.top_k >= 0, "a whole number, 0 or more; 0 keeps all", "40"),
            ("top_p", _real(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1; 1 keeps all", "0.95"),
            ("min_p", _real(self.min_p) and 0 <= self.min_p <= 1, "0 to 1; 0 keeps all", "0.05"),
            (
                "repetition_penalty",
                _real(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0; 1 is off",
                "1.1",
            ),
            (
                "seed",
                self.seed is None or (_whole(self.seed) and self.seed >= 0),
                "None or a whole number, 0 or more",
                "0",
            ),
            (
                "max_new_tokens",
                _whole(self.max_new_tokens) and self.max_new_tokens >= 1,
                "a whole number, 1 or more",
                "128",
            ),
            (
                "stop",
                all(isinstance(text, str) and text for text in stop),
                "texts with at least one character",
                "('\\n\\n',)",
            ),
        )
        for name, good, allowed, example in checks:
            if not good:
                raise SpecError(
                    f"{name}={getattr(self, name)!r} is not possible. Allowed: {allowed}. Try {name}={example}."
                )

    def rng(self) -> np.random.Generator:
        """Return the random numbers of one row; those of a given seed are the same whatever stands in the batch."""
        return np.random.Generator(np.random.PCG64(self.seed))


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def sample(
    logits_BV: NDArray[np.floating],
    params: Sequence[SamplingParams],
    history: Sequence[Sequence[int] | NDArray[np.integer]],
    rngs: Sequence[np.random.Generator],
) -> NDArray[np.int64]:
    """Draw the next token of each row.

    The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, each on what the one before
    left, probabilities made anew. (llama.cpp's default chain applies the temperature last.) Greedy rows take the largest
    logit after the penalty, the first of equals, and use no random number; other rows use exactly one.

    Args:
        logits_BV: float [B, V]; not changed. -inf forbids a token.
        params: of each row.
        history: token ids of each row so far, prompt included.
        rngs: of each row, from `SamplingParams.rng`.

    Returns:
        int64 [B].

    Raises:
        SpecError: not one of each for every row.
        TrimtabError: a row of logits holds NaN or +inf, or forbids every token.
    """
    if logits_BV.ndim != 2 or not len(logits_BV) == len(params) == len(history) == len(rngs):
        raise SpecError(
            f"sample takes logits [rows, vocabulary] and one of each per row; it got logits of shape {list(logits_BV.shape)}, "
            f"{len(params)} params, {len(history)} histories, {len(rngs)} generators."
        )
    return np.array(
        [_draw(logits_BV[row], row, params[row], history[row], rngs[row]) for row in range(len(params))], dtype=np.int64
    )


def _draw(
    row_V: NDArray[np.floating],
    index: int,
    params: SamplingParams,
    seen: Sequence[int] | NDArray[np.integer],
    rng: np.random.Generator,
) -> int:
    if params.repetition_penalty != 1:
        row_V = penalize(row_V, seen, params.repetition_penalty)
    best = int(np.argmax(row_V))  # NaN counts as largest
    if not math.isfinite(row_V[best]):
        raise TrimtabError(
            f"Row {index} of the logits has {row_V[best]} as its largest value, so no token can be drawn. "
            "The model's numbers broke: try float32, or look for damaged weights."
        )
    if params.temperature == 0:
        return best
    ids, probabilities = candidates(row_V, params)
    sums = np.cumsum(probabilities)
    # The last sum is 1 up to rounding, hence the scale; `right` never lands on a token of probability 0.
    return int(ids[np.searchsorted(sums, rng.random() * sums[-1], side="right")])


def penalize(
    row_V: NDArray[np.floating], seen: Sequence[int] | NDArray[np.integer], penalty: float
) -> NDArray[np.floating]:
    """Return a copy of `row_V` in which each token of `seen` is less likely, once however often it was seen.

    Source: CTRL (arXiv 1909.05858), with transformers' treatment of negative logits.
    """
    out_V = row_V.copy()
    ids = np.unique(np.asarray(seen, dtype=np.int64))
    values = out_V[ids]
    out_V[ids] = np.where(values < 0, values * penalty, values / penalty)
    return out_V


def candidates(row_V: NDArray[np.floating], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return (ids, probabilities) of the tokens that temperature, top-k, top-p and min-p leave, likeliest first.

    Probabilities sum to 1; the likeliest token always stays; equals stand in the order of their ids.

    Args:
        row_V: float [V] with a finite largest value.
        params: with a temperature above 0.
    """
    if 0 < params.top_k < len(row_V):
        least = np.partition(row_V, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(row_V >= least)
    else:
        ids = np.arange(len(row_V))
    ids = ids[np.argsort(-row_V[ids], kind="stable")]
    logits = row_V[ids].astype(np.float64)
    # Subtracting first keeps a tiny temperature from overflowing.
    probabilities = np.exp((logits - logits[0]) / params.temperature)
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        before = np.cumsum(probabilities) - probabilities  # what the likelier ones hold together
        ids, probabilities = ids[before < params.top_p], probabilities[before < params.top_p]
    if params.min_p > 0:
        # A floor on the ratio, so it does not matter whether probabilities were made anew.
        kept = probabilities >= params.min_p * probabilities[0]
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities / probabilities.sum()


class StopChecker:
    """Lets text through until a stop text is complete, and shows no part of that one.

    What could be the beginning of a stop text is held back until it is certain. The stop text that ends first counts, the
    longest of those that end together, so the result does not depend on how the text was cut into pieces.

    Args:
        stops: texts; none lets everything through.

    Attributes:
        stopped: the stop text that was met, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """Take a piece, return the text that is now certain to belong to the answer."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            _, place, self.stopped = min(found)
            self._held = ""
            return text[:place]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back: no more text comes, so it was no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
