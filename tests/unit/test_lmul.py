"""L-Mul: kernels against integers in numpy and tables, sums rounded after every addition, the model's three scopes, energy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.runtime.kernels import lmul as kernels
from trimtab.runtime.numerics import lmul as oracle
from trimtab.runtime.numerics.floats import round_mantissa
from trimtab.runtime.numerics.scaled import E4M3_VALUES, encode_e4m3, round_fp8
from trimtab.spec.product import EXACT, Lmul, Rounded

#: Zeros, subnormals, the ends of each range, infinities, NaN.
CORNERS = np.array(
    [0, -0.0, 1e-45, -1e-39, 2**-126, -(2.0**-126), 1.5 * 2**-126, 2**-14, 2**-6, 2**-9, 3e-3, 448, -480, 57344, 1e6, 1.9999999,
     3.4e38, -3.4028235e38, 1e30, 1e-30, 1, -1, np.inf, -np.inf, np.nan],
    np.float32,
)  # fmt: skip
RULES = [
    Lmul(mantissa=m, exp=e, round=r, carry=c, offset=o)
    for m, e in ((2, 5), (3, 4), (4, 8), (7, 4), (23, 8), (22, 5))
    for r in ("trunc", "nearest")
    for c in ("int", "formula")
    for o in ("auto", "none", 2)
]


def same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the bit, signs of zeros included; any NaN is equal to any other."""
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


def numbers(*shape: int, seed: int = 0, spread: int = 8) -> np.ndarray:
    """Random floats over many powers of two, both signs, some zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread + 1, shape)
    return np.where(rng.random(shape) < 0.05, 0, values).astype(np.float32)


# ------------------------------------------------------------------------------------------------------ one product


@pytest.mark.parametrize("product", RULES, ids=str)
def test_products_are_those_of_integers(isa: str, product: Lmul) -> None:
    values = np.concatenate((CORNERS, numbers(40, spread=120)))
    a, b = (np.ascontiguousarray(x) for x in np.broadcast_arrays(values[:, None], values))
    same_bits(kernels.multiply(a, b, product), oracle.multiply(a, b, product))


def test_every_pair_of_fp8_numbers(isa: str) -> None:
    """All 2^16 pairs of codes laid out as e4m3, by the bytes: what 8-bit hardware computes."""
    codes = np.arange(256)
    x, y = (np.ascontiguousarray(c) for c in np.broadcast_arrays(codes[:, None], codes))
    left, right = x & 0x7F, y & 0x7F
    byte = np.clip(left + right - (7 << 3) + 1, 0, 0x7E)
    byte = np.where((left < 8) | (right < 8) | (byte < 8), 0, byte) | (x ^ y) & 0x80
    byte = np.where((left == 0x7F) | (right == 0x7F), 0x7F, byte)
    found = kernels.multiply(E4M3_VALUES[x], E4M3_VALUES[y], Lmul(mantissa=3, exp=4))
    same_bits(found, E4M3_VALUES[byte])


@pytest.mark.parametrize("mantissa", [2, 3, 4])
def test_a_table_of_mantissas_gives_the_same(mantissa: int) -> None:
    product = Lmul(mantissa=mantissa)
    table, cut = oracle.mantissa_table(product), (1 << mantissa) - 1
    a, b = (numbers(3000, seed=s) for s in (1, 2))
    x, y = (oracle.fields(v, product) for v in (a, b))
    code = (((x >> mantissa) + (y >> mantissa) - 127) << mantissa) + table[x & cut, y & cut]
    wanted = np.where((x == 0) | (y == 0), 0.0, oracle.value_of(code, product)) * np.where(
        np.signbit(a) ^ np.signbit(b), -1, 1
    )
    np.testing.assert_array_equal(kernels.multiply(a, b, product), wanted.astype(np.float32))


def test_error_of_a_product() -> None:
    """Mean relative error over uniform mantissas; the paper's claims need integer carry and cut operands."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1, 2, 200_000).astype(np.float32) for _ in range(2))

    def error(product: Lmul | Rounded) -> float:
        return float(np.abs(kernels.multiply(a, b, product) / (a.astype(np.float64) * b) - 1).mean())

    e4m3, e5m2 = error(Rounded(mantissa=3)), error(Rounded(mantissa=2))
    assert error(Lmul(mantissa=4)) == pytest.approx(e4m3, abs=0.001)
    assert error(Lmul(mantissa=3)) < e5m2 - 0.008
    assert error(Lmul(mantissa=4, round="nearest")) > 1.5 * e4m3
    assert error(Lmul(mantissa=4, carry="formula")) > 2 * e4m3
    assert error(Lmul(mantissa=23, offset="none")) > 1.4 * error(Lmul(mantissa=23))


