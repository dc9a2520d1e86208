"""Outliers in the inputs of matrices: which columns hold them, how often, and how large they are.

Legend: T tokens, K columns of an input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from trimtab.errors import CalibrationError
from trimtab.model.calibration import observed
from trimtab.runtime.step import IntArray
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.model import ModelSpec

#: Magnitude from which a value is an outlier. Source: LLM.int8(), section 4.
THRESHOLD = 6.0


class Columns:
    """What the columns of one input hold, window by window.

    Args:
        threshold: of an outlier.

    Attributes:
        peaks: float32 [K] for each window, the largest magnitude.
        hits: int64 [K], positions with an outlier.
        values: float32, all outliers; `places` says in which column.
        count: positions seen.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.threshold, self.count = threshold, 0
        self.peaks: list[np.ndarray] = []
        self.hits = np.zeros(0, np.int64)
        self._values: list[np.ndarray] = []
        self._places: list[np.ndarray] = []

    def add(self, x_TK: torch.Tensor) -> None:
        """Take in one window.

        Raises:
            CalibrationError: a value is not finite.
        """
        x = x_TK.float().numpy()
        size = np.abs(x)
        if not np.isfinite(size).all():
            raise CalibrationError(
                "An input of a matrix is not finite (NaN or infinite): the weights of this model are broken."
            )
        self.peaks.append(size.max(axis=0))
        large = size >= self.threshold
        self.hits = large.sum(axis=0) + (self.hits if self.count else 0)
        self.count += len(x)
        _, places = np.nonzero(large)
        self._values.append(x[large])
        self._places.append(places)

    @property
    def values(self) -> np.ndarray:
        return np.concatenate(self._values)

    @property
    def places(self) -> np.ndarray:
        return np.concatenate(self._places)

    @property
    def columns(self) -> tuple[int, ...]:
        """Those that held an outlier, ascending."""
        return tuple(np.flatnonzero(np.max(self.peaks, axis=0) >= self.threshold).tolist())

    @property
    def mean_columns(self) -> float:
        """Outlier columns of a window, on average."""
        return float(np.mean([(peak >= self.threshold).sum() for peak in self.peaks]))


def columns_of(
    spec: ModelSpec,
    weights: Weights,
    windows: Sequence[IntArray],
    threshold: float = THRESHOLD,
    progress: object = None,
) -> dict[str, Columns]:
    """The inputs of every matrix of the layers, by path, on token windows; matrices with one input share one object."""
    found = observed(spec, weights, windows, lambda path: Columns(threshold), progress)  # type: ignore[arg-type]
    return {path: columns for path, columns in found.items() if isinstance(columns, Columns)}


def smallest_threshold(found: Mapping[str, Columns], outputs: Mapping[str, int], share: float = 0.01) -> float:
    """The smallest threshold that leaves at most `share` of all multiply-adds to outlier columns, to two decimals.

    Args:
        found: inputs by path.
        outputs: rows of the matrix at each path; paths it lacks do not count.
        share: of the multiply-adds of an average window.
    """
    peaks = np.concatenate([np.concatenate(found[path].peaks) for path in outputs])
    work = np.concatenate([np.full(sum(map(len, found[path].peaks)), float(n)) for path, n in outputs.items()])
    order = np.argsort(-peaks)
    done = np.cumsum(work[order])
    allowed = int(np.searchsorted(done, share * done[-1], side="right"))  # as many of the largest may be outliers
    if allowed == len(peaks):
        return 0.01
    return max(0.01, math.floor(float(peaks[order[allowed]]) * 100 + 1) / 100)
