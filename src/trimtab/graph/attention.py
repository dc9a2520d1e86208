"""What attention and its cache do in a pass: pairs multiplied, keys read, tokens appended, tokens given up.

Symbols: T new tokens, s and c new and earlier tokens of a row in view, N query heads, G KV heads, H head size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.graph.ops import Counts, IntArray, Op, StepShape
from trimtab.spec.cache import Budget, HeadSpec
from trimtab.spec.formats import ITEM_BYTES
from trimtab.spec.model import weight_nbytes
from trimtab.spec.nodes import AttentionSpec, Prefill

#: Query rows of one tile of a tiled attention kernel; keys are read once per tile where they do not fit the cache.
QUERY_TILE = 128

# Vector FLOPs per element; the same for every machine, since they only matter where nothing else does.
SOFTMAX, SOFTCAP, DEQUANT = 5, 4, 2
#: Of a key element that a policy sums up by itself: a square and an addition.
_SQUARE = 2


@dataclass(frozen=True, slots=True)
class How:
    """How this stack runs attention."""

    attention: str
    llc_bytes: int | None


@dataclass(frozen=True, slots=True)
class Mask:
    """What hides earlier keys from a query: a window, a chunk of the sequence, a pattern over the prompt."""

    window: int | None = None
    chunk: int | None = None
    prefill: Prefill | None = None


# -------------------------------------------------------------------------------------------------------------- cache


def append(op: Op, step: StepShape, how: How) -> Counts:
    """New keys and values are written; what leaves the tail in the course of it is coded."""
    node: Any = op.node
    heads = Counter(node.cache.heads).items()
    sealed = sum(times * _sealed(head, step, 1 - step.ends_prompt) for head, times in heads if head.seals)
    return Counts(
        vector_flops=step.tokens * sum(times * page_coding(head) for head, times in heads),
        kv_written=step.tokens * sum(times * head.landing_bytes() for head, times in heads) + sealed,
    )


def evict(op: Op, step: StepShape, how: How) -> Counts:
    """Policies look at what is held and choose what stays; tokens move together, and what waited for that is coded.

    How many tokens move is decided by data: the run observes it; expected is the most, every token that stays or every
    one that goes, whichever are fewer.
    """
    node: Any = op.node
    per_head = node.num_attention_heads // node.num_key_value_heads
    total = Counts()
    expected = landing = 0
    for head, heads in Counter(node.cache.heads).items():
        if isinstance(head.keep, Budget) and head.policy is not None:
            found, moved = _choice(head, head.keep, step, per_head)
            total = total + _times(found, heads)
            expected, landing = expected + heads * moved, landing or head.landing_bytes()
        if head.thin is not None:
            total = total + _times(_thinning(head, step), heads)
        if head.waits and head.seals:
            total = total + Counts(kv_written=heads * _sealed(head, step, step.ends_prompt))
    moved = step.observed.get(f"{op.name}.moved", expected)
    return total + Counts(kv_read=moved * landing, kv_written=moved * landing)


def _choice(head: HeadSpec, keep: Budget, step: StepShape, per_head: int) -> tuple[Counts, Any]:
    """(counts, tokens expected to move) of one head whose policy chooses tokens, all rows."""
    policy = head.policy
    assert policy is not None
    in_view = keep.visible(step.past, step.prompts) + step.new
    over = in_view > keep.tokens
    if keep.when == "prompt":
        acts, looks = over * step.ends_prompt, step.prompts
    else:
        acts, looks = (step.new > 0) * 1 if policy.score else over * 1, step.new
    queries = step.new if policy.queries < 0 else np.minimum(policy.queries, looks)
    pairs = per_head * queries * in_view if policy.products else 0 * in_view
    vector = SOFTMAX * pairs if policy.products else _SQUARE * head.head_dim * in_view
    moved = over * acts * np.minimum(keep.tokens, in_view - keep.tokens)
    counts = Counts(
        flops=step.copies * (acts * 2 * head.head_dim * pairs).sum(-1),
        vector_flops=step.copies * (acts * vector).sum(-1),
        kv_read=step.copies * (acts * head.landing[0].nbytes(in_view, head.head_dim)).sum(-1),
    )
    return counts, step.copies * moved.sum(-1)


def expected_moves(node: AttentionSpec, step: StepShape) -> Any:
    """Tokens that move in a pass for want of an observation, over all heads and rows of a layer."""
    chosen = ((head, head.keep) for head in node.cache.heads if isinstance(head.keep, Budget) and head.policy)
    return sum(_choice(head, keep, step, 1)[1] for head, keep in chosen)


def _thinning(head: HeadSpec, step: StepShape) -> Counts:
    """One head whose channels are chosen: its keys are read once if any of them is thinned."""
    seen = step.past + step.new
    held = head.keep.held(seen, step.prompts)
    acts = step.ends_prompt * (head.sealed(seen, step.prompts)[0] > 0)
    return Counts(
        vector_flops=step.copies * (acts * _SQUARE * head.head_dim * held).sum(-1),
        kv_read=step.copies * (acts * head.landing[0].nbytes(held, head.head_dim)).sum(-1),
    )


def _sealed(head: HeadSpec, step: StepShape, where: IntArray) -> IntArray:
    """Bytes one head codes after a pass; of a head that waits for the end of the prompt in the rows `where` is 1."""
    nbytes = head.sealed_bytes(step.past, step.new, step.prompts)
    return step.copies * (nbytes * where if head.waits else nbytes).sum(-1)


def _times(counts: Counts, times: int) -> Counts:
    return Counts(**{name: times * getattr(counts, name) for name in Counts.__slots__})


def page_coding(head: HeadSpec) -> int:
    """Vector FLOPs that code a token's key and value for the cache, or bring them back to floats."""
    parts = ((head.k_format, head.head_dim), (head.v_format, head.v_head_dim))
    return DEQUANT * sum(size for form, size in parts if not form.is_float)


