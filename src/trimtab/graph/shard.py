"""One device's slice of a model: what tensor and expert parallelism leave of every node.

Column-parallel matrices (q, k, v, gate, up) lose outputs, row-parallel ones (o, down) inputs, and the layer remembers over
how many ranks its outputs are summed (`LayerSpec.ranks`), which is where `build` puts the collectives. KV heads are
replicated where there are fewer of them than ranks; a latent cache is whole on every rank.

Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053; Yuan et al., arXiv 2402.16363 (GQA, MLA and experts under TP).
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.errors import SpecError
from trimtab.graph.shard_recurrent import slice_recurrent
from trimtab.spec.formats import MX_BLOCK
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import (
    AttentionSpec,
    FFNSpec,
    LatentAttentionSpec,
    LayerSpec,
    LinearAttentionSpec,
    MoESpec,
    StateSpaceSpec,
)
from trimtab.spec.parallel import Parallel


def shard(spec: ModelSpec, parallel: Parallel) -> ModelSpec:
    """Return the slice one device of a stage holds; the spec itself where nothing is cut.

    The layers of all stages are kept: pipeline stages are told apart where they are priced.

    Raises:
        SpecError: a degree that does not divide what it cuts, with those that do.
    """
    if parallel.tp == 1 and parallel.ep == 1:
        return spec
    _check(spec, parallel)
    same: dict[LayerSpec, LayerSpec] = {}
    layers = []
    for index, layer in enumerate(spec.layers):
        if layer not in same:
            same[layer] = _layer(layer, parallel, f"layers.{index}")
        layers.append(same[layer])
    tp = parallel.tp
    rows = -(-spec.vocab_size // tp)  # vocabularies are padded to a multiple of the ranks
    return replace(
        spec,
        layers=tuple(layers),
        embed_tokens=replace(spec.embed_tokens, n=rows),
        lm_head=replace(spec.lm_head, n=rows),
        ranks=tp,
    )


def tp_choices(spec: ModelSpec, most: int = 64) -> list[int]:
    """Tensor-parallel degrees up to `most` that divide every head count and width of the model."""
    return [tp for tp in range(1, most + 1) if _fits(spec, tp)]


def _fits(spec: ModelSpec, tp: int) -> bool:
    for layer in dict.fromkeys(spec.layers):
        heads, kv_heads = _heads(layer)
        if heads % tp or (kv_heads % tp and tp % kv_heads):
            return False
        mlp = layer.mlp
        ffns = (mlp.shared,) if isinstance(mlp, MoESpec) else (mlp,)
        if any(isinstance(ffn, FFNSpec) and ffn.intermediate_size % tp for ffn in ffns):
            return False
    return True


def _heads(layer: LayerSpec) -> tuple[int, int]:
    mixer = layer.self_attn
    if isinstance(mixer, AttentionSpec):
        return mixer.num_attention_heads, mixer.num_key_value_heads
    if isinstance(mixer, LatentAttentionSpec):
        return mixer.num_attention_heads, 1
    return (getattr(mixer, "num_heads", 1), getattr(mixer, "num_groups", 1)) if mixer is not None else (1 << 30, 1)


def _check(spec: ModelSpec, parallel: Parallel) -> None:
    if not _fits(spec, parallel.tp):
        heads, kv_heads = _heads(spec.layers[0])
        raise SpecError(
            f"tp={parallel.tp} does not divide {spec.name} ({heads} heads, {kv_heads} KV heads). "
            f"Allowed: {', '.join(map(str, tp_choices(spec)))}."
        )
    experts = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoESpec)]
    if parallel.ep > 1 and not experts:
        raise SpecError(f"ep={parallel.ep} spreads experts, and {spec.name} has none. Allowed: 1.")
    for moe in experts:
        if moe.num_experts % parallel.ep:
            allowed = [d for d in range(1, moe.num_experts + 1) if moe.num_experts % d == 0]
            raise SpecError(f"ep={parallel.ep} does not divide {moe.num_experts} experts. Allowed: {allowed}.")


def _layer(layer: LayerSpec, parallel: Parallel, path: str) -> LayerSpec:
    tp = parallel.tp
    changes: dict[str, object] = {"ranks": tp}
    mixer = layer.self_attn
    if isinstance(mixer, AttentionSpec):
        changes["self_attn"] = _attention(mixer, tp, path)
    elif isinstance(mixer, LatentAttentionSpec):
        changes["self_attn"] = _latent(mixer, tp, path)
    elif isinstance(mixer, StateSpaceSpec | LinearAttentionSpec):
        changes["self_attn"] = slice_recurrent(mixer, tp, _rows(mixer.out_proj, tp, f"{path}.self_attn.out_proj"))
    if isinstance(layer.mlp, FFNSpec):
        changes["mlp"] = _ffn(layer.mlp, tp, path)
    elif isinstance(layer.mlp, MoESpec):
        changes["mlp"] = _moe(layer.mlp, parallel, path)
    return replace(layer, **changes)  # type: ignore[arg-type]


def _attention(node: AttentionSpec, tp: int, path: str) -> AttentionSpec:
    heads, kv_heads = node.num_attention_heads // tp, max(node.num_key_value_heads // tp, 1)
    share = kv_heads * node.head_dim / node.k_proj.n
    norms = {
        name: replace(norm, size=max(norm.size // tp, node.head_dim))
        for name in ("q_norm", "k_norm")
        if (norm := getattr(node, name)) is not None and norm.size > node.head_dim
    }
    return replace(
        node,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        q_proj=_columns(node.q_proj, tp),
        k_proj=replace(node.k_proj, n=int(node.k_proj.n * share)),
        v_proj=replace(node.v_proj, n=int(node.v_proj.n * share)),
        o_proj=_rows(node.o_proj, tp, f"{path}.self_attn.o_proj"),
        cache=replace(node.cache, heads=node.cache.heads[:kv_heads]),
        **norms,  # type: ignore[arg-type]
    )


def _latent(node: LatentAttentionSpec, tp: int, path: str) -> LatentAttentionSpec:
    return replace(
        node,
        num_attention_heads=node.num_attention_heads // tp,
        q_b_proj=_columns(node.q_b_proj, tp),
        kv_b_proj=_columns(node.kv_b_proj, tp),
        o_proj=_rows(node.o_proj, tp, f"{path}.self_attn.o_proj"),
    )


def _ffn(node: FFNSpec, tp: int, path: str) -> FFNSpec:
    gate = None if node.gate_proj is None else _columns(node.gate_proj, tp)
    down = _rows(node.down_proj, tp, f"{path}.mlp.down_proj")
    return replace(node, gate_proj=gate, up_proj=_columns(node.up_proj, tp), down_proj=down)


def _moe(node: MoESpec, parallel: Parallel, path: str) -> MoESpec:
    """Experts whole over `ep` ranks, and their neurons cut over the rest of the tensor-parallel ranks."""
    cut = 1 if parallel.exchange else parallel.tp // parallel.ep
    shared = None if node.shared is None else _ffn(node.shared, parallel.tp, path)
    if node.experts.intermediate_size % cut:
        raise SpecError(
            f"tp={parallel.tp} with ep={parallel.ep} cuts experts of {node.experts.intermediate_size} neurons into {cut}, "
            f"which does not divide. Allowed: ep={parallel.tp}."
        )
    experts = _ffn(_padded(node.experts, cut), cut, path)
    return replace(node, experts=experts, shared=shared, ranks=parallel.ep, exchange=parallel.exchange)


def _padded(ffn: FFNSpec, cut: int) -> FFNSpec:
    """Experts in mxfp4 are padded with neurons of zeros until every part is whole blocks, as engines do."""
    if ffn.down_proj.format.kind != "mxfp4":
        return ffn
    whole = cut * MX_BLOCK
    size = -(-ffn.intermediate_size // whole) * whole
    gate = None if ffn.gate_proj is None else replace(ffn.gate_proj, n=size)
    return replace(ffn, gate_proj=gate, up_proj=replace(ffn.up_proj, n=size), down_proj=replace(ffn.down_proj, k=size))


def _columns(node: LinearSpec, tp: int) -> LinearSpec:
    """Outputs are cut."""
    return replace(node, n=node.n // tp)


def _rows(node: LinearSpec, tp: int, path: str) -> LinearSpec:
    """Inputs are cut; groups and blocks of a packed format run along them and must stay whole."""
    cut = replace(node, k=node.k // tp)
    try:
        cut.nbytes()
    except SpecError as error:
        raise SpecError(f"tp={tp} cuts {path} to {cut.k} inputs: {error}") from None
    return cut
