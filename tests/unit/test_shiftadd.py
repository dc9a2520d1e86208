"""Binary-coded weights: the search, the codec, the sweep and the kernels, against brute force and plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.model.binary import BinaryRule
from trimtab.model.sweep import factor, group_order, sweep
from trimtab.runtime.kernels import reference
from trimtab.runtime.kernels.binary import binary_multiply, binary_multiply_plain
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.numerics.bcq import (
    EVEN,
    bcq,
    binary_scales,
    greedy_signs,
    levels_of,
    scales_of,
    signs_of,
    terms_of,
    tile,
    values_of,
)
from trimtab.runtime.numerics.rotation import rotation_of
from trimtab.spec.bcq import BcqFormat
from trimtab.techniques.linear.shiftadd import near
from trimtab.techniques.registry import parse_technique


def weights(seed: int, rows: int = 40, cols: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def square_error(w: np.ndarray, signs: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.square(values_of(signs, scales) - w).sum(1)


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-15, 1e15), st.integers(1, 4))
def test_terms_are_powers_of_two_that_come_closer(value: float, count: int) -> None:
    codes, total = terms_of(np.array([value], np.float32), count)
    assert scales_of(codes)[0] == total[0]
    left = [
        abs(float(np.float32(value)) - float(terms_of(np.array([value], np.float32), n)[1][0]))
        for n in range(1, count + 1)
    ]
    assert left == sorted(left, reverse=True) and left[-1] <= value * 0.42 * 0.5 ** (count - 1)
    assert 2.0 ** np.rint(np.log2(np.float32(value))) == pytest.approx(float(scales_of(codes[:, :1])[0]))


def test_zero_has_no_term() -> None:
    codes, total = terms_of(np.zeros(3, np.float32), 3)
    assert (codes == 0).all() and (total == 0).all() and (scales_of(codes) == 0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 1, 5, 50]), st.booleans(), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_scales_are_as_good_as_those_of_plain_loops(
    seed: int, bits: int, apot: int, rounds: int, nearest: bool, costly: bool, threads: int
) -> None:
    w = weights(seed, 40 if seed % 4 == 0 else 3, 16)
    cost = np.random.default_rng(seed).uniform(0.1, 3, w.shape).astype(np.float32) if costly else np.ones_like(w)
    found = binary_scales(w, bits, apot, rounds, nearest=nearest, cost_Rg=cost if costly else None, threads=threads)
    wanted = reference.binary_scales(w, cost, bits, apot, rounds, nearest, EVEN)
    assert (np.diff(found, axis=1) <= 0).all()
    code = signs_of if nearest else greedy_signs
    errors = [(cost * np.square(values_of(code(w, s), s) - w)).sum(1) for s in (found, wanted)]
    # A weight halfway between two levels may go either way, and a search may end elsewhere then.
    alike = np.isclose(errors[0], errors[1], rtol=1e-4, atol=1e-6)
    assert alike.mean() >= 0.9 or len(w) * (1 - alike.mean()) <= 1
    assert errors[0].sum() <= 1.02 * errors[1].sum() + 1e-6


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_signs_are_those_of_the_nearest_level(seed: int, bits: int) -> None:
    w = weights(seed, 3, 12)
    scales = np.random.default_rng(seed).uniform(0.01, 1, (3, bits)).astype(np.float32)
    found = values_of(signs_of(w, scales), scales)
    levels, patterns = levels_of(scales)
    assert (np.diff(levels, axis=1) >= 0).all() and patterns.shape == (3, 2**bits, bits)
    for row in range(3):
        every = [
            sum(s * a for s, a in zip(p, scales[row], strict=True)) for p in itertools.product((-1, 1), repeat=bits)
        ]
        nearest = np.abs(np.array(every)[:, None] - w[row]).min(0)
        np.testing.assert_allclose(np.abs(found[row] - w[row]), nearest, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_the_search_only_gets_better(bits: int) -> None:
    w = weights(1, 60, 64)
    errors = [square_error(w, *bcq(w, bits, 0, rounds)) for rounds in (0, 1, 3, 10, 30)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before + 1e-4).all()
    by_terms = [float(square_error(w, *bcq(w, bits, apot, 20)).sum()) for apot in (1, 2, 3)]
    free = float(square_error(w, *bcq(w, bits, 0, 20)).sum())
    assert by_terms[0] > by_terms[1] >= by_terms[2] * 0.999 and by_terms[2] <= 1.02 * free
    greedy = float(square_error(w, *bcq(w, bits, 3, 20, nearest=False)).sum())
    assert greedy >= by_terms[2] * 0.999
    if bits == 1:  # the best single scale is the mean magnitude
        _, scales = bcq(w, 1, 0, 5)
        np.testing.assert_allclose(scales[:, 0], np.abs(w).mean(1), rtol=1e-5)


def test_costs_move_the_scales_to_where_errors_matter() -> None:
    w = weights(2, 30, 32)
    cost = np.where(np.arange(32) % 4 == 0, 50.0, 0.02).astype(np.float32)
    told, plain = (bcq(w, 2, 3, 20, cost_Rg=c) for c in (np.broadcast_to(cost, w.shape), None))
    left = [float((np.square(values_of(*found) - w) * cost).sum()) for found in (told, plain)]
    assert left[0] < 0.85 * left[1]
    with pytest.raises(SpecError, match="not finite"):
        bcq(np.full((1, 8), np.nan, np.float32), 2)


FORMS = [
    BcqFormat(bits=2, group=64), BcqFormat(bits=3, group=0, apot=2), BcqFormat(bits=1, group=16, mode="acc"),
    BcqFormat(bits=4, group=0, mode="acc", apot=1), BcqFormat(bits=2, group=8),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", [16, 37])
def test_codec_and_tiles_hold_the_same(form: BcqFormat, rows: int) -> None:
    w = weights(5, rows, 24)
    packed = encode(w, form)
    step, wide = form.scale_rows(rows), form.scale_cols
    signs = rows * 24 // 8 * form.bits
    assert packed.nbytes == form.nbytes(rows, 24) == signs + -(-rows // step) * (24 // wide) * form.bits * form.apot
    value = decode(packed)
    assert np.square(value - w).mean() < np.square(w).mean() * (0.5 if form.bits > 1 else 0.8)
    tiled = tile(packed)
    np.testing.assert_array_equal(decode(tiled), value)
    assert tiled.format.tiled and tiled.nbytes == tiled.format.nbytes(rows, 24)
    for first, c in itertools.product(
        range(0, rows, step), range(0, 24, wide)
    ):  # one group after the other, by plain loops
        block = w[first : first + step, c : c + wide].reshape(1, -1)
        np.testing.assert_allclose(
            values_of(*bcq(block, form.bits, form.apot))[0],
            value[first : first + step, c : c + wide].reshape(-1),
            rtol=1e-6,
        )


@pytest.mark.parametrize("cols", [24, 64, 576, 1536, 8 * 13])
def test_a_rotation_keeps_lengths_and_spreads_what_stands_out(cols: int) -> None:
    turn = rotation_of(cols)
    whole = turn.apply(np.eye(cols)).T  # V: column j is what it makes of unit vector j
    np.testing.assert_allclose(whole @ whole.T, np.eye(cols), atol=2e-6)
    x = weights(3, 5, cols)
    np.testing.assert_allclose(turn.apply(x), x @ whole.T, atol=2e-5)
    np.testing.assert_allclose(turn.undo(turn.apply(x)), x, atol=2e-5)
    assert len(turn.left) * len(turn.right) == cols and np.abs(whole).max() < 0.99
    outlier = np.zeros((1, cols), np.float32)
    outlier[0, 3] = 1.0
    assert np.abs(turn.apply(outlier)).max() < 0.95
    assert rotation_of(cols).order is turn.order, "made once"


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_a_rotated_matrix_is_the_plain_one_of_turned_weights(tokens: int) -> None:
    w, x = weights(11, 37, 48), weights(12, tokens, 48)
    plain, form = BcqFormat(bits=3, group=16, mode="acc"), BcqFormat(bits=3, group=16, mode="acc", rotated=True)
    turn = rotation_of(48)
    packed, inner = encode(w, form), encode(turn.apply(w), plain)
    for name, buffer in inner.buffers.items():
        np.testing.assert_array_equal(packed.buffers[name], buffer)
    np.testing.assert_allclose(decode(packed), turn.undo(decode(inner)), atol=1e-6)
    assert packed.nbytes == form.nbytes(37, 48) == plain.nbytes(37, 48)
    assert form.input_flops(48) == 2 * 48 * (6 + 8) and plain.input_flops(48) == 0
    wanted = x @ decode(packed).T
    for multiply in (binary_multiply, binary_multiply_plain):
        np.testing.assert_allclose(multiply(tile(packed), x), wanted, atol=1e-4)


@pytest.mark.parametrize("nearest", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_swept_columns_are_what_is_stored_and_hurt_less(form: BcqFormat, nearest: bool) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=made) @ (torch.randn(32, 32, generator=made) * torch.rand(32, generator=made))
    h = (x.T @ x / 256).double()
    w = torch.from_numpy(weights(7, 37, 32))
    how = factor(h, 0.01, group_order(h.diagonal(), form.scale_cols))
    rule = BinaryRule(form, (37, 32), how.order, 20, nearest)
    found, _ = sweep(w, how, rule)
    np.testing.assert_allclose(decode(rule.packed()), found.numpy(), atol=1e-6)

    def error(v: torch.Tensor) -> float:
        dw = (v - w).double()
        return float((dw @ h * dw).sum())

    assert error(found) < 0.8 * error(torch.from_numpy(decode(encode(w.numpy(), form))))


def test_parameters_are_refused_in_words() -> None:
    with pytest.raises(SpecError, match=r"shiftadd: bits=2.2 .*averages such as 2.2 with alloc=auto"):
        parse_technique("shiftadd:bits=2.2")
    with pytest.raises(SpecError, match=r"multiples of 8, or -1. Try group=16"):
        parse_technique("shiftadd:group=12")
    with pytest.raises(SpecError, match=r"shares of 1..4 bits that sum to 1"):
        parse_technique("shiftadd:mix=2:0.8|3:0.3,alloc=auto")
    with pytest.raises(SpecError, match="multiple"):
        BcqFormat(bits=2, group=64).buffers(16, 20)


def test_an_average_of_bits_is_allotted(tiny_model: Any, tiny_materials: Any) -> None:
    asked = parse_technique("shiftadd:bits=2.5,alloc=auto,group=16,samples=256,window=128")
    found: Any = asked.resolve(tiny_model, tiny_materials)
    nodes = dict(tiny_model.spec.linears())
    from trimtab.techniques.allocation import groups

    sizes = np.array([sum(nodes[path].n * nodes[path].k for path in part) for part in groups(tiny_model.spec)])
    average = float((sizes * found.bits).sum() / sizes.sum())
    assert 2.3 < average <= 2.5 and parse_technique(str(found)) == found
    assert set(found.bits) == {2, 3}, "the bits next to the average alone"
    mixed: Any = parse_technique('shiftadd:mix="2:0.8|3:0.2",alloc=auto,group=16')
    assert mixed.average == pytest.approx(2.2)
    assert set(mixed.resolve(tiny_model, tiny_materials).bits) <= {2, 3}
    assert near(3.0) == (3,) and near(1.25) == (1, 2)
