"""Statistics of attention scores on text: what they span by layer and head, and the phi that fits them.

Legend: T tokens of a window, N query heads, G KV heads, H head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.runtime.weights.packed import fingerprint
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec

if TYPE_CHECKING:
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


@dataclass(frozen=True)
class Scores:
    """Scores of one layer as the softmax sees them: rotated, scaled, capped.

    Args:
        least, most: of every query head over all pairs that attend, [N].
        row_least, row_most: of every query head, least and largest of the largest scores of its queries, [N].
        rows: largest score of every query, [N, queries].
    """

    least: np.ndarray
    most: np.ndarray
    row_least: np.ndarray
    row_most: np.ndarray
    rows: np.ndarray

    def share_outside(self, phi: float, low: float, high: float) -> float:
        """Share of the queries whose largest score leaves phi + [low, high]."""
        shifted = self.rows - phi
        return float(np.mean((shifted < low) | (shifted > high)))


def score_ranges(spec: ModelSpec, weights: Weights, materials: Materials) -> dict[int, Scores]:
    """Run the calibration windows through the model and gather the scores of every layer."""
    import torch

    from trimtab.model.decoder import Decoder
    from trimtab.runtime.step import Step

    found: dict[int, list[tuple[np.ndarray, ...]]] = {}

    def tap(path: str, value: Any) -> None:
        q_TNH, k_TGH = value
        index = int(path.split(".")[1])
        attn = spec.layers[index].self_attn
        assert isinstance(attn, AttentionSpec)
        found.setdefault(index, []).append(_of_window(attn, q_TNH.float(), k_TGH.float()))

    decoder = Decoder(spec, weights)
    with torch.inference_mode():
        for window in materials.progress("flashdecpp: attention scores", materials.token_windows()):
            step = Step.of([len(window)], [0])
            step.taps = {"self_attn.qk": tap}
            decoder.forward(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
    scores = {}
    for index, parts in found.items():
        least, rows = (list(column) for column in zip(*parts, strict=True))
        joined = np.concatenate(rows, axis=1)
        scores[index] = Scores(np.min(least, axis=0), joined.max(1), joined.min(1), joined.max(1), joined)
    return scores


def _of_window(attn: AttentionSpec, q_TNH: Any, k_TGH: Any) -> tuple[np.ndarray, np.ndarray]:
    """Least score of every head [N], and the largest of every query [N, T]."""
    import torch

    from trimtab.model.attention import visible

    tokens, heads = q_TNH.shape[:2]
    groups = k_TGH.shape[1]
    q_GPTH = q_TNH.transpose(0, 1).reshape(groups, heads // groups * tokens, -1)
    scores = (q_GPTH @ k_TGH.permute(1, 2, 0) * attn.scale).view(heads, tokens, tokens)
    if attn.softcap is not None:
        scores = attn.softcap * torch.tanh(scores / attn.softcap)
    at = torch.arange(tokens)
    seen = visible(at, at, attn.window, attn.cache.heads[0].keep)
    hidden = torch.zeros(tokens, tokens, dtype=torch.bool) if seen is None else ~seen
    least = scores.masked_fill(hidden, float("inf")).amin((1, 2))
    return least.numpy(), scores.masked_fill_(hidden, float("-inf")).amax(2).numpy()


def best_phi(least: float, most: float, low: float, high: float) -> float:
    """The phi that leaves the largest scores of all queries, `least`..`most`, alike room on both sides of the safe range.

    >>> best_phi(-3.0, 17.0, -70.0, 70.0)
    7.0
    """
    return round(((least - low) + (most - high)) / 2, 2)


def phis(scores: Mapping[int, Scores], low: float, high: float) -> tuple[float, ...]:
    """Phi of every layer, in order."""
    return tuple(
        best_phi(float(scores[i].row_least.min()), float(scores[i].row_most.max()), low, high) for i in sorted(scores)
    )


def global_phi(scores: Mapping[int, Scores], low: float, high: float) -> float:
    """One phi for all layers."""
    least = min(float(s.row_least.min()) for s in scores.values())
    most = max(float(s.row_most.max()) for s in scores.values())
    return best_phi(least, most, low, high)


def calibrate(spec: ModelSpec, weights: Weights, materials: Materials, low: float, high: float) -> tuple[float, ...]:
    """Phi of every layer, from the cache of artefacts or measured."""

    def compute() -> list[float]:
        return list(phis(score_ranges(spec, weights, materials), low, high))

    return tuple(materials.cached("flashdecpp-phi", [fingerprint(weights), spec.hash, low, high], compute))
