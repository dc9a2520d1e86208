"""The blocks of a model: attention, recurrent mixers, feed-forward, experts, and the layer that holds them.

Layers may differ (sliding windows, experts, pruned widths), so nothing here holds a repeat count except experts, which
are one node with `num_experts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.cache import Budget, CacheSpec, Ring
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import ConvSpec, LinearSpec, NormSpec, RopeSpec
from trimtab.spec.product import EXACT, Product
from trimtab.spec.tree import Node

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

# ------------------------------------------------------------------------------------------------------------- softmax


@dataclass(frozen=True, slots=True)
class Online:
    """Partial sums of ranges of keys are scaled by the largest score of each when they are joined."""


@dataclass(frozen=True, slots=True)
class Unified:
    """Weights are ``exp(score - phi)`` for one phi, so that partial sums are added as they are.

    Scores are those the softmax sees: with the factor `scale` and the softcap on them.

    Args:
        phi: subtracted from every score of the layer.
        low, high: a query whose largest score leaves ``phi + [low, high]`` is computed again with `Online`.
        recompute: False never does: what leaves the range of the accumulators then becomes inf or nan.

    Raises:
        SpecError: numbers that are not finite, or low >= high.
    """

    phi: float
    low: float
    high: float
    recompute: bool = True

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.phi, self.low, self.high)):
            raise SpecError(
                f"unified softmax: phi={self.phi}, range {self.low}..{self.high} is not possible. Allowed: finite numbers."
            )
        if self.low >= self.high:
            raise SpecError(
                f"unified softmax: the range {self.low}..{self.high} of score - phi is empty. Allowed: low < high. "
                f"Try {min(self.low, self.high)}..{max(self.low, self.high) + (self.low == self.high)}."
            )


Softmax = Online | Unified
ONLINE = Online()

# ------------------------------------------------------------------------------------------------------ sparse prompts


@dataclass(frozen=True, slots=True)
class Prefill:
    """In passes of several tokens a query sees the first `sink` keys and the `local` newest; a single one sees all.

    Args:
        sink: first keys of the sequence.
        local: newest keys of a query, its own included.
        last: queries at the end of a prompt that see everything, as far as the pass that ends it brings them.

    Raises:
        SpecError: a negative number, or no newest key.
    """

    sink: int
    local: int
    last: int = 0

    def __post_init__(self) -> None:
        if self.sink < 0 or self.local < 1 or self.last < 0:
            raise SpecError(
                f"a sparse prompt of sink={self.sink}, local={self.local}, last={self.last}: not possible. "
                "Allowed: sink >= 0, local >= 1, last >= 0."
            )


# -------------------------------------------------------------------------------------------------------------- blocks

#: Orders of the elements of a key.
KEY_ORDERS = ("model", "row", "rms", "random")


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
        softmax: how partial sums of ranges of keys are joined.
        split: keys of one range in decode; None = the kernel's choice.
        key_order: how the elements of a key (and of the queries that meet it) are ordered: ``model``, or ``row``, ``rms``,
            ``random``: each KV head in an order of its own, which the rows of k_proj and q_proj already have and which is a
            weight, ``<path>.key_order``. Scores are the same in any order.
        prefill: keys that the queries of a prompt see; None = all.
        product: how queries meet keys, and weights values; softmax stays exact.
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
    softmax: Softmax = ONLINE
    split: int | None = None
    key_order: str = "model"
    prefill: Prefill | None = None
    product: Product = EXACT
    cache: CacheSpec

    def __post_init__(self) -> None:
        if self.key_order not in KEY_ORDERS:
            raise unknown("order of keys", self.key_order, KEY_ORDERS)
        if self.prefill is None:
            return
        if self.window is not None or self.chunk is not None:
            raise SpecError(
                "A sparse prompt in attention with a window or chunks: not possible. "
                "Allowed: layers whose queries see all keys."
            )
        for head in self.cache.heads:
            if isinstance(head.keep, Ring) or (isinstance(head.keep, Budget) and head.keep.when == "pass"):
                raise SpecError(
                    f"A sparse prompt over a cache that forgets tokens while the prompt runs ({head.keep}): not possible, "
                    "since both hide keys of the same queries. Allowed: a cache that keeps the prompt to its end. "
                    "Use one of the two."
                )

    @property
    def key_order_format(self) -> WeightFormat:
        """How the orders are stored, a row per KV head: element j is the channel of the model at place j; integers of step one."""
        return WeightFormat(kind="int", bits=8, group=self.head_dim, sym=False)

    @property
    def key_order_nbytes(self) -> int:
        """Bytes of the orders; 0 where the model's own is kept."""
        return 0 if self.key_order == "model" else self.key_order_format.nbytes(self.num_key_value_heads, self.head_dim)

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
    """Gated (``down(act(gate(x)) * up(x))``) or plain (``down(act(up(x)))``, gate_proj None) feed-forward block.

    `product`: how the activated gate meets up.
    """

    gate_proj: LinearSpec | None
    up_proj: LinearSpec
    down_proj: LinearSpec
    act: str = "silu"
    executor: Executor = DENSE
    product: Product = EXACT

    def __post_init__(self) -> None:
        if self.product != EXACT and isinstance(self.executor, GateFirst):
            raise SpecError(
                "A feed-forward block that skips rows multiplies gate and up in floats: not possible with another product. "
                "Allowed: a dense block. Use one of the two."
            )

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


NO_FLOW = FlowSpec()