def test_threads_change_nothing() -> None:
    a, b = numbers(70_001, seed=3), numbers(70_001, seed=4)
    same_bits(kernels.multiply(a, b, Lmul(), threads=3), kernels.multiply(a, b, Lmul()))


# ------------------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("acc", ["fp32", "bf16", "e4m3", "lmul-m"])
@pytest.mark.parametrize(
    "product",
    [
        {"mantissa": 4},
        {"mantissa": 3, "exp": 4},
        {"mantissa": 23, "carry": "formula"},
        {"mantissa": 7, "round": "nearest"},
    ],
    ids=str,
)
def test_sums_are_rounded_after_every_addition(isa: str, product: dict[str, Any], acc: str) -> None:
    rule = Lmul(**product, acc=acc)
    for tokens, terms, outputs in ((1, 1, 1), (4, 7, 16), (7, 33, 35), (9, 5, 70)):
        x, w = numbers(tokens, terms, seed=5, spread=2), numbers(outputs, terms, seed=6, spread=2)
        wanted = oracle.matmul(x, w, rule)
        same_bits(kernels.matmul(x, w, rule), wanted)
        same_bits(kernels.matmul(x, np.ascontiguousarray(w.T), rule, transposed=True, threads=2), wanted)


@pytest.mark.parametrize("acc", ["fp32", "e4m3"])
def test_sums_with_infinities_and_overflow(isa: str, acc: str) -> None:
    x, w = np.tile(CORNERS, (3, 1)), np.stack([np.roll(CORNERS, shift) for shift in range(5)])
    with np.errstate(all="ignore"):
        same_bits(kernels.matmul(x, w, Lmul(acc=acc)), oracle.matmul(x, w, Lmul(acc=acc)))
        finite = np.ascontiguousarray(np.abs(x[:, :-3]))  # sums of the largest numbers overflow to infinity
        same_bits(kernels.matmul(finite, finite, Lmul(acc=acc)), oracle.matmul(finite, finite, Lmul(acc=acc)))


@pytest.mark.parametrize("acc", ["fp32", "bf16", "e4m3", "lmul-m"])
@pytest.mark.parametrize("mantissa", [2, 3, 23])
def test_rounded_floats(isa: str, mantissa: int, acc: str) -> None:
    rule = Rounded(mantissa=mantissa, acc=acc)
    x, w = numbers(5, 19, seed=7, spread=3), numbers(21, 19, seed=8, spread=3)
    same_bits(kernels.matmul(x, w, rule), oracle.matmul(x, w, rule))


@pytest.mark.parametrize("acc", ["bf16", "e4m3", "lmul-m"])
def test_rounding_of_a_sum(isa: str, acc: str) -> None:
    values = np.concatenate(
        (CORNERS, numbers(4000, spread=12), E4M3_VALUES, np.float32(0.5) * E4M3_VALUES, -numbers(90, spread=120))
    )
    half_way = (E4M3_VALUES[:126] + E4M3_VALUES[1:127]) / 2
    values = np.concatenate(
        (values, half_way, np.nextafter(half_way, np.float32(0)), np.nextafter(half_way, np.float32(9e9)))
    )
    rule = Lmul(mantissa=5, acc=acc)
    same_bits(kernels.rounded_sum(values, rule), oracle.rounded_sum(values, rule))


# ------------------------------------------------------------------------------------------------------ small floats


def test_fp8_rounding() -> None:
    import torch

    values = np.concatenate((numbers(5000, spread=20), CORNERS))
    for kind, dtype, largest in (("e4m3", torch.float8_e4m3fn, 448.0), ("e5m2", torch.float8_e5m2, 57344.0)):
        wanted = torch.from_numpy(np.clip(values, -largest, largest)).to(dtype).float().numpy()
        same_bits(round_fp8(values, kind), wanted)
    same_bits(round_fp8(values, "e4m3"), E4M3_VALUES[encode_e4m3(values)])
    within = numbers(3000, spread=5)  # inside the normal range the two roundings are one
    within = within[np.abs(within) > 2**-6]
    np.testing.assert_array_equal(
        round_mantissa(within, 3)[np.abs(within) < 448], round_fp8(within, "e4m3")[np.abs(within) < 448]
    )


