"""Bit-serial terms and products of exponents and integers: exact, against the values they stand for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import CalibrationError, SpecError
from trimtab.runtime.numerics import decode, encode, pairs
from trimtab.runtime.numerics.grids import parts_of
from trimtab.runtime.numerics.terms import bitserial_dot, grid_terms
from trimtab.runtime.numerics.tiles import tile
from trimtab.runtime.weights.packed import Packed, Weights, packed_float
from trimtab.spec.grids import GRIDS, GridFormat, PairFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import ExponentInteger

KINDS = [(name, bits) for name, widths in GRIDS.items() for bits in widths if name != "bipolar"]


@pytest.mark.parametrize(("name", "bits"), KINDS)
def test_terms_sum_to_the_value_of_every_code(name: str, bits: int) -> None:
    format = GridFormat(grid=name, bits=bits, group=16)
    terms = grid_terms(format)
    np.testing.assert_array_equal(terms.values, np.array(format.tables))
    assert terms.cycles <= {2: 2, 3: 2, 4: 2, 5: 3, 6: 3, 7: 4, 8: 4}[bits]
    assert terms.mantissa.max() <= 2


@given(st.sampled_from(KINDS), st.sampled_from(["fp16", "int8"]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_the_dot_of_terms_is_the_dot_of_values(kind: tuple[str, int], scale: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    format = GridFormat(grid=kind[0], bits=kind[1], group=16, scale=scale)
    packed = encode(rng.standard_normal((5, 48)).astype(np.float32), format)
    x = (rng.standard_normal((3, 48)) * 10 ** rng.uniform(-6, 3, (3, 48))).astype(np.float16)
    found = bitserial_dot(x, packed)
    codes, scales, choice = parts_of(packed)
    for token, row in np.ndindex(found.shape):
        total = np.float32(0)
        for group in range(3):
            part = slice(group * 16, group * 16 + 16)
            table = format.tables[choice[row, group]]
            products = [float(a) * table[c] for a, c in zip(x[token, part], codes[row, part], strict=True)]
            total = total + np.float32(math.fsum(products)) * scales[row, group]
        assert found[token, row] == total
    np.testing.assert_array_equal(bitserial_dot(x, tile(packed)), found)


def test_bit_serial_refusals() -> None:
    packed = encode(np.ones((2, 16), np.float32), GridFormat(grid="bitmod", bits=3, group=16))
    with pytest.raises(SpecError, match="finite"):
        bitserial_dot(np.full((1, 16), np.inf, np.float16), packed)
    with pytest.raises(SpecError, match="planes of bits"):
        grid_terms(GridFormat(grid="bipolar", bits=2, group=16))
    wide = encode(np.ones((1, 1 << 17), np.float32), GridFormat(grid="int", bits=8, group=1 << 17))
    with pytest.raises(SpecError, match="64 bits"):
        bitserial_dot(np.full((1, 1 << 17), 60000, np.float16), wide)


def matrix(
    rng: np.random.Generator, wbits: int, weight_normal: str, product: ExponentInteger, rows: int, cols: int
) -> tuple[Any, Packed, float]:
    from trimtab.model.integers import ExponentIntegers

    format = PairFormat(bits=wbits, normal=weight_normal, group=cols)
    packed = encode((rng.standard_t(3, (rows, cols)) * 0.05).astype(np.float32), format)
    scale = float(np.float16(0.07))
    weights = Weights({"m": packed, "m.act_scale": packed_float(np.array([scale], np.float32), "fp32")})
    node = LinearSpec(n=rows, k=cols, format=format, product=product)
    return ExponentIntegers("m", node, weights), packed, scale


@pytest.mark.parametrize("wbits, weight_normal", [(4, "int"), (4, "flint"), (8, "int")])
@pytest.mark.parametrize("abits, act_normal", [(4, "int"), (4, "flint"), (8, "int")])
def test_integer_products_are_those_of_the_float_grid(
    wbits: int, weight_normal: str, abits: int, act_normal: str
) -> None:
    import torch

    rng = np.random.default_rng(0)
    product = ExponentInteger(bits=abits, normal=act_normal)
    rule, packed, scale = matrix(rng, wbits, weight_normal, product, 7, 96)
    x = (rng.standard_t(2, (5, 96)) * (0.3 if abits == 4 else 3)).astype(np.float32)
    x[0, 3] = 500.0  # an outlier among outliers
    coded = rule.inputs_TK(x)
    # What the decoder of a pair hands to the multiplier: small integers, and the shift that is the sum of two exponents.
    act = PairFormat(bits=abits, normal=act_normal, group=96)
    codes = pairs.pair_codes(np.clip(x / np.float32(scale), -rule.limit, rule.limit), act)
    e, i = (table.reshape(-1)[pairs._table_places(codes, act)] for table in pairs.exponent_integers(act))
    f, j = (
        table.reshape(-1)[pairs._table_places(pairs.parts_of(packed)[0], packed.format)]
        for table in pairs.exponent_integers(packed.format)
    )
    sums = ((i[:, None].astype(np.int64) * j[None]) << (e[:, None] + f[None])).sum(-1)
    assert np.abs(sums).max() < 2**31
    found = rule(torch.from_numpy(x), None).numpy()
    wanted = sums.astype(np.int32) * (packed.buffers["scale"][:, 0].astype(np.float32) * np.float32(scale))
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    # The same in floats: values on the grid, sums in float64, which holds all of them.
    grid = (coded.astype(np.float64) @ np.array(rule.weights_NK(), np.float64).T).astype(np.int64)
    np.testing.assert_array_equal(grid, sums)
    np.testing.assert_array_equal(rule.weights_NK() * packed.buffers["scale"].astype(np.float32), decode(packed))
    assert rule.nbytes == packed.nbytes + 4 == LinearSpec(n=7, k=96, format=packed.format, product=product).nbytes()


def test_sums_stay_in_int32_or_the_matrix_is_refused() -> None:
    from trimtab.model.integers import integer_product, largest_input

    act = PairFormat(bits=8, group=2)
    rows = np.full((1, 4096), 100)
    limit = largest_input(rows, act, "m")
    assert limit * 409600 < 2**31 < 2 * limit * 409600
    assert largest_input(rows[:, :64], act, "m") == 2**15
    with pytest.raises(SpecError, match=r"m: sums of K=4096 products.*abits=4"):
        largest_input(np.full((1, 4096), 2**13), act, "m")
    rng = np.random.default_rng(0)
    x, w = rng.integers(-(2**15), 2**15 + 1, (3, 8)), rng.integers(-(2**12), 2**12, (5, 8))
    np.testing.assert_array_equal(integer_product(x.astype(np.int32), w.astype(np.int32)), x @ w.T)
    assert integer_product(np.zeros((2, 8), np.int32), w.astype(np.int32)).shape == (2, 5)
    with pytest.raises(SpecError, match="one scale a row"):
        matrix_of_other_groups(rng)


def matrix_of_other_groups(rng: np.random.Generator) -> None:
    from trimtab.model.integers import ExponentIntegers

    format = PairFormat(bits=4, group=8)
    packed = encode(rng.standard_normal((4, 16)).astype(np.float32), format)
    ExponentIntegers("m", LinearSpec(n=4, k=16, format=format, product=ExponentInteger()), Weights({"m": packed}))


def test_normal_types_are_settled_by_error(tiny_model: Any, tiny_materials: Any) -> None:
    from trimtab.techniques.linear.olive import Olive

    asked = Olive(search="100:250:50")
    found = asked.resolve(tiny_model, tiny_materials)
    count = len([path for path, _ in tiny_model.spec.linears() if path.startswith("layers.")])
    assert len(found.normal) == 2 * count and set(found.normal) <= {"i", "f"}
    weights_only = Olive(search="100:250:50", abits=16).resolve(tiny_model, tiny_materials)
    assert weights_only.normal == found.normal[:count]
    path = "layers.1.mlp.up_proj"
    index = [p for p, _ in tiny_model.spec.linears() if p.startswith("layers.")].index(path)
    w = decode(tiny_model.weights[path])
    errors = {
        normal: pairs.pair_scales(w, PairFormat(bits=4, normal=normal, group=w.shape[1]), search=(100, 250, 50))[
            1
        ].sum()
        for normal in ("int", "flint")
    }
    assert found.normal[index] == min(errors, key=errors.__getitem__)[0]
    assert Olive(wbits=8, abits=8).resolve(tiny_model, tiny_materials).normal == "int"


def test_inputs_that_are_not_finite_are_refused(tiny_model: Any, tiny_materials: Any) -> None:
    from trimtab.model.variant import Model, Variant
    from trimtab.techniques.apply import applied

    path = "layers.0.post_attention_layernorm"
    broken = tiny_model.weights[path].buffers["data"].copy()
    broken[0, 0] = np.nan
    model = Model(Variant(tiny_model.spec, tiny_model.weights | {path: packed_float(broken, "fp32")}))
    with (
        pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.gate_proj is not finite"),
        applied(model, "olive:normal=int,search=100:250:50", materials=tiny_materials),
    ):
        pass


def test_one_scale_for_all_rows_is_the_best_of_those_searched() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_t(2, (40, 64)).astype(np.float32)
    format = PairFormat(bits=4, group=64)
    scale, error = pairs.pair_scale(x, format, search=(75, 250, 25))

    def paid(tried: float) -> float:
        buffers = pairs.encode_pairs_with(x, format, np.full((40, 1), tried, np.float32))
        return float(np.square(decode(Packed(format, x.shape, buffers)) - x).sum(dtype=np.float64))

    reach = abs(x.mean(dtype=np.float64)) + 3 * x.std(dtype=np.float64)
    others = [paid(percent / 100 * reach / 7) for percent in range(75, 250, 25)]
    assert paid(scale) == pytest.approx(error, rel=1e-4) == pytest.approx(min(others), rel=1e-4)


def test_groups_that_do_not_divide_name_those_that_do() -> None:
    from trimtab.techniques.plan import make_plan

    with pytest.raises(SpecError, match=r"group=128 does not divide the rows of 576.*64, 96, 192.*Try group=96"):
        make_plan("smollm2-135m", "a100", techniques=["bitmod"])
    with pytest.raises(SpecError, match=r"group=1024 is longer than the rows of 576"):
        make_plan("smollm2-135m", "a100", techniques=["bitmod:group=1024"])
    with pytest.raises(SpecError, match=r"Allowed: 3, 4, 5, 6, 8"):
        make_plan("smollm2-135m", "a100", techniques=["bitmod:bits=2"])
