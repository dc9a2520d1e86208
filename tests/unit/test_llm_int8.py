"""LLM.int8(): exact int8 products, which columns are outliers, what is kept beside the codes, and the native kernel."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CalibrationError, SpecError, UnsupportedModelError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import StepShape
from trimtab.model.folding import fold
from trimtab.model.int8 import VectorInt8, coded, outlier_columns
from trimtab.model.outliers import Columns, smallest_threshold
from trimtab.model.variant import Model, Variant
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.kernels import int8_product
from trimtab.runtime.native import lower
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.packed import Weights, packed_float
from trimtab.spec.formats import FP16
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import Int8Vector
from trimtab.spec.tree import Edit
from trimtab.spec.vector import RowInt8Format
from trimtab.techniques.apply import applied, derive
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, parse_technique, spec_string


def _codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize(
    ("t", "n", "k"), [(1, 1, 1), (3, 5, 63), (1, 16, 64), (70, 33, 576), (7, 19, 1536), (2, 2, 133_000)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_int64(isa: str, t: int, n: int, k: int, threads: int) -> None:
    rng = np.random.default_rng(k)
    w, x = _codes(rng, n, k), _codes(rng, t, k)
    np.testing.assert_array_equal(int8_product(w, x, threads), x.astype(np.int64) @ w.T.astype(np.int64))


def test_the_largest_sum_fits(isa: str) -> None:
    """133,000 products of 127 * 127 are just below 2^31."""
    w = np.full((1, 133_000), 127, np.int8)
    assert int8_product(w, w)[0, 0] == 133_000 * 127 * 127
    assert int8_product(w, -w)[0, 0] == -133_000 * 127 * 127


def test_product_refuses_other_shapes() -> None:
    with pytest.raises(SpecError, match="int8"):
        int8_product(np.zeros((2, 3), np.int8), np.zeros((1, 4), np.int8))
    with pytest.raises(SpecError, match="int8"):
        int8_product(np.zeros((2, 3), np.float32), np.zeros((1, 3), np.int8))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9), cols=st.integers(1, 70), seed=st.integers(0, 9), shared=st.sampled_from(["row", "tensor"])
)
def test_weights_are_rounded_to_the_nearest_code(rows: int, cols: int, seed: int, shared: str) -> None:
    w = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    w[0] = 0
    form = RowInt8Format(shared=shared)
    packed = encode(w, form)
    assert packed.nbytes == form.nbytes(rows, cols) and np.abs(packed.buffers["data"].astype(int)).max() <= 127
    error = np.abs(decode(packed) - w)
    # Half a step, and the rounding of fp32.
    assert (error <= packed.buffers["scale"] * 0.5001).all()
    np.testing.assert_array_equal(decode(packed)[0], 0)


def test_formats_refuse_what_they_cannot_hold() -> None:
    with pytest.raises(SpecError, match="row, tensor"):
        RowInt8Format(shared="group")
    with pytest.raises(SpecError, match="not finite"):
        encode(np.full((1, 4), np.nan, np.float32), RowInt8Format())
    for bad in ({"threshold": 0.0}, {"threshold": math.nan}, {"source": "x"}, {"granularity": "x"}):
        with pytest.raises(SpecError, match="Allowed"):
            Int8Vector(**bad)  # type: ignore[arg-type]


def _rule(w: np.ndarray, product: Int8Vector, bias: bool = False) -> VectorInt8:
    form = RowInt8Format(shared="row" if product.granularity == "vector" else "tensor")
    node = LinearSpec(n=w.shape[0], k=w.shape[1], format=form, act="int8", product=product, bias=bias)
    weights = {"m": encode(w, form)}
    if product.columns_kept(node.k):
        kept = w.T if product.columns is None else w.T[list(product.columns)]
        weights["m.outliers"] = encode(np.ascontiguousarray(kept), FP16)
    return VectorInt8("m", node, Weights(weights))


def _matrix(n: int = 24, k: int = 40, seed: int = 0) -> np.ndarray:
    # In fp16, so that original columns are exact.
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float16).astype(np.float32)


def _by_hand(w: np.ndarray, x: np.ndarray, product: Int8Vector) -> np.ndarray:
    """The card's formulas in float64 and int64."""
    s_w = np.abs(w).max(1).astype(np.float64)
    w8 = np.rint(127 * w / s_w[:, None]).astype(np.int64)
    out = np.flatnonzero((np.abs(x) >= product.threshold).any(0)) if product.columns is None else list(product.columns)
    rest = x.astype(np.float64).copy()
    rest[:, out] = 0
    s_x = np.abs(rest).max(1)
    x8 = np.rint(127 * rest / np.where(s_x > 0, s_x, 1)[:, None]).astype(np.int64)
    y = (x8 @ w8.T) * (s_x[:, None] * s_w) / (127 * 127)
    columns = w[:, out] if product.source == "fp" else w8[:, out] * s_w[:, None] / 127
    return y + x[:, out].astype(np.float64) @ columns.T