# -------------------------------------------------------------------------------------------------------- the model


def test_matrices_of_the_model(tiny_model: Any) -> None:
    """A linear layer is the definition's sum over its stored values, bias and packed formats included."""
    import torch

    from trimtab.model.lmul import Approximate
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.weights.packed import Weights
    from trimtab.spec.formats import FP32, WeightFormat
    from trimtab.spec.leaves import LinearSpec

    rule, x, bias = Lmul(mantissa=3, acc="bf16"), numbers(5, 32, seed=9), np.arange(24, dtype=np.float32)
    for format in (FP32, WeightFormat(kind="int", bits=4, group=16)):
        packed = encode(numbers(24, 32, seed=10, spread=2), format)
        node = LinearSpec(n=24, k=32, format=format, product=rule)
        layer = Approximate("w", node, Weights({"w": packed}))
        found = layer(torch.from_numpy(x), torch.from_numpy(bias)).numpy()
        same_bits(found, oracle.matmul(x, decode(packed), rule) + bias)


def test_attention_multiplies_by_the_rule_and_softmax_exactly(tiny_model: Any) -> None:
    """Scores and outputs of one block against the definition; a scale that is no power of two is one more product."""
    import torch

    from trimtab.model.lmul import mixed, scaled_dots

    rule = Lmul(mantissa=4)
    q, k, v = (
        numbers(2, 6, 16, seed=11, spread=1),
        numbers(2, 5, 16, seed=12, spread=1),
        numbers(2, 5, 16, seed=13, spread=1),
    )
    dots = np.stack([oracle.matmul(a, b, rule) for a, b in zip(q, k, strict=True)])
    q_GMH, k_GSH, v_GSH = (torch.from_numpy(x) for x in (q, k, v))
    same_bits(scaled_dots(q_GMH, k_GSH, 0.25, rule).numpy(), dots * np.float32(0.25))
    scale = np.float32(1 / np.sqrt(24))
    wanted = oracle.multiply(dots, np.full_like(dots, scale), rule)
    same_bits(scaled_dots(q_GMH, k_GSH, float(scale), rule).numpy(), wanted)
    weights = torch.softmax(torch.from_numpy(dots), -1)
    found = mixed(weights, v_GSH, rule).numpy()
    same_bits(found, np.stack([oracle.matmul(w, x.T, rule) for w, x in zip(weights.numpy(), v, strict=True)]))


@pytest.mark.parametrize("scope", ["attn", "linear", "elementwise", "all"])
def test_scopes_change_what_they_name(tiny_model: Any, tiny_materials: Any, scope: str) -> None:
    """With operands and products as fine as floats are, logits move little; at two bits they move; elsewhere nothing does."""
    from trimtab.techniques.apply import applied

    ids = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
    plain = tiny_model.logits(ids).numpy()
    moved = {}
    for mantissa in (2, 7):
        with applied(tiny_model, f"lmul:scope={scope},mantissa={mantissa}", materials=tiny_materials) as model:
            moved[mantissa] = float(np.abs(model.logits(ids).numpy() - plain).mean())
            layer: Any = model.spec.layers[1]
            nodes = {
                "attn": layer.self_attn.product,
                "linear": layer.mlp.up_proj.product,
                "elementwise": layer.self_attn.rope.product,
            }
            assert {name for name, p in nodes.items() if p != EXACT} == ({scope} if scope != "all" else set(nodes))
            assert (model.spec.lm_head.product != EXACT) == (scope == "all")
            final: Any = model.spec.norm
            assert final.product == layer.mlp.product == layer.input_layernorm.product == nodes["elementwise"]
    assert 0 < moved[7] < moved[2]


