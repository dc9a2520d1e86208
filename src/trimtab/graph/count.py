"""What an op does in a pass: FLOPs and bytes as exact integers, for one pass or arrays of passes.

Symbols: T new tokens, s and c new and earlier tokens of a row, N query heads, G KV heads, H head size. FLOPs are those of
matrix multiplications, 2 per multiply-add; `vector_flops` is an estimate of the rest and only prices it.

Two attentions are counted. ``eager`` multiplies every new token with every key in view, mask or not, and writes the
scores. ``tiled`` (Flash) skips what the causal mask and the window hide and never writes a score.

Source: Yuan et al., LLM Inference Unveiled, arXiv 2402.16363; Dao, FlashAttention-2, arXiv 2307.08691; DeepSeek-V2, arXiv
2405.04434 (absorbed latent attention).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from trimtab.errors import unknown
from trimtab.graph.attention import (
    DEQUANT,
    SOFTCAP,
    SOFTMAX,
    How,
    append,
    attend,
    attend_expanded,
    attend_latent,
    evict,
    page_coding,
    score_elements,
    within_chunks,
)
from trimtab.graph.coded import dequantize, find, is_coded, outliers, product_counts, quantize
from trimtab.graph.ops import Counts, Group, IntArray, Kernel, Op, StepShape, group
from trimtab.graph.routing import busiest_rank, distinct_experts
from trimtab.spec.formats import ITEM_BYTES
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import weight_nbytes
from trimtab.spec.nodes import FFNSpec, GateFirst, LinearAttentionSpec, MoESpec, StateSpaceSpec

#: How attention runs.
ATTENTIONS = ("eager", "tiled")

# Vector FLOPs per element; the same for every machine, since they only matter where nothing else does.
_NORM = {"rms": 5, "layer": 7}
_ROPE, _ACT, _ADD = 3, 5, 1


def count(item: Op | Kernel, step: StepShape, attention: str = "eager", llc_bytes: int | None = None) -> Counts:
    """Count one op, or the ops of one kernel without the activations that stay inside it.

    Args:
        item: what runs.
        step: passes; counts have the shape of its leading axes.
        attention: ``eager`` or ``tiled``.
        llc_bytes: last-level cache; a tiled kernel whose keys and values of one head exceed it reads them once per query
            tile. None = they fit.

    Raises:
        SpecError: an attention of another name.
    """
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    how = How(attention, llc_bytes)
    total = Counts()
    for op in item.ops if isinstance(item, Kernel) else (item,):
        total = total + _TABLE[op.kind](op, step, how)
    read = sum(value.row_bytes * step.rows(value.rows) for value in item.reads)
    written = sum(value.row_bytes * step.rows(value.rows) for value in item.writes)
    return total + Counts(act_read=read, act_written=written)


def count_all(
    kernels: Iterable[Kernel], step: StepShape, attention: str = "eager", llc_bytes: int | None = None
) -> tuple[tuple[Group, Counts], ...]:
    """Count kernels, those that are equal but for their names once; the counts are of one of them."""
    # An observed count is looked up by name, so then every kernel stands alone.
    groups = tuple(Group(k, (k.name,)) for k in kernels) if step.observed else group(kernels)
    return count_groups(groups, step, attention, llc_bytes)


def count_groups(
    groups: Iterable[Group], step: StepShape, attention: str = "eager", llc_bytes: int | None = None
) -> tuple[tuple[Group, Counts], ...]:
    """Count one kernel of every group."""
    return tuple((same, count(same.kernel, step, attention, llc_bytes)) for same in groups)


def scratch_bytes(op: Op, step: StepShape, attention: str) -> IntArray | int:
    """Bytes an op holds besides what it reads and writes: the scores of eager attention, before and after softmax, and the
    states between the chunks of a scan.

    Eager attention runs the rows of a batch one after the other, so copies of a row add nothing.
    """
    if op.kind == "scan":
        node: Any = op.node
        return _chunks(node, step) * node.cache.states[0].nbytes()
    if attention == "tiled" or not op.kind.startswith("attend"):
        return 0
    return 2 * ITEM_BYTES[op.dtype] * score_elements(op, replace(step, copies=1))


# ---------------------------------------------------------------------------------------------------- linear and norm


def _embed(op: Op, step: StepShape, how: How) -> Counts:
    table: Any = op.node
    tokens = step.tokens
    return Counts(weight_read=tokens * table.format.row_nbytes(table.k), vector_flops=_ADD * tokens * table.k)


def _linear(op: Op, step: StepShape, how: How) -> Counts:
    node: Any = op.node
    return product_counts(op, step) if is_coded(node) else _matrix(node, step.rows(op.writes[0].rows))


def _matrix(node: LinearSpec, rows: IntArray) -> Counts:
    """`rows` inputs through the whole matrix; it is read once."""
    used = rows > 0
    vector = _decoding(node) * used + _coding(node, rows) + (rows * node.n if node.bias else 0)
    return Counts(flops=2 * rows * node.n * node.k, vector_flops=vector, weight_read=_where(used, node.nbytes(), 0))


def _decoding(node: LinearSpec) -> int:
    """Vector FLOPs that turn a packed matrix into floats; none where its codes go into the product."""
    return 0 if node.format.is_float or _coded(node) else DEQUANT * node.n * node.k


def _coding(node: LinearSpec, rows: Any) -> Any:
    """Vector FLOPs that code or rotate the inputs of a product and scale its outputs."""
    return rows * (node.format.input_flops(node.k) + (DEQUANT * node.k + node.n if _coded(node) else 0))


def _coded(node: LinearSpec) -> bool:
    return node.act != "none" or node.product.codes_input


def _norm(op: Op, step: StepShape, how: How) -> Counts:
    node: Any = op.node
    rows = step.rows(op.writes[0].rows)
    return Counts(
        vector_flops=_NORM[node.kind] * rows * op.writes[0].width, weight_read=_where(rows > 0, node.nbytes(), 0)
    )


def _elementwise(per_element: int) -> Callable[[Op, StepShape, How], Counts]:
    def formula(op: Op, step: StepShape, how: How) -> Counts:
        return Counts(vector_flops=sum(per_element * value.width * step.rows(value.rows) for value in op.writes))

    return formula


def _act(op: Op, step: StepShape, how: How) -> Counts:
    """The gate's threshold is a weight of four bytes."""
    node: Any = op.node
    read = _where(step.tokens > 0, weight_nbytes(node), 0) if isinstance(node.executor, GateFirst) else 0
    return _elementwise(_ACT)(op, step, how) + Counts(weight_read=read)