PRODUCTS = [
    Int8Vector(),
    Int8Vector(source="dequant"),
    Int8Vector(columns=(0, 3, 39)),
    Int8Vector(columns=(5,), source="dequant"),
    Int8Vector(threshold=math.inf),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
def test_the_rule_is_the_paper(product: Int8Vector, tokens: int) -> None:
    w, x = _matrix(), np.random.default_rng(1).standard_normal((tokens, 40)).astype(np.float32)
    x[0, 3], x[-1, 7] = 6.0, -60
    found = _rule(w, product)(torch.from_numpy(x), None).numpy()
    # One code may differ where a value lies between two; 1e-5 is the rounding of fp32.
    np.testing.assert_allclose(found, _by_hand(w, x, product), rtol=1e-4, atol=1e-4)


def test_exactly_the_outlier_columns_are_taken_out() -> None:
    x = torch.full((3, 8), 0.5)
    x[1, 2], x[0, 5] = -6.0, 5.9999
    assert outlier_columns(x, Int8Vector()).tolist() == [2]
    codes, units, _ = coded(x.index_fill(1, torch.tensor([2]), 0.0), Int8Vector())
    assert not codes[:, 2].any() and codes[0, 5] == 127
    np.testing.assert_allclose(units[:, 0], [5.9999 / 127, 0.5 / 127, 0.5 / 127], rtol=1e-6)


def test_outliers_are_those_of_the_call() -> None:
    """Not of a call before, and the same for one token as in a batch that has no other outlier."""
    rule = _rule(_matrix(), Int8Vector())
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((4, 40)).astype(np.float32))
    clean = rule(x[1:2], None)
    x[0, 11] = 50
    rule(x[:1], None)
    assert rule.found == 1
    np.testing.assert_array_equal(rule(x[1:2], None), clean)
    assert rule.found == 0
    together = rule(x, None)
    assert rule.found == 1 and not torch.equal(together[1:2], clean)  # column 11 is in 16 bits for every row
    np.testing.assert_allclose(together[:1], rule(x[:1], None), rtol=1e-6)


def test_scales_are_taken_after_the_outliers() -> None:
    """With s_x of the whole row, a value of 1000 would leave codes of 0 for all others."""
    w, x = _matrix(), torch.full((1, 40), 0.3)
    x[0, 0] = 1000
    wanted = x.double() @ torch.from_numpy(w).double().T
    error = (_rule(w, Int8Vector())(x, None) - wanted).abs().max()
    naive = (_rule(w, Int8Vector(threshold=math.inf))(x, None) - wanted).abs().max()
    assert error < naive / 50


def test_all_columns_warn_and_are_floats() -> None:
    w, x = _matrix(), torch.full((2, 40), 7.0)
    with pytest.warns(RuntimeWarning, match="all 40 input columns of m"):
        found = _rule(w, Int8Vector())(x, None)
    np.testing.assert_allclose(found, x @ torch.from_numpy(w).T, rtol=1e-5, atol=1e-4)


