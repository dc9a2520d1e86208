"""What can be priced but not run yet, and why: one sentence each."""

from __future__ import annotations

from trimtab.errors import UnsupportedModelError
from trimtab.spec import tree
from trimtab.spec.leaves import LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LatentAttentionSpec, LinearAttentionSpec, StateSpaceSpec
from trimtab.spec.product import EXACT

#: Blocks that the decoder does not have.
_LAYERS: dict[type, str] = {
    LatentAttentionSpec: "latent attention",
    StateSpaceSpec: "a state-space layer (Mamba-2)",
    LinearAttentionSpec: "linear attention (gated delta rule)",
}


def check_runnable(spec: ModelSpec) -> None:
    """Refuse a model that the decoder or the cache cannot run as described.

    Raises:
        UnsupportedModelError: names what is missing and where.
    """
    for path, node in tree.walk(spec):
        missing = _missing(node)
        if missing:
            raise UnsupportedModelError(
                f"{spec.name}: {missing} ({path}) can be priced but not run yet. Use `trimtab predict`."
            )


def _missing(node: tree.Node) -> str:
    """What of a node has no code that runs it; empty = it runs."""
    if type(node) in _LAYERS:
        return _LAYERS[type(node)]
    if isinstance(node, AttentionSpec) and (node.chunk is not None or node.gated):
        return "attention within chunks" if node.chunk is not None else "attention with a gated output"
    if isinstance(node, NormSpec) and not node.weight:
        return "a norm without weights"
    if isinstance(node, FFNSpec) and node.act == "relu2":
        return "the activation relu2"
    if isinstance(node, LinearSpec) and node.act != "none" and node.product == EXACT:
        return f"a product with its input coded as {node.act}"
    return ""
