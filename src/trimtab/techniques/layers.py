"""Which layers and heads of a model a technique of the cache or of attention can change."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.errors import SpecError
from trimtab.spec.cache import HeadSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, LatentAttentionSpec


def attentions(name: str, spec: ModelSpec, *, whole: bool = False) -> list[tuple[str, AttentionSpec]]:
    """Return (path, node) of the layers that cache keys and values per head; recurrent ones are left out.

    Args:
        name: of the technique, for the sentence.
        spec: the model.
        whole: leave out layers whose queries see a window or a chunk alone as well: what they read is bounded already.

    Raises:
        SpecError: latent attention, whose one cached vector serves every head, or no layer is left.
    """
    found = []
    for index, layer in enumerate(spec.layers):
        node = layer.self_attn
        if isinstance(node, LatentAttentionSpec):
            raise SpecError(
                f"{name}: {spec.name} caches one latent for all heads (latent attention). Not supported. "
                "Allowed: models that cache keys and values per head."
            )
        if isinstance(node, AttentionSpec) and not (whole and (node.window is not None or node.chunk is not None)):
            found.append((f"layers.{index}.self_attn", node))
    if not found:
        raise SpecError(
            f"{name}: {spec.name} has no layer that caches keys and values{' of everything before' if whole else ''}. "
            "Allowed: models with at least one."
        )
    return found


def heads(layers: list[tuple[str, AttentionSpec]]) -> Iterator[tuple[str, HeadSpec]]:
    """Yield (path, head) of every KV head of these layers."""
    for path, node in layers:
        for index, head in enumerate(node.cache.heads):
            yield f"{path}.cache.heads.{index}", head