def test_no_token_is_an_empty_result() -> None:
    rule = _rule(_matrix(), Int8Vector())
    assert rule(torch.zeros(0, 40), torch.zeros(24)).shape == (0, 24)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [6.0, math.inf])
@pytest.mark.parametrize("zeropoint", [False, True])
def test_what_is_not_finite_stays_so(value: float, threshold: float, zeropoint: bool) -> None:
    x = torch.full((3, 40), 0.3)
    x[1, 4] = value
    found = _rule(_matrix(), Int8Vector(threshold=threshold, zeropoint=zeropoint))(x, None)
    assert not torch.isfinite(found[1]).any() and torch.isfinite(found[[0, 2]]).all()


def test_coarser_scales_are_worse_and_zero_points_help_where_inputs_are_one_sided() -> None:
    w = _matrix(64, 96) * np.linspace(0.1, 4, 64, dtype=np.float32)[:, None]
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((32, 96)).astype(np.float32))
    x *= torch.linspace(0.05, 1, 32)[:, None]

    def error(x: torch.Tensor, **how: Any) -> float:
        wanted = x.double() @ torch.from_numpy(w).double().T
        found = _rule(w, Int8Vector(threshold=math.inf, **how))(x, None)
        return float((found - wanted).square().sum() / wanted.square().sum())

    assert error(x) < error(x, granularity="row") < error(x, granularity="tensor")
    # The step of the input halves; the error of the weights stays.
    assert error(x.abs(), zeropoint=True) < 0.85 * error(x.abs())
    assert error(x.abs(), zeropoint=True, granularity="tensor") < error(x.abs(), granularity="tensor")


def test_int8_has_no_gradient() -> None:
    x = torch.zeros(1, 40, requires_grad=True)
    with pytest.raises(UnsupportedModelError, match="LoRA"):
        _rule(_matrix(), Int8Vector())(x, None)


# ------------------------------------------------------------------------------------------------- spec and weights

DEQUANT = "llm-int8:outlier_source=dequant"


@pytest.mark.parametrize(
    "setting", ["llm-int8", DEQUANT, "llm-int8:decompose=false", "llm-int8:include=mlp,threshold=0.5"]
)
def test_bytes_are_those_of_the_spec(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    model = Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials))
    assert model.weights.nbytes == model.spec.weight_nbytes()
    path = "layers.1.mlp.down_proj"
    packed = model.weights[path]
    assert torch.from_numpy(packed.buffers["data"]).dtype == torch.int8
    assert (f"{path}.outliers" in model.weights) == ("dequant" not in setting and "false" not in setting)
    n, k = packed.shape
    assert packed.nbytes == n * k + 4 * n
    assert ("layers.1.self_attn.q_proj" in [p for p in model.weights if model.weights[p].format.kind == "int8"]) == (
        "include" not in setting
    )


def test_static_columns_come_from_text(tiny_model: Any, tiny_materials: Any, tmp_path: Path) -> None:
    materials = dataclasses.replace(tiny_materials, cache=tmp_path)
    with applied(tiny_model, "llm-int8:outliers=static,threshold=2.5", materials=materials) as model:
        nodes = dict(model.spec.linears())
        found = {path: node.product.columns for path, node in nodes.items() if isinstance(node.product, Int8Vector)}
        assert found and all(columns is not None for columns in found.values()) and any(found.values())
        assert model.weights.nbytes == model.spec.weight_nbytes()
        kept = {path: model.weights[f"{path}.outliers"].shape[0] for path in found if found[path]}
        assert kept == {path: len(columns) for path, columns in found.items() if columns}
        assert len(list(tmp_path.glob("llm-int8-columns-*.json"))) == 1
    file = next(tmp_path.glob("*.json"))
    named = f"llm-int8:threshold=2.5,outliers=static:{file}"
    assert spec_string(parse_technique(named)) == named
    with applied(tiny_model, named, materials=materials) as model:
        assert {p: n.product.columns for p, n in model.spec.linears() if isinstance(n.product, Int8Vector)} == found
    (tmp_path / "broken.json").write_text("[]")
    for name, message in (("none.json", "cannot be read"), ("broken.json", "no outlier columns")):
        with pytest.raises(CalibrationError, match=message):
            compose(tiny_model.spec, parse_all([f"llm-int8:outliers=static:{tmp_path / name}"]))
    other = dataclasses.replace(tiny_model.spec, name="another")
    with pytest.raises(CalibrationError, match="made for"):
        compose(other, parse_all([named]))


