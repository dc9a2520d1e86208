"""What can be priced but not run yet, and why: one sentence each."""

from __future__ import annotations

from trimtab.errors import UnsupportedModelError
from trimtab.spec import tree
from trimtab.spec.cache import HeadSpec
from trimtab.spec.leaves import LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LatentAttentionSpec, LinearAttentionSpec, StateSpaceSpec

#: Blocks that the decoder does not have.
_LAYERS: dict[type, str] = {
    LatentAttentionSpec: "latent attention",
    StateSpaceSpec: "a state-space layer (Mamba-2)",
    LinearAttentionSpec: "linear attention (gated delta rule)",
}


def check_runnable(spec: ModelSpec, *, int_pages: bool = False) -> None:
    """Refuse a model that the decoder or the cache cannot run as described.

    Args:
        spec: the model.
        int_pages: the caller reads and writes int8 pages, as the native program does.

    Raises:
        UnsupportedModelError: names what is missing and where.
    """
    for path, node in tree.walk(spec):
        missing = _missing(node, int_pages)
        if missing:
            raise UnsupportedModelError(
                f"{spec.name}: {missing} ({path}) can be priced but not run yet. Use `trimtab predict`."
            )


def _missing(node: tree.Node, int_pages: bool) -> str:
    """What of a node has no code that runs it; empty = it runs."""
    if type(node) in _LAYERS:
        return _LAYERS[type(node)]
    if isinstance(node, AttentionSpec) and (node.chunk is not None or node.gated):
        return "attention within chunks" if node.chunk is not None else "attention with a gated output"
    if isinstance(node, NormSpec) and not node.weight:
        return "a norm without weights"
    if isinstance(node, FFNSpec) and node.act == "relu2":
        return "the activation relu2"
    if isinstance(node, LinearSpec) and node.act != "none":
        return f"a product with its input coded as {node.act}"
    if isinstance(node, HeadSpec):
        known = ("int8",) if int_pages else ()
        coded = next(
            (form for form in (node.k_format, node.v_format) if not form.is_float and form.kind not in known), None
        )
        return f"attention over a cache in {coded}" if coded else ""
    return ""