# ---------------------------------------------------------------------------------------------------------- attention


def attend(op: Op, step: StepShape, how: How) -> Counts:
    """Grouped-query attention over the cache, or over the prompt itself where the pass keeps none."""
    node: Any = op.node
    cached = len(op.reads) == 1
    per_head = node.num_attention_heads // node.num_key_value_heads
    mask = Mask(node.window, node.chunk, node.prefill)
    flops = multiplied = kv_read = decoding = 0
    for head, heads in Counter(node.cache.heads).items():
        seen = per_head * heads * pairs(head, mask, step, how)
        multiplied = multiplied + seen
        flops = flops + 2 * (head.head_dim + head.v_head_dim) * seen
        if cached:
            keys, nbytes = keys_read(head, mask, step, how)
            kv_read = kv_read + heads * nbytes
            decoding = decoding + heads * keys * page_coding(head)
    vector = (SOFTMAX + (SOFTCAP if node.softcap else 0)) * multiplied + decoding
    own = np.where(step.tokens > 0, weight_nbytes(node), 0)[()] if weight_nbytes(node) else 0
    return Counts(flops=flops, vector_flops=vector, weight_read=own, kv_read=kv_read) + _scores(op, step, how)


def attend_expanded(op: Op, step: StepShape, how: How) -> Counts:
    """Latent attention on expanded keys and values (prefill)."""
    node: Any = op.node
    seen = node.num_attention_heads * pairs(node.cache.heads[0], Mask(), step, how)
    width = node.qk_nope_head_dim + node.qk_rope_head_dim + node.v_head_dim
    return Counts(flops=2 * width * seen, vector_flops=SOFTMAX * seen) + _scores(op, step, how)


def attend_latent(op: Op, step: StepShape, how: How) -> Counts:
    """Latent attention in the latent space (decode): the cache is read once for all heads."""
    node: Any = op.node
    head = node.cache.heads[0]
    seen = node.num_attention_heads * pairs(head, Mask(), step, how)
    width = 2 * node.kv_lora_rank + node.qk_rope_head_dim
    keys, nbytes = keys_read(head, Mask(), step, how)
    vector = SOFTMAX * seen + keys * page_coding(head)
    core = Counts(flops=2 * width * seen, vector_flops=vector, kv_read=nbytes)
    return core + _scores(op, step, how)


def _scores(op: Op, step: StepShape, how: How) -> Counts:
    """Traffic of the scores: written by QK, read and written by softmax, read by PV."""
    if how.attention == "tiled":
        return Counts()
    nbytes = 2 * ITEM_BYTES[op.dtype] * score_elements(op, step)
    return Counts(act_read=nbytes, act_written=nbytes)


def score_elements(op: Op, step: StepShape) -> IntArray | int:
    """Scores of all query heads that eager attention writes."""
    node: Any = op.node
    per_head = node.num_attention_heads // len(node.cache.heads)
    eager = How("eager", None)
    return sum(per_head * heads * pairs(head, Mask(), step, eager) for head, heads in Counter(node.cache.heads).items())


