"""What a model is: small frozen nodes, from the whole model down to one linear layer.

Layers may differ (sliding windows, experts, pruned widths), so nothing here holds a repeat count except experts, which
are one node with `num_experts`. Every node knows its parameters and its resident bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec import tree
from trimtab.spec.cache import CacheSpec, PageFormat
from trimtab.spec.formats import BF16, ITEM_BYTES, WeightFormat, dtype_name, float_format
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
    """

    n: int
    k: int
    bias: bool = False
    format: WeightFormat = BF16
    bias_format: WeightFormat = BF16
    layout: str = "row"

    def __post_init__(self) -> None:
        if self.layout not in ("row", "transposed"):
            raise SpecError(f"layout '{self.layout}' is not known. Allowed: row, transposed.")

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
    """RMSNorm (``kind="rms"``) or LayerNorm (``kind="layer"``) over `size` elements; `unit_offset`: scale by 1 + w."""

    size: int
    kind: str = "rms"
    eps: float = 1e-5
    bias: bool = False
    unit_offset: bool = False
    format: WeightFormat = BF16

    def num_parameters(self) -> int:
        """Scale plus bias."""
        return self.size * (2 if self.bias else 1)

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(1, self.size) * (2 if self.bias else 1)


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
    softcap: float | None = None
    scale: float = 1.0
    alibi: bool = False
    sinks: bool = False
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

    def num_parameters(self) -> int:
        """The correction bias only; router and experts are nodes of their own."""
        return self.num_experts if self.correction_bias else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec(Node):
    """One decoder layer: norm, attention, norm, MLP.

    `parallel`: both read the layer's input; through the first norm where there is no second one (Phi-2), each through its
    own norm otherwise (GPT-NeoX).
    """

    input_layernorm: NormSpec | None
    self_attn: AttentionSpec | LatentAttentionSpec
    attn_output_norm: NormSpec | None = None
    post_attention_layernorm: NormSpec | None
    mlp: FFNSpec | MoESpec
    mlp_output_norm: NormSpec | None = None
    parallel: bool = False


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
    """A whole decoder-only language model. `history` remembers who edited what; it takes no part in equality or hash."""

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
        return sum(node.num_parameters() * count for _, node, count in owned(self) if hasattr(node, "num_parameters"))  # type: ignore[attr-defined]

    def weight_nbytes(self) -> int:
        """Resident bytes of all weights, ties once."""
        return sum(weight_nbytes(node) * count for _, node, count in owned(self))

    def kv_nbytes(self, tokens: int) -> int:
        """Bytes the cache of one sequence holds after `tokens` tokens."""
        return sum(layer.self_attn.cache.nbytes(tokens).held for layer in self.layers)

    def with_dtype(self, dtype: str, kv_dtype: str | None = None, *, keep_packed: bool = True) -> ModelSpec:
        """Return the model with float weights and activations in `dtype` and the cache in `kv_dtype`.

        Args:
            dtype: ``float32 | bfloat16 | float16``.
            kv_dtype: the same choices; None = as `dtype`.
            keep_packed: leave block-quantized matrices as they are (True) or store them as `dtype` too.
        """
        weights, page = float_format(dtype), PageFormat(dtype_name(kv_dtype or dtype))

        def convert(node: Node) -> Node:
            updates: dict[str, object] = {}
            for field in dataclasses.fields(node):  # type: ignore[arg-type]
                value = getattr(node, field.name)
                if isinstance(value, Node):
                    updates[field.name] = convert(value)
                elif isinstance(value, tuple) and value and isinstance(value[0], Node):
                    cache: dict[Node, Node] = {}
                    updates[field.name] = tuple(cache.setdefault(item, convert(item)) for item in value)
                elif isinstance(value, WeightFormat) and (value.is_float or not keep_packed):
                    updates[field.name] = weights
                elif isinstance(value, PageFormat):
                    updates[field.name] = page
            return dataclasses.replace(node, **updates)  # type: ignore[type-var]

        converted = convert(self)
        assert isinstance(converted, ModelSpec)
        return dataclasses.replace(converted, act_dtype=weights.kind)


def weight_nbytes(node: Node) -> int:
    """Resident weight bytes of one node, its children excluded."""
    if isinstance(node, LinearSpec | EmbeddingSpec | NormSpec):
        return node.nbytes()
    if isinstance(node, AttentionSpec) and node.sinks:
        return node.num_attention_heads * node.q_proj.bias_format.nbytes(1, 1)
    if isinstance(node, MoESpec) and node.correction_bias:
        return node.num_experts * ITEM_BYTES["fp32"]
    if isinstance(node, FFNSpec) and isinstance(node.executor, GateFirst):
        return ITEM_BYTES["fp32"]  # the threshold
    return 0


def owned(spec: ModelSpec) -> Iterator[tuple[str, Node, int]]:
    """Yield (path, node, count) of every node that owns weights; a tied head owns none, experts count num_experts."""

    def below(node: Node, path: str, count: int) -> Iterator[tuple[str, Node, int]]:
        for name, child in tree.children(node):
            here = f"{path}.{name}" if path else name
            if here == "lm_head" and spec.tie_word_embeddings:
                continue
            times = count * node.num_experts if isinstance(node, MoESpec) and name == "experts" else count
            yield here, child, times
            yield from below(child, here, times)

    yield from below(spec, "", 1)


@functools.lru_cache(maxsize=64)
def _hash(spec: ModelSpec) -> str:
    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
            return {"type": type(value).__name__, **fields}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return hashlib.sha256(json.dumps(plain(spec), sort_keys=True).encode()).hexdigest()
