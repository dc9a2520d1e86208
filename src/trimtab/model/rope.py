"""Rotary position embedding in torch; the frequencies are those of `runtime.rope`."""

from __future__ import annotations

import numpy as np
import torch

from trimtab.runtime.rope import frequencies
from trimtab.runtime.step import Step
from trimtab.spec.leaves import RopeSpec


class Rotary:
    """Angles of one RopeSpec; see `runtime.rope.frequencies`.

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
        found = frequencies(rope, max_positions)
        self.inverse = torch.from_numpy(found.inverse)
        self.long = None if found.long is None else torch.from_numpy(found.long)
        self.original, self.scale = found.original, found.scale

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


def rotate(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """Rotate the first R elements of every head; pairs are (i, i + R / 2)."""
    dim = cos_TR.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = turned * cos_TR[:, None] + swapped * sin_TR[:, None]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
