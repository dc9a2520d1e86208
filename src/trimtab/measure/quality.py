"""What a change costs in quality: perplexity, KL divergence and agreement against the unmodified model, paired by token.

KL comes first: it compares whole distributions at every position, so a few thousand tokens tell what perplexity needs
many more for.

Legend: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.errors import CalibrationError
from trimtab.model.divergence import kl_divergence, kl_nats
from trimtab.runtime.step import IntArray, Step
from trimtab.spec.report import Figure

if TYPE_CHECKING:
    from trimtab.model.variant import Variant

__all__ = ["Quality", "TokenScores", "evaluate_text", "kl_divergence", "kl_nats", "standard_error", "windows"]

#: Rows of logits compared at once: a full window over a large vocabulary would hold gigabytes in float64.
ROWS = 128


@dataclass(slots=True)
class TokenScores:
    """Scores of single tokens, gathered over windows.

    Args:
        nll, nll_base: negative log-likelihood in nats of the true next token, of the variant and of the base.
        kl: KL(base || variant) in nats at each position.
        agree: 1 where both would choose the same token.
    """

    nll: list[float] = field(default_factory=list)
    nll_base: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)

    def add(self, base_TV: torch.Tensor, variant_TV: torch.Tensor, next_T: torch.Tensor) -> None:
        """Score positions whose next token is known.

        Args:
            base_TV, variant_TV: logits after each position.
            next_T: the token that follows each position.
        """
        for start in range(0, len(next_T), ROWS):
            rows = slice(start, start + ROWS)
            p = base_TV[rows].float().log_softmax(-1)
            q = variant_TV[rows].float().log_softmax(-1)
            at = next_T[rows, None]
            self.nll_base += (-p.gather(-1, at)[:, 0]).tolist()
            self.nll += (-q.gather(-1, at)[:, 0]).tolist()
            self.kl += kl_divergence(p, q).tolist()
            self.agree += (p.argmax(-1) == q.argmax(-1)).float().tolist()

    def result(self) -> Quality:
        """Means with standard errors; differences are paired by token.

        Raises:
            CalibrationError: nothing was scored.
        """
        if not self.kl:
            raise CalibrationError("No token was scored. Give a text longer than one window.")
        nll, base = np.array(self.nll), np.array(self.nll_base)
        return Quality(
            tokens=len(nll),
            ppl=math.exp(nll.mean()),
            ppl_base=math.exp(base.mean()),
            nll_difference=float((nll - base).mean()),
            nll_difference_se=standard_error(nll - base),
            kl_nats=float(np.mean(self.kl)),
            kl_se=standard_error(np.array(self.kl)),
            top1_agreement=float(np.mean(self.agree)),
            top1_se=standard_error(np.array(self.agree)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Quality of a variant on a text.

    Args:
        tokens: positions scored.
        ppl, ppl_base: perplexity of variant and base.
        nll_difference, nll_difference_se: mean over tokens of their difference in nats, and its standard error.
        kl_nats, kl_se: mean KL(base || variant), and its standard error.
        top1_agreement, top1_se: share of positions where both would choose the same token.
    """

    tokens: int
    ppl: float
    ppl_base: float
    nll_difference: float
    nll_difference_se: float
    kl_nats: float
    kl_se: float
    top1_agreement: float
    top1_se: float

    def figures(self, check: str = "") -> dict[str, Figure]:
        """As figures of a report; the band is one standard error to each side."""

        def figure(value: float, error: float, unit: str) -> Figure:
            why = f"{self.tokens} tokens, standard error {error:.4g}"
            return Figure(
                value=value, p10=value - error, p90=value + error, unit=unit, kind="measured", check=check, why=why
            )

        spread = self.ppl * self.nll_difference_se
        return {
            "kl_nats": figure(self.kl_nats, self.kl_se, "nats"),
            "ppl": figure(self.ppl, spread, ""),
            "ppl_base": figure(self.ppl_base, 0.0, ""),
            "top1_agreement": figure(self.top1_agreement, self.top1_se, ""),
        }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def windows(ids: Sequence[int] | IntArray, size: int, most: int | None = None) -> list[IntArray]:
    """Cut token ids into windows of `size` without overlap; of more than `most`, evenly spread ones are taken.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    array = np.asarray(ids, dtype=np.int64)
    count = len(array) // size
    if count == 0:
        raise CalibrationError(
            f"The text has {len(array)} tokens, a window has {size}. Give a longer text or a smaller window."
        )
    pieces = array[: count * size].reshape(count, size)
    if most is not None and most < count:
        pieces = pieces[np.linspace(0, count - 1, most).round().astype(int)]
    return list(pieces)


def evaluate_text(
    base: Variant, variant: Variant, pieces: Iterable[IntArray], scores: TokenScores | None = None
) -> Quality:
    """Score whole windows: no overlap, no BOS, the first token of a window is not scored.

    Every token attends as the variant attends, without a cache.

    Args:
        base: the unmodified model.
        variant: the one under test.
        pieces: windows of token ids.
        scores: where to gather; a new one by default.
    """
    scores = scores or TokenScores()
    for piece in pieces:
        step, wanted = Step.of([len(piece)], [0]), np.arange(len(piece) - 1, dtype=np.int64)
        ids = torch.from_numpy(piece)
        found = [one.decoder(ids, step, None, wanted) for one in (base, variant)]
        scores.add(found[0], found[1], ids[1:])
    return scores.result()
