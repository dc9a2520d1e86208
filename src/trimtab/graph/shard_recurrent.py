"""One device's slice of a recurrent layer: heads are cut, and groups (or key heads) with them while there are enough.

Where there are fewer groups than ranks each rank keeps a whole one, and its part of the projection and the convolution.

Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060, 8.1 (tensor parallelism of Mamba-2).
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.spec.cache import CacheSpec
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.nodes import LinearAttentionSpec, StateSpaceSpec

Recurrent = StateSpaceSpec | LinearAttentionSpec


def slice_recurrent(node: Recurrent, tp: int, out_proj: LinearSpec) -> Recurrent:
    """Return what one of `tp` ranks holds of a layer.

    Args:
        node: the whole layer; `tp` divides its heads, and its groups or is a multiple of them.
        tp: ranks.
        out_proj: the rank's slice of the output projection, whose inputs are cut.
    """
    heads, groups = node.num_heads // tp, max(node.num_groups // tp, 1)
    inner = heads * node.head_dim
    if isinstance(node, StateSpaceSpec):
        channels = inner + 2 * groups * node.state_size
        return replace(
            node,
            num_heads=heads,
            num_groups=groups,
            in_proj=replace(node.in_proj, n=inner + channels + heads),
            conv1d=replace(node.conv1d, channels=channels),
            norm=replace(node.norm, size=inner),
            out_proj=out_proj,
            cache=_states(node, inner * node.state_size, channels),
        )
    channels = inner + 2 * groups * node.key_head_dim
    return replace(
        node,
        num_heads=heads,
        num_key_heads=groups,
        in_proj_qkvz=replace(node.in_proj_qkvz, n=channels + inner),
        in_proj_ba=replace(node.in_proj_ba, n=2 * heads),
        conv1d=replace(node.conv1d, channels=channels),
        out_proj=out_proj,
        cache=_states(node, inner * node.key_head_dim, channels),
    )


def _states(node: Recurrent, elements: int, channels: int) -> CacheSpec:
    state, inputs = node.cache.states
    kept = channels * (node.conv1d.kernel - 1)
    return replace(node.cache, states=(replace(state, elements=elements), replace(inputs, elements=kept)))
