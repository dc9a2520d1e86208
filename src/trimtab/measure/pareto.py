"""The Pareto front over several metrics: who is dominated, and by whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.errors import SpecError, unknown

#: Which direction is better; ``none`` marks a metric that no front can be drawn over.
Sense = Literal["min", "max", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Who is dominated.

    Args:
        mask: True for rows on the Pareto front.
        by: for each dominated row, the first row of the front that dominates it; None for the others.
        incomplete: rows with a missing metric: not on the front, and they dominate nobody, since nobody can tell.
    """

    mask: npt.NDArray[np.bool_]
    by: tuple[int | None, ...]
    incomplete: tuple[int, ...] = ()


def pareto(points: Sequence[Sequence[float | None]], senses: Sequence[Sense]) -> Front:
    """Mark the rows no other row is at least as good as in everything and better than in something.

    Args:
        points: [rows][metrics]; None and NaN are missing.
        senses: ``min`` or ``max`` of each metric, two or more.

    Returns:
        The front. Equal rows do not dominate each other. A row with a missing metric is incomplete.

    Raises:
        SpecError: fewer than two metrics, an unknown sense, or rows of another length.

    >>> pareto([(1, 9), (2, 5), (2, 9), (None, 1)], ["min", "max"]).by
    (None, 0, 0, None)
    """
    if len(senses) < 2:
        raise SpecError(f"A front needs two metrics or more; {len(senses)} given.")
    wrong = [sense for sense in senses if sense not in ("min", "max")]
    if wrong:
        raise unknown("sense", str(wrong[0]), ("min", "max"))
    if any(len(row) != len(senses) for row in points):
        raise SpecError(f"Every row must hold {len(senses)} metrics, one for each sense.")
    table = np.array([[np.nan if v is None else float(v) for v in row] for row in points], dtype=np.float64)
    cost = table.reshape(len(points), len(senses)) * [1.0 if sense == "min" else -1.0 for sense in senses]
    whole = np.logical_not(np.isnan(cost).any(axis=1))
    mask = np.array(whole)
    for row in np.flatnonzero(whole):
        others = cost[whole]
        mask[row] = not ((others <= cost[row]).all(axis=1) & (others < cost[row]).any(axis=1)).any()
    front = np.flatnonzero(mask)
    by: list[int | None] = [None] * len(points)
    for row in np.flatnonzero(whole & ~mask):
        over = (cost[front] <= cost[row]).all(axis=1) & (cost[front] < cost[row]).any(axis=1)
        by[row] = int(front[np.flatnonzero(over)[0]])
    return Front(mask=mask, by=tuple(by), incomplete=tuple(int(row) for row in np.flatnonzero(~whole)))