def pairs(head: HeadSpec, mask: Mask, step: StepShape, how: How) -> IntArray:
    """(query, key) pairs of one head, all rows: the full rectangle (eager), or what the mask leaves (tiled).

    Where tokens were given up, a window counts from the newest of those that are held.
    """
    s, c = step.new, head.keep.visible(step.past, step.prompts)
    if how.attention == "eager":
        found = s * (c + s)
    elif mask.chunk is not None:
        found = within_chunks(c + s, mask.chunk) - within_chunks(c, mask.chunk)
    elif mask.prefill is not None:
        whole = _whole_queries(mask.prefill, step)
        found = _seen(s - whole, c, mask.prefill.sink + mask.prefill.local) + _seen(whole, c + s - whole, None)
    else:
        found = _seen(s, c, mask.window)
    if head.select is not None:
        found = np.where(s == 1, head.select.read(c + s), found)
    return step.copies * found.sum(-1)


def _seen(s: IntArray, c: IntArray, window: int | None) -> IntArray:
    """Pairs of s queries behind c keys: every query sees the keys up to its own, at most `window` of them."""
    if window is None:
        return s * c + s * (s + 1) // 2
    growing = np.clip(window - c, 0, s)  # queries that see fewer than `window` keys
    return growing * c + growing * (growing + 1) // 2 + (s - growing) * window


def _whole_queries(prefill: Prefill, step: StepShape) -> IntArray:
    """Queries of each row that see everything: a single one, and the last of a prompt."""
    return np.where(step.new == 1, 1, step.ends_prompt * np.minimum(prefill.last, step.new))


def within_chunks(tokens: IntArray, chunk: int) -> IntArray:
    """Causal pairs of a sequence of `tokens`, each token with those before it in its chunk and itself."""
    full, rest = tokens // chunk, tokens % chunk
    return full * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2


def keys_read(head: HeadSpec, mask: Mask, step: StepShape, how: How) -> tuple[IntArray, IntArray]:
    """Tokens of one KV head read by all rows, and their bytes; the queries of its group share a read.

    A tiled kernel reads for every tile of queries the keys in view of it, and each key once where all of them fit the
    cache.
    """
    s, past, prompts = step.new, step.past, step.prompts
    c = head.keep.visible(past, prompts)
    chosen = np.where(s == 1, head.select.read(c + s), c + s) if head.select is not None else c + s
    nbytes = head.read_bytes(past, s, prompts)
    if how.attention == "eager":
        return step.copies * chosen.sum(-1), step.copies * nbytes.sum(-1)
    tiles = -(-s // QUERY_TILE)
    window, first, hiding = mask.window, 0, tiles
    if mask.prefill is not None:
        whole, first = (
            _whole_queries(mask.prefill, step),
            mask.prefill.sink,
        )  # the hidden keys stand behind the first ones
        window, hiding = first + mask.prefill.local, np.where(whole > 0, (s - whole) // QUERY_TILE, tiles)
        hidden = np.where(whole > 0, 0, np.maximum(c - (window - 1), 0))
    else:
        hidden = c // mask.chunk * mask.chunk if mask.chunk else np.maximum(c - (window - 1), 0) if window else 0 * c
    keys = chosen - hidden
    nbytes = nbytes - np.where(hidden > 0, head.hidden_bytes(past, hidden, prompts, first), 0)
    if how.llc_bytes is not None:
        again = tiles * c + QUERY_TILE * (tiles * (tiles - 1) // 2) + s
        again = again - _hidden_from_tiles(c, hiding, window, mask.chunk)
        if head.select is not None:
            again = np.where(s == 1, keys, again)
        beyond = nbytes > how.llc_bytes
        # Each of the keys beyond the first reading costs what the average one does.
        nbytes = np.where(beyond, np.rint(nbytes * (again / np.maximum(keys, 1))).astype(np.int64), nbytes)
        keys = np.where(beyond, again, keys)
    return step.copies * keys.sum(-1), step.copies * nbytes.sum(-1)


def _hidden_from_tiles(c: IntArray, tiles: IntArray, window: int | None, chunk: int | None) -> IntArray | int:
    """Keys before the first one in view of each of the first tiles of queries, summed over these."""
    if chunk is not None:
        start = c[..., None] + QUERY_TILE * np.arange(int(tiles.max(initial=0)))
        return np.where(start < (c + QUERY_TILE * tiles)[..., None], start // chunk * chunk, 0).sum(-1)
    if window is None:
        return 0
    before = c - (window - 1)  # hidden from the first tile if positive; every tile hides QUERY_TILE more
    none = np.clip(-(before // QUERY_TILE), 0, tiles)
    return (tiles - none) * before + QUERY_TILE * (tiles * (tiles - 1) - none * (none - 1)) // 2
