"""From a ModelSpec to the ops of one forward pass, in the order in which they run."""

from __future__ import annotations

from typing import Literal

from trimtab.errors import SpecError
from trimtab.graph.coded import is_coded
from trimtab.graph.ops import Graph, Op, Value
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import (
    AttentionSpec,
    FFNSpec,
    GateFirst,
    LatentAttentionSpec,
    LayerSpec,
    LinearAttentionSpec,
    Mixer,
    MoESpec,
    StateSpaceSpec,
)
from trimtab.spec.product import Int8Vector
from trimtab.spec.tree import Node

Phase = Literal["prefill", "decode"]


def build(
    spec: ModelSpec, phase: Phase = "decode", *, head: bool = True, layers: int | None = None, cache: bool = True
) -> Graph:
    """Return the graph of one pass.

    Args:
        spec: the model.
        phase: matters for latent attention alone: ``prefill`` expands keys and values, ``decode`` absorbs the expansion
            into queries and outputs.
        head: with the final norm and the head; False for a pass that wants no logits.
        layers: how many layers run; None = all.
        cache: False for a pass that keeps nothing, such as the filter pass over a whole prompt.
    """
    build = _Builder(spec.act_dtype, phase, cache)
    x = build.emit("embed_tokens", "embed", spec.embed_tokens, (), spec.hidden_size)
    x = build.sum_over_ranks("embed_tokens", spec, spec.ranks, x)
    if spec.embed_positions is not None:
        x = build.emit("embed_positions", "embed", spec.embed_positions, (x,), spec.hidden_size)
    if spec.embed_norm is not None:
        x = build.emit("embed_norm", "norm", spec.embed_norm, (x,), spec.hidden_size)
    # Equal layers become one object, so that ops equal but for their name are found by identity.
    same: dict[LayerSpec, LayerSpec] = {}
    for index, layer in enumerate(spec.layers[:layers]):
        x = build.layer(f"layers.{index}", same.setdefault(layer, layer), x)
    if head:
        if spec.norm is not None:
            x = build.emit("norm", "norm", spec.norm, (x,), spec.hidden_size, rows="logits")
        x = build.linear("lm_head", spec.lm_head, x, rows="logits")
        if spec.ranks > 1:
            x = build.emit("lm_head.all_gather", "all_gather", spec, (x,), spec.vocab_size, rows="logits")
        if spec.logit_softcap is not None:
            build.emit("logit_softcap", "softcap", spec, (x,), x.width, rows="logits")
    return Graph(tuple(build.ops))


def filter_graph(spec: ModelSpec) -> Graph:
    """The pass of a token filter over one whole prompt, without a cache.

    Layers before the filter layer run whole; of the filter layer only what queries and keys need; then come the scores.

    Args:
        spec: a model whose flow has a filter.
    """
    chosen = spec.flow.filter
    assert chosen is not None, "the model has no token filter"
    path = f"layers.{chosen.layer}"
    ops = [*build(spec, "prefill", head=False, layers=chosen.layer + 1, cache=False).ops]
    attention = spec.layers[chosen.layer].self_attn
    if not isinstance(attention, AttentionSpec):
        raise SpecError(f"The token filter needs grouped-query attention in layer {chosen.layer}. Name another layer.")
    attend = next(index for index, op in enumerate(ops) if op.name == f"{path}.self_attn.attend")
    q, k = ops[attend].reads[:2]
    ops = [op for op in ops[:attend] if not op.name.startswith(f"{path}.self_attn.v_proj")]
    return Graph(
        (*ops, Op("flow.score", "score", attention, (q, k), (Value("flow.score", 1, spec.act_dtype),), spec.flow))
    )


