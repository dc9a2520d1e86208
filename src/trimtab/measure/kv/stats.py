"""Paired statistics over identical prompts: means with bootstrap intervals, whole dialogues drawn at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError

#: Draws of a bootstrap, and the share of them inside an interval.
DRAWS, SHARE = 2000, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its interval.

    Args:
        mean: over all values.
        low, high: bounds of the interval; the mean itself where there is only one dialogue.
    """

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside."""
        return not self.low <= value <= self.high


def bootstrap(dialogues: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Mean of all values with a percentile interval.

    The turns of one dialogue share a context, so they are drawn together: a dialogue is one sample, its turns are not.

    Args:
        dialogues: values of each dialogue's turns.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        SpecError: there is no value.
    """
    groups = [np.asarray(values, np.float64) for values in dialogues if len(values)]
    if not groups:
        raise SpecError("There is nothing to average. Give at least one dialogue with one turn.")
    sums, counts = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    mean = float(sums.sum() / counts.sum())
    if len(groups) == 1:
        return Interval(mean=mean, low=mean, high=mean)
    drawn = np.random.default_rng(seed).integers(0, len(groups), (DRAWS, len(groups)))
    means = sums[drawn].sum(-1) / counts[drawn].sum(-1)
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(mean=mean, low=float(low), high=float(high))


def paired(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Interval:
    """Interval of the difference ours - theirs, value by value over the same prompts.

    Raises:
        SpecError: the two were not made on the same dialogues and turns.
    """
    if [len(values) for values in ours] != [len(values) for values in theirs]:
        raise SpecError("A paired difference needs the same dialogues with the same turns on both sides.")
    return bootstrap([np.subtract(one, other).tolist() for one, other in zip(ours, theirs, strict=True)], seed)
