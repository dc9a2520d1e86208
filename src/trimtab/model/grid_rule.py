"""The rule of the sweep that rounds columns to the tables of a grid (`spec.grids`).

Legend: N outputs, K inputs of a matrix, g columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trimtab.runtime.numerics.grids import buffers_of, grid_scales, nearest_codes_of
from trimtab.spec.grids import GridFormat


class GridRule:
    """Round to the tables of a grid whose scales are fixed where the sweep reaches the group.

    Args:
        format: by rows.
        shape: (N, K).
        order: int64 [K], columns in the order of the sweep; groups stand together.
        shares: of the full range, tried as scales.
    """

    def __init__(self, format: GridFormat, shape: Sequence[int], order: torch.Tensor, shares: Sequence[float]) -> None:
        rows, cols = shape
        self.format, self.group, self.order, self.shares = format, format.group, order.tolist(), shares
        self.codes = np.empty((rows, cols), np.uint8)
        groups = (rows, cols // self.group)
        self.scale, self.choice = np.empty(groups, np.float32), np.empty(groups, np.uint8)
        self.tables = np.array(format.tables, np.float32)

    def start(self, j: int, w_Ng: torch.Tensor, cost_g: torch.Tensor) -> None:
        cost = (cost_g / cost_g.mean().clamp_min(1e-30)).numpy()
        w = np.ascontiguousarray(w_Ng.numpy())
        self._scale, self._choice = grid_scales(w, self.format, cost, self.shares)
        index = self.order[j] // self.group
        self.scale[:, index], self.choice[:, index] = self._scale[:, 0], self._choice[:, 0]

    def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
        w = np.ascontiguousarray(w_N.numpy())[:, None]
        codes = nearest_codes_of(w, self._scale, self._choice, self.format)
        self.codes[:, self.order[j]] = codes[:, 0]
        return torch.from_numpy(self.tables[self._choice[:, 0], codes[:, 0]] * self._scale[:, 0])

    def buffers(self) -> dict[str, np.ndarray]:
        """The matrix as the format stores it."""
        return buffers_of(self.codes, self.scale, self.choice, self.format)
