"""Feed-forward blocks: plain, gated, gate-first with skipped rows, mixture of experts.

Legend: T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import UnsupportedModelError
from trimtab.model.linear import Linear, int_rows
from trimtab.model.taps import tapped
from trimtab.model.tensors import float_tensor
from trimtab.runtime.kernels import ACTS, RowMatrix, gate_first
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.nodes import FFNSpec, GateFirst, MoESpec

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

#: Spelling of an activation in the gate-first kernel.
KERNEL_ACTS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an activation by its Hugging Face name.

    Raises:
        UnsupportedModelError: it is not known.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"activation '{name}' is not known. Known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class FFN(nn.Module):
    """One feed-forward block; with `experts` it holds that many sets of matrices, chosen by index."""

    def __init__(self, path: str, spec: FFNSpec, weights: Weights, experts: int | None = None) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        for name in ("gate_proj", "up_proj", "down_proj"):
            node = getattr(spec, name)
            stored = None if experts is None else [f"{path}.{index}.{name}" for index in range(experts)]
            module = None if node is None else Linear(f"{path}.{name}", node, weights, stored)
            self.add_module(name, module)
        self.act = activation(spec.act)
        self.threshold = weights[f"{path}.threshold"] if isinstance(spec.executor, GateFirst) else None

    def forward(self, x_TD: torch.Tensor, step: Step, index: int = 0) -> torch.Tensor:
        """Return [T, D]."""
        if isinstance(self.spec.executor, GateFirst):
            return self._gate_first(x_TD, step, self.spec.executor)
        if self.gate_proj is None:
            hidden = self.up_proj(x_TD, step, index)
            self._act_ran(step)
            return self.down_proj(self.act(hidden), step, index)
        gate = tapped(step, "mlp.gate_pre", self.path, self.gate_proj(x_TD, step, index))
        up = self.up_proj(x_TD, step, index)
        gate = tapped(step, "mlp.gate", self.path, self.act(gate))
        self._act_ran(step)
        return self.down_proj(gate * up, step, index)

    def _act_ran(self, step: Step) -> None:
        if step.record is not None:
            step.record.op(f"{self.path}.act", weight_read=0 if self.threshold is None else self.threshold.nbytes)

    def _gate_first(self, x_TD: torch.Tensor, step: Step, how: GateFirst) -> torch.Tensor:
        """The gate decides which neurons run: rows are skipped for few tokens, zeroed for many."""
        assert self.threshold is not None
        threshold = float(float_tensor(self.threshold)[0, 0])
        if len(x_TD) <= how.max_tokens and not step.taps:
            return self._skip_rows(x_TD, step, threshold)
        gate = self.act(tapped(step, "mlp.gate_pre", self.path, self.gate_proj(x_TD, step)))
        if how.threshold_prefill or len(x_TD) <= how.max_tokens:
            gate = gate * (gate.abs() > threshold)
        gate = tapped(step, "mlp.gate", self.path, gate)
        self._act_ran(step)
        return self.down_proj(gate * self.up_proj(x_TD, step), step)

    def _skip_rows(self, x_TD: torch.Tensor, step: Step, threshold: float) -> torch.Tensor:
        name = KERNEL_ACTS.get(self.spec.act, self.spec.act)
        if name not in ACTS:
            raise UnsupportedModelError(f"rows cannot be skipped after '{self.spec.act}'. Allowed: {', '.join(ACTS)}.")
        gate, up, down_t = (_rows(module.packed[0]) for module in (self.gate_proj, self.up_proj, self.down_proj))
        x = np.ascontiguousarray(x_TD.float().numpy())
        done = gate_first(x, gate, up, down_t, threshold=threshold, act=name, threads=torch.get_num_threads())
        if step.record is not None:
            pairs, (gate_read, up_read, down_read) = int(done.active.sum()), done.bytes_read
            step.record.op(f"{self.path}.gate_proj", flops=2 * x.size * gate.shape[0], weight_read=gate_read)
            self._act_ran(step)
            step.record.op(f"{self.path}.up_proj", flops=2 * pairs * up.shape[1], weight_read=up_read)
            step.record.op(f"{self.path}.down_proj", flops=2 * pairs * down_t.shape[1], weight_read=down_read)
            step.record.observe(f"{self.path}.active_rows", done.rows_touched)
            step.record.observe(f"{self.path}.active_pairs", pairs)
        return torch.from_numpy(done.y).to(x_TD.dtype)


def _rows(packed: Packed) -> RowMatrix:
    """A stored matrix by rows, as the gate-first kernel takes it."""
    if packed.format.kind == "int":
        return int_rows(packed)
    if packed.format.kind in ("fp32", "bf16"):
        return packed.buffers["data"]
    raise UnsupportedModelError(
        f"rows of {packed.format} weights cannot be skipped. Allowed: fp32, bf16, int. Load with dtype float32 or bfloat16."
    )


class MoE(nn.Module):
    """Router, chosen experts one after the other, optional shared expert."""

    def __init__(self, path: str, spec: MoESpec, weights: Weights) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.router = Linear(f"{path}.router", spec.router, weights)
        self.experts = FFN(f"{path}.experts", spec.experts, weights, spec.num_experts)
        self.shared = None if spec.shared is None else FFN(f"{path}.shared", spec.shared, weights)
        gate = spec.shared_gate
        self.shared_gate = None if gate is None else Linear(f"{path}.shared_gate", gate, weights)

    def forward(self, x_TD: torch.Tensor, step: Step) -> torch.Tensor:
        """Return [T, D]."""
        spec = self.spec
        logits_TE = self.router(x_TD, step).float()
        scores_TE = logits_TE.softmax(-1) if spec.scoring == "softmax" else logits_TE.sigmoid()
        weights, chosen = scores_TE.topk(spec.num_experts_per_tok, dim=-1)
        if spec.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * spec.routed_scaling).to(x_TD.dtype)
        out_TD = torch.zeros_like(x_TD)
        touched = chosen.unique().tolist()
        for expert in touched:
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            out_TD.index_add_(0, token, self.experts(x_TD[token], step, expert) * weights[token, slot, None])
        if self.shared_gate is not None and self.shared is not None:
            gate = self.shared_gate(x_TD, step).sigmoid()
            out_TD = out_TD + gate * self.shared(x_TD, step)
        elif self.shared is not None:
            out_TD = out_TD + self.shared(x_TD, step)
        if step.record is not None:
            step.record.observe(f"{self.path}.experts_touched", len(touched))
            step.record.op(f"{self.path}.combine")
        return out_TD
