"""The reference decoder: one tree of modules that mirrors the ModelSpec by path, and the only block loop.

Activations are packed [T, D]: T new tokens of all rows, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from trimtab.model.attention import Attention
from trimtab.model.ffn import FFN, MoE
from trimtab.model.linear import Embedding, Linear, Norm
from trimtab.model.taps import tapped
from trimtab.model.tensors import DTYPES
from trimtab.runtime.step import IntArray, Step
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.leaves import NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec
from trimtab.spec.runnable import check_runnable

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import KVStore


class Layer(nn.Module):
    """Norm, attention, norm, MLP, with the residual adds between."""

    def __init__(self, index: int, spec: LayerSpec, weights: Weights, max_positions: int) -> None:
        super().__init__()
        self.index, self.spec, self.path = index, spec, f"layers.{index}"
        assert isinstance(spec.self_attn, AttentionSpec)  # `check_runnable` refuses what else there is
        self.input_layernorm = self._norm("input_layernorm", spec.input_layernorm, weights)
        self.self_attn = Attention(f"{self.path}.self_attn", spec.self_attn, weights, max_positions)
        self.attn_output_norm = self._norm("attn_output_norm", spec.attn_output_norm, weights)
        self.post_attention_layernorm = self._norm("post_attention_layernorm", spec.post_attention_layernorm, weights)
        block = FFN if isinstance(spec.mlp, FFNSpec) else MoE
        self.mlp = block(f"{self.path}.mlp", spec.mlp, weights)  # type: ignore[arg-type]
        self.mlp_output_norm = self._norm("mlp_output_norm", spec.mlp_output_norm, weights)

    def _norm(self, name: str, spec: NormSpec | None, weights: Weights) -> Norm | None:
        return None if spec is None else Norm(f"{self.path}.{name}", spec, weights)

    def forward(self, h_TD: torch.Tensor, step: Step, store: KVStore | None) -> torch.Tensor:
        """Return [T, D]."""
        normed = _apply(self.input_layernorm, h_TD, step)
        attended = _apply(self.attn_output_norm, self.self_attn(normed, step, store, self.index), step)
        if not self.spec.parallel:
            h_TD = self._add("add_attn", h_TD, attended, step)
            normed = h_TD
        elif self.post_attention_layernorm is not None:
            normed = h_TD
        normed = _apply(self.post_attention_layernorm, normed, step)
        out = _apply(self.mlp_output_norm, self.mlp(normed, step), step)
        if self.spec.parallel:
            h_TD = self._add("add_attn", h_TD, attended, step)
        h_TD = self._add("add_mlp", h_TD, out, step)
        return tapped(step, "resid", self.path, h_TD)

    def _add(self, name: str, h_TD: torch.Tensor, out_TD: torch.Tensor, step: Step) -> torch.Tensor:
        h_TD = h_TD + out_TD
        if step.record is not None:
            step.record.op(f"{self.path}.{name}")
        return h_TD


def _apply(norm: Norm | None, x: torch.Tensor, step: Step) -> torch.Tensor:
    return x if norm is None else norm(x, step)


def run_blocks(layers: Iterable[Layer], h_TD: torch.Tensor, step: Step, store: KVStore | None) -> torch.Tensor:
    """Run decoder layers one after the other; partial runs (filters, taps) use it too."""
    for layer in layers:
        h_TD = layer(h_TD, step, store)
    return h_TD


class Decoder(nn.Module):
    """A model built from its spec; every module carries the node it was built from as `spec`."""

    def __init__(self, spec: ModelSpec, weights: Weights) -> None:
        super().__init__()
        check_runnable(spec)
        self.spec, self.dtype = spec, DTYPES[spec.act_dtype]
        self.embed_tokens = Embedding("embed_tokens", spec.embed_tokens, weights, self.dtype)
        positions, norm = spec.embed_positions, spec.embed_norm
        self.embed_positions = (
            None if positions is None else Embedding("embed_positions", positions, weights, self.dtype)
        )
        self.embed_norm = None if norm is None else Norm("embed_norm", norm, weights)
        built = [Layer(i, layer, weights, spec.max_position_embeddings) for i, layer in enumerate(spec.layers)]
        self.layers = nn.ModuleList(built)
        self.norm = None if spec.norm is None else Norm("norm", spec.norm, weights)
        stored = ["embed_tokens"] if spec.tie_word_embeddings else None
        self.lm_head = Linear("lm_head", spec.lm_head, weights, stored)
        self.eval()

    @torch.inference_mode()
    def forward(self, ids_T: torch.Tensor, step: Step, store: KVStore | None, logits_rows: IntArray) -> torch.Tensor:
        """Run one pass without gradients; see `logits`."""
        return self.logits(ids_T, step, store, logits_rows)

    def logits(self, ids_T: torch.Tensor, step: Step, store: KVStore | None, logits_rows: IntArray) -> torch.Tensor:
        """Run one pass; gradients reach the weights that are `Learned`.

        Args:
            ids_T: [T] token ids of all rows.
            step: offsets, positions, sequences.
            store: cache the new keys and values go to; None attends inside the pass alone.
            logits_rows: which of the T tokens want logits.

        Returns:
            float32 [len(logits_rows), V].
        """
        h_TD = run_blocks(self.layers, self.embed(ids_T, step), step, store)  # type: ignore[arg-type]
        return self.head(h_TD, step, logits_rows)

    def embed(self, ids_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states before the first layer [T, D]."""
        h_TD = self.embed_tokens(ids_T, step)
        if self.embed_positions is not None:
            h_TD = h_TD + self.embed_positions(torch.from_numpy(step.positions), step)
        return _apply(self.embed_norm, h_TD, step)

    def head(self, h_TD: torch.Tensor, step: Step, logits_rows: IntArray) -> torch.Tensor:
        """Logits [R, V] in float32 of the rows wanted."""
        if len(logits_rows) == 0:
            return torch.zeros(0, self.spec.vocab_size)
        if len(logits_rows) < len(h_TD) or np.any(logits_rows[:-1] >= logits_rows[1:]):
            h_TD = h_TD[torch.from_numpy(logits_rows)]
        h_RD = _apply(self.norm, h_TD, step)
        logits_RV = self.lm_head(h_RD, step).float()
        if self.spec.logit_scale != 1.0:
            logits_RV = logits_RV * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits_RV = self.spec.logit_softcap * torch.tanh(logits_RV / self.spec.logit_softcap)
            if step.record is not None:
                step.record.op("logit_softcap")
        return logits_RV
