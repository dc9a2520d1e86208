"""Rotary position embedding, with the scalings of the Hugging Face configs.

Source: Su et al., RoFormer, arXiv 2104.09864; Llama 3.1 (llama3); Peng et al., YaRN, arXiv 2309.00071; LongRoPE,
arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from trimtab.errors import UnsupportedModelError
from trimtab.runtime.step import Step
from trimtab.spec.leaves import RopeSpec

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Rotary:
    """Angles of one RopeSpec.

    LongRoPE has two sets of frequencies. A sequence that will not outgrow the original context takes the short one, any
    other the long one, from its first token on: keys of both sets in one cache would not fit each other.

    Args:
        rope: what is rotated, and how it is scaled.
        max_positions: context of the model.

    Attributes:
        inverse: frequencies [dim / 2] in float32.
        long: those of longer sequences; None = the same.
        original: tokens up to which `inverse` holds.
        scale: factor on cosine and sine.

    Raises:
        UnsupportedModelError: a scaling that is not known.
    """

    def __init__(self, rope: RopeSpec, max_positions: int) -> None:
        facts: Mapping[str, Any] = dict(rope.scaling)
        kind = str(facts.get("rope_type", "default"))
        self.inverse = 1.0 / _powers(rope)
        self.long: torch.Tensor | None = None
        self.original, self.scale = max_positions, 1.0
        if kind == "linear":
            self.inverse = self.inverse / float(facts["factor"])
        elif kind == "llama3":
            self.inverse = _llama3(self.inverse, facts)
        elif kind == "yarn":
            self.inverse, self.scale = _yarn(rope, self.inverse, facts, max_positions)
        elif kind == "longrope":
            self.original = int(facts.get("original_max_position_embeddings") or max_positions)
            self.inverse, self.long = (_by_factors(rope, facts, which) for which in ("short_factor", "long_factor"))
            self.scale = _longrope_scale(facts, self.original, max_positions)
        elif kind not in ("default", "dynamic"):  # dynamic stretches beyond the context only, where nothing runs
            raise UnsupportedModelError(f"rope scaling '{kind}' is not known. Known: {', '.join(SCALINGS)}.")

    def tables(self, step: Step, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine [T, dim] of every new token."""
        inverse = self.inverse if self.long is None else self._chosen(step, self.long)
        angles = torch.from_numpy(step.positions).float()[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def _chosen(self, step: Step, long: torch.Tensor) -> torch.Tensor:
        """Frequencies of every new token [T, dim / 2], by the length its sequence will reach."""
        beyond = torch.from_numpy(np.repeat(step.reaches > self.original, np.diff(step.cu)))
        return torch.where(beyond[:, None], long, self.inverse)


def _powers(rope: RopeSpec) -> torch.Tensor:
    return rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim)


def _llama3(inverse: torch.Tensor, facts: Mapping[str, Any]) -> torch.Tensor:
    original = float(facts["original_max_position_embeddings"])
    low, high, factor = float(facts["low_freq_factor"]), float(facts["high_freq_factor"]), float(facts["factor"])
    wavelength = 2 * math.pi / inverse
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    return torch.where(wavelength > original / low, inverse / factor, blended)


def _yarn(
    rope: RopeSpec, inverse: torch.Tensor, facts: Mapping[str, Any], max_positions: int
) -> tuple[torch.Tensor, float]:
    factor = float(facts["factor"])
    original = float(facts.get("original_max_position_embeddings") or max_positions)
    fast, slow = float(facts.get("beta_fast") or 32), float(facts.get("beta_slow") or 1)

    def turning(rotations: float) -> float:
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = turning(fast), turning(slow)
    if facts.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = ((torch.arange(rope.dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    scale = facts.get("attention_factor")
    if scale is None:

        def mscale(by: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

        both = facts.get("mscale"), facts.get("mscale_all_dim")
        scale = mscale(float(both[0])) / mscale(float(both[1])) if all(both) else mscale(1.0)  # type: ignore[arg-type]
    return inverse / factor * ramp + inverse * (1 - ramp), float(scale)


def _by_factors(rope: RopeSpec, facts: Mapping[str, Any], which: str) -> torch.Tensor:
    factors = facts.get(which)
    if factors is None or len(factors) != rope.dim // 2:
        raise UnsupportedModelError(
            f"longrope needs {which} in rope_scaling, one number for each of the {rope.dim // 2} rotated pairs."
        )
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _powers(rope))


def _longrope_scale(facts: Mapping[str, Any], original: int, max_positions: int) -> float:
    scale, spread = facts.get("attention_factor"), float(facts.get("factor") or max_positions / original)
    if scale is None:
        scale = 1.0 if spread <= 1 else math.sqrt(1 + math.log(spread) / math.log(original))
    return float(scale)


def rotate(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of every head; pairs are (i, i + R / 2)."""
    dim = cos_TR.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = turned * cos_TR[:, None] + swapped * sin_TR[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
