"""Frequencies of rotary position embeddings, with the scalings of the Hugging Face configs.

Source: Su et al., RoFormer, arXiv 2104.09864; Llama 3.1 (llama3); Peng et al., YaRN, arXiv 2309.00071; LongRoPE,
arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.errors import UnsupportedModelError
from trimtab.spec.leaves import RopeSpec

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """Angles a token turns by per position.

    LongRoPE has two sets of frequencies. A sequence that will not outgrow the original context takes the short one, any
    other the long one, from its first token on: keys of both sets in one cache would not fit each other.

    Args:
        inverse: float32 [dim / 2].
        long: those of longer sequences; None = the same.
        original: tokens up to which `inverse` holds.
        scale: factor on cosine and sine.
    """

    inverse: np.ndarray
    long: np.ndarray | None
    original: int
    scale: float


def frequencies(rope: RopeSpec, max_positions: int) -> Frequencies:
    """Frequencies of a RopeSpec.

    Args:
        rope: what is rotated, and how it is scaled.
        max_positions: context of the model.

    Raises:
        UnsupportedModelError: a scaling that is not known.
    """
    facts: Mapping[str, Any] = dict(rope.scaling)
    kind = str(facts.get("rope_type", "default"))
    inverse = np.float32(1.0) / _powers(rope)
    long, original, scale = None, max_positions, 1.0
    if kind == "linear":
        inverse = inverse / np.float32(facts["factor"])
    elif kind == "llama3":
        inverse = _llama3(inverse, facts)
    elif kind == "yarn":
        inverse, scale = _yarn(rope, inverse, facts, max_positions)
    elif kind == "longrope":
        original = int(facts.get("original_max_position_embeddings") or max_positions)
        inverse, long = (_by_factors(rope, facts, which) for which in ("short_factor", "long_factor"))
        scale = _longrope_scale(facts, original, max_positions)
    elif kind not in ("default", "dynamic"):  # dynamic stretches beyond the context only, where nothing runs
        raise UnsupportedModelError(f"rope scaling '{kind}' is not known. Known: {', '.join(SCALINGS)}.")
    return Frequencies(inverse.astype(np.float32), long, original, scale)


def _powers(rope: RopeSpec) -> np.ndarray:
    return np.float32(rope.theta) ** (np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim))


def _llama3(inverse: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    original = float(facts["original_max_position_embeddings"])
    low, high, factor = float(facts["low_freq_factor"]), float(facts["high_freq_factor"]), float(facts["factor"])
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clip(0, 1)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    return np.where(wavelength > original / low, inverse / factor, blended)


def _yarn(
    rope: RopeSpec, inverse: np.ndarray, facts: Mapping[str, Any], max_positions: int
) -> tuple[np.ndarray, float]:
    factor = float(facts["factor"])
    original = float(facts.get("original_max_position_embeddings") or max_positions)
    fast, slow = float(facts.get("beta_fast") or 32), float(facts.get("beta_slow") or 1)

    def turning(rotations: float) -> float:
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(fast), turning(slow)
    if facts.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)).clip(0, 1)
    scale = facts.get("attention_factor")
    if scale is None:

        def mscale(by: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

        both = facts.get("mscale"), facts.get("mscale_all_dim")
        scale = mscale(float(both[0])) / mscale(float(both[1])) if all(both) else mscale(1.0)  # type: ignore[arg-type]
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)


def _by_factors(rope: RopeSpec, facts: Mapping[str, Any], which: str) -> np.ndarray:
    factors = facts.get(which)
    if factors is None or len(factors) != rope.dim // 2:
        raise UnsupportedModelError(
            f"longrope needs {which} in rope_scaling, one number for each of the {rope.dim // 2} rotated pairs."
        )
    return np.float32(1.0) / (np.asarray(factors, np.float32) * _powers(rope))


def _longrope_scale(facts: Mapping[str, Any], original: int, max_positions: int) -> float:
    scale, spread = facts.get("attention_factor"), float(facts.get("factor") or max_positions / original)
    if scale is None:
        scale = 1.0 if spread <= 1 else math.sqrt(1 + math.log(spread) / math.log(original))
    return float(scale)
