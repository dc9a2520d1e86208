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
from trimtab.model.linear import Linear
from trimtab.model.lmul import times_of
from trimtab.model.products import int_rows
from trimtab.model.taps import tapped
from trimtab.model.tensors import float_tensor
from trimtab.runtime.kernels import ACTS, RowMatrix, gate_first
from trimtab.runtime.numerics import decode
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.leaves import LinearSpec
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
    "swiglu_oai": lambda x: (x := x.clamp(max=7.0)) * torch.sigmoid(1.702 * x),
}

#: What up becomes before the gate meets it; nothing for most activations. gpt-oss clamps it and adds one.
UPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"swiglu_oai": lambda up: up.clamp(-7.0, 7.0) + 1.0}

#: Spelling of an activation in the gate-first kernel.
KERNEL_ACTS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

#: Formats the gate-first kernel reads.
ROW_KINDS = ("fp32", "bf16", "int")


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

        def linear(name: str, node: LinearSpec) -> Linear:
            stored = None if experts is None else [f"{path}.{index}.{name}" for index in range(experts)]
            return Linear(f"{path}.{name}", node, weights, stored)

        self.gate_proj = None if spec.gate_proj is None else linear("gate_proj", spec.gate_proj)
        self.up_proj = linear("up_proj", spec.up_proj)
        self.down_proj = linear("down_proj", spec.down_proj)
        self.act, self.up = activation(spec.act), UPS.get(spec.act)
        self.times = times_of(spec.product)
        self.threshold = weights[f"{path}.threshold"] if isinstance(spec.executor, GateFirst) else None
        if self.threshold is not None and self.up is not None:
            raise UnsupportedModelError(f"{path}: gate-first is not built for '{spec.act}', which changes up as well.")
        if self.threshold is not None and (spec.up_proj.layout, spec.down_proj.layout) != ("row", "transposed"):
            raise UnsupportedModelError(
                f"{path}: gate-first wants up_proj stored by row and down_proj transposed, so that a neuron is one row of each."
            )

    def forward(self, x_TD: torch.Tensor, step: Step, index: int = 0) -> torch.Tensor:
        """Return [T, D]."""
        if self.gate_proj is None:
            hidden = self.act(self.up_proj(x_TD, step, index))
            self._act_ran(step)
            return self.down_proj(hidden, step, index)
        if isinstance(self.spec.executor, GateFirst):
            return self._gate_first(x_TD, self.gate_proj, step, self.spec.executor)
        gate = tapped(step, "mlp.gate_pre", self.path, self.gate_proj(x_TD, step, index))
        up = self.up_proj(x_TD, step, index)
        gate = tapped(step, "mlp.gate", self.path, self.act(gate))
        hidden = self.times(gate, self.up(up) if self.up else up)
        self._act_ran(step)
        return self.down_proj(hidden, step, index)

    def _act_ran(self, step: Step) -> None:
        if step.record is not None:
            step.record.op(f"{self.path}.act", weight_read=0 if self.threshold is None else self.threshold.nbytes)

    def _gate_first(self, x_TD: torch.Tensor, gate_proj: Linear, step: Step, how: GateFirst) -> torch.Tensor:
        """The gate decides which neurons run: rows are skipped for few tokens, zeroed for many.

        A neuron runs if ``|act(gate)| > threshold``: one exactly at the threshold, such as 0 at threshold 0, does not.
        """
        assert self.threshold is not None
        threshold = float(float_tensor(self.threshold)[0, 0])
        if len(x_TD) <= how.max_tokens and not step.taps:
            return self._skip_rows(x_TD, gate_proj, step, threshold)
        gate = self.act(tapped(step, "mlp.gate_pre", self.path, gate_proj(x_TD, step)))
        if how.threshold_prefill or len(x_TD) <= how.max_tokens:
            gate = gate * (gate.abs() > threshold)
        gate = tapped(step, "mlp.gate", self.path, gate)
        self._act_ran(step)
        return self.down_proj(gate * self.up_proj(x_TD, step), step)

    def _skip_rows(self, x_TD: torch.Tensor, gate_proj: Linear, step: Step, threshold: float) -> torch.Tensor:
        """Read the rows of up and down that some token needs, in the kernel if it takes this block."""
        act = KERNEL_ACTS.get(self.spec.act, self.spec.act)
        linears = (gate_proj, self.up_proj, self.down_proj)
        packed = [module.packed[0] for module in linears]
        plain = any(module.spec.bias for module in linears) or act not in ACTS
        if plain or any(matrix.format.kind not in ROW_KINDS for matrix in packed):
            return self._gather_rows(x_TD, gate_proj, step, threshold)
        gate, up, down_t = map(_rows, packed)
        x = np.ascontiguousarray(x_TD.float().numpy())
        done = gate_first(x, gate, up, down_t, threshold=threshold, act=act, threads=torch.get_num_threads())
        if step.record is not None:
            gate_read, up_read, down_read = done.bytes_read
            step.record.op(f"{self.path}.gate_proj", flops=2 * x.size * gate.shape[0], weight_read=gate_read)
            self._act_ran(step)
            self._rows_ran(step, done.rows_touched, int(done.active.sum()), x.shape[1], up_read, down_read)
        return torch.from_numpy(done.y).to(x_TD.dtype)

    def _gather_rows(self, x_TD: torch.Tensor, gate_proj: Linear, step: Step, threshold: float) -> torch.Tensor:
        """The same for any format, activation and bias: gather the rows, then one token after the other."""
        gate_TF = self.act(gate_proj(x_TD, step))
        self._act_ran(step)
        active_TF = ~(gate_TF.abs() <= threshold)
        rows = active_TF.any(0).nonzero()[:, 0]
        up_RD, up_read = _gathered(self.up_proj, rows, x_TD.dtype)
        down_RD, down_read = _gathered(self.down_proj, rows, x_TD.dtype)
        up_bias, down_bias = self.up_proj.bias(0, x_TD.dtype), self.down_proj.bias(0, x_TD.dtype)
        out_TD = torch.zeros_like(x_TD) if down_bias is None else down_bias.expand_as(x_TD).clone()
        pairs = 0
        for token, active_R in enumerate(active_TF[:, rows]):
            up = up_RD[active_R] @ x_TD[token]
            if up_bias is not None:
                up = up + up_bias[rows][active_R]
            out_TD[token] += (gate_TF[token, rows][active_R] * up) @ down_RD[active_R]
            pairs += len(up)
        if step.record is not None:
            self._rows_ran(step, len(rows), pairs, x_TD.shape[1], up_read, down_read)
        return out_TD

    def _rows_ran(self, step: Step, rows: int, pairs: int, width: int, up_read: int, down_read: int) -> None:
        assert step.record is not None
        step.record.op(f"{self.path}.up_proj", flops=2 * pairs * width, weight_read=up_read)
        step.record.op(f"{self.path}.down_proj", flops=2 * pairs * width, weight_read=down_read)
        step.record.observe(f"{self.path}.active_rows", rows)
        step.record.observe(f"{self.path}.active_pairs", pairs)


