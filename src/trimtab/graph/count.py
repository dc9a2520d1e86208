"""What an op does in a pass: FLOPs and bytes as exact integers, for one pass or arrays of passes.

Symbols: T new tokens, s and c new and earlier tokens of a row, N query heads, G KV heads, H head size. FLOPs are those of
matrix multiplications, 2 per multiply-add; `vector_flops` is an estimate of the rest and only prices it.

Two attentions are counted. ``eager`` multiplies every new token with every key in view, mask or not, and writes the
scores. ``tiled`` (Flash) skips what the causal mask and the window hide and never writes a score.

Source: Yuan et al., LLM Inference Unveiled, arXiv 2402.16363; Dao, FlashAttention-2, arXiv 2307.08691; DeepSeek-V2, arXiv
2405.04434 (absorbed latent attention).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab.errors import unknown
from trimtab.graph.ops import Counts, Group, IntArray, Kernel, Op, StepShape, group
from trimtab.spec.cache import CacheSpec, Keep
from trimtab.spec.formats import ITEM_BYTES
from trimtab.spec.nodes import FFNSpec, GateFirst, LinearSpec, MoESpec, weight_nbytes

#: How attention runs.
ATTENTIONS = ("eager", "tiled")

#: Query rows of one tile of a tiled attention kernel; keys are read once per tile where they do not fit the cache.
QUERY_TILE = 128

# Vector FLOPs per element; the same for every machine, since they only matter where nothing else does.
_NORM = {"rms": 5, "layer": 7}
_SOFTMAX, _SOFTCAP, _ROPE, _ACT, _ADD, _DEQUANT = 5, 4, 3, 5, 1, 2


@dataclass(frozen=True, slots=True)
class _How:
    """How this stack runs attention."""

    attention: str
    llc_bytes: int | None


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
    how = _How(attention, llc_bytes)
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
    return tuple((same, count(same.kernel, step, attention, llc_bytes)) for same in groups)


def scratch_bytes(op: Op, step: StepShape, attention: str) -> IntArray | int:
    """Bytes an op holds besides what it reads and writes: the scores of eager attention, before and after softmax.

    Eager attention runs the rows of a batch one after the other, so copies of a row add nothing.
    """
    if attention == "tiled" or not op.kind.startswith("attend"):
        return 0
    return 2 * ITEM_BYTES[op.dtype] * _score_elements(op, replace(step, copies=1), _How("eager", None))


# ---------------------------------------------------------------------------------------------------- linear and norm


def _embed(op: Op, step: StepShape, how: _How) -> Counts:
    table: Any = op.node
    tokens = step.tokens
    return Counts(weight_read=tokens * table.format.nbytes(1, table.k), vector_flops=_ADD * tokens * table.k)


def _linear(op: Op, step: StepShape, how: _How) -> Counts:
    node: Any = op.node
    return _matrix(node, step.rows(op.writes[0].rows))


def _matrix(node: LinearSpec, rows: IntArray) -> Counts:
    """`rows` inputs through the whole matrix; it is read once."""
    used = rows > 0
    vector = (0 if node.format.is_float else _DEQUANT * node.n * node.k) * used + (rows * node.n if node.bias else 0)
    return Counts(flops=2 * rows * node.n * node.k, vector_flops=vector, weight_read=_where(used, node.nbytes(), 0))


def _norm(op: Op, step: StepShape, how: _How) -> Counts:
    node: Any = op.node
    rows = step.rows(op.writes[0].rows)
    return Counts(
        vector_flops=_NORM[node.kind] * rows * op.writes[0].width, weight_read=_where(rows > 0, node.nbytes(), 0)
    )


def _elementwise(per_element: int) -> Callable[[Op, StepShape, _How], Counts]:
    def formula(op: Op, step: StepShape, how: _How) -> Counts:
        return Counts(vector_flops=sum(per_element * value.width * step.rows(value.rows) for value in op.writes))

    return formula


def _act(op: Op, step: StepShape, how: _How) -> Counts:
    """The gate's threshold is a weight of four bytes."""
    node: Any = op.node
    read = _where(step.tokens > 0, weight_nbytes(node), 0) if isinstance(node.executor, GateFirst) else 0
    return _elementwise(_ACT)(op, step, how) + Counts(weight_read=read)


# ---------------------------------------------------------------------------------------------------------- attention


def _append(op: Op, step: StepShape, how: _How) -> Counts:
    node: Any = op.node
    return Counts(kv_written=step.tokens * sum(head.token_bytes() for head in node.cache.heads))


