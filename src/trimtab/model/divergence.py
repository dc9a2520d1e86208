"""KL divergence between the outputs of two models."""

from __future__ import annotations

import torch

#: Rows of logits compared at once: a full window over a large vocabulary would hold gigabytes in float64.
_ROWS = 128


def kl_divergence(p_log: torch.Tensor, q_log: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities over the last axis; summed in float64."""
    return (p_log.exp() * (p_log - q_log)).sum(-1, dtype=torch.float64).clamp_min(0)


def kl_nats(base_TV: torch.Tensor, variant_TV: torch.Tensor) -> float:
    """Mean KL(base || variant) in nats of logits [T, V]."""
    total = 0.0
    for start in range(0, len(base_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        p, q = (logits[rows].float().log_softmax(-1) for logits in (base_TV, variant_TV))
        total += float(kl_divergence(p, q).sum())
    return total / len(base_TV)