def test_elementwise_products(tiny_model: Any) -> None:
    """A norm, the gate and rope by their definitions."""
    import torch

    from trimtab.model.linear import Norm
    from trimtab.model.lmul import times_of
    from trimtab.model.rope import rotate
    from trimtab.runtime.numerics import encode
    from trimtab.runtime.step import Step
    from trimtab.runtime.weights.packed import Weights
    from trimtab.spec.formats import FP32
    from trimtab.spec.leaves import NormSpec

    rule, step = Lmul(mantissa=3), Step.of([4], [0])
    x, weight, bias = numbers(4, 12, seed=14, spread=1), numbers(12, seed=15, spread=1), numbers(12, seed=16, spread=1)
    weights = Weights({"n": encode(weight, FP32), "n.bias": encode(bias, FP32)})

    def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return oracle.multiply(*(np.ascontiguousarray(v) for v in np.broadcast_arrays(a, b)), rule)

    for kind in ("rms", "layer"):
        norm = Norm("n", NormSpec(size=12, kind=kind, bias=kind == "layer", format=FP32, product=rule), weights)
        t = torch.from_numpy(x)
        t = t - t.mean(-1, keepdim=True) if kind == "layer" else t
        inverse = torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-5).numpy()
        wanted = times(times(t.numpy(), inverse), weight)
        same_bits(norm(torch.from_numpy(x), step).numpy(), wanted + bias if kind == "layer" else wanted)
    heads, angle = torch.from_numpy(numbers(4, 2, 6, seed=17, spread=1)), torch.arange(24.0).view(4, 6)
    first, second = heads.numpy()[..., :3], heads.numpy()[..., 3:]
    swapped = np.concatenate((-second, first), axis=-1)
    cos, sin = angle.cos(), angle.sin()
    wanted = times(heads.numpy(), cos.numpy()[:, None]) + times(swapped, sin.numpy()[:, None])
    same_bits(rotate(heads, cos, sin, times_of(rule)).numpy(), wanted)


def test_gradients_are_those_of_exact_products() -> None:
    import torch

    from trimtab.model.lmul import matmul, multiply

    x, w, e = (torch.from_numpy(numbers(*shape, seed=s)) for s, shape in ((18, (5, 7)), (19, (4, 7)), (20, (7,))))
    with pytest.raises(SpecError, match="ste=1"):
        matmul(x.clone().requires_grad_(), w, Lmul())
    rule = Lmul(ste=True)
    for transposed in (False, True):
        grads = []
        for product in (rule, None):
            a, b, c = (t.clone().requires_grad_() for t in (x, w.T.contiguous() if transposed else w, e))
            b_NK = b.T if transposed else b
            scaled = multiply(a, c, rule) if product else a * c
            y = matmul(a, b, rule, transposed=transposed) if product else a @ b_NK.T
            (y.sum() * 2 + (y * torch.arange(4.0)).sum() + scaled.sum()).backward()
            grads.append((a.grad, b.grad, c.grad))
        for found, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(found, wanted)


def test_dtypes_are_said(tiny_model: Any) -> None:
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    half, brain = (tiny_model.spec.with_dtype(dtype) for dtype in ("float16", "bfloat16"))
    with pytest.warns(UserWarning, match="mantissa=10 is taken as 7"):
        spec = compose(brain, parse_all(["lmul:mantissa=10"]))
    attention: Any = spec.layers[0].self_attn
    assert attention.product == Lmul(mantissa=7)
    with pytest.warns(UserWarning, match="converted to fp32"):
        compose(half, parse_all(["lmul"]))
    compose(half, parse_all(["lmul:exp=5"]))


def test_what_does_not_go_together(tiny_model: Any, tiny_materials: Any) -> None:
    """Skipped rows are products of floats; the native program says why it does not run."""
    from trimtab.errors import UnsupportedModelError
    from trimtab.runtime.native import lowered_spec
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    for pair in (["cats", "lmul:scope=linear"], ["lmul:scope=elementwise", "cats"]):
        with pytest.raises(SpecError, match="transposed|skips rows"):
            compose(tiny_model.spec, parse_all(pair))
    for scope in ("attn", "linear", "elementwise"):
        with pytest.raises(UnsupportedModelError, match=r"bits added \(L-Mul\).*has no native kernel"):
            lowered_spec(compose(tiny_model.spec, parse_all([f"lmul:scope={scope}"])))


# ----------------------------------------------------------------------------------------------------------- energy


