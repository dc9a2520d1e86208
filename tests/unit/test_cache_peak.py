"""The most pages a cache takes on its way: metered as they are taken, in both engines, against the prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from trimtab.model.variant import Model, Variant
from trimtab.predict.memory import Footprint
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.native import lower
from trimtab.spec.configs import spec_from_config
from trimtab.spec.machine import load_stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.workload import Workload
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all

LAYERS, PROMPT, GEN = 4, 200, 9
CASES = [
    (),
    ("snapkv:cap=24,window=8",),
    ("pyramidkv:cap=48,window=8",),
    ("knorm:cap=20",),
    ("think:ratio=0.4,obs=8,recent=8",),
    ("kivi:bits=2,group=16,residual=16", "think:ratio=0.4,obs=8"),
    ("snapkv:cap=80,window=8", "kivi:bits=4,group=16,residual=16"),
    ("snapkv:cap=80,window=8", "think:ratio=0.4,obs=8,recent=8"),
    ("kivi:bits=4,group=16,residual=16",),
]


@pytest.fixture(scope="module")
def model() -> Any:
    """Four layers with heads of 32."""
    from trimtab.runtime.weights.random import random_weights

    config = {
        "model_type": "llama", "vocab_size": 67, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    spec = spec_from_config(config, "peak").with_dtype("float32")
    return Model(Variant(spec, random_weights(spec)))


def predicted(spec: ModelSpec, batch: int, chunk: int, gen: int = GEN) -> int:
    """Of prompts that run side by side, `chunk` tokens of each in a pass."""
    stack = dataclasses.replace(load_stack("datasheet"), prefill_chunk=chunk, max_batched_tokens=None)
    return Footprint(spec, stack).at(Workload(batch=batch, prompt=PROMPT, gen=gen)).kv_peak


def metered(runner: Any, batch: int, chunk: int) -> int:
    """The same in a session."""
    session = Session(runner, chunk=chunk)
    session.prefill([np.random.default_rng(row).integers(0, 67, PROMPT) for row in range(batch)], reserve=GEN)
    for token in range(GEN):
        session.decode([token] * batch)
    return max(session.store.peak_bytes, session.store.nbytes().reserved)


@pytest.mark.parametrize("techniques", CASES, ids=str)
@pytest.mark.parametrize(("batch", "chunk"), [(1, 512), (3, 512), (1, 64), (2, 199)])
def test_peak_is_the_predicted_one(model: Model, techniques: tuple[str, ...], batch: int, chunk: int) -> None:
    spec = compose(model.spec, parse_all(techniques))
    wanted = predicted(spec, batch, chunk)
    assert metered(lower(spec, model.weights, 1), batch, chunk) == wanted
    if batch == 1 or "think" in str(techniques) or "kivi" not in str(techniques):
        assert metered(Model(Variant(spec, model.weights)).runner(), batch, chunk) == wanted
