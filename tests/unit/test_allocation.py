"""Folding scales, awq, and bits under a budget: function preserved, exhaustive search, predictions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.model.calibration import Inputs, observed
from trimtab.model.folding import fold, shared_by_values
from trimtab.model.variant import Model, Variant
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.configs import spec_from_config
from trimtab.techniques import allocation
from trimtab.techniques.allocation import Budget, allot, groups
from trimtab.techniques.apply import derive
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, parse_technique

IDS = np.random.default_rng(4).integers(0, 97, 40)
SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # biases of q, k, v
    "gemma": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 64,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },  # norms that scale by 1 + w
}  # fmt: skip


def small(family: str) -> Model:
    spec = spec_from_config(SMALL | FAMILIES[family], f"small-{family}").with_dtype("float32")
    return Model(Variant(spec, random_weights(spec, seed=3)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", range(4))
def test_folding_a_scale_preserves_the_function(family: str, stage: int) -> None:
    model = small(family)
    before = model.logits(IDS)
    layer, size = model.spec.layers[1], 48 if stage == 3 else 32
    scale = np.exp(np.random.default_rng(stage).uniform(-2, 2, size))
    if stage == 1:
        scale = shared_by_values(layer, scale)
    changed = fold(layer, "layers.1", model.weights, stage, scale)
    assert len(changed) >= 2 and all(
        not np.array_equal(decode(p), decode(model.weights[n])) for n, p in changed.items()
    )
    after = Model(Variant(model.spec, model.weights | changed)).logits(IDS)
    assert torch.allclose(after, before, atol=2e-4 * float(before.abs().max()))


def test_what_cannot_take_a_scale_up_is_refused() -> None:
    model = small("llama")
    uneven = np.arange(1, 33, dtype=np.float64)
    with pytest.raises(UnsupportedModelError, match="share the scale"):
        fold(model.spec.layers[0], "layers.0", model.weights, 1, uneven)
    config = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    opt = spec_from_config(SMALL | config, "small-opt").with_dtype("float32")
    with pytest.raises(UnsupportedModelError, match="without a gate"):
        fold(opt.layers[0], "layers.0", random_weights(opt), 3, np.ones(48))
    with pytest.raises(SpecError, match=r"awq: layers.0 .* gated FFN.*Use gptq"):
        compose(opt, parse_all(["awq:group=16"]))


def test_awq_beats_rounding_on_inputs_of_uneven_size(tiny_materials: Any) -> None:
    model = small("llama")
    columns = np.where(np.arange(32) % 7 == 0, 12.0, 1.0)
    rest = fold(model.spec.layers[0], "layers.0", model.weights, 0, 1 / columns)  # a few channels of the norm are loud
    variant = Variant(model.spec, model.weights | rest)
    digits = dataclasses.replace(
        tiny_materials, texts={"t": " ".join(map(str, np.random.default_rng(0).integers(0, 97, 1024)))}
    )
    quick = "bits=3,group=16,samples=512,window=128"
    scaled = derive(variant, parse_all([f"awq:{quick}"]), digits)
    plain = derive(variant, parse_all(["rtn:bits=3,group=16,sym=false"]), digits)
    x = observed(model.spec, variant.weights, digits.token_windows(), lambda path: Inputs("plain"))
    base = decode(scaled.weights["layers.0.input_layernorm"]) / decode(variant.weights["layers.0.input_layernorm"])
    assert base.max() / base.min() > 1.5  # it did scale
    for name in ("q_proj", "k_proj", "v_proj"):
        path = f"layers.0.self_attn.{name}"
        h, w = x[path].hessian.numpy(), decode(variant.weights[path])  # type: ignore[attr-defined]
        found = decode(scaled.weights[path]) * base
        rounded = decode(plain.weights[path])
        if name == "v_proj":  # its rows carry what o was scaled by
            rows = np.linalg.norm(found, axis=1, keepdims=True) / np.linalg.norm(w, axis=1, keepdims=True)
            found = found / rows
        errors = [float(((v - w) @ h * (v - w)).sum()) for v in (found, rounded)]
        assert errors[0] < 0.8 * errors[1], name


def test_matrices_that_run_together_share_bits(tiny_model: Any) -> None:
    found = groups(tiny_model.spec)
    assert len(found) == 3 * 4
    assert found[4] == tuple(f"layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert found[6] == ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_allotting_is_optimal(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.uniform(0.1, 3, (4, 3)), axis=1) * 10.0 ** rng.integers(-9, 9)
    harm = -np.sort(-(rng.uniform(0, 1, (4, 3)) ** 3), axis=1)
    limit = float(cost[:, 0].sum() + share * (cost[:, -1] - cost[:, 0]).sum())
    found = allot(harm, cost, limit)
    rows = range(4)
    best = min(
        sum(harm[g, b] for g, b in zip(rows, choice, strict=True))
        for choice in itertools.product(range(3), repeat=4)
        if sum(cost[g, b] for g, b in zip(rows, choice, strict=True)) <= limit * (1 + 1e-9)
    )
    assert sum(cost[rows, found]) <= limit * (1 + 1e-6)
    assert harm[rows, found].sum() == pytest.approx(best, abs=1e-4)


def test_budgets_are_read_and_refused() -> None:
    assert Budget.of("3.5") == Budget("bits", 3.5) and Budget.of("60MB") == Budget("bytes", 60e6)
    assert Budget.of("9s") == Budget("seconds", 9) and Budget.of("0.05 J") == Budget("joules", 0.05)
    for bad in ("", "x", "3.5 bits", "-1", "0", "4ns"):
        with pytest.raises(SpecError, match=r"Allowed: average bits"):
            Budget.of(bad)
    with pytest.raises(SpecError, match=r"below what the cheapest choice costs"):
        allot(np.ones((2, 2)), np.ones((2, 2)), 1.5)


@pytest.mark.parametrize("budget", ["3.5", "120kB", "2us", "1mJ"])
def test_bits_auto_meets_its_budget(tiny_model: Any, tiny_materials: Any, budget: str) -> None:
    technique = parse_technique(f"gptq:bits=auto,budget={budget},on=a100,group=16,samples=512,window=128")
    assert technique.unresolved
    spec = tiny_model.spec
    parsed = Budget.of(budget)
    if parsed.kind in ("seconds", "joules"):  # between all 2 and all 8 bits, whatever the machine file says
        ends = [_predicted(tiny_model, bits, parsed.kind) for bits in (2, 8)]
        value = f"{(ends[0] + ends[1]) / 2:.9f}{'s' if parsed.kind == 'seconds' else 'J'}"
        technique = dataclasses.replace(technique, budget=value)
        parsed = Budget.of(value)
    resolved = technique.resolve(tiny_model, tiny_materials)
    assert not resolved.unresolved and len(resolved.bits) == 12 and len(set(resolved.bits)) > 1
    assert parse_technique(str(resolved)) == resolved
    variant = derive(tiny_model.variant, [resolved], tiny_materials)
    linears = [(p, n) for p, n in variant.spec.linears() if p.startswith("layers.")]
    if parsed.kind == "bits":
        weights = sum(n.n * n.k for _, n in linears)
        assert sum(n.format.bits * n.n * n.k for _, n in linears) <= 3.5 * weights
        assert sum(n.format.bits * n.n * n.k for _, n in linears) > 3.3 * weights
    elif parsed.kind == "bytes":
        assert 117_000 < sum(variant.weights[p].nbytes for p, _ in linears) <= 120_000
    else:
        name = "tpot_s" if parsed.kind == "seconds" else "energy_j"
        found = allocation._predicted(compose(spec, [resolved]), name, "a100")
        assert ends[0] <= found <= parsed.value * (1 + 1e-6)


def _predicted(model: Any, bits: int, kind: str) -> float:
    spec = compose(model.spec, parse_all([f"gptq:bits={bits},group=16"]))
    return allocation._predicted(spec, "tpot_s" if kind == "seconds" else "energy_j", "a100")


def test_a_wrong_number_of_bits_is_refused(tiny_model: Any) -> None:
    with pytest.raises(SpecError, match=r"3 numbers of bits for the 12 groups"):
        compose(tiny_model.spec, parse_all(["gptq:bits=2|3|4,group=16"]))
    with pytest.raises(SpecError, match=r"needs `trimtab calibrate` first"):
        allocation.costs(tiny_model.spec, (2, 4), parse_technique("gptq:group=16").form, Budget("seconds", 1.0), "")