# ---------------------------------------------------------------------------------------------------------- attention


def _expand(op: Op, step: StepShape, how: How) -> Counts:
    """Keys and values of every token in view, out of the cached latents."""
    node: Any = op.node
    head = node.cache.heads[0]
    cached = Counts(vector_flops=step.keys * page_coding(head), kv_read=step.keys * head.token_bytes())
    return _matrix(node.kv_b_proj, step.keys) + cached


def _absorb(head_dim: str) -> Callable[[Op, StepShape, How], Counts]:
    """One GEMM per head with its part of kv_b_proj: into the latent space (keys) or out of it (values)."""

    def formula(op: Op, step: StepShape, how: How) -> Counts:
        node: Any = op.node
        rows, rank = node.num_attention_heads * getattr(node, head_dim), node.kv_lora_rank
        used = step.tokens > 0
        return Counts(
            flops=2 * step.tokens * rows * rank, weight_read=_where(used, node.kv_b_proj.format.nbytes(rows, rank), 0)
        )

    return formula


def _score(op: Op, step: StepShape, how: How) -> Counts:
    """Inner products of the last query, summed over the heads of each group, with every key of the prompt (token filter)."""
    node: Any = op.node
    heads, size = node.num_key_value_heads, node.head_dim
    return Counts(flops=2 * heads * size * step.tokens, vector_flops=node.num_attention_heads * size * step.copies)


# ---------------------------------------------------------------------------------------------------- recurrent layers


def _conv(op: Op, step: StepShape, how: How) -> Counts:
    """Every channel by itself, so no matrix product; the last inputs of every sequence are read and written anew."""
    node: Any = op.node
    owner: Any = op.owner
    state = _sequences(step) * owner.cache.states[1].nbytes()
    return Counts(
        vector_flops=(2 * node.kernel + _ACT) * node.channels * step.tokens,
        weight_read=_where(step.tokens > 0, node.nbytes(), 0),
        kv_read=state,
        kv_written=state,
    )