def test_auto_is_resolved_to_a_threshold(tiny_model: Any, tiny_materials: Any) -> None:
    technique = parse_technique("llm-int8:threshold=auto")
    resolved = technique.resolve(tiny_model, tiny_materials)
    assert technique.unresolved and not resolved.unresolved and isinstance(resolved.threshold, float)  # type: ignore[attr-defined]


def test_the_smallest_threshold_leaves_one_percent() -> None:
    columns = Columns()
    values = np.arange(1, 1001, dtype=np.float32)[None] / 10
    columns.add(torch.from_numpy(values))
    # 10 of 1000 columns may be outliers: those above 99.0.
    assert smallest_threshold({"m": columns}, {"m": 7}) == pytest.approx(99.01, abs=0.011)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("llm-int8:threshold=0", "above 0"),
        ("llm-int8:threshold=-1", "above 0"),
        ("llm-int8:threshold=nan", "above 0"),
        ("llm-int8:threshold=six", "above 0"),
        ("llm-int8:granularity=group", "vector, row, tensor"),
        ("llm-int8:outliers=static:", "static:FILE"),
        ("llm-int8:weight_axis=in", "out"),
        ("llm-int8:include=all", "linears, attention, mlp"),
        ("rtn:bits=4,group=16+llm-int8", r"already quantized \(format int4-g16\)"),
        ("tmac:bits=2,group=32,kernel=lut+llm-int8", "LookupTable"),
        ("llm-int8+cats", "transposed"),
    ],
)
def test_bad_input_is_named(tiny_model: Any, bad: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        compose(tiny_model.spec, parse_all([bad]))
    assert issubclass(SpecError, ValueError)


# ------------------------------------------------------------------------------------------------------ the program

NATIVE = [
    "llm-int8:threshold=2",
    "llm-int8:threshold=2,outlier_source=dequant",
    "llm-int8:decompose=false",
    "llm-int8:include=attention,threshold=1.5",
    "llm-int8:threshold=0.0001",
]


@pytest.mark.parametrize("setting", NATIVE)
def test_the_program_is_the_decoder(tiny_model: Any, tiny_materials: Any, setting: str, isa: str) -> None:
    model = Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials))
    session = Session(lower(model.spec, model.weights, threads=2), chunk=13)
    ids = np.random.default_rng(3).integers(0, 97, 40)
    reference = model.session(chunk=13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the last setting: every column is an outlier
        # One code of an input may be another one where it lies between two, which moves what comes after.
        for step in range(4):
            wanted = reference.prefill([ids[:30]]) if step == 0 else reference.decode([ids[30 + step]])
            found = session.prefill([ids[:30]], reserve=10) if step == 0 else session.decode([ids[30 + step]])
            np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())
            assert np.argmax(found) == np.argmax(wanted)


@pytest.mark.parametrize("setting", NATIVE)
def test_kernels_and_counts_are_the_graphs(tiny_model: Any, tiny_materials: Any, setting: str) -> None:
    model = Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials))
    program = lower(model.spec, model.weights, threads=2)
    assert program.weight_bytes == program.spec.weight_nbytes()
    session = Session(program)
    from trimtab.spec.machine import load_stack

    kernels = fuse(build(program.spec), dataclasses.replace(load_stack("ideal"), fused=frozenset({"native"})))
    for new, past in ((9, 0), (1, 9)):
        session.record = record = Recorder()
        if past:
            session.decode([5])
        else:
            session.prefill([list(range(9))])
        step = StepShape.of([new], [past], logits=1, observed=record.observed)
        counted = {kernel.name: count(kernel, step) for kernel in kernels}
        assert list(record.ops) == list(counted)
        for name, metered in record.ops.items():
            assert (name, metered.weight_read, metered.flops) == (name, counted[name].weight_read, counted[name].flops)


