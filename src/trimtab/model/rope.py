"""Rotary position embedding, with the scalings of the Hugging Face configs.

Source: Su et al., RoFormer, arXiv 2104.09864; Llama 3.1 (llama3); Peng et al., YaRN, arXiv 2309.00071; LongRoPE,
arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trimtab.errors import UnsupportedModelError
from trimtab.spec.nodes import RopeSpec

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope", "su")


def frequencies(rope: RopeSpec, max_positions: int) -> tuple[torch.Tensor, float]:
    """Return (inverse frequencies [dim / 2] in float32, factor on cos and sin).

    Raises:
        UnsupportedModelError: a scaling that is not known.
    """
    facts: Mapping[str, Any] = dict(rope.scaling)
    kind = str(facts.get("rope_type") or facts.get("type") or "default")
    inverse = 1.0 / (rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim))
    if kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / float(facts["factor"]), 1.0
    if kind == "llama3":
        return _llama3(inverse, facts), 1.0
    if kind == "yarn":
        return _yarn(rope, inverse, facts, max_positions)
    if kind in ("longrope", "su"):
        return _longrope(rope, facts, max_positions)
    raise UnsupportedModelError(f"rope scaling '{kind}' is not known. Known: {', '.join(SCALINGS)}.")


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


def _longrope(rope: RopeSpec, facts: Mapping[str, Any], max_positions: int) -> tuple[torch.Tensor, float]:
    original = float(facts.get("original_max_position_embeddings") or max_positions)
    long = max_positions > original
    factors = facts.get("long_factor" if long else "short_factor")
    if factors is None:
        raise UnsupportedModelError("longrope needs long_factor and short_factor in rope_scaling.")
    spread = float(facts.get("factor") or max_positions / original)
    scale = facts.get("attention_factor")
    if scale is None:
        scale = 1.0 if spread <= 1 else math.sqrt(1 + math.log(spread) / math.log(original))
    power = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim)
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * power), float(scale)


def rotate(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of every head; pairs are (i, i + R / 2)."""
    dim = cos_TR.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = turned * cos_TR[:, None] + swapped * sin_TR[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
