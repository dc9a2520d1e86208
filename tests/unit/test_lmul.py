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
from trimtab.spec.product import Lmul, Rounded

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
    [{"mantissa": 4}, {"mantissa": 3, "exp": 4}, {"mantissa": 23, "carry": "formula"}, {"mantissa": 7, "round": "nearest"}],
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
    values = np.concatenate((CORNERS, numbers(4000, spread=12), E4M3_VALUES, np.float32(0.5) * E4M3_VALUES, -numbers(90, spread=120)))
    half_way = (E4M3_VALUES[:126] + E4M3_VALUES[1:127]) / 2
    values = np.concatenate((values, half_way, np.nextafter(half_way, np.float32(0)), np.nextafter(half_way, np.float32(9e9))))
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
    np.testing.assert_array_equal(round_mantissa(within, 3)[np.abs(within) < 448], round_fp8(within, "e4m3")[np.abs(within) < 448])


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_values_get_a_sentence() -> None:
    for bad, text in (
        ({"mantissa": 1}, "undefined below 2"),
        ({"mantissa": 24}, "2..23"),
        ({"exp": 6}, "4, 5, 8"),
        ({"acc": "fp64"}, "fp32, bf16"),
        ({"round": "up"}, "trunc"),
        ({"carry": "float"}, "formula"),
        ({"offset": "auot"}, "auto"),
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
