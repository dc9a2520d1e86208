"""Which experts tokens choose, as expectations: how popular each is, how many are touched, how busy the busiest rank is.

One number tells how uneven the choice is: the chance of the r-th most popular expert falls as r^-skew, 0 = all alike. A token
chooses k different experts, so chances sum to k and none passes 1. Under expert parallelism the experts are dealt to the ranks
by popularity, one to each in turn, as an engine that balances experts places them; a placement that knows nothing of
popularity is busier still.

Source: Yuan et al., LLM Inference Unveiled, arXiv 2402.16363 (distinct experts, most loaded rank).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import SpecError

FloatArray = npt.NDArray[np.float64]

#: Points at which the distribution of the busiest rank is taken; a wider one is taken in coarser steps.
_POINTS = 512


@functools.lru_cache(maxsize=256)
def expert_shares(num_experts: int, topk: int, skew: float = 0.0) -> FloatArray:
    """Chance that a token chooses each expert [E], the most popular first: min(1, c r^-skew), with c such that they sum to k.

    Raises:
        SpecError: more experts per token than there are, or a skew below 0.

    >>> expert_shares(4, 2).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    if not 1 <= topk <= num_experts:
        raise SpecError(f"{topk} of {num_experts} experts per token is not possible. Allowed: 1..{num_experts}.")
    if skew < 0:
        raise SpecError(f"skew={skew} is not possible. Allowed: 0 (all experts alike) or more.")
    if skew == 0:
        return np.full(num_experts, topk / num_experts)
    weight = np.arange(1, num_experts + 1, dtype=float) ** -skew
    rest = np.cumsum(weight[::-1])[::-1]
    for certain in range(topk):  # the most popular experts that every token chooses
        scale = (topk - certain) / rest[certain]
        if scale * weight[certain] <= 1:
            break
    else:
        certain, scale = topk, 0.0
    return np.where(np.arange(num_experts) < certain, 1.0, scale * weight)


def distinct_experts(num_experts: int, topk: int, tokens: Any, ranks: int = 1, skew: float = 0.0) -> Any:
    """Expected experts that at least one of `tokens` tokens chooses: U = sum (1 - (1 - p_e)^T), over those of the busiest rank.

    Args:
        num_experts, topk: experts in all, and per token.
        tokens: of all ranks; a number or an array.
        ranks: ranks the experts are dealt to.
        skew: how unevenly they are chosen.
    """
    seen = np.asarray(tokens, float)
    if skew == 0:
        return num_experts / ranks * (1 - (1 - topk / num_experts) ** seen)
    shares = expert_shares(num_experts, topk, skew)[::ranks]
    return (1 - (1 - shares) ** seen[..., None]).sum(-1)[()]


def busiest_rank(num_experts: int, topk: int, tokens: Any, ranks: int, skew: float = 0.0) -> Any:
    """Expected (token, expert) pairs of the rank that has most of them.

    Pairs of a rank are a sum of many rarely correlated choices: of mean T sum p and variance T sum p (1 - p) E / (E - 1) over
    its experts (sampling without replacement), taken as a scaled Poisson variable of that mean and variance. The ranks are
    taken as independent with the variance they have before the total is fixed at T k: to fix it moves all of them alike, and
    their maximum not at all in the mean. Then E[max] = sum over x of P(max > x).

    Args:
        num_experts, topk: experts in all, and per token.
        tokens: of all ranks; a number or an array.
        ranks: ranks the experts are dealt to.
        skew: how unevenly they are chosen.

    Raises:
        SpecError: ranks that do not divide the experts.

    Returns:
        A float or an array of floats, at least the even share in whole pairs.
    """
    if ranks < 1 or num_experts % ranks:
        raise SpecError(f"{ranks} ranks do not divide {num_experts} experts. Allowed: a divisor of {num_experts}.")
    seen = np.asarray(tokens, float)
    if ranks == 1:
        return topk * seen
    found = [_busiest(num_experts, topk, float(count), ranks, skew) for count in seen.ravel()]
    return np.maximum(np.reshape(found, seen.shape), np.ceil(seen * topk / ranks - 1e-9))[()]


@functools.lru_cache(maxsize=4096)
def _busiest(num_experts: int, topk: int, tokens: float, ranks: int, skew: float) -> float:
    shares = expert_shares(num_experts, topk, skew).reshape(-1, ranks)
    unique, times = np.unique(shares, axis=1, return_counts=True)  # ranks whose experts are equally popular
    mean = unique.sum(0)
    variance = (unique * (1 - unique)).sum(0) * num_experts / max(num_experts - 1, 1)
    return _expected_maximum(tokens * mean, tokens * variance, times)


def _expected_maximum(mean: FloatArray, variance: FloatArray, times: npt.NDArray[np.intp]) -> float:
    """E[max] of independent counts, `times` of each kind: sum over x >= 0 of 1 - product of P(count <= x)."""
    spread = np.sqrt(variance)
    start = max(float(np.floor((mean - 8 * spread).max())), 0.0)
    end = float(np.ceil((mean + 8 * spread).max())) + 2
    step = max((end - start) / _POINTS, 1.0)
    at = np.asarray(start + step * (np.arange(int(np.ceil((end - start) / step))) + 0.5) - 0.5, np.float64)
    below = _scaled_poisson(at[:, None], mean, np.maximum(variance, 1e-9 * mean + 1e-12))
    return start + step * float((1 - (below**times).prod(1)).sum())


def _scaled_poisson(x: FloatArray, mean: FloatArray, variance: FloatArray) -> FloatArray:
    """P(count <= x) of a Poisson variable scaled to that mean and variance, by Wilson and Hilferty's cube root.

    Source: Wilson and Hilferty, The Distribution of Chi-Square, PNAS 17 (1931).
    """
    scale = variance / np.maximum(mean, 1e-12)
    shape = np.maximum((x + 0.5) / scale + 0.5, 1e-9)  # half a step for the lattice at either end
    return _normal(3 * np.sqrt(shape) * (1 - 1 / (9 * shape) - np.cbrt(mean / scale / shape)))


def _normal(z: FloatArray) -> FloatArray:
    """Standard normal distribution function, to 8e-8. Source: Abramowitz and Stegun, 26.2.17."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi) * series
    return np.where(z > 0, 1 - tail, tail)
