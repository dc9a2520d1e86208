"""Linear layers over packed weights, embeddings and norms.

Legend: T tokens, K inputs, N outputs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.model.lmul import times_of
from trimtab.model.products import rule_of
from trimtab.model.taps import tapped
from trimtab.model.tensors import float_tensor
from trimtab.runtime.numerics import decode
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.product import EXACT


class Linear(nn.Module):
    """``y[T, N] = x[T, K] @ W.T (+ bias)``, or one of several such matrices (experts) chosen by index."""

    def __init__(self, path: str, spec: LinearSpec, weights: Weights, stored: Sequence[str] | None = None) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        names = list(stored) if stored is not None else [path]
        self.names = names if len(names) > 1 else [path]
        self.rules = [rule_of(name, spec, weights) for name in names]
        self.biases = [weights[f"{name}.bias"] if spec.bias else None for name in names]

    @property
    def packed(self) -> list[Packed]:
        """The matrices as they are held."""
        return [rule.packed for rule in self.rules]

    def forward(self, x_TK: torch.Tensor, step: Step, index: int = 0) -> torch.Tensor:
        """Multiply by matrix `index`."""
        rule, bias = self.rules[index], self.biases[index]
        x_TK = tapped(step, "linear", self.names[index], x_TK)
        y_TN = rule(x_TK, self.bias(index, x_TK.dtype))
        if step.record is not None:
            flops, extra = 2 * x_TK.numel() * y_TN.shape[-1], 0 if bias is None else bias.nbytes
            rule.meter(step.record, self.path, flops, extra)
        return y_TN

    def bias(self, index: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias [N] of matrix `index`, or None."""
        stored = self.biases[index]
        return None if stored is None else float_tensor(stored)[0].to(dtype)


class Embedding(nn.Module):
    """Rows of a table, looked up by id; packed tables decode the rows asked for alone."""

    def __init__(self, path: str, spec: EmbeddingSpec, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        self.path, self.spec, self.dtype = path, spec, dtype
        self.packed = weights[path]

    def forward(self, ids_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Return [T, D]."""
        rows = ids_T + self.spec.offset
        if self.packed.format.is_float:
            h_TD = F.embedding(rows, float_tensor(self.packed)).to(self.dtype)
        else:
            h_TD = torch.from_numpy(decode(self.packed, rows.numpy())).to(self.dtype)
        if self.spec.scale != 1.0:
            h_TD = h_TD * torch.tensor(self.spec.scale, dtype=self.dtype)
        if step.record is not None:
            step.record.op(self.path, weight_read=len(rows) * (self.packed.nbytes // self.packed.shape[0]))
        return h_TD


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, in float32 inside."""

    def __init__(self, path: str, spec: NormSpec, weights: Weights) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.packed = weights[path]
        self.bias = weights[f"{path}.bias"] if spec.bias else None
        self.times = times_of(spec.product)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Normalise [..., size]."""
        y = self._layer_norm(x) if self.spec.kind == "layer" else self._rms_norm(x)
        if step.record is not None:
            read = self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)
            step.record.op(self.path, weight_read=read)
        return y

    def _layer_norm(self, x: torch.Tensor) -> torch.Tensor:
        weight = float_tensor(self.packed)[0].to(x.dtype)
        bias = None if self.bias is None else float_tensor(self.bias)[0].to(x.dtype)
        if self.spec.product == EXACT:
            return F.layer_norm(x, (self.spec.size,), weight, bias, self.spec.eps)
        x32 = x.float() - x.float().mean(-1, keepdim=True)
        x32 = self.times(x32, torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.spec.eps))
        y = self.times(x32.to(x.dtype), weight)
        return y if bias is None else y + bias

    def _rms_norm(self, x: torch.Tensor) -> torch.Tensor:
        weight, x32 = float_tensor(self.packed)[0], x.float()
        x32 = self.times(x32, torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.spec.eps))
        if self.spec.unit_offset:  # Gemma multiplies before it rounds, the others after
            return self.times(x32, 1.0 + weight.float()).to(x.dtype)
        return self.times(x32.to(x.dtype), weight.to(x.dtype))
