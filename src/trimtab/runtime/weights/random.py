"""Random weights that fit a spec: for tests and for benchmarks of shapes nobody has weights for."""

from __future__ import annotations

import numpy as np

from trimtab.runtime.numerics import encode
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec import tree
from trimtab.spec.formats import FP32
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, GateFirst, MoESpec


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Return weights of every node: matrices N(0, 1/k), norms near 1, small biases, in the formats of the spec.

    Args:
        spec: the model.
        seed: equal seeds give equal weights.
    """
    rng = np.random.default_rng(seed)
    items: dict[str, Packed] = {}

    def fill(path: str, node: tree.Node) -> None:
        if isinstance(node, LinearSpec):
            matrix = rng.standard_normal((node.n, node.k), dtype=np.float32) / np.sqrt(node.k, dtype=np.float32)
            stored = matrix if node.layout == "row" else np.ascontiguousarray(matrix.T)
            items[path] = encode(stored, node.format, layout=node.layout)
            if node.bias:
                items[f"{path}.bias"] = encode(_small(node.n), node.bias_format)
        elif isinstance(node, EmbeddingSpec):
            items[path] = encode(rng.standard_normal((node.n, node.k), dtype=np.float32), node.format)
        elif isinstance(node, NormSpec):
            items[path] = encode(_small(node.size) + (0.0 if node.unit_offset else 1.0), node.format)
            if node.bias:
                items[f"{path}.bias"] = encode(_small(node.size), node.format)
        elif isinstance(node, AttentionSpec):
            if node.sinks:
                items[f"{path}.sinks"] = encode(_small(node.num_attention_heads), node.q_proj.bias_format)
            if node.key_order != "model":
                orders = np.stack([rng.permutation(node.head_dim) for _ in range(node.num_key_value_heads)])
                ones = np.ones((len(orders), 1), np.float16)
                buffers = {"codes": orders.astype(np.uint8), "scale": ones, "minimum": np.zeros_like(ones)}
                items[f"{path}.key_order"] = Packed(node.key_order_format, orders.shape, buffers)
        elif isinstance(node, MoESpec) and node.correction_bias:
            items[f"{path}.correction_bias"] = encode(_small(node.num_experts), FP32)
        elif isinstance(node, FFNSpec) and isinstance(node.executor, GateFirst):
            items[f"{path}.threshold"] = encode(np.full((1, 1), 0.1, dtype=np.float32), FP32)

    def _small(size: int) -> np.ndarray:
        return 0.1 * rng.standard_normal((1, size), dtype=np.float32)

    def below(node: tree.Node, path: str) -> None:
        for name, child in tree.children(node):
            here = f"{path}.{name}" if path else name
            if here == "lm_head" and spec.tie_word_embeddings:
                continue
            if isinstance(node, MoESpec) and name == "experts":
                for expert in range(node.num_experts):
                    below(child, f"{here}.{expert}")
                continue
            fill(here, child)
            below(child, here)

    below(spec, "")
    return Weights(items)
