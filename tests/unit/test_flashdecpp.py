"""FlashDecoding++: unified softmax against float64, its guard, the product kernels and their table, int8 pages, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import numpy as np
import pytest

import trimtab.runtime.native.dataflow as dataflow
from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.kernels import _core
from trimtab.runtime.native import lower
from trimtab.runtime.native.attention import Attention, attend_range, encode_pages
from trimtab.runtime.native.lower import core_tiles
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.numerics.tiles import tile, tiled_format
from trimtab.spec.cache import PageFormat
from trimtab.spec.formats import WeightFormat
from trimtab.spec.nodes import Unified
from trimtab.techniques.apply import applied, load_native
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, parse_technique

SPLIT = 256
LENGTHS = (1, 17, SPLIT - 1, SPLIT, SPLIT + 1, 1000, 8192)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def reference(
    q_TNH: np.ndarray, k_GSH: np.ndarray, v_GSH: np.ndarray, scale: float, softcap: float = 0.0, window: int = 0
) -> np.ndarray:
    """Softmax attention of the last T of S tokens in float64 [T, N, H]."""
    t, n, _ = q_TNH.shape
    per, s = n // len(k_GSH), k_GSH.shape[1]
    out = np.empty(q_TNH.shape)
    for i in range(t):
        last = s - t + i + 1
        first = max(0, last - window) if window else 0
        for head in range(n):
            k, v = (x[head // per, first:last].astype(np.float64) for x in (k_GSH, v_GSH))
            scores = k @ q_TNH[i, head].astype(np.float64) * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ v / weights.sum()
    return out


def top_of(q: np.ndarray, k: np.ndarray, scale: float) -> float:
    """Largest score of any query."""
    per = q.shape[1] // len(k)
    return max(float((k[h // per] @ q[0, h]).max()) * scale for h in range(q.shape[1]))


def attention(softmax: Any = None, **options: Any) -> Attention:
    made = {
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "scale": HEAD_DIM**-0.5,
        "split": SPLIT,
        **options,
    }
    return Attention(**made) if softmax is None else Attention(softmax=softmax, **made)


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_phi_gives_the_softmax(isa: str, tokens: int) -> None:
    q, k, v = (
        values(1, HEADS, HEAD_DIM),
        values(KV_HEADS, tokens, HEAD_DIM, seed=1),
        values(KV_HEADS, tokens, HEAD_DIM, seed=2),
    )
    wanted, top = reference(q, k, v, HEAD_DIM**-0.5), top_of(q, k, HEAD_DIM**-0.5)
    coded = encode_pages(k), encode_pages(v)
    for offset in (-20.0, -3.0, 0.0, 3.0, 20.0):
        one = attention(Unified(top - offset, -70.0, 60.0), threads=2)
        np.testing.assert_allclose(one.run(q, *coded), wanted, rtol=1e-5, atol=1e-5)
        assert one.recomputed == 0
    np.testing.assert_allclose(attention().run(q, *coded), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 96, 128])
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 4), (8, 2), (7, 1)])
def test_head_sizes_and_groups(isa: str, head_dim: int, heads: int, kv_heads: int) -> None:
    q, k, v = values(1, heads, head_dim), values(kv_heads, 77, head_dim, seed=1), values(kv_heads, 77, head_dim, seed=2)
    for format, bound in (("float32", 1e-5), ("bfloat16", 1e-5), ("float16", 1e-5), ("int8", 1e-5)):
        kc, vc = encode_pages(k, format), encode_pages(v, format)
        wanted = reference(q, kc.floats(), vc.floats(), 0.2)
        for softmax in (None, Unified(0.5, -70.0, 60.0)):
            options = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": 0.2, "format": format}
            got = attention(softmax, **options, split=32).run(q, kc, vc)
            np.testing.assert_allclose(got, wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("softcap,window", [(0.0, 0), (5.0, 0), (0.0, 9), (5.0, 40)])
def test_prompts_caps_and_windows(isa: str, softcap: float, window: int) -> None:
    q, k, v = values(21, 4, 32), values(2, 70, 32, seed=1), values(2, 70, 32, seed=2)
    wanted = reference(q, k, v, 1.0, softcap, window)
    for softmax in (None, Unified(4.0, -70.0, 60.0)):
        one = attention(softmax, heads=4, kv_heads=2, head_dim=32, scale=1.0, softcap=softcap, window=window)
        np.testing.assert_allclose(one.run(q, encode_pages(k), encode_pages(v)), wanted, rtol=1e-5, atol=1e-5)
        last = attention(softmax, heads=4, kv_heads=2, head_dim=32, scale=1.0, softcap=softcap, window=window, split=16)
        np.testing.assert_allclose(
            last.run(q[-1:], encode_pages(k), encode_pages(v)), wanted[-1:], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("page", [1, 16, 64, None])
def test_paged_is_contiguous(isa: str, format: str, page: int | None) -> None:
    q, k, v = values(5, 64), values(200, 64, seed=1), values(200, 64, seed=2)
    for phi in (None, 1.0):
        whole = attend_range(q, k, v, scale=0.3, phi=phi, format=format)
        paged = attend_range(q, k, v, scale=0.3, phi=phi, format=format, page=page)
        for a, b in zip(whole, paged, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())  # another order of the same sum


# -------------------------------------------------------------------------------------------------------------- guard


def adversarial(offset: float, tokens: int = 600) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Queries whose largest score lies `offset` above the phi that is returned."""
    q, k, v = (
        values(1, HEADS, HEAD_DIM),
        values(KV_HEADS, tokens, HEAD_DIM, seed=1),
        values(KV_HEADS, tokens, HEAD_DIM, seed=2),
    )
    return q, k, v, top_of(q, k, HEAD_DIM**-0.5) - offset