def test_energy_of_operations() -> None:
    """The ratios of the paper, from Horowitz' table."""
    from trimtab.predict.energy import gates, multiply_add_pj, product_pj, technology
    from trimtab.spec.product import LookupTable

    table = technology()
    assert product_pj(Lmul(), "fp16", table) / product_pj(EXACT, "fp16", table) == pytest.approx(0.05 / 1.1)
    assert product_pj(Lmul(), "fp32", table) / product_pj(EXACT, "fp32", table) == pytest.approx(0.1 / 3.7)
    assert multiply_add_pj(Lmul(), "fp32", table) / multiply_add_pj(EXACT, "fp32", table) == pytest.approx(1.0 / 4.6)
    assert multiply_add_pj(Lmul(), "bf16", table) / multiply_add_pj(EXACT, "bf16", table) == pytest.approx(0.45 / 1.5)
    with pytest.raises(SpecError, match="LookupTable has no energy"):
        product_pj(LookupTable(), "fp16", table)
    with pytest.raises(SpecError, match="45nm"):
        technology("7nm")
    multiplier, adder = gates(4, 3)
    assert adder < multiplier < gates(8, 23)[0]


def test_energy_of_a_pass(tiny_model: Any) -> None:
    """Terms of dot products are half the FLOPs; a scope lowers the price of its own terms alone; memory is as it was."""
    from trimtab.graph.build import build
    from trimtab.graph.count import count
    from trimtab.graph.ops import StepShape
    from trimtab.predict.energy import operation_energy
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    base, step = tiny_model.spec, StepShape.of([3], [9], 1)
    plain = operation_energy(base, "decode", step)
    flops = {op.name: int(count(op, step, "tiled").flops) for op in build(base).ops}
    assert plain.products_j == pytest.approx(sum(flops.values()) / 2 * 3.7e-12)
    assert plain.sums_j == pytest.approx(sum(flops.values()) / 2 * 0.9e-12)
    attended = sum(n for name, n in flops.items() if name.endswith("attend"))
    found = {
        s: operation_energy(compose(base, parse_all([f"lmul:scope={s}"])), "decode", step)
        for s in ("attn", "elementwise", "all")
    }
    assert plain.products_j - found["attn"].products_j == pytest.approx(attended / 2 * 3.6e-12)
    assert found["attn"].elementwise_j == plain.elementwise_j > found["elementwise"].elementwise_j
    assert found["elementwise"].products_j == plain.products_j
    assert found["all"].products_j == pytest.approx(sum(flops.values()) / 2 * 0.1e-12)
    assert len({e.dram_j for e in (plain, *found.values())}) == 1


def test_report_says_what_is_saved() -> None:
    """A prediction with L-Mul tells the share of the whole model, and that no time is saved."""
    from trimtab.predict.predict import predict
    from trimtab.techniques.plan import make_plan

    plain, added = (predict(make_plan("llama-2-7b", "a100", techniques=t)) for t in ((), ("lmul:scope=all",)))
    assert plain.figures["tpot_s"].value == added.figures["tpot_s"].value
    (note,) = (note for note in added.notes if "L-Mul" in note)
    assert "95% less" in note and "no time is saved" in note and "0.4% of a decode step" in note
    assert not any("L-Mul" in note for note in plain.notes)


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_values_get_a_sentence() -> None:
    for bad, text in (
        ({"mantissa": 1}, "undefined below 2"),
        ({"mantissa": 24}, "2..23"),
        ({"exp": 6}, "4, 5, 8"),
        ({"acc": "fp64"}, "fp32, bf16"),
        ({"round": "up"}, "trunc"),
        ({"carry": "float"}, "formula"),
        ({"offset": "half"}, "auto"),
        ({"offset": 5}, "1..4"),
    ):
        with pytest.raises(SpecError, match=text):
            Lmul(**bad)  # type: ignore[arg-type]


def test_only_floats_are_multiplied() -> None:
    floats = np.ones((2, 3), np.float32)
    for other in (np.ones((2, 3), np.int64), np.ones((2, 3), np.complex64), np.ones((3, 2), np.float32).T):
        for a, b in itertools.permutations((floats, other)):
            with pytest.raises(SpecError, match="contiguous float32"):
                kernels.multiply(a, b, Lmul())
            with pytest.raises(SpecError, match="contiguous float32"):
                kernels.matmul(a, b, Lmul())
    with pytest.raises(SpecError, match="shapes differ"):
        kernels.multiply(floats, floats[:1], Lmul())
    with pytest.raises(SpecError, match="do not agree"):
        kernels.matmul(floats, floats, Lmul(), transposed=True)
