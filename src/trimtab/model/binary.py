"""Rules of the sweep that code columns as sums of signs times powers of two.

Scales are shared along the outputs, so a column (or eight) is coded when the sweep reaches it, with all errors before it made up
for: what a row-wise group cannot do, whose scales are fixed before its later columns are known.

Legend: N outputs, K inputs of a matrix, q bits.
Source: You et al., ShiftAddLLM, arXiv 2406.05981, section 4.2.
"""

from __future__ import annotations

import numpy as np
import torch

from trimtab.runtime.numerics.bcq import binary_scales, levels_of, pack_signs, scales_of, terms_of
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.bcq import BcqFormat


class BinaryRule:
    """Scales of one column (``acc``) or eight (``lat``) are found where the sweep reaches them; then signs column by column.

    Args:
        format: of the result.
        shape: (N, K).
        order: int64 [K], columns in the order of the sweep; the columns that share scales stand together.
        rounds: of refitting, see `bcq`.
        nearest: signs of the nearest level; False: greedily.
    """

    def __init__(
        self, format: BcqFormat, shape: tuple[int, int], order: torch.Tensor, rounds: int = 50, nearest: bool = True
    ) -> None:
        self.format, self.order, self.rounds, self.nearest = format, order.tolist(), rounds, nearest
        self.rows, cols = shape
        self.group, self.step = format.scale_cols, format.scale_rows(shape[0])
        self.signs = np.empty((self.rows, cols, format.bits), bool)
        self.scales = np.zeros(format.buffers(*shape)[1].shape, np.uint8)

    def start(self, j: int, w_Ng: torch.Tensor, cost_g: torch.Tensor) -> None:
        w, cost = w_Ng.numpy(), (cost_g / cost_g.mean()).numpy()
        whole = self.rows // self.step * self.step
        parts = [w[:whole].reshape(-1, self.step * self.group)] if whole else []
        if whole < self.rows:
            parts.append(w[whole:].reshape(1, -1))
        codes = []
        for part in parts:
            costs = np.broadcast_to(cost, (part.shape[1] // self.group, self.group)).reshape(1, -1)
            scales = binary_scales(
                part, self.format.bits, self.format.apot, self.rounds,
                nearest=self.nearest, cost_Rg=np.broadcast_to(costs, part.shape), threads=torch.get_num_threads(),
            )  # fmt: skip
            codes.append(terms_of(scales, self.format.apot)[0])
        found = np.concatenate(codes)
        self.scales[:, self.order[j] // self.group] = found
        by_block = scales_of(found)
        self._scales = np.repeat(by_block, self.step, 0)[: self.rows]
        levels, patterns = levels_of(by_block)
        self._patterns = np.repeat(patterns, self.step, 0)[: self.rows]
        levels = np.repeat(levels, self.step, 0)[: self.rows]
        self._levels = levels
        self._middle = (levels[:, 1:] + levels[:, :-1]) / 2

    def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
        w = w_N.numpy()
        if self.nearest:
            index = (w[:, None] > self._middle).sum(1)[:, None]
            self.signs[:, self.order[j]] = np.take_along_axis(self._patterns, index[..., None], 1)[:, 0]
            return torch.from_numpy(np.take_along_axis(self._levels, index, 1)[:, 0])
        rest = w.copy()
        for i in range(self.format.bits):
            self.signs[:, self.order[j], i] = rest >= 0
            rest -= np.where(rest >= 0, 1, -1) * self._scales[:, i]
        return torch.from_numpy(w - rest)

    def packed(self) -> Packed:
        """The matrix as planes of signs and scales."""
        shape = self.signs.shape[:2]
        return Packed(self.format, (shape[0], shape[1]), {"signs": pack_signs(self.signs), "scales": self.scales})
