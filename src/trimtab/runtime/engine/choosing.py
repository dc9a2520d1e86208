"""Drawing tokens for many answers at once, each with settings, penalties and random numbers of its own. Numpy only.

What is drawn is what `sampling.candidates` and one random number define; only the way there is shorter: of a large vocabulary no
more is sorted than the drawn token needs.

Legend: R rows of logits, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.engine.sampling import SamplingParams, candidates
from trimtab.runtime.kernels import _core
from trimtab.runtime.step import IntArray

#: Rows of logits whose log-probabilities are made together.
_ROWS = 64
#: Up to so many tokens, sorting all is the shortest way.
_FEW = 2048
#: Values of a strip of logits of which only the largest is looked at, to find the largest of all.
_STRIP = 128
#: Temperatures below which single precision overflows.
_COLD = 1e-4
#: Nats below the likeliest token within which the drawn one is looked for, one after the other.
_LEVELS = (5.0, 7.5, 9.5, 11.0, 13.0, 16.0, math.inf)


class Nothing(TrimtabError):
    """Every token is forbidden, so the answer can only end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How one answer draws its tokens.

    Args:
        params: temperature, top-k, top-p, min-p, repetition penalty, seed.
        presence_penalty, frequency_penalty: taken from the logit of a token of the answer, once, and as often as it stands there.
        logit_bias: (token id, added to its logit) pairs; -100 forbids it, 100 forces it where no other has it.
        min_tokens: no token of `ends` before so many new tokens.
        ends: tokens that end an answer.

    Raises:
        SpecError: a negative id, or a number that is not finite.
    """

    params: SamplingParams
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        values = (self.presence_penalty, self.frequency_penalty, *(value for _, value in self.logit_bias))
        if not all(math.isfinite(value) for value in values):
            raise SpecError("Penalties and biases must be finite numbers. Use -100 to forbid a token.")
        if any(token < 0 for token, _ in self.logit_bias):
            raise SpecError("logit_bias names a negative token id. Allowed: 0 or more.")


class Chooser:
    """The tokens of one answer so far, as far as they bear on the next one.

    Args:
        drawing: settings.
        prompt: token ids.
        rng: random numbers; None = from the seed.
    """

    def __init__(
        self, drawing: Drawing, prompt: Sequence[int] | IntArray = (), rng: np.random.Generator | None = None
    ) -> None:
        self.drawing, self.params = drawing, drawing.params
        self.rng = drawing.params.rng() if rng is None else rng
        self._repeats = drawing.params.repetition_penalty != 1
        self._counts_answer = drawing.presence_penalty != 0 or drawing.frequency_penalty != 0
        self._seen = dict.fromkeys(int(token) for token in prompt) if self._repeats else {}
        self._answer: dict[int, int] = {}
        self._bias_ids = np.array([token for token, _ in drawing.logit_bias], np.int64)
        self._bias = np.array([value for _, value in drawing.logit_bias], np.float32)
        self._bias[self._bias <= -100] = -np.inf
        self._ends = np.array(sorted(drawing.ends), np.int64)
        self.made = 0

    @property
    def plain(self) -> bool:
        """Whether logits are taken as they come."""
        held = self.made < self.drawing.min_tokens and len(self._ends) > 0
        return not (self._repeats or held or len(self._bias_ids) or (self._counts_answer and self._answer))

    def note(self, token: int) -> None:
        """Take note of a token of the answer."""
        self.made += 1
        if self._repeats:
            self._seen[token] = None
        if self._counts_answer:
            self._answer[token] = self._answer.get(token, 0) + 1

    def adjust(self, row_V: NDArray[np.float32], allowed_V: NDArray[np.bool_] | None = None) -> None:
        """Change logits in place: repetition, presence and frequency penalties, bias, then what is forbidden."""
        drawing = self.drawing
        if self._seen:
            ids = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = row_V[ids], drawing.params.repetition_penalty
            row_V[ids] = np.where(values < 0, values * penalty, values / penalty)
        if self._answer:
            ids = np.fromiter(self._answer, np.int64, len(self._answer))
            counts = np.fromiter(self._answer.values(), np.float64, len(self._answer))
            row_V[ids] -= (drawing.presence_penalty + drawing.frequency_penalty * counts).astype(row_V.dtype)
        if len(self._bias_ids):
            row_V[self._bias_ids] += self._bias
        if self.made < drawing.min_tokens and len(self._ends):
            row_V[self._ends[self._ends < len(row_V)]] = -np.inf
        if allowed_V is not None:
            row_V[~allowed_V] = -np.inf


class Wish(NamedTuple):
    """One token to draw.

    Args:
        row: of the logits.
        chooser: of the answer.
        allowed_V: tokens that a grammar allows; None = all.
    """

    row: int
    chooser: Chooser
    allowed_V: NDArray[np.bool_] | None = None


def choose(logits_RV: NDArray[np.float32], wishes: Sequence[Wish]) -> list[int | TrimtabError]:
    """Draw a token for each wish; what keeps one from being drawn stands in its place, the others are not affected.

    Args:
        logits_RV: not changed.
        wishes: several may share a row.

    Returns:
        Token ids, `Nothing` where all tokens are forbidden, `TrimtabError` where a row holds NaN or +inf.
    """
    best_R = np.argmax(logits_RV, axis=1) if len(logits_RV) else np.zeros(0, np.int64)
    drawn: list[int | TrimtabError] = []
    for row, chooser, allowed_V in wishes:
        row_V, best = logits_RV[row], int(best_R[row])
        if allowed_V is not None or not chooser.plain:
            row_V = row_V.copy()
            chooser.adjust(row_V, allowed_V)
            best = int(np.argmax(row_V))  # NaN counts as largest
        top = float(row_V[best])
        if top == -math.inf:
            drawn.append(Nothing("Every token is forbidden here, so the answer ends."))
        elif not math.isfinite(top):
            drawn.append(
                TrimtabError(
                    f"The model's logits have {top} as their largest value, so no token can be drawn. Its numbers broke on this "
                    "text: try float32, or look for damaged weights."
                )
            )
        elif chooser.params.temperature == 0:
            drawn.append(best)
        else:
            drawn.append(pick(row_V, chooser.params, chooser.rng.random(), top))
    return drawn


def pick(row_V: NDArray[np.floating], params: SamplingParams, u: float, top: float) -> int:
    """Return the token that `candidates` in its order and `u` in [0, 1) single out.

    Args:
        row_V: logits [V].
        params: with a temperature above 0.
        u: where in the sum of the probabilities that are left.
        top: largest logit, finite.
    """
    ids = None
    if 0 < params.top_k < len(row_V):
        ids = _largest(row_V, params.top_k)
        row_V = row_V[ids]
    if len(row_V) <= _FEW or params.temperature < _COLD:
        found, probabilities = candidates(row_V, params)
        token = _at(found, np.cumsum(probabilities), u)
        return token if ids is None else int(ids[token])
    temperature = params.temperature
    # Single precision for the terms of the many unlikely tokens: it moves a boundary by some 1e-7 of their share.
    total = _core.exp_sum(np.ascontiguousarray(row_V, np.float32), top, 1 / temperature)
    free = params.top_p == 1 and params.min_p == 0
    some, shares = np.zeros(0, np.int64), np.zeros(0)
    for level in _LEVELS:
        some = np.flatnonzero(row_V >= top - level * temperature)
        shares = np.exp((row_V[some].astype(np.float64) - top) / temperature)
        # Without a cut the whole sum counts, with one what is left of it: enough is known once the cut lies inside.
        known = float(shares.sum()) / total
        cut_p = params.top_p < 1 and known > params.top_p * (1 + 1e-6)
        cut_min = params.min_p > 0 and level > -math.log(params.min_p) + 1e-3
        if level == math.inf:
            total = float(shares.sum())
        elif cut_p or cut_min or (free and known > u * (1 + 1e-6)):
            break
    order = np.argsort(-row_V[some], kind="stable")
    some, shares = some[order], shares[order]
    kept = shares / total
    if params.top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(kept) - kept, params.top_p, side="left"))]
    if params.min_p > 0:
        kept = kept[kept >= params.min_p * kept[0]]
    token = _at(some[: len(kept)], np.cumsum(kept), u, 1.0 if free else None)
    return token if ids is None else int(ids[token])


def _largest(row_V: NDArray[np.floating], count: int) -> IntArray:
    """Ids of the `count` largest values, and of those that equal the least of them."""
    # The count-th largest of the maxima of disjoint strips has at least `count` values at or above it: few are left to sort.
    strips = row_V[: len(row_V) // _STRIP * _STRIP].reshape(_STRIP, -1)
    ids: IntArray | None = None
    if strips.shape[1] > count:
        bound = np.partition(strips.max(axis=0), -count)[-count]
        ids = np.flatnonzero(row_V >= bound)
        row_V = row_V[ids]
    least = np.partition(row_V, -count)[-count]
    kept = np.flatnonzero(row_V >= least)
    return kept if ids is None else ids[kept]


def _at(ids: IntArray, sums: NDArray[np.float64], u: float, total: float | None = None) -> int:
    # The last sum is 1 up to rounding, hence the scale; `right` never lands on a token of probability 0.
    place = int(np.searchsorted(sums, u * (sums[-1] if total is None else total), side="right"))
    return int(ids[min(place, len(ids) - 1)])


def normalizers(logits_RV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logarithm of the sum of exponentials of each row [R]: a logit less it is a log-probability, in nats."""
    found = np.empty(len(logits_RV), np.float64)
    for start in range(0, len(logits_RV), _ROWS):
        part = logits_RV[start : start + _ROWS]
        top = part.max(axis=1, keepdims=True)
        found[start : start + _ROWS] = top[:, 0] + np.log(np.exp(part - top).sum(axis=1, dtype=np.float64))
    return found


def likeliest(row_V: NDArray[np.float32], normalizer: float, count: int) -> tuple[tuple[int, float], ...]:
    """(id, log-probability in nats) of the `count` likeliest tokens, best first, equals by id."""
    count = min(count, len(row_V))
    if count == 0:
        return ()
    ids = _largest(row_V, count)
    ids = ids[np.argsort(-row_V[ids], kind="stable")][:count]
    return tuple((int(token), float(row_V[token]) - normalizer) for token in ids)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; -inf of nothing, so that an answer without tokens is the least likely one."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else -math.inf