def test_what_only_compares_has_no_kernel(tiny_model: Any, tiny_materials: Any) -> None:
    for setting in ("llm-int8:granularity=tensor", "llm-int8:zeropoint=true"):
        model = Model(derive(tiny_model.variant, parse_all([setting]), tiny_materials))
        with pytest.raises(UnsupportedModelError, match="int8"):
            lower(model.spec, model.weights)
    mixed = compose(tiny_model.spec, parse_all(["llm-int8"]))
    mixed = mixed.edit([Edit("layers.0.self_attn.k_proj", "product", Int8Vector(threshold=3))], by="llm-int8")
    model = Model(derive(tiny_model.variant, parse_all(["llm-int8"]), tiny_materials))
    with pytest.raises(UnsupportedModelError, match="share an input"):
        lower(mixed, model.weights)


# ----------------------------------------------------------------------------------------------------------- outliers


def _planted(model: Any, dimension: int, factor: float) -> Variant:
    weights, scale = model.weights, np.ones(model.spec.hidden_size, np.float32)
    scale[dimension] = 1 / factor
    for index, layer in enumerate(model.spec.layers):
        for stage in (0, 2):
            weights = weights | fold(layer, f"layers.{index}", weights, stage, scale)
    return Variant(model.spec, weights)


def test_a_planted_dimension_is_reported(tiny_model: Any) -> None:
    from trimtab.measure.outliers import outlier_report

    pieces = list(np.random.default_rng(0).integers(0, 97, (3, 24)))
    planted = _planted(tiny_model, 7, 300)
    before, after = outlier_report(tiny_model.variant, pieces), outlier_report(planted, pieces)
    found = {(d.block, d.dimension): d for d in after.dimensions}
    new = set(found) - {(d.block, d.dimension) for d in before.dimensions}
    assert {("attention", 7), ("ffn", 7)} <= new and {dimension for _, dimension in new} == {7}
    low, middle, high = found["attention", 7].quartiles
    assert low <= middle <= high and found["attention", 7].layers == 1.0 and found["attention", 7].positions > 0.5
    assert after.in_int8 < before.in_int8 and 7 in after.columns["layers.0.self_attn.k_proj"]
    assert {m.path for m in after.matrices} == {path for path, _ in tiny_model.spec.linears() if path != "lm_head"}
    with pytest.raises(SpecError, match="above 0"):
        outlier_report(planted, pieces, 0.0)


def test_statistics_refuse_what_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        Columns().add(torch.tensor([[1.0, math.nan]]))


def test_positions_are_counted(tiny_model: Any) -> None:
    columns = Columns(6.0)
    columns.add(torch.tensor([[6.0, 5.9], [0.0, -7.0]]))
    columns.add(torch.tensor([[1.0, 8.0]]))
    assert columns.hits.tolist() == [1, 2] and columns.count == 3 and columns.columns == (0, 1)
    assert columns.mean_columns == 1.5 and sorted(columns.values.tolist()) == [-7.0, 6.0, 8.0]


def test_packed_float_columns_are_halves() -> None:
    """The side weight is fp16 [columns, n]: a float matrix as any other."""
    kept = packed_float(np.ones((3, 8), np.float16), "fp16")
    assert kept.nbytes == Int8Vector(columns=(0, 1, 2)).side_nbytes(8, 40) == 48
    assert Int8Vector().side_nbytes(8, 40) == 640 and Int8Vector(source="dequant").side_nbytes(8, 40) == 0
