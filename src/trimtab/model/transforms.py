"""Changes of weights that leave what a model computes as it was: scales moved from one matrix to the next.

Legend: K columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics import decode, encode, matrix
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LayerSpec
from trimtab.spec.tree import walk

#: Norm of a layer -> the block that alone reads it, and the block's matrices that do.
READERS = {
    "input_layernorm": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "post_attention_layernorm": ("mlp", ("gate_proj", "up_proj")),
}


def readers(spec: ModelSpec, norm: str) -> tuple[str, ...]:
    """Paths of the matrices that read a norm of a layer (``layers.3.input_layernorm``), and nothing else does.

    Raises:
        SpecError: no such norm, or something else reads it too.
    """
    path, _, name = norm.rpartition(".")
    nodes = dict(walk(spec))
    layer = nodes.get(path)
    if name not in READERS or not isinstance(layer, LayerSpec) or getattr(layer, name) is None:
        raise SpecError(f"{norm} is no norm of {spec.name} before a block. Allowed: layers.N.{', layers.N.'.join(READERS)}.")
    block, names = READERS[name]
    node = getattr(layer, block)
    if layer.parallel or not isinstance(node, AttentionSpec | FFNSpec):
        raise SpecError(f"{norm} of {spec.name} is read by more than the matrices of one block.")
    return tuple(f"{path}.{block}.{name}" for name in names if getattr(node, name, None) is not None)


def scale_columns(spec: ModelSpec, weights: Weights, norm: str, factors: np.ndarray) -> Weights:
    """Multiply the outputs of a norm by `factors` and divide the columns of the matrices that read it by them.

    Args:
        spec: of `weights`, which must be floats here.
        weights: the model.
        norm: path of a norm before a block.
        factors: float [K], none of them 0.

    Returns:
        The weights with the norm (and its bias) and its readers replaced; the model computes what it did.

    Raises:
        SpecError: see `readers`; factors of another length or with a zero; a matrix that is rounded already.
    """
    nodes = dict(walk(spec))
    node = nodes.get(norm)
    paths = readers(spec, norm)
    factors = np.asarray(factors, np.float32)
    size = getattr(node, "size", 0)
    if factors.shape != (size,) or not np.all(np.isfinite(factors) & (factors != 0)):
        raise SpecError(f"{norm}: {size} finite factors are wanted, none of them 0.")
    offset = np.float32(getattr(node, "unit_offset", False))
    replaced = {norm: _again(weights[norm], (decode(weights[norm]) + offset) * factors - offset)}
    if getattr(node, "bias", False):
        replaced[f"{norm}.bias"] = _again(weights[f"{norm}.bias"], decode(weights[f"{norm}.bias"]) * factors)
    for path in paths:
        if not weights[path].format.is_float:
            raise SpecError(f"{path} is held as {weights[path].format}: its columns cannot be scaled. Start from floats.")
        scaled = matrix(weights[path]) / factors
        replaced[path] = _again(weights[path], scaled.T if weights[path].layout == "transposed" else scaled)
    return weights | replaced


def scale_everywhere(spec: ModelSpec, weights: Weights, factors: np.ndarray, norms: Iterable[str] = tuple(READERS)) -> Weights:
    """`scale_columns` by the same factors at these norms of every layer."""
    for index in range(len(spec.layers)):
        for name in norms:
            weights = scale_columns(spec, weights, f"layers.{index}.{name}", factors)
    return weights


def _again(packed: Packed, values: np.ndarray) -> Packed:
    return encode(np.ascontiguousarray(values), packed.format, packed.layout)
