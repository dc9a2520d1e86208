"""Scaling the inputs of matrices by what stands before them: the function of the block stays what it is.

The columns of a matrix are multiplied by s and what feeds them is divided by it: a norm (q, k, v; gate, up), the rows of v (o), the
rows of up (down). A method may so move range from columns that matter to others without a trace at run time.

Legend: D hidden size, H head size, N query heads, G KV heads, F neurons.
Source: Xiao et al., SmoothQuant, arXiv 2211.10438; Lin et al., AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

import numpy as np

from trimtab.errors import UnsupportedModelError
from trimtab.runtime.numerics import decode, encode, matrix
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.leaves import LinearSpec, NormSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec

#: What feeds the matrices of a stage of `model.calibration.STAGES`.
FEEDERS = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")


def fold(layer: LayerSpec, path: str, weights: Weights, stage: int, scale_K: np.ndarray) -> dict[str, Packed]:
    """Multiply the columns of the matrices of a stage, and divide what feeds them.

    Args:
        layer: the block.
        path: ``layers.i``.
        weights: in floats, stored by rows.
        stage: index in `FEEDERS`.
        scale_K: positive, by column. Columns of o that read one value channel must have one scale.

    Returns:
        What was changed, in the formats it had.

    Raises:
        UnsupportedModelError: the block has nothing that could take the scale up.
    """
    attn, mlp = layer.self_attn, layer.mlp
    if not isinstance(attn, AttentionSpec) or not isinstance(mlp, FFNSpec) or layer.parallel:
        raise UnsupportedModelError(
            f"{path}: inputs can be scaled in blocks of attention and a dense FFN in a row only."
        )
    feeder = f"{path}.{FEEDERS[stage]}"
    scale = scale_K.astype(np.float32)
    if stage == 0:
        names = ["q_proj", "k_proj", "v_proj"]
        found = _norm(layer.input_layernorm, feeder, weights, scale)
        return found | _columns([f"{path}.self_attn.{name}" for name in names], weights, scale)
    if stage == 2:
        names = ["up_proj"] if mlp.gate_proj is None else ["gate_proj", "up_proj"]
        found = _norm(layer.post_attention_layernorm, feeder, weights, scale)
        return found | _columns([f"{path}.mlp.{name}" for name in names], weights, scale)
    if stage == 1:
        by_value = scale.reshape(attn.num_key_value_heads, -1, attn.cache.heads[0].v_head_dim)
        if not (by_value == by_value[:, :1]).all():
            raise UnsupportedModelError(
                f"{path}: query heads that share a value head must share the scale of its channels."
            )
        return _rows(feeder, attn.v_proj, weights, by_value[:, 0].reshape(-1)) | _columns(
            [f"{path}.self_attn.o_proj"], weights, scale
        )
    if mlp.gate_proj is None:  # an activation stands between
        raise UnsupportedModelError(f"{path}: without a gate nothing linear feeds down_proj.")
    return _rows(feeder, mlp.up_proj, weights, scale) | _columns([f"{path}.mlp.down_proj"], weights, scale)


def shared_by_values(layer: LayerSpec, wish_K: np.ndarray) -> np.ndarray:
    """Wishes by column of o, averaged over the query heads that read one value channel: same shape."""
    attn = layer.self_attn
    assert isinstance(attn, AttentionSpec)
    parts = wish_K.reshape(attn.num_key_value_heads, -1, attn.cache.heads[0].v_head_dim)
    return np.broadcast_to(parts.mean(1, keepdims=True), parts.shape).reshape(-1)


def _columns(paths: list[str], weights: Weights, scale: np.ndarray) -> dict[str, Packed]:
    return {path: encode(matrix(weights[path]) * scale, weights[path].format) for path in paths}


def _rows(path: str, node: LinearSpec, weights: Weights, scale: np.ndarray) -> dict[str, Packed]:
    found = {path: encode(matrix(weights[path]) / scale[:, None], weights[path].format)}
    if node.bias:
        bias = weights[f"{path}.bias"]
        found[f"{path}.bias"] = encode(decode(bias) / scale, bias.format)
    return found


def _norm(node: NormSpec | None, path: str, weights: Weights, scale: np.ndarray) -> dict[str, Packed]:
    if node is None or not node.weight:
        raise UnsupportedModelError(f"{path}: there is no norm with weights that could take the scale up.")
    stored = weights[path]
    value = decode(stored)
    changed = (1 + value) / scale - 1 if node.unit_offset else value / scale
    found = {path: encode(changed, stored.format)}
    if node.bias:
        bias = weights[f"{path}.bias"]
        found[f"{path}.bias"] = encode(decode(bias) / scale, bias.format)
    return found
