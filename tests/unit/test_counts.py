"""No drift: what the decoder really did equals what the graph says, op by op, for every family and technique.

The recorder adds up operand shapes and buffer sizes; the graph evaluates formulas over the spec. They share no code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trimtab.graph.build import build, filter_graph
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.model.variant import Model, Variant
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.cache import CacheSpec, HeadSpec
from trimtab.spec.nodes import FlowSpec
from trimtab.spec.tree import walk
from trimtab.techniques.apply import derive
from trimtab.techniques.registry import parse_all

pytestmark = pytest.mark.filterwarnings("ignore:think. the prompt has")

COUNTS = ("flops", "weight_read", "kv_read", "kv_written")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2], [2, 7, 1, 8, 2, 8]]
TECHNIQUES = [
    "rtn:bits=4,group=16",
    "rtn:bits=3,group=8,sym=false",
    "bitmod:bits=3,group=16",
    "bitmod:bits=4,types=int,group=16,scale_bits=16",
    "olive:normal=int,search=100:250:50",
    "olive:wbits=8,abits=16,search=100:250:50",
    "cats:sparsity=0.6",
    "streaming-llm:sink=2,recent=5",
    "gemfilter:layer=1,topk=5",
    "rtn:bits=4,group=16+cats:sparsity=0.6",
    "cats:sparsity=0.6+streaming-llm:sink=2,recent=5",
    "gemfilter:layer=2,topk=5+streaming-llm:sink=1,recent=3",
    "rtn:bits=4,group=16+gemfilter:layer=1,topk=5",
    "rtn:bits=4,group=16+streaming-llm:sink=2,recent=5",
    "cats:sparsity=0.6+gemfilter:layer=1,topk=5",
    "rtn:bits=4,group=16+cats:sparsity=0.6+gemfilter:layer=1,topk=6+streaming-llm:sink=1,recent=4",
    "llm-int8:threshold=2",
    "llm-int8:threshold=2.5,outlier_source=dequant",
    "llm-int8:decompose=false,include=mlp",
    "llm-int8:threshold=2,include=attention+cats:sparsity=0.6",
    "llm-int8:threshold=2+gemfilter:layer=1,topk=5",
    "kivi:group=8,residual=8",
    "kivi:kbits=8,vbits=4,group=16,residual=16",
    "kivi:bits=4,group=8,residual=8+gemfilter:layer=1,topk=12",
    "kivi:group=8,residual=8+streaming-llm:sink=2,recent=5",
    "bfp:block=8",
    "bfp:man=8,block=16,on=kv,sort=none",
    "snapkv:cap=9,window=3",
    "snapkv:cap=5,window=2,kernel=3,pool=max",
    "snapkv:cap=12,window=3+kivi:group=8,residual=8",
    "pyramidkv:cap=8,window=3",
    "knorm:cap=7,sink=1",
    "knorm:cap=12+kivi:kbits=8,vbits=4,group=8,residual=8",
    "h2o:cap=8",
    "h2o:cap=100",
    "tova:cap=8",
    "gemfilter:layer=1,topk=12+h2o:cap=7",
    "gemfilter:layer=1,topk=12+snapkv:cap=7,window=2",
    "quest:budget=8,page=4,skip=1",
    "quest:budget=6,page=3,skip=0",
    "vattn:page=4096,max_len=256",
    "vattn:layout=mega,max_len=256",
    "think:ratio=0.4,obs=4,recent=4",
    "think:ratio=0.5,recent=100",
    "snapkv:cap=10,window=2+think:ratio=0.3,obs=3,recent=3",
    "kivi:group=8,residual=8+think:ratio=0.5,obs=4",
    "snapkv:cap=16,window=3+think:ratio=0.4,obs=5+kivi:group=8,residual=8",
    "a-shape:sink=1,local=5",
    "tri-shape:sink=1,local=5,last=3+snapkv:cap=9,window=3",
]


def expected(graph: Any, step: StepShape) -> dict[str, tuple[int, ...]]:
    """Counts of every op of one pass by the formulas."""
    return {op.name: tuple(int(getattr(count(op, step), name)) for name in COUNTS) for op in graph.ops}


def metered(record: Recorder) -> dict[str, tuple[int, ...]]:
    """Counts of every op by the meters."""
    return {name: tuple(getattr(op, count) for count in COUNTS) for name, op in record.ops.items()}


def compare(graph: Any, step: StepShape, record: Recorder) -> None:
    """Ordered op names and every count must be equal."""
    wanted, found = expected(graph, step), metered(record)
    assert list(found) == list(wanted)
    assert found == wanted


def check_passes(model: Model, prompts: list[list[int]]) -> None:
    """One prefill (in two chunks) and two decode steps under the recorder, each against the graph."""
    spec = model.spec
    chosen = spec.flow.filter
    if chosen is not None:
        for prompt in prompts:
            record = Recorder()
            from trimtab.model.flow import filter_prompt

            filter_prompt(model.decoder, np.array(prompt), record)
            if len(prompt) > chosen.topk:
                compare(filter_graph(spec), StepShape.of([len(prompt)], [0], observed=record.observed), record)
            else:
                assert not record.ops
    held = [len(prompt) if chosen is None else min(len(prompt), chosen.topk) for prompt in prompts]
    session = model.session(chunk=11)
    passes: list[Recorder] = []
    forward = session._forward

    def recorded(*args: Any) -> Any:
        session.record = Recorder()
        passes.append(session.record)
        return forward(*args)

    session._forward = recorded  # type: ignore[method-assign]
    session.prefill(prompts)
    session.decode([5] * len(prompts))
    session.decode([6] * len(prompts))
    done = [0] * len(prompts)
    for record in passes[:-2]:
        active = [row for row, tokens in enumerate(held) if done[row] < tokens]
        new = [min(11, held[row] - done[row]) for row in active]
        last = sum(done[row] + count == held[row] for row, count in zip(active, new, strict=True))
        past, whole = [done[row] for row in active], [held[row] for row in active]
        step = StepShape.of(new, past, logits=last, observed=record.observed, prompt=whole)
        compare(build(spec, "prefill", head=last > 0), step, record)
        for row, tokens in zip(active, new, strict=True):
            done[row] += tokens
    for index, record in enumerate(passes[-2:]):
        past = [tokens + index for tokens in held]
        step = StepShape.of([1] * len(held), past, logits=len(held), observed=record.observed, prompt=held)
        compare(build(spec), step, record)


def test_families(family: Any) -> None:
    check_passes(Model(Variant(family, random_weights(family))), PROMPTS)


@pytest.mark.parametrize("setting", TECHNIQUES)
def test_techniques(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    check_passes(Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials)), PROMPTS)


def test_modules_are_the_nodes(family: Any) -> None:
    """The decoder's modules and the spec's nodes are one tree, by path and by identity."""
    decoder = Variant(family, random_weights(family)).decoder
    nodes = {path: node for path, node in walk(family) if not isinstance(node, CacheSpec | HeadSpec | FlowSpec)}
    modules = {path: module for path, module in decoder.named_modules() if path and path != "layers"}
    assert set(modules) == set(nodes)
    assert all(modules[path].spec is node for path, node in nodes.items())


def test_flops_equal_torch(family: Any) -> None:
    """FLOPs of the graph are those torch counts on the decoder (eager attention), to the last one."""
    from trimtab.model.attention import Attention, eager

    model = Model(Variant(family, random_weights(family)))
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            module.backend = eager
    tokens = 23
    with FlopCounterMode(display=False) as counter:
        model.logits(torch.arange(tokens)[None] % 90)
    step = StepShape.of([tokens], [0], logits=tokens)
    assert counter.get_total_flops() == sum(int(count(op, step).flops) for op in build(family, "prefill").ops)


def test_flops_of_decoding_equal_torch(family: Any) -> None:
    """A step behind a cached prompt, and the second chunk of a prompt, of two rows of different lengths."""
    from trimtab.model.attention import Attention, eager

    model = Model(Variant(family, random_weights(family)))
    for module in model.decoder.modules():
        if isinstance(module, Attention):
            module.backend = eager
    session = model.session(chunk=11)
    with FlopCounterMode(display=False) as counter:
        session.prefill(PROMPTS)
    first = StepShape.of([11, 6], [0, 0], logits=1)  # the shorter prompt ends in the first pass
    second = StepShape.of([6], [11], logits=1)
    wanted = sum(int(count(op, step).flops) for step in (first, second) for op in build(family, "prefill").ops)
    assert counter.get_total_flops() == wanted
    with FlopCounterMode(display=False) as counter:
        session.decode([5, 7])
    step = StepShape.of([1, 1], [17, 6], logits=2)
    assert counter.get_total_flops() == sum(int(count(op, step).flops) for op in build(family).ops)


def test_resident_bytes(family: Any) -> None:
    """Weights and cache hold the bytes the spec says."""
    model = Model(Variant(family, random_weights(family)))
    assert model.weights.nbytes == family.weight_nbytes()
    session = model.session()
    session.prefill(PROMPTS)
    assert session.store.nbytes().held == sum(family.kv_nbytes(len(prompt)) for prompt in PROMPTS)


@pytest.mark.parametrize("setting", TECHNIQUES)
def test_resident_bytes_with_techniques(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    model = Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials))
    assert model.weights.nbytes == model.spec.weight_nbytes()
    session = model.session()
    session.prefill(PROMPTS)
    prompts = list(session.lengths)
    for token in (5, 6):
        session.decode([token] * len(PROMPTS))
    lengths = zip(session.lengths, prompts, strict=True)
    assert session.store.nbytes().held == sum(model.spec.kv_nbytes(length, prompt) for length, prompt in lengths)


def test_planted_fault_in_a_formula_is_found(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key too many in the attention formula turns the comparison red."""
    from trimtab.graph import attention as module

    pairs = module.pairs
    monkeypatch.setattr(module, "pairs", lambda *args: pairs(*args) + 1)
    with pytest.raises(AssertionError):
        check_passes(tiny_model, PROMPTS)
