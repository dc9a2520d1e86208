"""Rules of the sweep that round columns to the grid of a format, and the search for the scales of a group.

Legend: N outputs, K inputs of a matrix, G groups of a row, g columns of a group, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.runtime.numerics.grid import packed_grid
from trimtab.runtime.numerics.grids import encode_grid_with, grid_scales
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import WeightFormat
from trimtab.spec.grids import GridFormat

#: Shares of the range that a group's scale may span; the one with the smallest error is taken.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)

#: Weights whose scales are searched for at a time.
_CHUNK = 1 << 17


def fit_scales(
    w_Ng: torch.Tensor, cost_g: torch.Tensor, format: WeightFormat, shares: tuple[float, ...] = SHARES
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and minimum of one group of every row, both of fp16 precision, float32 [N, 1].

    For every share of the range, codes are rounded for the scale it gives, the scale (and minimum) that fits these codes best in
    the weighted squares is taken, and what it leaves is compared. One share of 1 is plain rounding to nearest.

    Args:
        w_Ng: weights of the group.
        cost_g: what a squared error in each column costs, [g] or [N, g].
        format: ``int``.
        shares: see above.

    Raises:
        SpecError: a weight that is not finite, or beyond what an fp16 scale can express.
    """
    levels, half = 2**format.bits, 2 ** (format.bits - 1)
    low, high = w_Ng.amin(1), w_Ng.amax(1)
    if not torch.isfinite(low + high).all():
        raise SpecError(f"{format}: a weight is not finite. The weights of this model are broken.")
    share_C = torch.tensor(shares)
    if format.sym:
        extreme = torch.where(-low >= high, low, high)
        scale, minimum = (extreme / -half)[None] * share_C[:, None], None
    else:
        middle, reach = (low + high) / 2, (high - low) / 2
        scale = 2 * reach[None] * share_C[:, None] / (levels - 1)
        minimum = middle[None] - reach[None] * share_C[:, None]
    if len(shares) == 1:
        scale, minimum = _half(scale[0], format), None if minimum is None else _half(minimum[0], format)
        return scale[:, None], None if minimum is None else minimum[:, None]
    w = w_Ng[None]
    codes = _codes(w, scale[..., None], None if minimum is None else minimum[..., None], format)
    value = codes - half if minimum is None else codes
    cost = cost_g / cost_g.mean(-1, keepdim=True).clamp_min(1e-30)
    weighted = value * cost
    square = (weighted * value).sum(-1)
    cross = (weighted * w).sum(-1)
    if minimum is None:
        fitted = torch.where(square > 0, cross / square.clamp_min(1e-30), scale)
        scale = _half(torch.stack((scale, fitted)).flatten(0, 1), format)
    else:
        total, first, target = cost.sum(-1), weighted.sum(-1), (cost * w).sum(-1)
        determinant = square * total - first.square()
        flat = determinant <= 1e-6 * square * total
        determinant = determinant.masked_fill(flat, 1.0)
        fitted = torch.where(flat, scale, (cross * total - first * target) / determinant)
        lowest = torch.where(flat, minimum, (square * target - first * cross) / determinant)
        scale = _half(torch.stack((scale, fitted)).flatten(0, 1), format)
        minimum = _half(torch.stack((minimum, lowest)).flatten(0, 1), format)
    codes = _codes(w, scale[..., None], None if minimum is None else minimum[..., None], format)
    if minimum is None:
        left = (codes - half) * scale[..., None] - w
    else:
        left = codes * scale[..., None] + minimum[..., None] - w
    best = (left.square() * cost).sum(-1).argmin(0, keepdim=True)
    return scale.gather(0, best)[0][:, None], None if minimum is None else minimum.gather(0, best)[0][:, None]