def _rows(packed: Packed) -> RowMatrix:
    """A stored matrix by rows, as the gate-first kernel takes it."""
    return int_rows(packed) if packed.format.kind == "int" else packed.buffers["data"]


def _gathered(linear: Linear, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Some stored rows as [R, D], and the bytes they take, the bias included."""
    packed, bias, chosen = linear.packed[0], linear.biases[0], rows.numpy()
    read = sum(buffer[:1].nbytes * len(chosen) for buffer in packed.buffers.values())
    return torch.from_numpy(decode(packed, chosen)).to(dtype), read + (0 if bias is None else bias.nbytes)


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
        self.correction = weights[f"{path}.correction_bias"] if spec.correction_bias else None

    def forward(self, x_TD: torch.Tensor, step: Step) -> torch.Tensor:
        """Return [T, D]."""
        weights, chosen = self._route(x_TD, step)
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

    def _route(self, x_TD: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, k] and indices [T, k] of the chosen experts."""
        spec = self.spec
        logits_TE = self.router(x_TD, step).float()
        scores_TE = logits_TE.softmax(-1) if spec.scoring == "softmax" else logits_TE.sigmoid()
        choice_TE = scores_TE
        if self.correction is not None:  # balances the load: it decides who is chosen, not with which weight
            choice_TE = scores_TE + float_tensor(self.correction)[0]
            if step.record is not None:
                step.record.op(self.router.path, weight_read=self.correction.nbytes)
        if spec.topk_groups < spec.num_groups:
            by_group = choice_TE.unflatten(-1, (spec.num_groups, -1))
            best = by_group.topk(2, dim=-1).values.sum(-1).topk(spec.topk_groups, dim=-1).indices
            inside = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            choice_TE = by_group.masked_fill(~inside[..., None], float("-inf")).flatten(1)
        chosen = choice_TE.topk(spec.num_experts_per_tok, dim=-1).indices
        weights = scores_TE.gather(1, chosen)
        if spec.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * spec.routed_scaling).to(x_TD.dtype), chosen