def _scan(op: Op, step: StepShape, how: How) -> Counts:
    """A recurrence. One new token updates the state; more are worked on in chunks, inside which all pairs are products.

    Per head of p x n numbers and per token, state update and readout take 4 p n FLOPs (Mamba-2), 6 p n with the correction of
    the delta rule. A chunk adds its pairs: n for C B' of a group and p for its product with x (Mamba-2); for the delta rule
    2 n for Q K' and K K', p for the product with v, and n + p for the inverse of the chunk with k and v. ``eager`` pads the
    last chunk and computes the full squares, ``tiled`` what the causal mask leaves.

    The state of every sequence is read and written once. In chunks the states between them are written, passed on (read,
    written) and read, all in the dtype of the state.

    Source: Dao and Gu, Transformers are SSMs, arXiv 2405.21060; Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    node: Any = op.node
    pairs = step.copies * _chunk_pairs(step.new, node.chunk, how).sum(-1)
    if isinstance(node, StateSpaceSpec):
        products = 2 * (node.num_groups * node.state_size + node.inner_size) * pairs
        per_token = 4 * node.state_elements
    else:
        products = 2 * node.num_heads * (3 * node.key_head_dim + 2 * node.head_dim) * pairs
        per_token = 6 * node.state_elements
    tokens = step.copies * _worked(step.new, node.chunk, how).sum(-1)
    sequences, state = _sequences(step), node.cache.states[0].nbytes()
    between = 2 * _chunks(node, step) * state
    decays = _chunks(node, step) + step.copies * (step.new == 1).sum(-1)
    return Counts(
        flops=products + per_token * tokens,
        vector_flops=node.state_elements * decays + _ACT * node.num_heads * pairs,
        weight_read=_where(step.tokens > 0, weight_nbytes(node), 0),
        kv_read=sequences * state,
        kv_written=sequences * state,
        act_read=between,
        act_written=between,
    )


def _sequences(step: StepShape) -> IntArray:
    """Sequences that take part."""
    return step.copies * (step.new > 0).sum(-1)


def _chunks(node: StateSpaceSpec | LinearAttentionSpec, step: StepShape) -> IntArray:
    """Chunks of all rows; a single token is none."""
    return step.copies * np.where(step.new > 1, -(-step.new // node.chunk), 0).sum(-1)


def _worked(new: IntArray, chunk: int, how: How) -> IntArray:
    """Tokens worked on, padding included."""
    return np.where(new > 1, -(-new // chunk) * chunk, new) if how.attention == "eager" else new


def _chunk_pairs(new: IntArray, chunk: int, how: How) -> IntArray:
    """(token, token) pairs inside the chunks of a row; a single token has none."""
    pairs = _worked(new, chunk, how) * chunk if how.attention == "eager" else within_chunks(new, chunk)
    return np.where(new > 1, pairs, 0)


# ---------------------------------------------------------------------------------------------------- FFN and experts


def active_rows(node: FFNSpec, tokens: IntArray) -> Any:
    """Expected neurons that at least one of `tokens` tokens wakes, if tokens wake them independently."""
    executor: Any = node.executor
    return node.intermediate_size * (1 - (1 - executor.expected) ** np.asarray(tokens, float))


def experts_touched(node: MoESpec, tokens: IntArray, skew: float = 0.0) -> Any:
    """Expected distinct experts that `tokens` tokens choose (`routing.distinct_experts`).

    Of experts spread over ranks those of the busiest rank; where ranks exchange tokens, every rank brings `tokens`.
    """
    return distinct_experts(node.num_experts, node.num_experts_per_tok, _seen(node, tokens), node.ranks, skew)


def expert_rows(node: MoESpec, tokens: IntArray, skew: float = 0.0) -> Any:
    """(token, expert) pairs computed here: all, or those of the busiest rank where others hold the other experts."""
    if node.ranks == 1:
        return node.num_experts_per_tok * tokens
    rows = busiest_rank(node.num_experts, node.num_experts_per_tok, _seen(node, tokens), node.ranks, skew)
    whole = np.asarray(np.rint(rows), np.int64)
    # Steps too large for int64 come in Python integers, and stay in them.
    return (whole.astype(object) if isinstance(tokens, int) or tokens.dtype == object else whole)[()]


def _seen(node: MoESpec, tokens: IntArray) -> IntArray:
    """Tokens that choose among all experts."""
    return tokens * (node.ranks if node.exchange else 1)


def _gated_linear(op: Op, step: StepShape, how: How) -> Counts:
    """Up or down behind a gate: one stored row per active neuron while few tokens run, the whole matrix otherwise."""
    node: Any = op.node
    owner: Any = op.owner
    tokens, block = step.tokens, op.name.rpartition(".")[0]
    neurons = owner.intermediate_size
    row = node.stored_shape[1]
    if node.layout != (
        "transposed" if op.name.endswith("down_proj") else "row"
    ):  # not stored by neuron: nothing can be skipped
        return _matrix(node, tokens)
    rows = step.observed.get(f"{block}.active_rows", active_rows(owner, tokens))
    pairs = step.observed.get(f"{block}.active_pairs", owner.executor.expected * neurons * np.asarray(tokens, float))
    bias = node.bias_format.nbytes(1, node.n) if node.bias else 0
    dense = _matrix(node, tokens)
    sparse = (tokens > 0) & (tokens <= owner.executor.max_tokens)
    return Counts(
        flops=_where(sparse, _whole(2 * row * pairs), dense.flops),
        vector_flops=_where(sparse, _whole((0 if node.format.is_float else DEQUANT * row) * rows), dense.vector_flops),
        weight_read=_where(sparse, _whole(node.format.nbytes(1, row) * rows + bias), dense.weight_read),
    )


def _router(op: Op, step: StepShape, how: How) -> Counts:
    owner: Any = op.owner
    tokens = step.tokens
    extra = Counts(
        vector_flops=SOFTMAX * owner.num_experts * tokens, weight_read=_where(tokens > 0, weight_nbytes(owner), 0)
    )
    return _linear(op, step, how) + extra


def _expert(op: Op, step: StepShape, how: How) -> Counts:
    """One matrix of the chosen experts: k per token are computed, the distinct ones are read."""
    node: Any = op.node
    owner: Any = op.owner
    tokens = step.tokens
    rows = expert_rows(owner, tokens, step.skew)
    expected = experts_touched(owner, tokens, step.skew)
    touched = step.observed.get(f"{op.name.partition('.experts.')[0]}.experts_touched", expected)
    return Counts(
        flops=2 * rows * node.n * node.k,
        vector_flops=_whole(_decoding(node) * touched) + _coding(node, rows),
        weight_read=_whole(node.nbytes() * touched),
    )


def _collective(op: Op, step: StepShape, how: How) -> Counts:
    """Payload of a collective: the whole value, whatever the algorithm sends of it."""
    value = op.writes[0]
    return Counts(comm=value.row_bytes * step.rows(value.rows))


def _combine(op: Op, step: StepShape, how: How) -> Counts:
    node: Any = op.node
    return Counts(vector_flops=2 * node.num_experts_per_tok * op.writes[0].width * step.tokens)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return np.where(condition, yes, no)[()]


def _whole(value: Any) -> Any:
    """Round an expectation to a whole count; observed counts are whole already and stay exact."""
    return value if isinstance(value, int) else np.rint(value).astype(np.int64)[()]


_TABLE: dict[str, Callable[[Op, StepShape, How], Counts]] = {
    "embed": _embed,
    "linear": _linear,
    "find": find,
    "quantize": quantize,
    "dequantize": dequantize,
    "outliers": outliers,
    "norm": _norm,
    "rope": _elementwise(_ROPE),
    "append": append,
    "attend": attend,
    "attend_expanded": attend_expanded,
    "attend_latent": attend_latent,
    "evict": evict,
    "expand": _expand,
    "absorb_q": _absorb("qk_nope_head_dim"),
    "absorb_v": _absorb("v_head_dim"),
    "score": _score,
    "add": _elementwise(_ADD),
    "act": _act,
    "gate": _elementwise(_ACT),
    "conv": _conv,
    "scan": _scan,
    "softcap": _elementwise(SOFTCAP),
    "gated_linear": _gated_linear,
    "router": _router,
    "expert": _expert,
    "combine": _combine,
    "all_reduce": _collective,
    "all_gather": _collective,
    "all_to_all": _collective,
}

KINDS = tuple(_TABLE)