def _half(values: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    rounded = values.half().float()
    if not torch.isfinite(rounded).all():
        raise SpecError(
            f"{format}: a group of weights is beyond what an fp16 scale can express. Keep this matrix in floats."
        )
    return rounded


def _codes(w: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, format: WeightFormat) -> torch.Tensor:
    """Nearest codes as floats; a scale of 0 gives the code of 0 (symmetric) or of the minimum."""
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    if minimum is None:
        return ((w * inverse).round() + 2 ** (format.bits - 1)).clamp(0, 2**format.bits - 1)
    return ((w - minimum) * inverse).round().clamp(0, 2**format.bits - 1)


class IntRule:
    """Round to a group-wise integer grid whose scales are fixed where the sweep reaches the group.

    Args:
        format: ``int``, by rows.
        shape: (N, K).
        order: int64 [K], columns in the order of the sweep; groups stand together.
        shares: see `fit_scales`.
    """

    def __init__(
        self, format: WeightFormat, shape: Sequence[int], order: torch.Tensor, shares: tuple[float, ...] = SHARES
    ) -> None:
        rows, cols = shape
        self.format, self.group, self.order, self.shares = format, format.group, order.tolist(), shares
        self.codes = np.empty((rows, cols), np.uint8)
        groups = (rows, cols // format.group)
        self.scale, self.minimum = np.empty(groups, np.float16), np.empty(groups, np.float16)

    def start(self, j: int, w_Ng: torch.Tensor, cost_g: torch.Tensor) -> None:
        self._scale, self._minimum = fit_scales(w_Ng, cost_g, self.format, self.shares)
        index = self.order[j] // self.group
        self.scale[:, index] = self._scale[:, 0].numpy()
        if self._minimum is not None:
            self.minimum[:, index] = self._minimum[:, 0].numpy()

    def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
        codes = _codes(w_N[:, None], self._scale, self._minimum, self.format)
        self.codes[:, self.order[j]] = codes[:, 0].numpy()
        if self._minimum is None:
            return ((codes - 2 ** (self.format.bits - 1)) * self._scale)[:, 0]
        return (codes * self._scale + self._minimum)[:, 0]

    def packed(self) -> Packed:
        """The matrix as codes and scales."""
        return packed_grid(self.codes, self.scale, None if self.format.sym else self.minimum, self.format)


def rounded(
    w_NK: torch.Tensor, format: WeightFormat, cost_K: torch.Tensor | None = None, shares: tuple[float, ...] = SHARES
) -> Packed:
    """Round a matrix to the nearest points of a grid whose scales are searched for, without a sweep.

    Args:
        w_NK: float32 [N, K].
        format: ``int`` or ``grid``, by rows.
        cost_K: what a squared error in each column costs; None = all alike.
        shares: see `fit_scales`.
    """
    rows, cols = w_NK.shape
    if isinstance(format, GridFormat):
        cost = None if cost_K is None else (cost_K / cost_K.mean().clamp_min(1e-30)).numpy()
        scale, choice = grid_scales(w_NK.numpy(), format, cost, shares)
        return Packed(format, (rows, cols), encode_grid_with(w_NK.numpy(), format, scale, choice))
    groups = cols // format.group
    w = w_NK.reshape(rows * groups, format.group)
    cost = torch.ones(1, cols) if cost_K is None else cost_K[None]
    cost = cost.expand(rows, cols).reshape(rows * groups, format.group)
    codes = np.empty((len(w), format.group), np.uint8)
    scales = {name: np.empty(len(w), np.float16) for name in ("scale", "minimum")}
    step = max(1, _CHUNK // format.group)
    for first in range(0, len(w), step):
        part = slice(first, first + step)
        scale, minimum = fit_scales(w[part], cost[part], format, shares)
        codes[part] = _codes(w[part], scale, minimum, format).numpy()
        scales["scale"][part] = scale[:, 0].numpy()
        if minimum is not None:
            scales["minimum"][part] = minimum[:, 0].numpy()
    low = None if format.sym else scales["minimum"].reshape(rows, groups)
    return packed_grid(codes.reshape(rows, cols), scales["scale"].reshape(rows, groups), low, format)