def _attend(op: Op, step: StepShape, how: _How) -> Counts:
    """Grouped-query attention over the cache, or over the prompt itself where the pass keeps none."""
    node: Any = op.node
    cached = len(op.reads) == 1
    per_head = node.num_attention_heads // node.num_key_value_heads
    flops = pairs = kv_read = 0
    for head, heads in Counter(node.cache.heads).items():
        seen = per_head * heads * _pairs(head.keep, node.window, step, how)
        pairs = pairs + seen
        flops = flops + 2 * (head.head_dim + head.v_head_dim) * seen
        if cached:
            kv_read = kv_read + heads * _kv_read(head.keep, node.window, head.token_bytes(), step, how)
    vector = (_SOFTMAX + (_SOFTCAP if node.softcap else 0)) * pairs
    sinks = _where(step.tokens > 0, weight_nbytes(node), 0) if node.sinks else 0
    return Counts(flops=flops, vector_flops=vector, weight_read=sinks, kv_read=kv_read) + _scores(op, step, how)


def _attend_expanded(op: Op, step: StepShape, how: _How) -> Counts:
    """Latent attention on expanded keys and values (prefill)."""
    node: Any = op.node
    pairs = node.num_attention_heads * _pairs(_keep(node.cache), None, step, how)
    width = node.qk_nope_head_dim + node.qk_rope_head_dim + node.v_head_dim
    return Counts(flops=2 * width * pairs, vector_flops=_SOFTMAX * pairs) + _scores(op, step, how)


def _attend_latent(op: Op, step: StepShape, how: _How) -> Counts:
    """Latent attention in the latent space (decode): the cache is read once for all heads."""
    node: Any = op.node
    keep = _keep(node.cache)
    pairs = node.num_attention_heads * _pairs(keep, None, step, how)
    width = 2 * node.kv_lora_rank + node.qk_rope_head_dim
    kv_read = _kv_read(keep, None, node.cache.heads[0].token_bytes(), step, how)
    return Counts(flops=2 * width * pairs, vector_flops=_SOFTMAX * pairs, kv_read=kv_read) + _scores(op, step, how)


def _expand(op: Op, step: StepShape, how: _How) -> Counts:
    """Keys and values of every token in view, out of the cached latents."""
    node: Any = op.node
    return _matrix(node.kv_b_proj, step.keys) + Counts(kv_read=step.keys * node.cache.heads[0].token_bytes())


def _absorb(head_dim: str) -> Callable[[Op, StepShape, _How], Counts]:
    """One GEMM per head with its part of kv_b_proj: into the latent space (keys) or out of it (values)."""

    def formula(op: Op, step: StepShape, how: _How) -> Counts:
        node: Any = op.node
        rows, rank = node.num_attention_heads * getattr(node, head_dim), node.kv_lora_rank
        used = step.tokens > 0
        return Counts(
            flops=2 * step.tokens * rows * rank, weight_read=_where(used, node.kv_b_proj.format.nbytes(rows, rank), 0)
        )

    return formula


def _score(op: Op, step: StepShape, how: _How) -> Counts:
    """Inner products of the last query, summed over the heads of each group, with every key of the prompt (token filter)."""
    node: Any = op.node
    heads, size = node.num_key_value_heads, node.head_dim
    return Counts(flops=2 * heads * size * step.tokens, vector_flops=node.num_attention_heads * size * step.copies)


def _scores(op: Op, step: StepShape, how: _How) -> Counts:
    """Traffic of the scores: written by QK, read and written by softmax, read by PV."""
    if how.attention == "tiled":
        return Counts()
    nbytes = 2 * ITEM_BYTES[op.dtype] * _score_elements(op, step, how)
    return Counts(act_read=nbytes, act_written=nbytes)


def _score_elements(op: Op, step: StepShape, how: _How) -> IntArray | int:
    node: Any = op.node
    per_head = node.num_attention_heads // len(node.cache.heads)
    return sum(
        per_head * heads * _pairs(head.keep, None, step, how) for head, heads in Counter(node.cache.heads).items()
    )


def _keep(cache: CacheSpec) -> Keep:
    return cache.heads[0].keep


def _visible(keep: Keep, past: IntArray) -> IntArray:
    """Earlier tokens still in view; every `Keep` is the smaller of the past and a bound."""
    return np.minimum(past, keep.visible(1 << 62))


