"""Calibration by blocks, the column sweep and gptq: against slow references, hand-made inputs and plain rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CalibrationError, SpecError
from trimtab.model import calibration
from trimtab.model.calibration import Blocks, Inputs, observed
from trimtab.model.rounding import IntRule, fit_scales
from trimtab.model.sweep import Factor, factor, group_order, sweep
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.packed import Weights, packed_float
from trimtab.spec.formats import WeightFormat
from trimtab.techniques.apply import applied, derive
from trimtab.techniques.registry import parse_all, parse_technique

QUICK = "samples=512,window=128"


def problem(seed: int, n: int = 12, k: int = 32, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [n, k] and the Hessian of correlated inputs."""
    made = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=made) * torch.rand(k, generator=made)
    x = torch.randn(tokens, k, generator=made) @ mixing
    return torch.randn(n, k, generator=made), (x.T @ x / tokens).double()


def int_format(bits: int, group: int, sym: bool) -> WeightFormat:
    return WeightFormat(kind="int", bits=bits, group=group, sym=sym)


def error(w: torch.Tensor, found: torch.Tensor, h: torch.Tensor) -> float:
    dw = (w - found).double()
    return float((dw @ h * dw).sum())


class Rounded:
    """Round every column to a fixed step: a rule without scales to fix."""

    def __init__(self, group: int, step: float = 0.5) -> None:
        self.group, self.step = group, step
        self.starts: list[int] = []

    def start(self, j: int, w_Ng: torch.Tensor, cost_g: torch.Tensor) -> None:
        assert w_Ng.shape[1] == len(cost_g) == self.group
        self.starts.append(j)

    def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
        return (w_N / self.step).round() * self.step


def slow_sweep(w: torch.Tensor, h: torch.Tensor, damp: float, order: list[int], step: float) -> torch.Tensor:
    """Optimal brain compression, one column at a time, the inverse updated by elimination."""
    k = len(h)
    damped = h + torch.eye(k, dtype=h.dtype) * damp * h.diagonal().mean()
    inverse, left = torch.linalg.inv(damped), w.double().clone()
    out = torch.empty_like(left)
    for place in order:
        out[:, place] = (left[:, place] / step).round() * step
        scaled = (left[:, place] - out[:, place]) / inverse[place, place]
        left -= scaled[:, None] * inverse[place][None]
        inverse = inverse - inverse[:, place, None] * inverse[None, place] / inverse[place, place]
    return out.float()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 32]), st.sampled_from([4, 13, 128]), st.booleans())
def test_the_sweep_is_optimal_brain_compression(seed: int, group: int, block: int, act: bool) -> None:
    w, h = problem(seed)
    order = group_order(h.diagonal(), group) if act else None
    how = factor(h, 0.05, order)
    rule = Rounded(group)
    found, loss = sweep(w, how, rule, block)
    wanted = slow_sweep(w, h, 0.05, how.order.tolist(), rule.step)
    assert (found != wanted).float().mean() < 0.02  # a value half-way between two points may fall to either
    assert rule.starts == list(range(0, 32, group))
    damped = h + torch.eye(32, dtype=h.dtype) * 0.05 * h.diagonal().mean()
    assert loss == pytest.approx(error(w, found, damped), rel=1e-3)


