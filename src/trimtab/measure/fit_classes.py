"""Fit the plain constants of op classes to timed ops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.spec.machine import Efficiency


@dataclass(frozen=True, slots=True)
class Sample:
    """One op of one pass: what it would take at full compute, at full bandwidth, its launches, and what it took."""

    key: str
    compute_s: float
    memory_s: float
    launches: float
    time_s: float


def fit_classes(samples: Iterable[Sample]) -> dict[str, Efficiency]:
    """Fit (compute efficiency, bandwidth efficiency, launch) of every class on the relative error of its samples."""
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.key, []).append(sample)
    return {key: _fit(found) for key, found in by_key.items()}


def _fit(samples: Sequence[Sample]) -> Efficiency:
    """Search a grid of three constants, refined twice around the best, for the least squared error of the logarithm.

    Long ops weigh more (by the root of their time): they make up the passes.
    """
    compute, memory, launches, taken = (
        np.array([getattr(s, name) for s in samples]) for name in ("compute_s", "memory_s", "launches", "time_s")
    )
    weight = np.sqrt(taken / taken.sum())
    shares = [np.geomspace(0.005, 2.0, 24), np.geomspace(0.005, 4.0, 24)]
    launch = np.geomspace(1e-7, max(taken.min() * 1.5, 2e-7), 16)
    best = (0.0, 0.0, 0.0)
    for _ in range(3):
        ec, eb = shares[0][:, None, None, None], shares[1][None, :, None, None]
        t0 = launch[None, None, :, None]
        predicted = np.maximum(compute / ec, memory / eb) + launches * t0
        error = (weight * np.log(predicted / taken) ** 2).sum(-1)
        i, j, k = np.unravel_index(int(error.argmin()), error.shape)
        best = float(shares[0][i]), float(shares[1][j]), float(launch[k])
        shares = [np.geomspace(center / 1.3, center * 1.3, 14) for center in best[:2]]
        launch = np.geomspace(best[2] / 1.5, best[2] * 1.5, 12)
    return Efficiency(compute_efficiency=best[0], bandwidth_efficiency=best[1], launch_s=best[2])


def predicted_s(constants: Efficiency, sample: Sample) -> float:
    """Seconds of one op by the constants of its class."""
    busy = max(sample.compute_s / constants.compute_efficiency, sample.memory_s / constants.bandwidth_efficiency)
    return busy + sample.launches * constants.launch_s
