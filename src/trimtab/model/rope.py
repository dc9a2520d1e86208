"""Rotary position embedding in torch; the frequencies are those of `runtime.rope`.

Legend: T tokens, N heads, G KV heads, H head size, R rotated elements of a head.
"""

from __future__ import annotations

import numpy as np
import torch

from trimtab.model.lmul import Times
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
        product: how elements meet them.

    Raises:
        UnsupportedModelError: a scaling that is not known.
    """

    def __init__(self, rope: RopeSpec, max_positions: int) -> None:
        found = frequencies(rope, max_positions)
        self.inverse = torch.from_numpy(found.inverse)
        self.long = None if found.long is None else torch.from_numpy(found.long)
        self.original, self.scale = found.original, found.scale
        self.product = rope.product

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


def rotate(x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, times: Times = torch.mul) -> torch.Tensor:
    """Rotate the first R elements of every head; pairs are (i, i + R / 2). `times` multiplies with cosine and sine."""
    dim = cos_TR.shape[-1]
    turned, rest = x_TNH[..., :dim], x_TNH[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    turned = times(turned, cos_TR[:, None]) + times(swapped, sin_TR[:, None])
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def rotate_ordered(
    x_TNH: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    order_GH: torch.Tensor,
    times: Times = torch.mul,
) -> torch.Tensor:
    """Rotate heads whose elements lie in another order: what `rotate` gives, in that order, to the bit.

    The tables are permuted for every KV head, and the partner of an element is looked up through the order: pairs need not
    lie side by side.

    Args:
        x_TNH: [T, N, H]; the N / G heads of a group share its order.
        cos_TR, sin_TR: in the model's order.
        order_GH: int64; the channel of the model at every place.
        times: multiplies with cosine and sine.
    """
    size, dim = order_GH.shape[-1], cos_TR.shape[-1]
    channel = torch.arange(size)
    partner = torch.where(channel < dim // 2, channel + dim // 2, channel - dim // 2)
    place_GH = order_GH.argsort(-1)  # where each channel lies
    source_GH = place_GH.gather(1, partner[order_GH])
    cos_TH = torch.nn.functional.pad(cos_TR, (0, size - dim), value=1.0)
    sin_TH = torch.nn.functional.pad(sin_TR, (0, size - dim))
    sin_TH = torch.where(channel < dim // 2, -sin_TH, sin_TH)
    groups = len(order_GH)
    x_TGNH = x_TNH.unflatten(1, (groups, -1))
    swapped = x_TGNH.gather(-1, source_GH[None, :, None].expand_as(x_TGNH))
    turned = times(x_TGNH, cos_TH[:, order_GH][:, :, None]) + times(swapped, sin_TH[:, order_GH][:, :, None])
    return turned.flatten(1, 2)
