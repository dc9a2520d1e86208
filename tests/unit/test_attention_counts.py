"""Attention's pairs and cache reads against loops over queries and keys, and identities between kinds of passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.graph.attention import QUERY_TILE
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import Op, StepShape
from trimtab.spec.cache import Ring
from trimtab.spec.configs import load_spec, spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit

HEADS, KV_HEADS, SIZE = 6, 2, 8
CONFIG = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
TOKEN_BYTES = 2 * SIZE * 2


def attend(window: int | None = None, chunk: int | None = None, kv_dtype: str = "bfloat16") -> Op:
    """The attention of a tiny model."""
    spec = spec_from_config(CONFIG, "tiny").with_dtype("bfloat16", kv_dtype)
    edits = [Edit("layers.0.self_attn", "window", window), Edit("layers.0.self_attn", "chunk", chunk)]
    return next(op for op in build(spec.edit(edits, "test")).ops if op.kind == "attend")


def seen(query: int, window: int | None, chunk: int | None) -> range:
    """Keys a query at a position sees."""
    first = 0 if window is None else max(0, query - window + 1)
    return range(first if chunk is None else query // chunk * chunk, query + 1)


SHAPES = [(1, 0), (1, 37), (5, 11), (40, 0), (300, 0), (300, 170), (128, 256), (513, 100)]


@pytest.mark.parametrize(("new", "past"), SHAPES)
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (50, None), (200, None), (None, 64), (None, 256)])
def test_pairs_and_reads_against_loops(new: int, past: int, window: int | None, chunk: int | None) -> None:
    op, step = attend(window, chunk), StepShape.of([new], [past])
    keys = [seen(query, window, chunk) for query in range(past, past + new)]
    pairs = sum(len(key) for key in keys)
    once = count(op, step, "tiled")
    assert int(once.flops) == 4 * HEADS * SIZE * pairs
    union = set().union(*keys)
    assert int(once.kv_read) == KV_HEADS * TOKEN_BYTES * len(union)
    # Where the keys of a head do not fit the cache, every tile of queries reads those that it sees.
    again = count(op, step, "tiled", llc_bytes=0)
    tiles = [set().union(*keys[at : at + QUERY_TILE]) for at in range(0, new, QUERY_TILE)]
    read = sum(len(tile) for tile in tiles)
    assert int(again.flops) == int(once.flops)
    assert int(again.kv_read) == KV_HEADS * TOKEN_BYTES * read
    # Eager attention computes the whole rectangle and reads each key once, masked or not.
    eager = count(op, step)
    assert int(eager.flops) == 4 * HEADS * SIZE * new * (past + new)
    assert int(eager.kv_read) == KV_HEADS * TOKEN_BYTES * (past + new)


def test_keys_that_fit_the_cache_are_read_once() -> None:
    op, step = attend(), StepShape.of([512], [0])
    fits = 512 * TOKEN_BYTES
    assert int(count(op, step, "tiled", llc_bytes=fits).kv_read) == KV_HEADS * fits
    assert int(count(op, step, "tiled", llc_bytes=fits - 1).kv_read) == KV_HEADS * TOKEN_BYTES * (128 + 256 + 384 + 512)


@pytest.mark.parametrize("tokens", [1, 2, 77, 2048])
def test_tiled_is_eager_times_the_causal_factor(tokens: int) -> None:
    """Of a prompt of n tokens (n + 1) / 2n of the square is seen: exactly, in every model without windows."""
    for name in ("llama-3.1-8b", "qwen3-0.6b", "gpt2", "deepseek-v3"):
        step = StepShape.of([tokens], [0])
        for op in build(load_spec(name), "prefill").ops[:20]:
            eager, tiled = int(count(op, step).flops), int(count(op, step, "tiled").flops)
            assert 2 * tokens * tiled == ((tokens + 1) * eager if op.kind.startswith("attend") else 2 * tokens * eager)


def total(spec: ModelSpec, step: StepShape, name: str = "flops", **options: Any) -> int:
    """One count of all ops of a pass."""
    return sum(int(getattr(count(op, step, **options), name)) for op in build(spec, "prefill").ops)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-2-2b", "llama-4-scout", "mixtral-8x7b"])
def test_chunks_of_a_prompt_sum_to_the_whole(name: str) -> None:
    """Causal pairs do not depend on how a prompt is cut; matrices are read once per chunk."""
    spec, prompt = load_spec(name), 5000
    whole = total(spec, StepShape.of([prompt], [0], logits=1), attention="tiled")
    cuts = [512] * 9 + [prompt - 9 * 512]
    past = np.cumsum([0, *cuts[:-1]])
    parts = [StepShape.of([new], [at], logits=int(at + new == prompt)) for new, at in zip(cuts, past, strict=True)]
    assert sum(total(spec, part, attention="tiled") for part in parts) == whole
    linear = next(op for op in build(spec).ops if op.name == "layers.0.self_attn.q_proj")
    reads = sum(int(count(linear, part).weight_read) for part in parts)
    assert reads == len(parts) * int(count(linear, StepShape.of([prompt], [0])).weight_read)


def test_eager_chunks_save_the_rectangle_above_the_diagonal_of_blocks() -> None:
    op = attend()
    parts = [StepShape.of([10], [at]) for at in (0, 10, 20)]
    assert sum(int(count(op, part).flops) for part in parts) == 4 * HEADS * SIZE * 10 * (10 + 20 + 30)


@pytest.mark.parametrize("gamma", [1, 4, 7])
def test_verifying_a_draft_runs_the_head_on_every_row_and_reads_weights_once(gamma: int) -> None:
    """Speculative verification: gamma + 1 tokens at nearly the bytes of one, with logits for all of them."""
    spec, past = load_spec("llama-3.1-8b"), 1000
    one = StepShape.of([1], [past], logits=1)
    draft = StepShape.of([gamma + 1], [past], logits=gamma + 1)
    head = next(op for op in build(spec).ops if op.name == "lm_head")
    assert int(count(head, draft).flops) == (gamma + 1) * int(count(head, one).flops)
    assert int(count(head, draft).weight_read) == int(count(head, one).weight_read)
    singles = [StepShape.of([1], [past + i], logits=1) for i in range(gamma + 1)]
    assert total(spec, draft, attention="tiled") == sum(total(spec, step, attention="tiled") for step in singles)
    bytes_of = {
        name: [total(spec, step, name, attention="tiled") for step in (one, draft)]
        for name in ("weight_read", "kv_read")
    }
    assert bytes_of["weight_read"][1] - bytes_of["weight_read"][0] == gamma * 2 * spec.hidden_size  # embedding rows
    assert bytes_of["kv_read"][1] * (past + 1) == bytes_of["kv_read"][0] * (past + gamma + 1)


@pytest.mark.parametrize(("kv_dtype", "token_bytes"), [("bfloat16", 4), ("fp8", 2), ("int8-g8", 10), ("int4-g8", 9)])
def test_bytes_of_a_coded_cache(kv_dtype: str, token_bytes: int) -> None:
    """Per head of 8 and token, key and value: codes and, for integers, an fp16 scale and minimum each."""
    per_token = {"bfloat16": 32, "fp8": 16, "int8-g8": 24, "int4-g8": 16}[kv_dtype]
    op = attend(kv_dtype=kv_dtype)
    assert int(count(op, StepShape.of([1, 3], [9, 4]), "tiled").kv_read) == KV_HEADS * per_token * (10 + 7)
    assert token_bytes < per_token
    spec = spec_from_config(CONFIG, "tiny").with_dtype("bfloat16", kv_dtype)
    assert spec.kv_nbytes(100) == 100 * KV_HEADS * per_token


def test_a_tied_table_is_held_once_and_read_for_the_head_as_well() -> None:
    tied, untied = (spec_from_config({**CONFIG, "tie_word_embeddings": tie}, "m") for tie in (True, False))
    table = 97 * 48 * 2
    assert untied.weight_nbytes() - tied.weight_nbytes() == table
    assert untied.num_parameters() - tied.num_parameters() == 97 * 48
    step = StepShape.of([3], [0], logits=1)
    for spec in (tied, untied):
        by_name = {op.name: int(count(op, step).weight_read) for op in build(spec).ops}
        assert (by_name["embed_tokens"], by_name["lm_head"]) == (3 * 48 * 2, table)


def test_a_ring_bounds_what_is_read() -> None:
    spec = spec_from_config(CONFIG, "tiny").edit(
        [Edit("layers.*.self_attn.cache.heads.*", "keep", Ring(sink=2, recent=6))], "test"
    )
    op = next(op for op in build(spec).ops if op.kind == "attend")
    for past, keys in ((3, 4), (7, 8), (500, 8)):
        assert int(count(op, StepShape.of([1], [past]), "tiled").kv_read) == KV_HEADS * TOKEN_BYTES * keys
