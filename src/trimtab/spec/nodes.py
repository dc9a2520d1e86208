"""What a model is: small frozen nodes, from the whole model down to one linear layer.

Layers may differ (sliding windows, experts, pruned widths), so nothing here holds a repeat count except experts, which
are one node with `num_experts`. Every node knows its parameters and its resident bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec import tree
from trimtab.spec.cache import CacheSpec, PageFormat, page_format
from trimtab.spec.formats import ACT_KINDS, BF16, ITEM_BYTES, SCALED_KINDS, WeightFormat, float_format, weights_name
from trimtab.spec.tree import Edit, Node, Written

# ------------------------------------------------------------------------------------------------------------- leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec(Node):
    """``y[T, n] = x[T, k] @ W.T (+ bias)``.

    Args:
        n: output features.
        k: input features.
        bias: True if a bias of n elements is added; it is stored in `bias_format`.
        format: how the matrix is stored.
        layout: ``row`` stores W [n, k]; ``transposed`` stores W.T [k, n] (groups then run along n), so that one input
            feature is one contiguous row that can be skipped.
        act: how the input is coded for the product: ``none`` (as the activations are: a packed matrix is then decoded for it),
            ``fp8``, ``int8`` or ``fp4``.
    """

    n: int
    k: int
    bias: bool = False
    format: WeightFormat = BF16
    bias_format: WeightFormat = BF16
    layout: str = "row"
    act: str = "none"

    def __post_init__(self) -> None:
        if self.layout not in ("row", "transposed"):
            raise SpecError(f"layout '{self.layout}' is not known. Allowed: row, transposed.")
        if self.act not in ACT_KINDS:
            raise unknown("input format", self.act, ACT_KINDS)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(rows, columns) as stored: [n, k], or [k, n] when transposed."""
        return (self.n, self.k) if self.layout == "row" else (self.k, self.n)

    def num_parameters(self) -> int:
        """Weights plus bias."""
        return self.n * self.k + (self.n if self.bias else 0)

    def nbytes(self) -> int:
        """Resident bytes: every buffer of the format plus the bias."""
        bias = self.bias_format.nbytes(1, self.n) if self.bias else 0
        return self.format.nbytes(*self.stored_shape) + bias


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec(Node):
    """A table of n rows of k; `scale` multiplies the looked-up rows, `offset` is added to the ids (OPT positions)."""

    n: int
    k: int
    format: WeightFormat = BF16
    scale: float = 1.0
    offset: int = 0

    def num_parameters(self) -> int:
        """Elements of the table."""
        return self.n * self.k

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(self.n, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec(Node):
    """RMSNorm (``kind="rms"``) or LayerNorm (``kind="layer"``) over `size` elements; `unit_offset`: scale by 1 + w.

    `weight`: False for a norm without parameters.
    """

    size: int
    kind: str = "rms"
    eps: float = 1e-5
    bias: bool = False
    unit_offset: bool = False
    format: WeightFormat = BF16
    weight: bool = True

    def num_parameters(self) -> int:
        """Scale plus bias."""
        return self.size * (self.weight + self.bias)

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(1, self.size) * (self.weight + self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec(Node):
    """Causal convolution over the last `kernel` tokens, every channel by itself."""

    channels: int
    kernel: int
    bias: bool = False
    format: WeightFormat = BF16

    def num_parameters(self) -> int:
        """Weights plus bias."""
        return self.channels * (self.kernel + self.bias)

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(self.channels, self.kernel + self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding over the first `dim` elements of a head.

    Args:
        dim: rotated elements (may be fewer than head_dim).
        theta: base.
        scaling: ``(("rope_type", "llama3"), ("factor", 8.0), ...)`` as in the HF config; empty = none.
    """

    dim: int
    theta: float = 10000.0
    scaling: tuple[tuple[str, object], ...] = ()


# ----------------------------------------------------------------------------------------------------------- executors


@dataclass(frozen=True, slots=True)
class Dense:
    """Every neuron is computed."""


@dataclass(frozen=True, slots=True)
class GateFirst:
    """The gate decides which rows of up and down are read.

    Args:
        expected: share of active neurons per token.
        max_tokens: most tokens of one pass that still skip rows; longer passes threshold the gate and stay dense.
        threshold_prefill: False leaves passes longer than `max_tokens` untouched.
    """

    expected: float
    max_tokens: int = 4
    threshold_prefill: bool = True


Executor = Dense | GateFirst
DENSE = Dense()

# -------------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec(Node):
    """Grouped-query attention.

    Args:
        q_norm, k_norm: over each head (size head_dim), or over all heads together (size heads * head_dim).
        window: tokens a query sees, itself included (sliding window); None = all.
        chunk: a query sees the tokens of its own chunk of the sequence alone (Llama 4); None = all.
        gated: q_proj yields for every head a gate as well, whose sigmoid scales the output (Qwen3-Next).
        v_norm: over each value head (Gemma 4).
        tied_values: values are the keys as projected, so v_proj owns no weights and does not run (Gemma 4).
        softcap: ``cap * tanh(score / cap)`` on the scores (Gemma 2); None = off.
        scale: factor on q.k; the family's default is 1/sqrt(head_dim).
        rope: None for learned positions or ALiBi.
        alibi: True adds the ALiBi bias (BLOOM).
        sinks: True if every query head has a learned sink logit (gpt-oss).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    q_proj: LinearSpec
    k_proj: LinearSpec
    v_proj: LinearSpec
    o_proj: LinearSpec
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    rope: RopeSpec | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    scale: float = 1.0
    alibi: bool = False
    sinks: bool = False
    gated: bool = False
    v_norm: NormSpec | None = None
    tied_values: bool = False
    cache: CacheSpec

    def num_parameters(self) -> int:
        """Sink logits only; the projections are nodes of their own."""
        return self.num_attention_heads if self.sinks else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionSpec(Node):
    """Multi-head latent attention (DeepSeek): the cache holds one latent of kv_lora_rank + qk_rope_head_dim per token.

    The cache is one head whose key is the latent with its rope part and whose value is shared with it (v_head_dim 0).
    """

    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_a_proj: LinearSpec | None
    q_a_layernorm: NormSpec | None
    q_b_proj: LinearSpec
    kv_a_proj_with_mqa: LinearSpec
    kv_a_layernorm: NormSpec
    kv_b_proj: LinearSpec
    o_proj: LinearSpec
    rope: RopeSpec
    scale: float = 1.0
    cache: CacheSpec

    def num_parameters(self) -> int:
        """None of its own."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpaceSpec(Node):
    """Mamba-2: ``S = a S + dt B x', y = C S + D x`` per head, with B and C shared by the heads of a group.

    Args:
        num_heads, head_dim, state_size: a head carries head_dim x state_size numbers.
        num_groups: of B and C.
        chunk: tokens that are worked on as one block of matrix products in a prompt.
        in_proj: yields gate (heads x head_dim), what the convolution reads (x, B, C) and one dt per head.
        norm: over the output times its gate.
        cache: no KV heads; the state, and the last tokens of the convolution.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    chunk: int
    in_proj: LinearSpec
    conv1d: ConvSpec
    norm: NormSpec
    out_proj: LinearSpec
    cache: CacheSpec

    @property
    def inner_size(self) -> int:
        """Width of x, gate and output."""
        return self.num_heads * self.head_dim

    @property
    def state_elements(self) -> int:
        """Numbers all heads carry."""
        return self.inner_size * self.state_size

    def num_parameters(self) -> int:
        """A, D and the bias of dt, one each per head; the rest are nodes of their own."""
        return 3 * self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionSpec(Node):
    """Gated delta rule (Qwen3-Next): ``S = a S (1 - b k k') + b v k', y = S q`` per value head.

    Args:
        num_key_heads, key_head_dim: of q and k; a key head serves num_heads / num_key_heads value heads.
        num_heads, head_dim: value heads; each carries key_head_dim x head_dim numbers.
        chunk: tokens that are worked on as one block of matrix products in a prompt.
        in_proj_qkvz: yields q, k, v and the gate; in_proj_ba two numbers per value head.
        norm: over each head, times its gate.
        cache: no KV heads; the state, and the last tokens of the convolution.
    """

    num_heads: int
    head_dim: int
    num_key_heads: int
    key_head_dim: int
    chunk: int
    in_proj_qkvz: LinearSpec
    in_proj_ba: LinearSpec
    conv1d: ConvSpec
    norm: NormSpec
    out_proj: LinearSpec
    cache: CacheSpec

    @property
    def num_groups(self) -> int:
        """Groups of heads that share a key, as a state-space layer calls them."""
        return self.num_key_heads

    @property
    def inner_size(self) -> int:
        """Width of v, gate and output."""
        return self.num_heads * self.head_dim

    @property
    def state_elements(self) -> int:
        """Numbers all heads carry."""
        return self.inner_size * self.key_head_dim

    def num_parameters(self) -> int:
        """A and the bias of the decay, one each per value head; the rest are nodes of their own."""
        return 2 * self.num_heads


#: What mixes the tokens of a layer.
Mixer = AttentionSpec | LatentAttentionSpec | StateSpaceSpec | LinearAttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNSpec(Node):
    """Gated (``down(act(gate(x)) * up(x))``) or plain (``down(act(up(x)))``, gate_proj None) feed-forward block."""

    gate_proj: LinearSpec | None
    up_proj: LinearSpec
    down_proj: LinearSpec
    act: str = "silu"
    executor: Executor = DENSE

    @property
    def intermediate_size(self) -> int:
        """Neurons."""
        return self.up_proj.n


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec(Node):
    """Mixture of experts: `experts` is one node that stands for `num_experts` equal ones.

    Args:
        scoring: ``softmax`` or ``sigmoid`` of the router logits.
        norm_topk_prob: True if the weights of the chosen experts are normalised to 1.
        routed_scaling: factor on the routed output.
        shared: expert every token runs; `shared_gate` scales it by a sigmoid (Qwen2-MoE).
        correction_bias: True if a learned fp32 bias per expert is added to the scores when experts are chosen, and only
            then (DeepSeek-V3); its weight is ``<path>.correction_bias``.
        num_groups, topk_groups: experts fall into `num_groups` equal groups, of which the `topk_groups` best take part.
        expert_norm: router and experts read the layer's residual through norms of their own, the router's being `router_norm`
            (Gemma 4); None: what the shared expert reads.
        expert_output_norm, shared_output_norm: of both outputs before they are summed.
        expert_scale: True if a learned factor per expert scales its weight.
        ranks: ranks the experts are spread over; this one holds num_experts / ranks of them, whole.
        exchange: True if every rank brings tokens of its own, which travel to their experts and back (all-to-all); False if
            all ranks see the same tokens and their outputs are summed.
    """

    router: LinearSpec
    experts: FFNSpec
    num_experts: int
    num_experts_per_tok: int
    shared: FFNSpec | None = None
    shared_gate: LinearSpec | None = None
    scoring: str = "softmax"
    norm_topk_prob: bool = True
    routed_scaling: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    router_norm: NormSpec | None = None
    expert_norm: NormSpec | None = None
    expert_output_norm: NormSpec | None = None
    shared_output_norm: NormSpec | None = None
    expert_scale: bool = False
    ranks: int = 1
    exchange: bool = False

    def num_parameters(self) -> int:
        """Correction bias and scales only; router and experts are nodes of their own."""
        return self.num_experts * (self.correction_bias + self.expert_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec(Node):
    """One decoder layer: norm, attention, norm, MLP.

    `parallel`: both read the layer's input; through the first norm where there is no second one (Phi-2), each through its
    own norm otherwise (GPT-NeoX). A layer may lack its mixer or its MLP, and then the norm before it as well (Nemotron-H).
    `ranks`: this is one of as many tensor-parallel slices of the layer, so the output of
    each block is summed over them.
    """

    input_layernorm: NormSpec | None
    self_attn: Mixer | None
    attn_output_norm: NormSpec | None = None
    post_attention_layernorm: NormSpec | None
    mlp: FFNSpec | MoESpec | None
    mlp_output_norm: NormSpec | None = None
    parallel: bool = False
    ranks: int = 1

    @property
    def cache(self) -> CacheSpec:
        """The cache of its mixer; an empty one where it has none."""
        return _NO_CACHE if self.self_attn is None else self.self_attn.cache


_NO_CACHE = CacheSpec()


@dataclass(frozen=True, slots=True)
class TokenFilter:
    """Run layers 0..layer on the whole prompt, keep the `topk` best tokens (scores pooled over `pool`), start afresh."""

    layer: int
    topk: int
    pool: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSpec(Node):
    """What happens to the tokens around the block loop."""

    filter: TokenFilter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(Node):
    """A whole decoder-only language model. `history` remembers who edited what; it takes no part in equality or hash.

    `ranks`: embedding and head are one of as many slices of the vocabulary (`graph.shard`).
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    act_dtype: str = "bf16"
    embed_tokens: EmbeddingSpec
    embed_positions: EmbeddingSpec | None = None
    embed_norm: NormSpec | None = None
    layers: tuple[LayerSpec, ...]
    norm: NormSpec | None
    lm_head: LinearSpec
    tie_word_embeddings: bool = False
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    flow: FlowSpec = FlowSpec()
    ranks: int = 1
    history: tuple[Written, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def num_hidden_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def act_bytes(self) -> int:
        """Bytes of one activation element."""
        return ITEM_BYTES[self.act_dtype]

    @property
    def hash(self) -> str:
        """Hex digest of everything that defines the model; keys caches, artefacts and ledger rows."""
        return _hash(self)

    def edit(self, edits: Iterable[Edit], by: str) -> ModelSpec:
        """Return a copy with the edits made in the name of `by`.

        Raises:
            SpecError: an edit names no node or no field.
            Conflict: another writer set the same field to another value.
        """
        edited, history = tree.edit(self, edits, by, self.history)
        return dataclasses.replace(edited, history=history)

    def linears(self) -> Iterator[tuple[str, LinearSpec]]:
        """Yield (path, node) of every linear, lm_head included."""
        for path, node in tree.walk(self):
            if isinstance(node, LinearSpec):
                yield path, node

    def node(self, path: str) -> Node:
        """Return the node at `path`.

        Raises:
            SpecError: there is none.
        """
        for found, node in tree.walk(self):
            if found == path:
                return node
        raise SpecError(f"{self.name} has no node '{path}'.")

    def num_parameters(self) -> int:
        """Parameters, ties counted once."""
        return self._sum_owned(lambda node: node.num_parameters() if hasattr(node, "num_parameters") else 0)  # type: ignore[attr-defined]

    def weight_nbytes(self) -> int:
        """Resident bytes of all weights, ties once."""
        return self._sum_owned(weight_nbytes)

    def _sum_owned(self, of: Callable[[Node], int]) -> int:
        """Sum of `of` over all nodes that own weights; layers that are one object are asked once."""

        def total(layers: tuple[LayerSpec, ...]) -> int:
            part = dataclasses.replace(self, layers=layers)
            return sum(of(node) * count for _, node, count in owned(part))

        rest = total(())
        once = {id(layer): total((layer,)) - rest for layer in {id(layer): layer for layer in self.layers}.values()}
        return rest + sum(once[id(layer)] for layer in self.layers)

    def kv_nbytes(self, tokens: int) -> int:
        """Bytes the cache of one sequence holds after `tokens` tokens, recurrent states included."""
        return sum(layer.cache.nbytes(tokens).held for layer in self.layers)

    def state_nbytes(self) -> int:
        """Of these the bytes that do not depend on tokens: the states of recurrent layers."""
        return sum(layer.cache.state_bytes for layer in self.layers)

    def with_dtype(self, dtype: str, kv_dtype: str | None = None, *, keep_packed: bool = True) -> ModelSpec:
        """Return the model with float weights and activations in `dtype` and the cache in `kv_dtype`.

        Args:
            dtype: ``float32 | bfloat16 | float16``; ``fp8``: activations, norms, embeddings, routers and the head in bf16, every
                other matrix in fp8 with its input coded as fp8; ``mxfp4``: the same with mxfp4 matrices and inputs left in
                bf16, and where the model has experts, in them alone (gpt-oss).
            kv_dtype: a floating dtype, ``fp8``, ``int8`` or ``int4`` (``int4-g32``: groups of 32); None = as the activations.
            keep_packed: leave matrices that are not plain floats as they are (True) or store them as `dtype` too.

        Raises:
            SpecError: a dtype of another name, or rows that do not divide into blocks.
        """
        name = weights_name(dtype)
        weights = float_format("bf16" if name in SCALED_KINDS else name)
        page = page_format(kv_dtype or weights.kind)

        done: dict[int, Node] = {}  # equal layers are one object more often than not

        def once(node: Node) -> Node:
            if id(node) not in done:
                done[id(node)] = convert(node)
            return done[id(node)]

        def convert(node: Node) -> Node:
            updates: dict[str, object] = {}
            for field in dataclasses.fields(node):  # type: ignore[arg-type]
                value = getattr(node, field.name)
                if isinstance(value, Node):
                    updates[field.name] = convert(value)
                elif isinstance(value, tuple) and value and isinstance(value[0], Node):
                    updates[field.name] = tuple(once(item) for item in value)
                elif isinstance(value, WeightFormat) and (value.is_float or not keep_packed):
                    updates[field.name] = weights
                    if isinstance(node, LinearSpec) and field.name == "format":
                        updates["act"] = "none"
                elif isinstance(value, PageFormat):
                    updates[field.name] = page
            return dataclasses.replace(node, **updates)  # type: ignore[type-var]

        converted = convert(self)
        assert isinstance(converted, ModelSpec)
        converted = dataclasses.replace(converted, act_dtype=weights.kind)
        return converted._coded(name) if name in SCALED_KINDS else converted

    def _coded(self, kind: str) -> ModelSpec:
        """The matrices that checkpoints in fp8 or mxfp4 hold so, as `with_dtype` says."""
        experts_only = kind == "mxfp4" and any(isinstance(layer.mlp, MoESpec) for layer in self.layers)
        values = {"format": WeightFormat(kind=kind), "act": "fp8" if kind == "fp8" else "none"}

        def coded(layer: LayerSpec) -> LayerSpec:
            one = dataclasses.replace(self, layers=(layer,))
            edits = [
                Edit(path, field, value)
                for path, node in one.linears()
                if node.format.is_float and path.rpartition(".")[2] not in ("lm_head", "router", "shared_gate")
                if not experts_only or ".experts." in path
                for field, value in values.items()
            ]
            return tree.edit(one, edits, kind, ())[0].layers[0]  # type: ignore[attr-defined]

        done = {id(layer): coded(layer) for layer in {id(layer): layer for layer in self.layers}.values()}
        return dataclasses.replace(self, layers=tuple(done[id(layer)] for layer in self.layers))


def weight_nbytes(node: Node) -> int:
    """Resident weight bytes of one node, its children excluded."""
    if isinstance(node, LinearSpec | EmbeddingSpec | NormSpec | ConvSpec):
        return node.nbytes()
    if isinstance(node, StateSpaceSpec | LinearAttentionSpec):
        return node.out_proj.bias_format.nbytes(1, node.num_parameters())
    if isinstance(node, AttentionSpec) and node.sinks:
        return node.num_attention_heads * node.q_proj.bias_format.nbytes(1, 1)
    if isinstance(node, MoESpec):
        bias = node.num_experts * ITEM_BYTES["fp32"] if node.correction_bias else 0
        return bias + (node.router.bias_format.nbytes(1, node.num_experts) if node.expert_scale else 0)
    if isinstance(node, FFNSpec) and isinstance(node.executor, GateFirst):
        return ITEM_BYTES["fp32"]  # the threshold
    return 0


def owned(spec: ModelSpec) -> Iterator[tuple[str, Node, int]]:
    """Yield (path, node, count) of every node that owns weights; what is tied owns none, experts count num_experts."""

    def below(node: Node, path: str, count: int) -> Iterator[tuple[str, Node, int]]:
        for name, child in tree.children(node):
            here = f"{path}.{name}" if path else name
            if here == "lm_head" and spec.tie_word_embeddings:
                continue
            if name == "v_proj" and isinstance(node, AttentionSpec) and node.tied_values:
                continue
            held = node.num_experts // node.ranks if isinstance(node, MoESpec) and name == "experts" else 1
            times = count * held
            yield here, child, times
            yield from below(child, here, times)

    yield from below(spec, "", 1)


@functools.lru_cache(maxsize=64)
def _hash(spec: ModelSpec) -> str:
    seen: dict[int, object] = {}

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if id(value) not in seen:
                fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
                seen[id(value)] = {"type": type(value).__name__, **fields}
            return seen[id(value)]
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return hashlib.sha256(json.dumps(plain(spec), sort_keys=True).encode()).hexdigest()
