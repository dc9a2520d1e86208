"""Caches that code, thin, evict and forget, in the native program: the decoder's logits, bytes and reads, pass by pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.model.variant import Model, Variant
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.native import lower
from trimtab.runtime.step import Recorder
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all

GATES = "tests/fixtures/duo/tiny-llama.tsv"
#: Techniques, format of the cache, and how far logits may lie apart: a code may fall to the other side where a sum is rounded otherwise.
CASES = [
    ((), "float32", 1e-4),
    ((), "int8", 2e-3),
    ((), "int4", 2e-2),
    ((), "fp8", 2e-2),
    (("streaming-llm:sink=2,recent=20",), "float32", 1e-4),
    (("streaming-llm:sink=4,recent=12",), "bfloat16", 2e-3),
    (("streaming-llm:sink=3,recent=17",), "int8", 4e-3),  # 20 keys: a value that falls to the other code weighs more
    (("kivi:bits=8,group=16,residual=16",), "float32", 2e-3),
    (("kivi:bits=4,group=16,residual=32",), "bfloat16", 2e-2),
    (("kivi:bits=2,group=32,residual=32",), "float32", 5e-2),
    (("kivi:bits=4,group=16,residual=16", "streaming-llm:sink=2,recent=20"), "float32", 1e-4),
    (("snapkv:cap=24,window=8",), "float32", 1e-4),
    (("pyramidkv:cap=24,window=8",), "float32", 1e-4),
    (("knorm:cap=20",), "bfloat16", 2e-3),
    (("tova:cap=24",), "float32", 1e-4),
    (("h2o:cap=24",), "float32", 1e-4),
    (("quest:budget=32,page=16,skip=1",), "float32", 1e-4),
    (("quest:budget=24,page=4,skip=0",), "bfloat16", 2e-3),
    (("a-shape:sink=4,local=16",), "float32", 1e-4),
    (("a-shape:sink=0,local=9",), "float32", 1e-4),
    (("tri-shape:sink=4,local=16,last=11",), "float32", 1e-4),
    (("tri-shape:sink=5,local=20,last=3", "kivi:bits=4,group=16,residual=16"), "float32", 2e-2),
    (("snapkv:cap=40,window=8", "kivi:bits=4,group=16,residual=16"), "float32", 2e-2),
    (("think:ratio=0.4,obs=8,recent=8",), "float32", 1e-4),
    (("think:ratio=0.5,obs=8,recent=8",), "bfloat16", 2e-3),
    (("kivi:bits=4,group=16,residual=16", "think:ratio=0.4,obs=8"), "float32", 2e-2),
    (("snapkv:cap=30,window=8", "think:ratio=0.4,obs=8,recent=8"), "float32", 1e-4),
]


@pytest.fixture(scope="module")
def wide_model() -> Any:
    """Heads of 32, four query heads to a KV head."""
    from trimtab.runtime.weights.random import random_weights
    from trimtab.spec.configs import spec_from_config

    config = {
        "model_type": "llama", "vocab_size": 131, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    spec = spec_from_config(config, "wide").with_dtype("float32")
    return Model(Variant(spec, random_weights(spec)))


@pytest.mark.parametrize(("techniques", "kv_dtype", "apart"), CASES, ids=str)
@pytest.mark.parametrize("chunk", [512, 37])
def test_logits_bytes_and_reads_are_the_decoders(
    wide_model: Model, techniques: tuple[str, ...], kv_dtype: str, apart: float, chunk: int
) -> None:
    spec = compose(wide_model.spec.with_kv_dtype(kv_dtype), parse_all(techniques))
    program = lower(spec, wide_model.weights, 2)
    reference = Model(Variant(spec, wide_model.weights))
    native, torch = (Session(runner, chunk=chunk) for runner in (program, reference.runner()))
    graph = build(program.spec).ops
    prompts = [np.random.default_rng(7).integers(0, 131, n) for n in (90, 41)]
    found, wanted = (session.prefill(prompts, reserve=60) for session in (native, torch))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=apart)
    past = [len(prompt) for prompt in prompts]
    for turn in range(60):
        new = 1 if turn % 20 != 10 else 5
        records = []
        for session in (native, torch):
            record = session.record = Recorder()
            pieces = [np.arange(turn + row, turn + row + new) % 131 for row in range(2)]
            logits = session.decode([piece[0] for piece in pieces]) if new == 1 else session.extend(pieces)
            records.append((record, logits))
        np.testing.assert_allclose(records[0][1], records[1][1], rtol=0, atol=apart)
        seen = records[1][0]
        step = StepShape.of([new, new], past, logits=2 * new, observed=seen.observed, prompt=[90, 41])
        for (record, _), how in zip(
            records, ("tiled", "eager"), strict=True
        ):  # the decoder masks keys, the program skips them
            counts = [count(op, step, how) for op in graph]
            for name in ("kv_read", "kv_written"):
                assert record.total(name) == sum(int(getattr(c, name)) for c in counts), (turn, name, how)
        past = [length + new for length in past]
    assert native.store.nbytes() == torch.store.nbytes()
    assert native.store.nbytes().held == sum(
        spec.kv_nbytes(length, prompt) for length, prompt in zip(past, (90, 41), strict=True)
    )
    for session in (native, torch):
        session.close()
        assert session.store.pages_bytes == 0


@pytest.mark.parametrize(
    "techniques", [(), ("kivi:bits=4,group=16,residual=16",), ("snapkv:cap=40,window=8",)], ids=str
)
def test_forks_and_marks_after_steady_passes(wide_model: Model, techniques: tuple[str, ...]) -> None:
    """Counting ahead of the rows must not show: a state that is come back to gives the same logits to the bit."""
    spec = compose(wide_model.spec, parse_all(techniques))
    session = Session(lower(spec, wide_model.weights, 2))
    session.prefill([np.arange(70)], reserve=100)
    for token in range(9):
        session.decode([token])
    store, seq = session.store, session.seqs[0]
    mark, length = store.mark(seq), session.lengths[0]
    first = [session.decode([token]) for token in range(40)]
    assert store.nbytes(seq).held == spec.kv_nbytes(length + 40, 70)
    store.reset(seq, mark)
    session.lengths[0] = length
    for token, logits in enumerate(first):
        np.testing.assert_array_equal(session.decode([token]), logits)
    store.release(mark)
    session.close()
    assert store.pages_bytes == 0


def test_a_shared_prefix_leaves_the_short_way_open(wide_model: Model) -> None:
    """Kept prefixes share whole pages: answers behind them are counted ahead, and what others own is copied before it is written."""
    session = Session(lower(wide_model.spec, wide_model.weights, 1))
    session.prefill([np.arange(70)])
    store, seq = session.store, session.seqs[0]
    kept = store.fork(seq)
    store.truncate(kept, 64)  # one page, which nobody writes to any more
    alone = [session.decode([token]) for token in range(3)]
    assert seq._steady is not None and seq._steady.left == 128 - 73
    mark = store.mark(seq)  # now the second page is shared: the next token has it copied, those after it go on alone
    before = store.nbytes(seq).reserved
    session.decode([3])
    assert seq._steady is not None and seq._steady.left == 128 - 74
    session.decode([4])
    assert store.nbytes(seq).reserved == before
    store.reset(seq, mark)
    session.lengths[0] = 73
    again = session.decode([3])
    store.reset(seq, mark)
    store.truncate(seq, 70)
    session.lengths[0] = 70
    for token, logits in enumerate(alone):
        np.testing.assert_array_equal(session.decode([token]), logits)
    np.testing.assert_array_equal(session.decode([3]), again)
    for one in (kept,):
        store.free(one)
    store.release(mark)
    session.close()
    assert store.pages_bytes == 0
