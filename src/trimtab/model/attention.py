"""Grouped-query attention: project, append to the store, attend over what it hands out, project back.

Legend: T new tokens of all rows, s of one row, S keys in view, N query heads, G KV heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.errors import SpecError
from trimtab.model.linear import Linear, Norm
from trimtab.model.lmul import mixed, scaled_dots, times_of
from trimtab.model.rope import Rotary, rotate, rotate_ordered
from trimtab.model.taps import tapped
from trimtab.model.tensors import as_array, as_tensor, float_tensor, widened
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.cache import Keep, Ring
from trimtab.spec.nodes import AttentionSpec, Prefill, Unified
from trimtab.spec.product import EXACT

if TYPE_CHECKING:
    from trimtab.runtime.cache.store import KVStore

#: Keys and values of some heads of one row: (head indices, k [G', S, H], v [G', S, H], positions [S] or [G', S], bytes of pages
#: read).
Group = tuple[tuple[int, ...], torch.Tensor, torch.Tensor, torch.Tensor, int]


class Attention(nn.Module):
    """One attention block."""

    def __init__(self, path: str, spec: AttentionSpec, weights: Weights, max_positions: int) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.q_proj = Linear(f"{path}.q_proj", spec.q_proj, weights)
        self.k_proj = Linear(f"{path}.k_proj", spec.k_proj, weights)
        self.v_proj = Linear(f"{path}.v_proj", spec.v_proj, weights)
        self.q_norm = None if spec.q_norm is None else Norm(f"{path}.q_norm", spec.q_norm, weights)
        self.k_norm = None if spec.k_norm is None else Norm(f"{path}.k_norm", spec.k_norm, weights)
        self.o_proj = Linear(f"{path}.o_proj", spec.o_proj, weights)
        self.sinks = weights[f"{path}.sinks"] if spec.sinks else None
        self.key_order = None if spec.key_order == "model" else weights[f"{path}.key_order"]
        self.rotary = None if spec.rope is None else Rotary(spec.rope, max_positions)
        self.backend: Callable[..., torch.Tensor] = unified if isinstance(spec.softmax, Unified) else sdpa
        self.recomputed = 0  # rows (a token of a head) whose unified softmax was computed again

    def forward(self, x_TD: torch.Tensor, step: Step, store: KVStore | None, layer: int) -> torch.Tensor:
        """Return [T, D]."""
        q_TNH, k_TGH, v_TGH = self.project(x_TD, step)
        out_TNH = torch.empty(*q_TNH.shape[:2], v_TGH.shape[-1], dtype=q_TNH.dtype)
        positions = torch.from_numpy(step.positions)
        rows = list(zip(step.cu[:-1].tolist(), step.cu[1:].tolist(), strict=True))
        if store is None:
            views = (self._own(k_TGH[a:b], v_TGH[a:b], positions[a:b]) for a, b in rows)
        else:
            views = self._stored(q_TNH, k_TGH, v_TGH, step, store, layer)
        per_head = q_TNH.shape[1] // k_TGH.shape[1]
        flops = read = 0
        recomputed = self.recomputed
        for row, ((a, b), groups) in enumerate(zip(rows, views, strict=True)):
            ends = store is None or (step.ends is not None and bool(step.ends[row]))
            for heads, k_GSH, v_GSH, at_S, nbytes in groups:
                queries = [head * per_head + i for head in heads for i in range(per_head)]
                chosen = (
                    slice(queries[0], queries[-1] + 1)
                    if queries == list(range(queries[0], queries[-1] + 1))
                    else queries
                )
                keep = self.spec.cache.heads[heads[0]].keep
                q_sNH = q_TNH[a:b, chosen]
                read += nbytes
                flops += 2 * q_sNH.shape[0] * q_sNH.shape[1] * k_GSH.shape[1] * (k_GSH.shape[2] + v_GSH.shape[2])
                mask = visible(positions[a:b], at_S, self.spec.window, keep, self.spec.prefill, ends)
                bias = self._bias(positions[a:b], at_S, mask, chosen)
                out_TNH[a:b, chosen] = self.backend(
                    self, q_sNH, k_GSH.to(q_sNH.dtype), v_GSH.to(q_sNH.dtype), bias, chosen
                )
        if step.record is not None:
            own = sum(packed.nbytes for packed in (self.sinks, self.key_order) if packed is not None)
            step.record.op(f"{self.path}.attend", flops=flops, weight_read=own, kv_read=read)
            if isinstance(self.spec.softmax, Unified):
                step.record.observe(f"{self.path}.recomputed", self.recomputed - recomputed)
        if store is not None and store.acts(layer):
            q = as_array(q_TNH)
            done = store.attended(layer, [q[a:b] for a, b in rows], step)
            if step.record is not None:
                step.record.op(f"{self.path}.evict", flops=done.flops, kv_read=done.read, kv_written=done.written)
                step.record.observe(f"{self.path}.evict.moved", done.moved)
        return self.o_proj(out_TNH.flatten(1), step)

    def project(self, x_TD: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [T, N, H], k [T, G, H] (normed and rotated) and v [T, G, H]."""
        q_TN, k_TG = self.q_proj(x_TD, step), self.k_proj(x_TD, step)
        v_TGH = self.v_proj(x_TD, step).unflatten(-1, (self.spec.num_key_value_heads, -1))
        return *self._positioned(q_TN, k_TG, step), v_TGH

    def queries_and_keys(self, x_TD: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q [T, N, H] and k [T, G, H] alone (token filters)."""
        return self._positioned(self.q_proj(x_TD, step), self.k_proj(x_TD, step), step)

    def _positioned(self, q_TN: torch.Tensor, k_TG: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm, split heads and rotate; a norm is over each head or over all of them together."""
        order_GH = None
        if self.key_order is not None:
            order_GH = torch.from_numpy(self.key_order.buffers["codes"].astype(np.int64))
        parts = []
        for x, norm in ((q_TN, self.q_norm), (k_TG, self.k_norm)):
            if norm is not None and norm.spec.size == x.shape[-1]:
                x, norm = norm(x, step), None
            x = x.unflatten(-1, (-1, self.spec.head_dim))
            if norm is not None:
                x = norm(x, step) if order_GH is None else _normed_ordered(norm, x, order_GH, step)
            parts.append(x)
        q_TNH, k_TGH = parts
        if self.rotary is not None:
            cos, sin = self.rotary.tables(step, q_TNH.dtype)
            times = times_of(self.rotary.product)
            if order_GH is None:
                q_TNH, k_TGH = rotate(q_TNH, cos, sin, times), rotate(k_TGH, cos, sin, times)
            else:
                q_TNH, k_TGH = (rotate_ordered(x, cos, sin, order_GH, times) for x in (q_TNH, k_TGH))
            if step.record is not None:
                step.record.op(f"{self.path}.rope")
        return tapped(step, "self_attn.qk", self.path, (q_TNH, k_TGH))

    def _own(self, k_sGH: torch.Tensor, v_sGH: torch.Tensor, at_s: torch.Tensor) -> Iterator[Group]:
        """A row's own keys, without a store; heads that keep alike go together."""
        heads = self.spec.cache.heads
        for keep in dict.fromkeys(head.keep for head in heads):
            chosen = tuple(index for index, head in enumerate(heads) if head.keep == keep)
            index = list(chosen)
            yield chosen, k_sGH[:, index].transpose(0, 1), v_sGH[:, index].transpose(0, 1), at_s, 0

    def _stored(
        self,
        q_TNH: torch.Tensor,
        k_TGH: torch.Tensor,
        v_TGH: torch.Tensor,
        step: Step,
        store: KVStore,
        layer: int,
    ) -> Iterator[list[Group]]:
        """Append to the store and yield what each row may read."""
        written = store.written
        views = store.append(layer, as_array(k_TGH), as_array(v_TGH), step, as_array(q_TNH))
        if step.record is not None:
            step.record.op(f"{self.path}.append", kv_written=store.written - written)
        for row in views:
            groups: list[Group] = []
            for view in row:
                k, v = (as_tensor(x, "bf16" if x.dtype == np.uint16 else "fp32") for x in (view.k, view.v))
                groups.append((view.heads, k, v, torch.from_numpy(view.positions), view.nbytes))
            yield groups

    def _bias(
        self, at_s: torch.Tensor, at_S: torch.Tensor, mask_sS: torch.Tensor | None, heads: slice | list[int]
    ) -> torch.Tensor | None:
        """Additive mask [s, S], or [N', s, S] where heads differ; None if every query sees every key."""
        bias = None
        if mask_sS is not None:
            bias = torch.zeros(mask_sS.shape).masked_fill_(~mask_sS, float("-inf"))
            if bias.dim() == 3:
                bias = self._by_query_head(bias)
        if self.spec.alibi:
            slopes = alibi_slopes(self.spec.num_attention_heads)[heads]
            distance = (at_S[..., None, :] - at_s[:, None]).float()
            if distance.dim() == 3:
                distance = self._by_query_head(distance)
            alibi = slopes[:, None, None] * distance
            bias = alibi if bias is None else alibi + bias
        return bias

    def _by_query_head(self, x_GsS: torch.Tensor) -> torch.Tensor:
        return x_GsS.repeat_interleave(self.spec.num_attention_heads // self.spec.num_key_value_heads, dim=0)


def _normed_ordered(norm: Norm, x_TNH: torch.Tensor, order_GH: torch.Tensor, step: Step) -> torch.Tensor:
    """A norm of every head, whose elements lie in another order than the norm's weights: heads share these, not the order."""
    order_NH = order_GH.repeat_interleave(x_TNH.shape[1] // len(order_GH), dim=0)
    in_model = x_TNH.gather(-1, order_NH.argsort(-1).expand_as(x_TNH))
    return norm(in_model, step).gather(-1, order_NH.expand_as(x_TNH))


def visible(
    at_s: torch.Tensor,
    at_S: torch.Tensor,
    window: int | None,
    keep: Keep,
    prefill: Prefill | None = None,
    ends: bool = False,
) -> torch.Tensor | None:
    """Which keys each query sees [s, S], or [G, s, S] where heads hold different ones; None if all of them: causal, inside the
    window, inside the ring, inside the pattern of a prompt (`ends`: these are its last queries).
    """
    if len(at_s) == 1 and window is None and not isinstance(keep, Ring):
        return None
    query, key = at_s[:, None], at_S[..., None, :]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    if isinstance(keep, Ring):
        seen &= (key < keep.sink) | (key > query - keep.recent)
    if prefill is not None and len(at_s) > 1:
        near = (key < prefill.sink) | (key > query - prefill.local)
        if ends and prefill.last:
            near[..., -prefill.last :, :] = True
        seen &= near
    return None if bool(seen.all()) else seen


def alibi_slopes(heads: int) -> torch.Tensor:
    """Slope of every head. Source: Press et al., Train Short, Test Long, arXiv 2108.12409."""
    nearest = 2 ** math.floor(math.log2(heads))
    powers = [2 ** (-8 * (i + 1) / nearest) for i in range(nearest)]
    powers += [2 ** (-4 * (2 * i + 1) / nearest) for i in range(heads - nearest)]
    return torch.tensor(powers)


def _scores(spec: AttentionSpec, q_sNH: torch.Tensor, k_GSH: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Scaled, capped and biased scores in float32 [N, s, S]."""
    s, n, h = q_sNH.shape
    g = k_GSH.shape[0]
    q_GPsH = q_sNH.transpose(0, 1).reshape(g, n // g * s, h)
    scores = scaled_dots(q_GPsH, k_GSH, spec.scale, spec.product).view(n, s, -1).float()
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    return scores if bias is None else scores + bias


def unified(
    block: Attention,
    q_sNH: torch.Tensor,
    k_GSH: torch.Tensor,
    v_GSH: torch.Tensor,
    bias: torch.Tensor | None,
    heads: slice | list[int],
) -> torch.Tensor:
    """The definition of `Unified`: sums of ``exp(score - phi)`` by ranges of keys, added as they are; a row whose largest score
    leaves the safe range is computed again with the ordinary softmax. Returns [s, N, H].
    """
    softmax = block.spec.softmax
    assert isinstance(softmax, Unified)
    if block.sinks is not None:
        raise SpecError(f"{block.path}: a unified softmax with sink logits is not supported.")
    s, n, _ = q_sNH.shape
    g, dtype = k_GSH.shape[0], q_sNH.dtype
    q_sNH, k_GSH, v_GSH = q_sNH.float(), k_GSH.float(), v_GSH.float()
    scores = _scores(block.spec, q_sNH, k_GSH, bias)
    split = block.spec.split or scores.shape[-1]
    weight = torch.zeros(n, s, 1)
    out = torch.zeros(g, n // g * s, v_GSH.shape[-1])
    for first in range(0, scores.shape[-1], split):
        part = torch.exp(scores[..., first : first + split] - softmax.phi)
        weight += part.sum(-1, keepdim=True)
        out += mixed(part.view(g, n // g * s, -1), v_GSH[:, first : first + split], block.spec.product)
    out = out.view(n, s, -1) / weight
    if softmax.recompute:  # judged by the scores, before an exponential of them could overflow
        shifted = scores.amax(-1) - softmax.phi
        risky = ~((shifted >= softmax.low) & (shifted <= softmax.high))
        if bool(risky.any()):
            block.recomputed += int(risky.sum())
            again = mixed(scores.softmax(-1).view(g, n // g * s, -1), v_GSH, block.spec.product).view(n, s, -1)
            out[risky] = again[risky]
    return out.transpose(0, 1).to(dtype)


def eager(
    block: Attention,
    q_sNH: torch.Tensor,
    k_GSH: torch.Tensor,
    v_GSH: torch.Tensor,
    bias: torch.Tensor | None,
    heads: slice | list[int],
) -> torch.Tensor:
    """Scores, softmax in float32, weighted sum; the queries that share a KV head are one matrix. Returns [s, N, H]."""
    s, n, _ = q_sNH.shape
    g, dtype = k_GSH.shape[0], q_sNH.dtype
    if widened(s, dtype):
        q_sNH, k_GSH, v_GSH = q_sNH.float(), k_GSH.float(), v_GSH.float()
    scores = _scores(block.spec, q_sNH, k_GSH, bias)
    if block.sinks is not None:
        sink = float_tensor(block.sinks)[0].float()[heads]
        scores = torch.cat((scores, sink[:, None, None].expand(n, s, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = mixed(weights.to(v_GSH.dtype).reshape(g, n // g * s, -1), v_GSH, block.spec.product)
    return out.view(n, s, -1).transpose(0, 1).to(dtype)


def sdpa(
    block: Attention,
    q_sNH: torch.Tensor,
    k_GSH: torch.Tensor,
    v_GSH: torch.Tensor,
    bias: torch.Tensor | None,
    heads: slice | list[int],
) -> torch.Tensor:
    """Torch's fused attention for long passes; what it cannot do, and single tokens, go to `eager`. Returns [s, N, H]."""
    s, n, _ = q_sNH.shape
    if s <= 8 or block.spec.softcap is not None or block.sinks is not None or block.spec.product != EXACT:
        return eager(block, q_sNH, k_GSH, v_GSH, bias, heads)
    dtype = q_sNH.dtype
    if widened(s, dtype):
        q_sNH, k_GSH, v_GSH = q_sNH.float(), k_GSH.float(), v_GSH.float()
    mask = None if bias is None else bias.to(q_sNH.dtype)
    grouped = n > k_GSH.shape[0]
    q_1NsH, k_1GSH, v_1GSH = q_sNH.transpose(0, 1)[None], k_GSH[None], v_GSH[None]
    out = F.scaled_dot_product_attention(
        q_1NsH, k_1GSH, v_1GSH, attn_mask=mask, scale=block.spec.scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1).to(dtype)