@pytest.mark.parametrize("offset", [100.0, -200.0])
def test_guard_computes_risky_rows_again(isa: str, offset: float) -> None:
    q, k, v, phi = adversarial(offset)
    coded, wanted = (encode_pages(k), encode_pages(v)), reference(q, k, v, HEAD_DIM**-0.5)
    guarded = attention(Unified(phi, -70.0, 60.0))
    np.testing.assert_allclose(guarded.run(q, *coded), wanted, rtol=1e-5, atol=1e-5)
    assert guarded.recomputed == HEADS
    bare = attention(Unified(phi, -70.0, 60.0, recompute=False))
    assert not np.isfinite(bare.run(q, *coded)).any()
    assert bare.recomputed == 0


def test_only_the_row_at_risk_is_computed_again(isa: str) -> None:
    q, k, v, _ = adversarial(0.0)
    k[1, 300] = q[0, 4] * 30  # one key far above the others, for the heads of one group
    one = attention(Unified(0.0, -70.0, 60.0))
    wanted = reference(q, k, v, HEAD_DIM**-0.5)
    np.testing.assert_allclose(one.run(q, encode_pages(k), encode_pages(v)), wanted, rtol=1e-5, atol=1e-5)
    scores = [float((k[h // 3] @ q[0, h]).max()) * HEAD_DIM**-0.5 for h in range(HEADS)]
    assert one.recomputed == sum(score > 60 or score < -70 for score in scores) >= 1


def test_a_range_without_a_key_in_sight_changes_nothing(isa: str) -> None:
    q, k, v = values(3, 64), values(512, 64, seed=1), values(512, 64, seed=2)
    high = np.full(3, 256)
    seen, hidden = (
        attend_range(q, k, v, first=a, last=b, high=high, scale=0.1, phi=0.0) for a, b in ((0, 256), (256, 512))
    )
    assert np.isneginf(hidden.largest).all() and not hidden.weight.any() and not hidden.sums.any()
    wanted = reference(q[None, :, :], k[None, :256], v[None, :256], 0.1)[0]
    joined = (seen.sums + hidden.sums) / (seen.weight + hidden.weight)[:, None]
    np.testing.assert_allclose(joined, wanted, rtol=1e-5, atol=1e-5)


def test_windows_hide_whole_ranges(isa: str) -> None:
    q, k, v = values(1, 4, 32), values(2, 300, 32, seed=1), values(2, 300, 32, seed=2)
    one = attention(Unified(0.0, -70.0, 60.0), heads=4, kv_heads=2, head_dim=32, scale=0.2, window=20, split=64)
    np.testing.assert_allclose(
        one.run(q, encode_pages(k), encode_pages(v)), reference(q, k, v, 0.2, window=20), rtol=1e-5, atol=1e-5
    )
    assert one.recomputed == 0


# -------------------------------------------------------------------------------------------------------------- order


def test_ranges_are_independent_of_each_other(isa: str) -> None:
    """Ranges computed in any order, alone or beside others, give the same bits, so a fixed tree gives the same sum."""
    q, k, v = values(3, 64), values(1024, 64, seed=1), values(1024, 64, seed=2)
    k[700] *= 50  # a range with a far larger maximum must not reach the others

    def parts(order: Any) -> list[Any]:
        found: dict[int, Any] = {}
        for index in order:
            found[index] = attend_range(q, k, v, first=index * 128, last=(index + 1) * 128, scale=0.05, phi=0.5)
        return [found[index] for index in range(8)]

    def tree(items: list[np.ndarray]) -> np.ndarray:
        while len(items) > 1:
            items = [a + b for a, b in zip(items[::2], items[1::2], strict=True)]
        return items[0]

    first = parts(range(8))
    for seed in range(3):
        again = parts(np.random.default_rng(seed).permutation(8).tolist())
        np.testing.assert_array_equal(tree([p.weight for p in first]), tree([p.weight for p in again]))
        np.testing.assert_array_equal(tree([p.sums for p in first]), tree([p.sums for p in again]))
    alone = attend_range(q, k[128:256], v[128:256], scale=0.05, phi=0.5)
    np.testing.assert_array_equal(alone.weight, first[1].weight)
    # Without phi the weights of a range are relative to its own maximum: joining them takes what phi makes superfluous.
    online = [attend_range(q, k, v, first=i * 128, last=(i + 1) * 128, scale=0.05) for i in range(8)]
    assert len({float(p.largest[0]) for p in online}) == 8


def test_threads_do_not_change_the_sum() -> None:
    q, k, v, phi = adversarial(3.0, 2000)
    coded = encode_pages(k), encode_pages(v)
    one, three = (attention(Unified(phi, -70.0, 60.0), threads=n).run(q, *coded) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


# --------------------------------------------------------------------------------------------------------- int8 pages


@pytest.mark.parametrize("size,group", [(64, 64), (128, 64), (96, 64), (32, 16)])
def test_int8_pages_hold_rows_to_half_a_step(isa: str, size: int, group: int) -> None:
    x = values(40, size) * 3
    x[3] = 7.25  # one value: no range
    coded = encode_pages(x[None], PageFormat("int8", group))
    assert coded.nbytes == 40 * (size + 4 * -(-size // group))
    back = coded.floats()[0]
    parts = np.array_split(x, range(group, size, group), axis=1)
    span, least = (
        np.concatenate([np.broadcast_to(of(part, axis=1, keepdims=True), part.shape) for part in parts], axis=1)
        for of in (np.ptp, np.min)
    )
    # Half a step, and what rounding the minimum and 255 steps to halves adds.
    assert (np.abs(back - x) <= span / 510 + np.abs(least) * 2**-11 + span * 2**-11 + 1e-6).all()
    np.testing.assert_array_equal(back[3], np.full(size, 7.25, np.float32))


def test_int8_cache_runs_natively(tiny_model: Any) -> None:
    spec = tiny_model.spec.with_kv_dtype("int8-g16")
    program = lower(spec, tiny_model.weights, 2)
    ids = np.random.default_rng(7).integers(0, 131, 150)
    wanted = tiny_model.logits([ids.tolist()])[0].numpy()
    session = Session(program, chunk=13)
    prompt = session.prefill([ids[:140]])[0]  # no reserve: pages are taken on the way
    assert np.abs(prompt - wanted[139]).max() < 0.05 * np.abs(wanted).max()
    for at in range(140, 150):
        logits = session.decode([ids[at]])[0]
        assert np.abs(logits - wanted[at]).max() < 0.05 * np.abs(wanted).max()
    held = session.store.nbytes().held
    assert held == spec.kv_nbytes(150) == 3 * 2 * 2 * 150 * (16 + 4)


# ----------------------------------------------------------------------------------------------------------- products

FORMATS = (
    WeightFormat(kind="fp32"), WeightFormat(kind="fp16"), WeightFormat(kind="bf16"),
    *(WeightFormat(kind="int", bits=bits, group=group, sym=sym) for bits, group, sym in (
        (2, 16, True), (3, 32, False), (4, 32, True), (4, 64, False), (5, 48, False), (6, 64, True), (7, 32, True), (8, 96, False))),
)  # fmt: skip


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 13, 70])
def test_product_kernels_agree(isa: str, form: WeightFormat, rows: int) -> None:
    packed, x = tile(encode(values(33, 384), form)), values(rows, 384, seed=1)
    for twice_from in (0.0, 2.0, np.inf):
        found = {}
        for name, (flat, decoded) in dataflow.ONLY.items():
            found[name] = np.empty((rows, 33), np.float32)
            read = _core.multiply(core_tiles(packed), x, 1, found[name], twice_from, flat, decoded)
            assert read == packed.nbytes
        exact = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
        bound = 2e-5 * np.abs(exact).max()
        np.testing.assert_allclose(found["gemv"], found["flat"], rtol=2e-5, atol=bound)
        np.testing.assert_allclose(found["gemm"], found["flat"], rtol=2e-5, atol=bound)
        if form.is_float:
            np.testing.assert_allclose(found["gemm"], exact, rtol=2e-5, atol=bound)


def test_profile_is_measured_once_and_reused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Any
) -> None:
    form = tiled_format(WeightFormat(kind="bf16"), 96)
    first = dataflow.thresholds(64, 96, form, ("gemv", "flat", "gemm"), 1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "measuring them once" in said and str(dataflow.profile_path()) in said
    table = json.loads(dataflow.profile_path().read_text())
    (where,) = table
    assert _core.isa() in where and "1 threads" in where
    (matrix,) = table[where]
    assert matrix.startswith("[64, 96]")
    assert all(len(times) == len(dataflow.ROWS) and min(times) > 0 for times in table[where][matrix].values())
    monkeypatch.setattr(dataflow, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert dataflow.thresholds(64, 96, form, ("gemv", "flat", "gemm"), 1) == first
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv("TRIMTAB_HOME", str(home))
    dataflow.thresholds(32, 96, form, ("gemv", "flat", "gemm"), 1)  # another shape of a known processor: silent
    assert capsys.readouterr().err == ""
    shorter = {name: times[:-1] for name, times in table[where][matrix].items()}  # of a release with other `ROWS`
    dataflow.profile_path().write_text(json.dumps({where: {matrix: shorter}}))
    assert len(dataflow.profile(64, 96, form, 1)["flat"]) == len(dataflow.ROWS)
    dataflow.profile_path().write_text("{ damaged")
    dataflow.thresholds(32, 96, form, ("gemv", "flat", "gemm"), 1)
    assert "measuring" in capsys.readouterr().err


def test_thresholds_lose_least() -> None:
    rows = np.array(dataflow.ROWS, float)
    times = {"gemv": 1.0 * rows, "flat": 1.5 + 0.4 * rows, "gemm": 8.0 + 0.1 * rows}
    flat, decoded = dataflow.choose(times)
    for at, count in enumerate(dataflow.ROWS):
        name = "gemv" if count < flat else "flat" if count < decoded else "gemm"
        assert times[name][at] == min(t[at] for t in times.values())
    flat, decoded = dataflow.choose(times, ("gemv", "gemm"))
    assert flat == decoded
    assert dataflow.choose(times, ("flat", "gemm"))[0] == 1


def test_program_follows_the_table(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def thresholds(n: int, k: int, *rest: Any) -> tuple[int, int]:
        asked.append((n, k))
        return 2, 5

    monkeypatch.setattr(
        sys.modules["trimtab.runtime.native.lower"], "thresholds", thresholds
    )  # the package has a function of that name
    ids = np.random.default_rng(3).integers(0, 131, 40)
    wanted = tiny_model.logits([ids.tolist()])[0, -1].numpy()
    for dataflow_name in ("auto", "gemv", "flat", "gemm"):
        spec = compose(tiny_model.spec, parse_all([f"flashdecpp:phi=0,dataflow={dataflow_name}"]))
        program = lower(spec, tiny_model.weights, 2)
        np.testing.assert_allclose(Session(program).prefill([ids])[0], wanted, rtol=1e-4, atol=1e-4)
    assert {(96, 96), (32, 96), (160, 96), (96, 160), (131, 96)} == set(asked)


# ---------------------------------------------------------------------------------------------------------- technique


def test_calibration_sees_the_scores_of_the_softmax(tiny_model: Any, tiny_materials: Any) -> None:
    from trimtab.techniques.attention._scores import score_ranges

    ranges = score_ranges(tiny_model.spec, tiny_model.weights, tiny_materials)
    seen: dict[str, Any] = {}
    import torch

    from trimtab.runtime.step import Step

    for window in tiny_materials.token_windows():
        step = Step.of([len(window)], [0])

        def tap(path: str, value: Any) -> None:
            q, k = (x.double() for x in value)
            k = k.repeat_interleave(3, dim=1)
            scores = torch.einsum("tnh,snh->nts", q, k) * 16**-0.5
            causal = torch.ones(len(q), len(q), dtype=torch.bool).tril()
            seen.setdefault(path, []).append(scores[:, causal])

        step.taps = {"self_attn.qk": tap}
        tiny_model.decoder.forward(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
    for index, scores in ranges.items():
        joined = torch.cat(seen[f"layers.{index}.self_attn"], dim=1).numpy()
        np.testing.assert_allclose(scores.least, joined.min(1), atol=1e-4)
        np.testing.assert_allclose(scores.most, joined.max(1), atol=1e-4)


@pytest.mark.parametrize(
    "setting", ["flashdecpp", "flashdecpp:phi=0.5", "flashdecpp:phi=0.1|0.2|0.3,split=16,a=-5,b=5"]
)
def test_both_engines_keep_the_logits(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    ids = np.random.default_rng(4).integers(0, 131, 90)
    wanted = tiny_model.logits([ids.tolist()])[0].numpy()
    technique = parse_technique(setting).resolve(tiny_model, tiny_materials)
    technique = dataclasses.replace(technique, dataflow="flat")
    assert technique.phi != "auto"
    with applied(tiny_model, technique, materials=tiny_materials) as model:
        np.testing.assert_allclose(model.logits([ids.tolist()])[0].numpy(), wanted, rtol=1e-5, atol=5e-5)
        program = lower(model.spec, model.weights, 2)
    session = Session(program)
    session.prefill([ids[:-1]], reserve=1)
    np.testing.assert_allclose(session.decode([ids[-1]])[0], wanted[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("phi", [-150.0, 150.0])
def test_both_engines_guard(tiny_model: Any, tiny_materials: Any, phi: float) -> None:
    ids = np.random.default_rng(4).integers(0, 131, 70)
    wanted = tiny_model.logits([ids.tolist()])[0].numpy()
    for recompute in (True, False):
        setting = f"flashdecpp:phi={phi},split=16,dataflow=flat,recompute={int(recompute)}"
        with applied(tiny_model, setting, materials=tiny_materials) as model:
            torch_logits = model.logits([ids.tolist()])[0].numpy()
            again = sum(layer.self_attn.recomputed for layer in model.decoder.layers)
            program = lower(model.spec, model.weights, 1)
        session = Session(program)
        native = [session.prefill([ids[:-1]], reserve=1)[0], session.decode([ids[-1]])[0]]
        if recompute:
            np.testing.assert_allclose(torch_logits, wanted, rtol=1e-5, atol=5e-5)
            np.testing.assert_allclose(native, wanted[-2:], rtol=1e-4, atol=1e-4)
            assert again == program.recomputed == 3 * 6 * 70
        else:
            assert not np.isfinite(torch_logits).any() and not np.isfinite(native).any()
            assert again == program.recomputed == 0


def test_limits_follow_the_accumulators(tiny_model: Any) -> None:
    low, high = parse_technique("flashdecpp").limits(tiny_model.spec)  # type: ignore[attr-defined]
    assert low == -70.0
    assert high == pytest.approx(math.log(float(np.finfo(np.float32).max) / 512) - 10)


@pytest.mark.parametrize(
    "setting,message",
    [
        ("flashdecpp:a=5,b=5", "a=5 is not below b=5"),
        ("flashdecpp:a=6,b=5", "a < b"),
        ("flashdecpp:split=0", "16..4096"),
        ("flashdecpp:split=5000", "Try split=4096"),
        ("flashdecpp:phi=nan", "finite"),
        ("flashdecpp:phi=inf", "finite"),
        ("flashdecpp:b=nan", "finite"),
        ("flashdecpp:phi=x", "phi=x"),
        ("flashdecpp:flat=0,dataflow=flat", "leaves no kernel"),
        ("flashdecpp:dataflow=fast", "dataflow=fast"),
    ],
)
def test_bad_parameters_say_what_is_allowed(setting: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_technique(setting)


def test_models_it_does_not_fit(tiny_model: Any) -> None:
    from tests.unit.test_native import family_model

    with pytest.raises(SpecError, match="ALiBi"):
        compose(family_model("bloom").spec, parse_all(["flashdecpp:phi=0"]))
    with pytest.raises(SpecError, match="sink"):
        compose(family_model("gpt_oss").spec, parse_all(["flashdecpp:phi=0"]))
    with pytest.raises(SpecError, match="2 numbers"):
        compose(tiny_model.spec, parse_all(["flashdecpp:phi=1|2"]))
    with pytest.raises(SpecError, match="not below"):
        compose(tiny_model.spec, parse_all(["flashdecpp:phi=0,a=80"]))
    for bad in ((math.nan, -1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 2.0, 1.0)):
        with pytest.raises(SpecError):
            Unified(*bad)
    with pytest.raises(UnsupportedModelError, match="different lengths"):
        spec = compose(tiny_model.spec, parse_all(["flashdecpp:phi=0,dataflow=flat"]))
        first = dataclasses.replace(spec.layers[0], self_attn=dataclasses.replace(spec.layers[0].self_attn, split=32))
        lower(dataclasses.replace(spec, layers=(first, *spec.layers[1:])), tiny_model.weights)


def test_softcapped_scores_are_calibrated_as_capped() -> None:
    from tests.unit.test_native import family_model
    from trimtab.techniques.attention._scores import score_ranges
    from trimtab.techniques.materials import Materials

    class Digits:
        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

    model = family_model("gemma2")
    spec = model.spec
    layers = tuple(
        dataclasses.replace(x, self_attn=dataclasses.replace(x.self_attn, softcap=0.5, scale=30.0)) for x in spec.layers
    )
    spec = dataclasses.replace(spec, layers=layers)
    ids = np.random.default_rng(1).integers(0, 97, 256)
    materials = Materials(texts={"t": " ".join(map(str, ids))}, tokenizer=Digits(), window=64, cache=None)  # type: ignore[arg-type]
    found = score_ranges(spec, model.weights, materials)
    assert max(float(s.most.max()) for s in found.values()) <= 0.5
    assert min(float(s.least.min()) for s in found.values()) >= -0.5


def test_the_native_loader_calibrates(smollm2_path: Any) -> None:
    from trimtab.runtime.text.builtin import builtin_text
    from trimtab.techniques.materials import Materials

    plain = load_native("smollm2-135m", dtype="float32")
    materials = Materials(texts={"built-in": builtin_text()[:4000]}, window=96, windows=2)
    ours = load_native("smollm2-135m", dtype="float32", techniques=["flashdecpp:dataflow=flat"], materials=materials)
    phi = [layer.self_attn.softmax.phi for layer in ours.spec.layers]  # type: ignore[union-attr]
    assert len(set(phi)) > 1
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
    prompt = plain.tokenizer.encode("The history of the sea", add_special_tokens=True)
    assert ours.generate(prompt, **options).ids == plain.generate(prompt, **options).ids
    assert ours.program.recomputed == 0