def _pairs(keep: Keep, window: int | None, step: StepShape, how: _How) -> IntArray:
    """(query, key) pairs of one head, all rows: the full rectangle (eager), or what mask and window leave (tiled)."""
    s, c = step.new, _visible(keep, step.past)
    if how.attention == "eager":
        return step.copies * (s * (c + s)).sum(-1)
    if window is None:
        return step.copies * (s * c + s * (s + 1) // 2).sum(-1)
    growing = np.clip(window - c, 0, s)  # queries that see fewer than `window` keys
    return step.copies * (growing * c + growing * (growing + 1) // 2 + (s - growing) * window).sum(-1)


def _kv_read(keep: Keep, window: int | None, token_bytes: int, step: StepShape, how: _How) -> IntArray:
    """Bytes of one KV head read by all rows; the queries of its group share a read."""
    s, c = step.new, _visible(keep, step.past)
    keys = c + s
    if how.attention == "eager":
        return step.copies * token_bytes * keys.sum(-1)
    if window is not None:
        keys = np.minimum(keys, window - 1 + s)
    if how.llc_bytes is not None:
        tiles = -(-s // QUERY_TILE)
        again = tiles * c + QUERY_TILE * (tiles * (tiles - 1) // 2) + s
        if window is not None:
            again = np.minimum(again, tiles * (window - 1 + QUERY_TILE))
        keys = np.where(keys * token_bytes > how.llc_bytes, np.maximum(again, keys), keys)
    return step.copies * token_bytes * keys.sum(-1)


# ---------------------------------------------------------------------------------------------------- FFN and experts


def active_rows(node: FFNSpec, tokens: IntArray) -> Any:
    """Expected neurons that at least one of `tokens` tokens wakes, if tokens wake them independently."""
    executor: Any = node.executor
    return node.intermediate_size * (1 - (1 - executor.expected) ** np.asarray(tokens, float))


def experts_touched(node: MoESpec, tokens: IntArray) -> Any:
    """Expected distinct experts that `tokens` tokens choose under uniform routing: U = E (1 - (1 - k/E)^T)."""
    return node.num_experts * (1 - (1 - node.num_experts_per_tok / node.num_experts) ** np.asarray(tokens, float))


def _gated_linear(op: Op, step: StepShape, how: _How) -> Counts:
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
        vector_flops=_where(sparse, _whole((0 if node.format.is_float else _DEQUANT * row) * rows), dense.vector_flops),
        weight_read=_where(sparse, _whole(node.format.nbytes(1, row) * rows + bias), dense.weight_read),
    )


def _router(op: Op, step: StepShape, how: _How) -> Counts:
    owner: Any = op.owner
    tokens = step.tokens
    extra = Counts(
        vector_flops=_SOFTMAX * owner.num_experts * tokens, weight_read=_where(tokens > 0, weight_nbytes(owner), 0)
    )
    return _linear(op, step, how) + extra


def _expert(op: Op, step: StepShape, how: _How) -> Counts:
    """One matrix of the chosen experts: k per token are computed, the distinct ones are read."""
    node: Any = op.node
    owner: Any = op.owner
    tokens = step.tokens
    rows = owner.num_experts_per_tok * tokens
    touched = step.observed.get(f"{op.name.partition('.experts.')[0]}.experts_touched", experts_touched(owner, tokens))
    one = _matrix(node, rows)
    dequant = 0 if node.format.is_float else _DEQUANT * node.n * node.k
    return Counts(flops=one.flops, vector_flops=_whole(dequant * touched), weight_read=_whole(node.nbytes() * touched))


def _combine(op: Op, step: StepShape, how: _How) -> Counts:
    node: Any = op.node
    return Counts(vector_flops=2 * node.num_experts_per_tok * op.writes[0].width * step.tokens)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return np.where(condition, yes, no)[()]


def _whole(value: Any) -> Any:
    """Round an expectation to a whole count; observed counts are whole already and stay exact."""
    return value if isinstance(value, int) else np.rint(value).astype(np.int64)[()]


_TABLE: dict[str, Callable[[Op, StepShape, _How], Counts]] = {
    "embed": _embed,
    "linear": _linear,
    "norm": _norm,
    "rope": _elementwise(_ROPE),
    "append": _append,
    "attend": _attend,
    "attend_expanded": _attend_expanded,
    "attend_latent": _attend_latent,
    "expand": _expand,
    "absorb_q": _absorb("qk_nope_head_dim"),
    "absorb_v": _absorb("v_head_dim"),
    "score": _score,
    "add": _elementwise(_ADD),
    "act": _act,
    "softcap": _elementwise(_SOFTCAP),
    "gated_linear": _gated_linear,
    "router": _router,
    "expert": _expert,
    "combine": _combine,
}

KINDS = tuple(_TABLE)