class _Builder:
    """Appends ops and hands out the values they write."""

    def __init__(self, dtype: str, phase: Phase, cache: bool) -> None:
        self.ops: list[Op] = []
        self.dtype, self.phase, self.cache = dtype, phase, cache

    def emit(
        self,
        name: str,
        kind: str,
        node: Node,
        reads: tuple[Value, ...],
        width: int,
        owner: Node | None = None,
        rows: str = "tokens",
    ) -> Value:
        """Append an op that writes one value of `width`; the value has the op's name."""
        value = Value(name, width, self.dtype, rows)
        self.ops.append(Op(name, kind, node, reads, (value,), owner))
        return value

    def linear(
        self,
        path: str,
        node: LinearSpec,
        x: Value,
        owner: Node | None = None,
        kind: str = "linear",
        rows: str = "tokens",
    ) -> Value:
        if is_coded(node) and kind == "linear":
            return self.coded(path, node, x, rows)
        return self.emit(path, kind, node, (x,), node.n, owner, rows)

    def coded(self, path: str, node: LinearSpec, x: Value, rows: str) -> Value:
        """A product in int8: outlier columns found, codes of the rest, sums, what they stand for, and the outliers added."""
        product = node.product
        assert isinstance(product, Int8Vector)
        codes, sums = Value(f"{path}.quantize", node.k, "i8", rows), Value(path, node.n, "int32", rows)
        columns: tuple[Value, ...] = ()
        if product.decomposes:
            columns = (self.emit(f"{path}.find", "find", node, (x,), product.outliers_expected(node.k), rows=rows),)
        self.ops.append(Op(codes.name, "quantize", node, (x,), (codes,)))
        self.ops.append(Op(path, "linear", node, (codes,), (sums,)))
        y = self.emit(f"{path}.dequantize", "dequantize", node, (sums,), node.n, rows=rows)
        return self.emit(f"{path}.outliers", "outliers", node, (*columns, y), node.n, rows=rows) if columns else y

    def norm(self, path: str, node: Node | None, x: Value) -> Value:
        """A norm, or nothing where the model has none."""
        return x if node is None else self.emit(path, "norm", node, (x,), x.width)

    def sum_over_ranks(self, path: str, node: Node, ranks: int, x: Value) -> Value:
        """An all-reduce behind a block of which this rank computed a part."""
        return self.emit(f"{path}.all_reduce", "all_reduce", node, (x,), x.width) if ranks > 1 else x

    def layer(self, path: str, layer: LayerSpec, x: Value) -> Value:
        """One decoder layer."""
        if layer.self_attn is None:
            normed = self.norm(f"{path}.post_attention_layernorm", layer.post_attention_layernorm, x)
            return self.mlp(path, layer, x, normed)
        normed = self.norm(f"{path}.input_layernorm", layer.input_layernorm, x)
        attended = self.mixer(f"{path}.self_attn", layer.self_attn, normed)
        if not layer.parallel:  # else both blocks are summed first, then over the ranks once
            attended = self.sum_over_ranks(f"{path}.self_attn", layer, layer.ranks, attended)
        attended = self.norm(f"{path}.attn_output_norm", layer.attn_output_norm, attended)
        if not layer.parallel:
            x = self.emit(f"{path}.add_attn", "add", layer, (x, attended), x.width)
            normed = x
        elif layer.post_attention_layernorm is not None:
            normed = x
        normed = self.norm(f"{path}.post_attention_layernorm", layer.post_attention_layernorm, normed)
        return self.mlp(path, layer, x, normed, attended)

    def mlp(self, path: str, layer: LayerSpec, x: Value, normed: Value, attended: Value | None = None) -> Value:
        """The second half of a layer; a parallel one adds `attended` here as well."""
        if layer.mlp is None:
            return x
        if isinstance(layer.mlp, FFNSpec):
            out = self.ffn(f"{path}.mlp", layer.mlp, normed)
        else:
            out = self.moe(f"{path}.mlp", layer.mlp, normed, x)
        out = self.sum_over_ranks(f"{path}.mlp", layer, layer.ranks, out)
        out = self.norm(f"{path}.mlp_output_norm", layer.mlp_output_norm, out)
        if layer.parallel and attended is not None:
            x = self.emit(f"{path}.add_attn", "add", layer, (x, attended), x.width)
        return self.emit(f"{path}.add_mlp", "add", layer, (x, out), x.width)

    def mixer(self, path: str, node: Mixer, x: Value) -> Value:
        """What mixes the tokens of a layer."""
        if isinstance(node, AttentionSpec):
            return self.attention(path, node, x)
        if isinstance(node, LatentAttentionSpec):
            return self.latent_attention(path, node, x)
        if isinstance(node, StateSpaceSpec):
            return self.state_space(path, node, x)
        return self.linear_attention(path, node, x)

    def attention(self, path: str, node: AttentionSpec, x: Value) -> Value:
        """Projections, norms of q and k, rope, cache, attention, what the cache then gives up, output projection."""
        if node.gated:
            q, gate = self.split(f"{path}.q_proj", node.q_proj, x, q=node.q_proj.n // 2, gate=node.q_proj.n // 2)
        else:
            q, gate = self.linear(f"{path}.q_proj", node.q_proj, x), None
        k = self.linear(f"{path}.k_proj", node.k_proj, x)
        v = k if node.tied_values else self.linear(f"{path}.v_proj", node.v_proj, x)
        q = self.norm(f"{path}.q_norm", node.q_norm, q)
        k = self.norm(f"{path}.k_norm", node.k_norm, k)
        v = self.norm(f"{path}.v_norm", node.v_norm, v)
        if node.rope is not None:
            q, k = self.rope(path, node, q, k)
        if self.cache:
            self.ops.append(Op(f"{path}.append", "append", node, (k, v), ()))
        read = (q,) if self.cache else (q, k, v)
        out = self.emit(f"{path}.attend", "attend", node, read, node.o_proj.k)
        if self.cache and any(head.policy or head.thin for head in node.cache.heads):
            self.ops.append(Op(f"{path}.evict", "evict", node, (), ()))
        if gate is not None:
            out = self.emit(f"{path}.gate", "gate", node, (out, gate), out.width)
        return self.linear(f"{path}.o_proj", node.o_proj, out)

    def rope(self, path: str, node: Node, q: Value, k: Value) -> tuple[Value, Value]:
        """Rotate q and k."""
        name = f"{path}.rope"
        rotated = Value(f"{name}.q", q.width, self.dtype), Value(f"{name}.k", k.width, self.dtype)
        self.ops.append(Op(name, "rope", node, (q, k), rotated))
        return rotated

    def latent_attention(self, path: str, node: LatentAttentionSpec, x: Value) -> Value:
        """Multi-head latent attention: the cache holds one latent per token for all heads."""
        q = x
        if node.q_a_proj is not None:
            q = self.linear(f"{path}.q_a_proj", node.q_a_proj, q)
            q = self.norm(f"{path}.q_a_layernorm", node.q_a_layernorm, q)
        q = self.linear(f"{path}.q_b_proj", node.q_b_proj, q)
        latent = self.linear(f"{path}.kv_a_proj_with_mqa", node.kv_a_proj_with_mqa, x)
        latent = self.norm(f"{path}.kv_a_layernorm", node.kv_a_layernorm, latent)
        q, latent = self.rope(path, node, q, latent)
        self.ops.append(Op(f"{path}.append", "append", node, (latent,), ()))
        heads, rank = node.num_attention_heads, node.kv_lora_rank
        width = heads * node.v_head_dim
        if self.phase == "prefill":
            expanded = self.emit(f"{path}.kv_b_proj", "expand", node, (), node.kv_b_proj.n, rows="keys")
            out = self.emit(f"{path}.attend", "attend_expanded", node, (q, expanded), width)
        else:
            q = self.emit(f"{path}.q_absorb", "absorb_q", node, (q,), heads * (rank + node.qk_rope_head_dim))
            out = self.emit(f"{path}.attend", "attend_latent", node, (q,), heads * rank)
            out = self.emit(f"{path}.v_absorb", "absorb_v", node, (out,), width)
        return self.linear(f"{path}.o_proj", node.o_proj, out)

    def split(self, path: str, node: LinearSpec, x: Value, **widths: int) -> tuple[Value, ...]:
        """A matrix whose outputs go different ways."""
        parts = tuple(Value(f"{path}.{name}", width, self.dtype) for name, width in widths.items())
        self.ops.append(Op(path, "linear", node, (x,), parts))
        return parts

    def state_space(self, path: str, node: StateSpaceSpec, x: Value) -> Value:
        """Mamba-2: projection, convolution, scan, gated norm, output projection."""
        widths = {"z": node.inner_size, "xbc": node.conv1d.channels, "dt": node.num_heads}
        z, xbc, dt = self.split(f"{path}.in_proj", node.in_proj, x, **widths)
        xbc = self.emit(f"{path}.conv1d", "conv", node.conv1d, (xbc,), xbc.width, node)
        y = self.emit(f"{path}.scan", "scan", node, (xbc, dt), node.inner_size)
        y = self.emit(f"{path}.norm", "norm", node.norm, (y, z), y.width)
        return self.linear(f"{path}.out_proj", node.out_proj, y)

    def linear_attention(self, path: str, node: LinearAttentionSpec, x: Value) -> Value:
        """Gated delta rule: projections, convolution, scan, gated norm, output projection."""
        widths = {"qkv": node.conv1d.channels, "z": node.inner_size}
        qkv, z = self.split(f"{path}.in_proj_qkvz", node.in_proj_qkvz, x, **widths)
        ba = self.linear(f"{path}.in_proj_ba", node.in_proj_ba, x)
        qkv = self.emit(f"{path}.conv1d", "conv", node.conv1d, (qkv,), qkv.width, node)
        y = self.emit(f"{path}.scan", "scan", node, (qkv, ba), node.inner_size)
        y = self.emit(f"{path}.norm", "norm", node.norm, (y, z), y.width)
        return self.linear(f"{path}.out_proj", node.out_proj, y)

    def ffn(self, path: str, node: FFNSpec, x: Value, experts: MoESpec | None = None) -> Value:
        """Gated, plain or gate-first FFN; with `experts`, the chosen experts of every token side by side."""
        kind, owner = ("expert", experts) if experts else ("linear", None)
        times = experts.num_experts_per_tok if experts else 1

        def linear(name: str, value: Value, kind: str = kind, owner: Node | None = owner) -> Value:
            matrix = getattr(node, name)
            if experts is None:
                return self.linear(f"{path}.{name}", matrix, value)
            return self.emit(f"{path}.{name}", kind, matrix, (value,), times * matrix.n, owner)

        def act(*reads: Value) -> Value:
            return self.emit(f"{path}.act", "act", node, reads, reads[0].width)

        if node.gate_proj is None:
            return linear("down_proj", act(linear("up_proj", x)))
        gate = linear("gate_proj", x)
        if isinstance(node.executor, GateFirst):
            gate = act(gate)
            up = self.emit(f"{path}.up_proj", "gated_linear", node.up_proj, (x, gate), node.up_proj.n, node)
            return self.emit(f"{path}.down_proj", "gated_linear", node.down_proj, (up,), node.down_proj.n, node)
        return linear("down_proj", act(gate, linear("up_proj", x)))

    def moe(self, path: str, node: MoESpec, x: Value, residual: Value) -> Value:
        """Router, chosen experts, shared expert, weighted sum."""
        routed = x if node.expert_norm is None else residual
        chosen = self.norm(f"{path}.router_norm", node.router_norm, routed)
        router = self.linear(f"{path}.router", node.router, chosen, node, "router")
        routed = self.norm(f"{path}.expert_norm", node.expert_norm, routed)
        width = node.num_experts_per_tok * x.width
        sent = self.emit(f"{path}.dispatch", "all_to_all", node, (routed,), width) if node.exchange else routed
        routed = self.ffn(f"{path}.experts", node.experts, sent, node)
        if node.exchange:
            routed = self.emit(f"{path}.collect", "all_to_all", node, (routed,), width)
        parts = [router, routed]
        if node.expert_output_norm is not None:
            summed = self.emit(f"{path}.combine", "combine", node, (router, routed), x.width)
            summed = self.norm(f"{path}.expert_output_norm", node.expert_output_norm, summed)
            shared = self.ffn(f"{path}.shared", node.shared, x)  # type: ignore[arg-type]
            shared = self.norm(f"{path}.shared_output_norm", node.shared_output_norm, shared)
            return self.emit(f"{path}.add_shared", "add", node, (summed, shared), x.width)
        if node.shared_gate is not None:
            parts.append(self.linear(f"{path}.shared_gate", node.shared_gate, x))
        if node.shared is not None:
            parts.append(self.ffn(f"{path}.shared", node.shared, x))
        return self.emit(f"{path}.combine", "combine", node, tuple(parts), x.width)
