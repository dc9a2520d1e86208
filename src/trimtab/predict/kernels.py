"""From a kernel of the graph to the sizes a fitted form asks for (`predict.forms`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.graph.ops import Counts, Kernel, Op, StepShape
from trimtab.predict import forms
from trimtab.predict.forms import Device
from trimtab.spec.machine import Efficiency, Machine
from trimtab.spec.nodes import AttentionSpec, MoESpec

#: kernel, its main op, counts, step, device, constants, bytes a pass streams -> seconds [...].
Adapter = Callable[[Kernel, Op, Counts, StepShape, Device, dict[str, float], Any], Any]


def device_of(machine: Machine, dtype: str) -> Device:
    """What a form needs to know of a machine; one without a number of units counts as one large unit."""
    return Device(
        peak_flops_per_s=machine.peak(dtype)[0],
        bandwidth_bytes_per_s=machine.memory_bandwidth_bytes_per_s,
        llc_bytes=float(machine.llc_bytes or 0),
        units=machine.units or 1,
    )


def constants_of(found: Efficiency) -> dict[str, float]:
    """All numbers of a class as a form takes them."""
    return {
        "compute_efficiency": found.compute_efficiency,
        "bandwidth_efficiency": found.bandwidth_efficiency,
        "launch_s": found.launch_s,
        **found.constants,
    }


def gemm(
    kernel: Kernel, main: Op, counts: Counts, step: StepShape, device: Device, c: dict[str, float], streamed: Any
) -> Any:
    """Linear ops that read the same input are one product with their outputs side by side."""
    shapes = [_matrix(op) for op in kernel.ops if op.kind == main.kind and op.reads == main.reads]
    n, k = sum(shape[0] for shape in shapes), shapes[0][1]
    rows = step.rows(main.writes[0].rows)
    io = counts.act_read + counts.act_written
    # Weights and cache of the whole pass go through the cache before this kernel runs again.
    return forms.gemm_s(rows, n, k, counts.weight_read, io, device, c, working_set_bytes=streamed)


def _matrix(op: Op) -> tuple[int, int]:
    """(outputs, inputs) of a linear op, or of the per-head products of latent attention."""
    node: Any = op.node
    if op.kind == "expand":
        return node.kv_b_proj.n, node.kv_b_proj.k
    if op.kind == "absorb_q":
        return node.num_attention_heads * node.kv_lora_rank, node.qk_nope_head_dim
    if op.kind == "absorb_v":
        return node.num_attention_heads * node.v_head_dim, node.kv_lora_rank
    if op.kind == "outliers":
        return node.n, max(1, node.product.outliers_expected(node.k))
    return node.n, node.k


def prefill_attention(
    kernel: Kernel, main: Op, counts: Counts, step: StepShape, device: Device, c: dict[str, float], streamed: Any
) -> Any:
    """Rows of different lengths count as so many of their mean."""
    heads, kv_heads, head_dim, item_bytes, window = _heads(main, step)
    batch, new, past = _rows(main, step)
    return forms.prefill_attention_s(batch, new, past, heads, kv_heads, head_dim, window, item_bytes, device, c)


def few_queries(decode: dict[str, float], main: Op, step: StepShape, device: Device) -> Any:
    """The same by the form of decoding, which splits long keys: kernels take whichever is faster."""
    heads, kv_heads, head_dim, item_bytes, window = _heads(main, step)
    batch, new, past = _rows(main, step)
    return forms.decode_attention_s(
        batch, new + past, heads, kv_heads, head_dim, item_bytes, device, decode, window=window, new=new
    )


def decode_attention(
    kernel: Kernel, main: Op, counts: Counts, step: StepShape, device: Device, c: dict[str, float], streamed: Any
) -> Any:
    """As `prefill_attention`, one new token per row."""
    heads, kv_heads, head_dim, item_bytes, window = _heads(main, step)
    batch, new, past = _rows(main, step)
    return forms.decode_attention_s(
        batch, new + past, heads, kv_heads, head_dim, item_bytes, device, c, window=window, new=new
    )


def _rows(op: Op, step: StepShape) -> tuple[Any, Any, Any]:
    """(sequences, mean new tokens, mean earlier tokens in view) of a pass."""
    node: Any = op.node
    sequences = np.asarray(step.copies * step.new.shape[-1], np.float64)
    new = np.asarray(step.new, np.float64).mean(-1)
    past = 0.0
    for head, times in Counter(node.cache.heads).items():
        in_view = head.keep.visible(step.past, step.prompts)
        if head.select is not None:
            in_view = np.where(step.new == 1, head.select.read(in_view + step.new) - step.new, in_view)
        past = past + times / len(node.cache.heads) * np.asarray(in_view, np.float64).mean(-1)
    return sequences, new, past


def _heads(op: Op, step: StepShape) -> tuple[int, int, float, float, float]:
    """(query heads, cached heads, their width, bytes of a cached element, window) of an attention.

    A sparse prompt is priced as a window of as many keys; its last queries, which see more, are few.
    """
    node: Any = op.node
    head = node.cache.heads[0]
    if isinstance(node, AttentionSpec):
        width = (head.head_dim + head.v_head_dim) / 2
        window = np.inf if node.window is None else float(node.window)
        if node.prefill is not None and np.max(step.new, initial=1) > 1:
            window = float(node.prefill.sink + node.prefill.local)
        return node.num_attention_heads, node.num_key_value_heads, width, head.token_bytes() / (2 * width), window
    if op.kind == "attend_expanded":  # keys and values of every head, expanded
        width = (node.qk_nope_head_dim + node.qk_rope_head_dim + node.v_head_dim) / 2
        return node.num_attention_heads, node.num_attention_heads, width, 2.0, np.inf
    # One latent for all heads, key and value at once.
    return node.num_attention_heads, 1, float(head.head_dim), head.token_bytes() / (2 * head.head_dim), np.inf


def experts(
    kernel: Kernel, main: Op, counts: Counts, step: StepShape, device: Device, c: dict[str, float], streamed: Any
) -> Any:
    """The routed experts of a layer as one grouped kernel; None where the stack runs their products one by one."""
    owner = main.owner
    assert isinstance(owner, MoESpec)
    ffn = owner.experts
    if not any(op.node is ffn.down_proj for op in kernel.ops) or not any(op.node is ffn.up_proj for op in kernel.ops):
        return None
    nbytes = sum(node.nbytes() for node in (ffn.gate_proj, ffn.up_proj, ffn.down_proj) if node is not None)
    tokens = np.asarray(step.tokens, np.float64) * (owner.ranks if owner.exchange else 1)
    return forms.moe_s(
        tokens, ffn.up_proj.k, ffn.intermediate_size, owner.num_experts_per_tok, owner.num_experts, nbytes,
        device, c, expert_ranks=owner.ranks, skewed=float(step.skew > 0),
    )  # fmt: skip


#: Form of the constants -> adapter.
ADAPTERS: dict[str, Adapter] = {
    "gemm": gemm,
    "prefill_attention": prefill_attention,
    "decode_attention": decode_attention,
    "moe": experts,
}
