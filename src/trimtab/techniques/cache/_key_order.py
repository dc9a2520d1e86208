"""Key channels in another order: found from the weights, and given to the rows of k_proj and q_proj once and for all.

Legend: G KV heads, N query heads, H head size, K inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics import decode, matrix
from trimtab.runtime.weights.packed import Packed, Weights, fingerprint
from trimtab.spec.formats import GGUF_BLOCKS
from trimtab.spec.leaves import LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec

if TYPE_CHECKING:
    from trimtab.techniques.materials import Materials


def row_norms(path: str, node: AttentionSpec, weights: Weights) -> np.ndarray:
    """Size of every key channel by the weights alone, float64 [G, H].

    The norm of its row of k_proj, its bias counted as one more column; where keys are normed, times the gain.
    """
    shape = (node.num_key_value_heads, node.head_dim)
    squares = np.square(matrix(weights[f"{path}.k_proj"]), dtype=np.float64).sum(axis=1)
    if node.k_proj.bias:
        squares += np.square(decode(weights[f"{path}.k_proj.bias"])[0], dtype=np.float64)
    norms = np.sqrt(squares).reshape(shape)
    if node.k_norm is not None:
        gain = decode(weights[f"{path}.k_norm"])[0].astype(np.float64) + (1.0 if node.k_norm.unit_offset else 0.0)
        norms *= np.abs(gain if node.k_norm.size == node.head_dim else gain.reshape(shape))
    return norms


def key_rms(spec: ModelSpec, weights: Weights, materials: Materials) -> dict[str, np.ndarray]:
    """Root mean square of every channel of the cached (rotated) keys on calibration text, [G, H] by attention path."""

    def compute() -> dict[str, list[list[float]]]:
        import torch

        from trimtab.model.decoder import Decoder
        from trimtab.runtime.step import Step

        squares: dict[str, Any] = {}
        tokens = 0

        def tap(path: str, value: Any) -> None:
            squares[path] = squares.get(path, 0.0) + value[1].double().square().sum(0)

        decoder = Decoder(spec, weights)
        with torch.inference_mode():
            for window in materials.progress("bfp: sizes of key channels", materials.token_windows()):
                step = Step.of([len(window)], [0])
                step.taps = {"self_attn.qk": tap}
                decoder.forward(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
                tokens += len(window)
        return {path: (total / tokens).sqrt().tolist() for path, total in squares.items()}

    found = materials.cached("bfp-key-rms", [fingerprint(weights), spec.hash], compute)
    return {path: np.array(rows) for path, rows in found.items()}


def descending(sizes_GH: np.ndarray) -> np.ndarray:
    """Order of the channels of every head, the largest first; equal ones stay in the model's order. uint8 [G, H]."""
    return np.argsort(-sizes_GH, axis=1, kind="stable").astype(np.uint8)


def ordered(path: str, node: AttentionSpec, weights: Weights, order_GH: np.ndarray) -> dict[str, Packed]:
    """The weights that change where the channels of keys take another order, and the order itself.

    Rows of k_proj take the order of their head, rows of q_proj that of the head they meet, biases with them. A norm over all
    heads together is reordered alike; one that every head shares stays as it is and is applied through the order.

    Args:
        path: of the attention node.
        node: with its keys still in the model's order.
        weights: of it.
        order_GH: uint8; the channel at every place.

    Raises:
        SpecError: a matrix whose rows cannot be told apart.
    """
    groups, size = order_GH.shape
    queries = order_GH.repeat(node.num_attention_heads // groups, axis=0)
    found: dict[str, Packed] = {}
    parts = (("q_proj", node.q_proj, node.q_norm, queries), ("k_proj", node.k_proj, node.k_norm, order_GH))
    for name, linear, norm, order_NH in parts:
        rows = (np.arange(len(order_NH))[:, None] * size + order_NH).reshape(-1)
        found |= _linear(f"{path}.{name}", linear, weights, rows)
        if norm is not None and norm.size != size:
            found |= _norm(f"{path}.{name[0]}_norm", norm, weights, rows)
    form, scale = node.key_order_format, np.ones((groups, 1), np.float16)
    buffers = {"codes": order_GH, "scale": scale, "minimum": np.zeros_like(scale)}
    return found | {f"{path}.key_order": Packed(form, (groups, size), buffers)}


def _linear(path: str, node: LinearSpec, weights: Weights, rows: np.ndarray) -> dict[str, Packed]:
    found = {path: with_rows(path, weights[path], rows)}
    if node.bias:
        found[f"{path}.bias"] = _vector(weights[f"{path}.bias"], rows)
    return found


def _norm(path: str, node: NormSpec, weights: Weights, rows: np.ndarray) -> dict[str, Packed]:
    return {name: _vector(weights[name], rows) for name in ([path, f"{path}.bias"] if node.bias else [path])}


def _vector(packed: Packed, rows: np.ndarray) -> Packed:
    """Elements of a float vector in another order."""
    return Packed(packed.format, packed.shape, {"data": packed.buffers["data"][:, rows]}, packed.layout)


def with_rows(path: str, packed: Packed, rows: np.ndarray) -> Packed:
    """A matrix with its outputs in another order; what is stored per row moves with the row and is not decoded.

    Args:
        path: of the matrix, for the message.
        packed: any format whose rows are stored one after the other; floats stored transposed too.
        rows: old place of every new row.

    Raises:
        SpecError: rows that cannot be told apart: tiles, or groups that run across rows.
    """
    form = packed.format
    if packed.layout == "transposed" and form.is_float and not form.tiled:
        return Packed(form, packed.shape, {"data": packed.buffers["data"][:, rows]}, packed.layout)
    if form.tiled or packed.layout != "row":
        raise SpecError(
            f"bfp: the rows of {path} lie interleaved in {form} ({packed.layout}), so its channels cannot be put in another "
            f"order. Allowed: floats, int, fp8, mxfp4 and {', '.join(GGUF_BLOCKS)}, stored by rows. "
            "Give bfp together with the technique that packs the weights, or use sort=none."
        )
    return Packed(form, packed.shape, {name: buffer[rows] for name, buffer in packed.buffers.items()}, packed.layout)