def test_a_rule_that_changes_nothing_loses_nothing() -> None:
    w, h = problem(0)

    class Keep(Rounded):
        def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
            return w_N

    found, loss = sweep(w, factor(h), Keep(8))
    assert loss == 0 and torch.equal(found, w)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_swept_codes_beat_rounding_and_are_what_is_stored(bits: int, sym: bool) -> None:
    format = int_format(bits, 8, sym)
    for seed in range(5):
        w, h = problem(seed)
        plain = IntRule(format, (12, 32), torch.arange(32), (1.0,))
        identity = Factor(torch.eye(32), torch.arange(32), torch.zeros(32, dtype=torch.bool), 0.0)
        rounded, _ = sweep(w, identity, plain)
        how = factor(h, 0.01, group_order(h.diagonal(), 8))
        rule = IntRule(format, (12, 32), how.order)
        found, _ = sweep(w, how, rule)
        np.testing.assert_array_equal(decode(rule.packed()), found.numpy())
        assert error(w, found, h) < 0.7 * error(w, rounded, h)
        from trimtab.runtime.numerics import encode

        np.testing.assert_allclose(
            rounded.numpy(), decode(encode(w.numpy(), format)), atol=1e-6
        )  # identity: plain rounding


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_searched_scales_are_never_worse_than_the_range(seed: int, bits: int, sym: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    w, cost = torch.randn(6, 16, generator=made), torch.rand(16, generator=made) + 0.01
    format = int_format(bits, 16, sym)

    def left(shares: tuple[float, ...]) -> torch.Tensor:
        scale, minimum = fit_scales(w, cost, format, shares)
        rule = IntRule(format, (6, 16), torch.arange(16), shares)
        rule._scale, rule._minimum = scale, minimum
        found = torch.stack([rule.column(j, w[:, j]) for j in range(16)], 1)
        return ((w - found).square() * cost).sum(1)

    assert (left((1.0, 0.9, 0.8)) <= left((1.0,)) * (1 + 1e-5) + 1e-9).all()


def test_dead_columns_broken_and_empty_statistics() -> None:
    w, h = problem(3)
    h[:, 5] = h[5] = 0
    found, _ = sweep(w, factor(h), Rounded(8))
    assert torch.isfinite(found).all() and (found[:, 5] == 0).all()
    with pytest.raises(CalibrationError, match="nothing but zeros"):
        factor(torch.zeros(4, 4))
    singular = torch.ones(4, 4) - 1e-6 * torch.eye(4)
    with pytest.warns(UserWarning, match=r"singular: damped by 0.001 of its mean instead of 1e-09"):
        assert factor(singular, 1e-9).damp == pytest.approx(1e-3)
    with pytest.raises(CalibrationError, match=r"not finite"):
        Inputs().add(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("tokens", ["unitnorm", "cap", "plain"])
def test_moments_against_numpy(tokens: str) -> None:
    x = np.random.default_rng(0).standard_normal((64, 7)).astype(np.float32)
    x[0] *= 1000  # a token far longer than the rest
    seen = Inputs(tokens)
    for part in (x[:40], x[40:]):
        seen.add(torch.from_numpy(part))
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if tokens == "unitnorm":
        wanted = (x / norm).T @ (x / norm) / 64
    elif tokens == "plain":
        wanted = x.T @ x / 64
    else:
        median = np.concatenate(
            [np.repeat(np.sort(norm[a:b], 0)[(b - a - 1) // 2], b - a) for a, b in ((0, 40), (40, 64))]
        )
        scaled = x * np.minimum(1, median[:, None] / norm)
        wanted = scaled.T @ scaled / 64
    np.testing.assert_allclose(seen.hessian.numpy(), wanted, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(seen.mean_square.numpy(), (x.astype(np.float64) ** 2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen.mean_abs.numpy(), np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(seen.peak.numpy(), np.abs(x).max(0))


def test_matrices_that_read_one_tensor_share_an_observer(tiny_model: Any) -> None:
    windows = [np.arange(20, dtype=np.int64), np.arange(30, 60, dtype=np.int64)]
    found = observed(tiny_model.spec, tiny_model.weights, windows, lambda path: Inputs())
    at = {path.removeprefix("layers.1."): found[path] for path in found if path.startswith("layers.1.")}
    assert at["self_attn.q_proj"] is at["self_attn.k_proj"] is at["self_attn.v_proj"]
    assert at["mlp.gate_proj"] is at["mlp.up_proj"] and at["mlp.down_proj"] is not at["mlp.up_proj"]
    assert len({id(one) for one in found.values()}) == 4 * 3 and len(found) == 7 * 3
    assert all(one.count == 50 for one in found.values())  # type: ignore[attr-defined]


def test_blocks_see_what_was_changed_before_them(tiny_model: Any) -> None:
    spec, weights = tiny_model.spec, tiny_model.weights
    windows = [np.arange(20, dtype=np.int64), np.arange(30, 60, dtype=np.int64)]
    seen: list[tuple[int, set[str]]] = []

    def silence(found: Any, now: Any) -> dict[str, Any]:
        """v becomes zero; then what o reads is zero."""
        seen.append((len(seen), {path.rpartition(".")[2] for path in found}))
        for path, one in found.items():
            if path.endswith("o_proj"):
                assert float(one.peak.max()) == 0
        return {p: packed_float(np.zeros(weights[p].shape, np.float32), "fp32") for p in found if p.endswith("v_proj")}

    blocks = Blocks(spec, weights, windows)
    changed = blocks.visit(0, weights, lambda path: True, lambda path: Inputs(), silence)
    assert [names for _, names in seen] == [
        {"q_proj", "k_proj", "v_proj"},
        {"o_proj"},
        {"gate_proj", "up_proj"},
        {"down_proj"},
    ]
    plain = Blocks(spec, changed, windows)
    plain.visit(0, changed, lambda path: False, lambda path: Inputs(), lambda found, now: {})
    assert all(torch.equal(a, b) for a, b in zip(blocks.hidden, plain.hidden, strict=True))
    through = Blocks(spec, weights, windows)
    for index in range(3):
        through.visit(index, weights, lambda path: False, lambda path: Inputs(), lambda found, now: {})
    logits = [tiny_model.decoder.head(h, through._step(0), np.arange(50)) for h in through.hidden]
    assert torch.allclose(logits[0][:20], tiny_model.logits(windows[0])[0], atol=1e-5)


def test_every_expert_is_observed_by_itself() -> None:
    from trimtab.runtime.weights.random import random_weights
    from trimtab.spec.configs import spec_from_config

    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    spec = spec_from_config(config, "tiny-moe").with_dtype("float32")
    weights = random_weights(spec)
    windows = [np.random.default_rng(0).integers(0, 64, 60)]
    stages: list[set[str]] = []

    def look(found: Any, now: Any) -> dict[str, Any]:
        stages.append({path.removeprefix("layers.0.mlp.experts.") for path in found if "experts" in path})
        return {}

    Blocks(spec, weights, windows).visit(0, weights, lambda path: "router" not in path, lambda path: Inputs(), look)
    assert stages[2] == {f"{e}.{name}" for e in range(3) for name in ("gate_proj", "up_proj")}
    assert stages[3] == {f"{e}.down_proj" for e in range(3)}


@pytest.mark.parametrize(
    "setting", ["bits=4,group=16", "bits=3,group=32,sym=false,order=none,search=false,tokens=plain"]
)
def test_gptq_moves_the_codes_and_keeps_the_outputs_closer(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    gptq = parse_technique(f"gptq:{setting},{QUICK}")
    twin = f"rtn:bits={gptq.bits},group={gptq.group},sym={str(gptq.sym).lower()}"  # type: ignore[attr-defined]
    swept = derive(tiny_model.variant, [gptq], tiny_materials)
    rounded = derive(tiny_model.variant, parse_all([twin]), tiny_materials)
    inputs = observed(tiny_model.spec, tiny_model.weights, tiny_materials.token_windows(), lambda path: Inputs("plain"))
    better = 0
    for path, one in inputs.items():
        assert isinstance(one, Inputs) and float(one.hessian.abs().max()) > 0
        assert swept.weights[path].format == rounded.weights[path].format
        assert swept.weights[path].nbytes == rounded.weights[path].nbytes
        w, a, b = (torch.from_numpy(decode(v.weights[path])) for v in (tiny_model.variant, swept, rounded))
        assert not torch.equal(a, b)
        better += error(w, a, one.hessian) < error(w, b, one.hessian)
    assert better >= 0.9 * len(inputs)


def test_interrupted_runs_go_on_where_they_stopped(
    tiny_model: Any, tiny_materials: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = parse_all([f"gptq:bits=3,group=16,{QUICK}"])
    whole = derive(tiny_model.variant, chosen, tiny_materials)
    kept = dataclasses.replace(tiny_materials, cache=tmp_path)
    visited: list[int] = []
    visit = Blocks.visit

    def counted(self: Blocks, index: int, *rest: Any) -> Weights:
        if index == 2 and not (2 in visited or len(visited) > 3):
            visited.append(index)
            raise KeyboardInterrupt
        visited.append(index)
        return visit(self, index, *rest)

    monkeypatch.setattr(calibration.Blocks, "visit", counted)
    with pytest.raises(KeyboardInterrupt):
        derive(tiny_model.variant, chosen, kept)
    found = derive(tiny_model.variant, chosen, kept)
    assert visited == [0, 1, 2, 2]  # the first two blocks were not done again
    again = derive(tiny_model.variant, chosen, kept)
    assert visited == [0, 1, 2, 2]
    for path in whole.weights:
        for name, buffer in whole.weights[path].buffers.items():
            np.testing.assert_array_equal(found.weights[path].buffers[name], buffer)
            np.testing.assert_array_equal(again.weights[path].buffers[name], buffer)
    derive(tiny_model.variant, parse_all([f"gptq:bits=4,group=16,{QUICK}"]), kept)
    assert visited == [0, 1, 2, 2, 0, 1, 2]  # other parameters are another run


def test_what_cannot_be_calibrated_is_refused(tiny_model: Any, tiny_materials: Any) -> None:
    short = dataclasses.replace(tiny_materials, texts={"t": "1 2 3 " * 50})
    with pytest.raises(CalibrationError, match=r"gptq: the calibration text holds 128 tokens.*at least 512"):
        derive(tiny_model.variant, parse_all([f"gptq:group=16,{QUICK}"]), short)
    with pytest.raises(CalibrationError, match=r"at least 2048 are needed, 12288 were asked"):
        derive(tiny_model.variant, parse_all(["gptq:group=16"]), tiny_materials)
    some = "group=16,samples=4096,window=128"
    longer = dataclasses.replace(tiny_materials, texts={"t": " ".join([tiny_materials.texts["random"]] * 3)})
    with pytest.warns(UserWarning, match=r"holds 3072 tokens in windows of 128, 4096 were asked for"):
        derive(tiny_model.variant, parse_all([f"gptq:{some}"]), longer)
    with pytest.raises(SpecError, match=r"gptq: layers.0.*group=64 does not divide the row length 96.*Try group=48"):
        derive(tiny_model.variant, parse_all(["gptq"]), tiny_materials)
    with (
        applied(tiny_model, "rtn:bits=8,group=16", materials=tiny_materials),
        pytest.raises(SpecError, match=r"already quantized \(format int8-g16\)"),
    ):
        derive(tiny_model.variant, parse_all([f"gptq:group=16,{QUICK}"]), tiny_materials)
    broken = tiny_model.weights["layers.1.mlp.up_proj"].buffers["data"].copy()
    broken[3, 4] = np.nan
    variant = dataclasses.replace(
        tiny_model.variant, weights=tiny_model.weights | {"layers.1.mlp.up_proj": packed_float(broken, "fp32")}
    )
    with pytest.raises((CalibrationError, SpecError), match="not finite"):
        derive(variant, parse_all([f"gptq:group=16,{QUICK}"]), tiny_materials)
