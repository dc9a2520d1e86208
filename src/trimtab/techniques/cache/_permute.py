"""Change the order of the KV heads of a layer, with their query heads: exact, since heads are summed in the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec


def permute_heads(spec: ModelSpec, weights: Weights, orders: Sequence[Sequence[int]]) -> Weights:
    """Return the weights with the KV heads of every layer in another order, whole groups of query heads with them.

    Args:
        spec: the model; plain float matrices, stored by row.
        weights: of it; all that does not change is shared.
        orders: for each layer the heads, in their new order.

    Raises:
        SpecError: not a permutation of the heads, another format, or ALiBi, whose slopes follow the place of a head.

    Source: Xiao et al., DuoAttention, arXiv 2410.10819, section 2.3.
    """
    replaced: dict[str, Packed] = {}
    for index, (layer, order) in enumerate(zip(spec.layers, orders, strict=True)):
        attention, path = layer.self_attn, f"layers.{index}.self_attn"
        if not isinstance(attention, AttentionSpec) or attention.alibi:
            raise SpecError(f"{path}: its heads have no order to change (no KV heads, or ALiBi).")
        heads = attention.num_key_value_heads
        if sorted(order) != list(range(heads)):
            raise SpecError(
                f"{path}: {list(order)} is no order of its {heads} KV heads. Allowed: each of 0..{heads - 1} once."
            )
        group, size = attention.num_attention_heads // heads, attention.head_dim
        kv = _blocks(order, size)
        values = _blocks(order, attention.v_proj.n // heads)
        query_heads = _blocks(order, group)
        queries = _blocks(query_heads, size)
        outputs = _blocks(query_heads, attention.o_proj.k // attention.num_attention_heads)
        for name, rows in (("q_proj", queries), ("k_proj", kv), ("v_proj", values)):
            replaced[f"{path}.{name}"] = _taken(weights[f"{path}.{name}"], rows, 0, path)
            if f"{path}.{name}.bias" in weights:
                replaced[f"{path}.{name}.bias"] = _taken(weights[f"{path}.{name}.bias"], rows, 1, path)
        replaced[f"{path}.o_proj"] = _taken(weights[f"{path}.o_proj"], outputs, 1, path)
        for name, norm, columns in (("q_norm", attention.q_norm, queries), ("k_norm", attention.k_norm, kv)):
            if norm is not None and norm.size == len(columns) and norm.size != size:  # one norm over all heads together
                replaced[f"{path}.{name}"] = _taken(weights[f"{path}.{name}"], columns, 1, path)
        if attention.sinks:
            replaced[f"{path}.sinks"] = _taken(weights[f"{path}.sinks"], query_heads, 1, path)
    return weights | replaced


def _blocks(order: Sequence[int], size: int) -> list[int]:
    """Indices of the elements of blocks of `size`, the blocks in this order."""
    return [block * size + i for block in order for i in range(size)]


def _taken(packed: Packed, index: Sequence[int], axis: int, path: str) -> Packed:
    if not packed.format.is_float or packed.layout != "row":
        raise SpecError(
            f"{path} is stored as {packed.format} ({packed.layout}). Allowed: plain floats by row; load with dtype='float32'."
        )
    data = np.ascontiguousarray(packed.buffers["data"].take(np.asarray(index), axis=axis))
    return Packed(packed.format, packed.shape, {"data": data}, packed.layout)
