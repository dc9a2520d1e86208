"""Codes that are places in a table: bit for bit against slow scalar rules, ties included, by rows and in tiles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.runtime.numerics import decode, encode, transcode
from trimtab.runtime.numerics.bitmasks import encode_bitmask_with, mask_of
from trimtab.runtime.numerics.grids import buffers_of, encode_grid_with, grid_scales, nearest_codes_of, parts_of
from trimtab.runtime.numerics.pairs import (
    encode_pairs_with,
    exponent_integers,
    integers_of,
    pair_codes,
    pair_scales,
)
from trimtab.runtime.numerics.pairs import parts_of as pair_parts_of
from trimtab.runtime.numerics.palettes import palette
from trimtab.runtime.numerics.tiles import allocate, tile, tiled_format, untile
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import FP32, WeightFormat
from trimtab.spec.grids import GRIDS, SCALES, GridFormat, PairFormat
from trimtab.spec.sparse import BitmaskFormat, PaletteFormat

kinds = [(name, bits) for name, widths in GRIDS.items() for bits in widths]
grids = st.builds(
    lambda kind, group, scale: GridFormat(grid=kind[0], bits=kind[1], group=group, scale=scale),
    st.sampled_from(kinds),
    st.sampled_from([4, 16, 48]),
    st.sampled_from(SCALES),
)
pairs = st.builds(
    lambda kind, group: PairFormat(normal=kind[0], bits=kind[1], group=group),
    st.sampled_from([("int", 4), ("flint", 4), ("int", 8)]),
    st.sampled_from([2, 16, 48]),
)


@st.composite
def matrices(draw: st.DrawFn, group: int) -> np.ndarray:
    """Normal, heavy-tailed, or multiples of a power of two, so that many lie half way between two points."""
    rows, groups, seed = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    rng, shape = np.random.default_rng(seed), (rows, groups * group)
    kind = draw(st.sampled_from(["normal", "heavy", "ties", "zeros"]))
    if kind == "ties":
        top = draw(st.sampled_from([3, 4, 6, 7, 8, 12, 16, 32]))
        values = rng.integers(-2 * top, 2 * top + 1, shape) / 2
        values.reshape(-1, group)[:, 0] = top
        return (values * draw(st.sampled_from([1.0, 0.25, 2.0**-7]))).astype(np.float32)
    values = rng.standard_t(2, shape) if kind == "heavy" else rng.standard_normal(shape)
    values = (values * draw(st.sampled_from([1e-2, 1.0, 30.0]))).astype(np.float32)
    if kind == "zeros":
        values.reshape(-1, group)[0] = 0
    return values


def slow_nearest(x: np.float32, table: tuple[float, ...]) -> int:
    """The code of the nearest value; of two at one distance the lower value, of equal values the lower code."""
    # A float32 minus a small integer is exact in float64.
    return min(range(len(table)), key=lambda code: (abs(float(x) - table[code]), table[code], code))


def slow_scale(peak: np.float32, top: float, kind: str) -> np.float32:
    if kind == "e8m0":
        if peak == 0:
            return np.float32(2.0**-127)
        return np.float32(2.0 ** (math.floor(math.log2(peak)) + 1 - round(math.log2(top))))
    scale = min(max(float(np.float32(peak) / np.float32(top)), 1e-5), 1e4)
    return np.float32(np.float16(np.float32(scale)))


def slow_grid(values: np.ndarray, format: GridFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and tables, one weight after the other."""
    rows, cols = values.shape
    groups = cols // format.group
    codes, scales = np.zeros((rows, cols), np.uint8), np.zeros((rows, groups), np.float32)
    choices = np.zeros((rows, groups), np.uint8)
    for row in range(rows):
        for group in range(groups):
            w = values[row, group * format.group : (group + 1) * format.group]
            peak, least = max(abs(v) for v in w), math.inf
            for index, table in enumerate(format.tables):
                scale = slow_scale(peak, max(abs(v) for v in table), format.scale)
                points = [np.float32(table[slow_nearest(v / scale, table)]) * scale for v in w]
                # Squares in float32, summed exactly.
                error = math.fsum(float((p - v) * (p - v)) for p, v in zip(points, w, strict=True))
                if error < least:
                    least, scales[row, group], choices[row, group] = error, scale, index
        if format.scale == "int8":
            largest = scales[row].max()
            step = np.float32(np.float16(largest / np.float32(255)))
            for group in range(groups):
                counted = min(max(round(scales[row, group] / step), 1), 255)
                scales[row, group] = np.float32(255 if scales[row, group] == largest else counted) * step
        for col in range(cols):
            group = col // format.group
            codes[row, col] = slow_nearest(values[row, col] / scales[row, group], format.tables[choices[row, group]])
    return codes, scales, choices


@given(st.data(), grids)
@settings(max_examples=80, deadline=None)
def test_codes_scales_and_tables_are_those_of_the_scalar_rule(data: st.DataObject, format: GridFormat) -> None:
    values = data.draw(matrices(format.group))
    codes, scale, choice = parts_of(encode(values, format))
    wanted_codes, wanted_scale, wanted_choice = slow_grid(values, format)
    np.testing.assert_array_equal(scale, wanted_scale)
    np.testing.assert_array_equal(choice, wanted_choice)
    np.testing.assert_array_equal(codes, wanted_codes)


@given(st.data(), grids | pairs)
@settings(max_examples=80, deadline=None)
def test_tiles_hold_what_rows_hold(data: st.DataObject, format: GridFormat | PairFormat) -> None:
    values = np.tile(data.draw(matrices(format.group)), (data.draw(st.sampled_from([1, 7])), 1))
    packed = encode(values, format)
    assert [*packed.buffers] == [buffer.name for buffer in format.buffers(*values.shape)]
    assert packed.nbytes == format.nbytes(*values.shape)
    if format.group % 16 and format.group != values.shape[1]:
        with pytest.raises(SpecError, match="tiles need groups"):
            tile(packed)
        return
    tiled = tile(packed)
    np.testing.assert_array_equal(decode(tiled), decode(packed))
    back = untile(tiled)
    assert back.format == format
    for name, buffer in packed.buffers.items():
        np.testing.assert_array_equal(back.buffers[name], buffer)
    direct = encode(values, tiled.format)
    into = tile(packed, allocate(tiled_format(format, values.shape[1]), packed.shape))
    for name, buffer in tiled.buffers.items():
        np.testing.assert_array_equal(direct.buffers[name], buffer)
        np.testing.assert_array_equal(into.buffers[name], buffer)
    np.testing.assert_array_equal(decode(tiled, slice(1, None)), decode(packed)[1:])


@pytest.mark.parametrize(("name", "bits"), kinds)
def test_every_code_of_every_table_is_its_value(name: str, bits: int) -> None:
    format = GridFormat(grid=name, bits=bits, group=1 << bits)
    tables = np.array(format.tables, np.float32)
    count = len(tables)
    codes = np.tile(np.arange(1 << bits, dtype=np.uint8), (count, 1))
    choice = np.arange(count, dtype=np.uint8)[:, None]
    packed = Packed(format, codes.shape, buffers_of(codes, np.full((count, 1), np.float32(0.5)), choice, format))
    np.testing.assert_array_equal(decode(packed), tables / 2)
    again = nearest_codes_of(decode(packed), np.full((count, 1), np.float32(0.5)), choice, format)
    np.testing.assert_array_equal(np.take_along_axis(tables, again.astype(np.intp), axis=1), tables)


def test_the_tables_are_those_of_the_papers() -> None:
    def of(name: str, bits: int) -> list[list[float]]:
        return [sorted(set(table)) for table in GridFormat(grid=name, bits=bits, group=4).tables]

    fp3, fp4 = [-4, -2, -1, 0, 1, 2, 4], [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
    assert of("bitmod", 3) == [sorted([*fp3, s]) for s in (3, -3, 6, -6)]
    assert of("bitmod", 4) == [sorted([*fp4, s]) for s in (10, -10, 16, -16)]
    assert of("er", 4) + of("ea", 4) == of("bitmod", 4)
    assert of("flint", 4) == [[-16, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 16]]
    assert of("ant", 4) == [list(range(-7, 8)), *of("flint", 4)]
    below_one, above = {m for m in range(8)}, {(8 + m) << e for m in range(8) for e in range(3)}
    assert of("fp", 6) == [sorted({s * m for m in below_one | above for s in (1, -1)})]


@given(st.data(), st.sampled_from([3, 4]))
@settings(max_examples=60, deadline=None)
def test_more_tables_are_never_worse(data: st.DataObject, bits: int) -> None:
    values = data.draw(matrices(16))

    def errors(name: str) -> np.ndarray:
        stored = decode(encode(values, GridFormat(grid=name, bits=bits, group=16)))
        return np.square(stored - values).reshape(len(values), -1, 16).sum(axis=2, dtype=np.float64)

    np.testing.assert_array_equal(errors("bitmod"), np.minimum(errors("er"), errors("ea")))
    assert np.all(errors("ant") <= errors("int"))


def test_equal_errors_take_the_first_table() -> None:
    # Symmetric values meet each table as its mirror image does.
    values = np.array([[4, -4, 2.9, -2.9, 1, -1, 0, 0]], np.float32)
    _, _, choice = parts_of(encode(values, GridFormat(grid="er", bits=3, group=8)))
    assert choice[0, 0] == 0
    tilted = values + np.array([[0, 0, 0, -0.1, 0, 0, 0, 0]], np.float32)  # -3 is met, 3 is not
    _, _, choice = parts_of(encode(tilted, GridFormat(grid="er", bits=3, group=8)))
    assert choice[0, 0] == 1


@given(st.data(), grids)
@settings(max_examples=60, deadline=None)
def test_scales_that_were_found_are_stored_as_they_are(data: st.DataObject, format: GridFormat) -> None:
    values = data.draw(matrices(format.group))
    scale, choice = grid_scales(values, format)
    buffers = encode_grid_with(values, format, scale, choice)
    codes, stored, tables = parts_of(Packed(format, values.shape, buffers))
    np.testing.assert_array_equal(stored, scale)
    np.testing.assert_array_equal(tables, choice)
    # Column by column, as a sweep rounds them, the codes are the same.
    by_column = [
        nearest_codes_of(values[:, [col]], scale[:, [col // format.group]], choice[:, [col // format.group]], format)
        for col in range(values.shape[1])
    ]
    np.testing.assert_array_equal(np.concatenate(by_column, axis=1), codes)


def test_a_weighted_error_serves_the_columns_that_count() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 64)).astype(np.float32)
    weight = np.where(np.arange(64) % 8 == 0, 100, 0.01).astype(np.float32)
    format = GridFormat(grid="bitmod", bits=3, group=32)

    def error(found: tuple[np.ndarray, np.ndarray]) -> float:
        stored = decode(Packed(format, values.shape, encode_grid_with(values, format, *found)))
        return float((weight * np.square(stored - values)).sum())

    plain, chosen = grid_scales(values, format), grid_scales(values, format, weight)
    assert error(chosen) < error(plain)
    assert error(grid_scales(values, format, weight, shrink=(1.0, 0.9, 0.8, 0.7))) < error(chosen)
    np.testing.assert_array_equal(plain[0], grid_scales(values, format, np.ones(64, np.float32))[0])


def test_bipolar_codes_are_the_rounded_places() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((8, 64)).astype(np.float32)
    for bits in GRIDS["bipolar"]:
        codes, scale, _ = parts_of(encode(values, GridFormat(grid="bipolar", bits=bits, group=32)))
        x = values.reshape(8, 2, 32) / scale[:, :, None]
        top = (1 << bits) - 1
        np.testing.assert_array_equal(codes.reshape(x.shape), np.clip(np.rint((x + top) / 2), 0, top))
        np.testing.assert_array_equal(scale, slow_scale_of(values, top))


def slow_scale_of(values: np.ndarray, top: int) -> np.ndarray:
    return np.array(
        [[slow_scale(np.abs(row[g : g + 32]).max(), top, "fp16") for g in (0, 32)] for row in values], np.float32
    )


@pytest.mark.parametrize("normal", ["int", "flint"])
def test_every_pair_of_nibbles_decodes_as_the_paper_says(normal: str) -> None:
    format = PairFormat(bits=4, normal=normal, group=2)
    first, second = (np.repeat(np.arange(16), 16), np.tile(np.arange(16), 16))
    found = Packed(
        format,
        (256, 2),
        {"codes": (first | second << 4).astype(np.uint8)[:, None], "scale": np.ones((256, 1), np.float16)},
    )
    values = decode(found)
    normals, wide = format.tables
    assert len(set(normals)) == 15
    kinds = {"normal": 0, "outlier": 0, "both": 0}
    for (a, b), (left, right) in zip(zip(first, second, strict=True), values, strict=True):
        if a == b == 8:
            kinds["both"] += 1
            assert (left, right) == (0, 0)
        elif 8 in (a, b):
            kinds["outlier"] += 1
            assert (left, right) == ((0, wide[b]) if a == 8 else (wide[a], 0))
        else:
            kinds["normal"] += 1
            assert (left, right) == (normals[a], normals[b])
    assert kinds == {"normal": 225, "outlier": 30, "both": 1}
    # Every byte that a pair is coded as comes back: all but those that hold an unused code.
    again = pair_codes(values, format)
    used = [(a, b) for a, b in zip(first, second, strict=True) if not (8 in (a, b) and (a % 8, b % 8) == (0, 0))]
    for a, b in used:
        np.testing.assert_array_equal(again[a * 16 + b], (a, b))
    np.testing.assert_array_equal(integers_of(np.stack((first, second), 1).astype(np.uint8), format), values)


def test_outliers_begin_above_the_normal_values() -> None:
    assert sorted({abs(v) for v in PairFormat(bits=4, group=2).tables[1]}) == [0, 12, 16, 24, 32, 48, 64, 96]
    flint = PairFormat(bits=4, normal="flint", group=2).tables[1]
    assert sorted({abs(v) for v in flint}) == [0, 24, 32, 48, 64, 96, 128, 192]
    wide = [v for v in PairFormat(bits=8, group=2).tables[1] if v]
    assert min(map(abs, wide)) == 144
    for form in (PairFormat(bits=4, group=2), PairFormat(bits=4, normal="flint", group=2), PairFormat(bits=8, group=2)):
        exponent, integer = exponent_integers(form)
        np.testing.assert_array_equal(integer.astype(np.int64) << exponent, np.array(form.tables))
        assert np.abs(integer[1]).max() < 16
        assert np.abs(integer[0]).max() < (16 if form.bits == 4 else 128)


def slow_pair(x: tuple[np.float32, np.float32], format: PairFormat, both: str) -> tuple[int, int]:
    normal, wide = format.tables
    union = {v: ("normal", code) for code, v in reversed([*enumerate(normal)])}
    union |= {v: ("outlier", code) for code, v in enumerate(wide) if v and abs(v) <= 2**15}
    found = [union[min(union, key=lambda v: (abs(float(value) - v), v))] for value in x]
    outliers = [kind == "outlier" for kind, _ in found]
    if not any(outliers):
        return found[0][1], found[1][1]
    left = outliers[0] and (not outliers[1] or both == "left" or abs(x[0]) >= abs(x[1]))
    return (found[0][1], format.identifier) if left else (format.identifier, found[1][1])


@given(st.integers(0, 2**31), pairs, st.sampled_from(["larger", "left"]))
@settings(max_examples=80, deadline=None)
def test_pairs_are_those_of_the_scalar_rule(seed: int, format: PairFormat, both: str) -> None:
    rng = np.random.default_rng(seed)
    top = int(max(format.tables[0]))
    x = np.concatenate((rng.standard_t(2, 60) * top / 2, rng.integers(-8 * top, 8 * top, 60) / 2)).astype(np.float32)
    x = rng.permutation(x)[None]
    codes = pair_codes(x, format, both)[0]
    for left, right in zip(range(0, 120, 2), range(1, 120, 2), strict=True):
        assert (codes[left], codes[right]) == slow_pair((x[0, left], x[0, right]), format, both)


@given(st.data(), pairs)
@settings(max_examples=30, deadline=None)
def test_the_scale_of_pairs_is_the_best_of_those_searched(data: st.DataObject, format: PairFormat) -> None:
    values = data.draw(matrices(format.group))
    search = (75, 250, 25)
    scale, error = pair_scales(values, format, search=search)
    groups = values.reshape(-1, format.group)
    reach = np.abs(groups.mean(axis=1, dtype=np.float64)) + 3 * groups.std(axis=1, dtype=np.float64)
    best = np.full(len(groups), np.inf)
    for percent in range(*search):
        tried = np.clip(percent / 100 * reach / max(format.tables[0]), 1e-5, 1e4).reshape(len(values), -1)
        stored = decode(Packed(format, values.shape, encode_pairs_with(values, format, tried)))
        best = np.minimum(best, np.square(stored - values).reshape(groups.shape).sum(axis=1, dtype=np.float64))
    stored = decode(Packed(format, values.shape, encode_pairs_with(values, format, scale)))
    paid = np.square(stored - values).reshape(groups.shape).sum(axis=1, dtype=np.float64)
    # Errors are float32 in units of the scale on one side and of the weights on the other.
    floor = 1e-9 * np.square(groups).sum(axis=1, dtype=np.float64)
    assert np.all(paid <= best * (1 + 1e-4) + floor)
    np.testing.assert_allclose(error.reshape(-1), paid, rtol=1e-4, atol=floor.max() + 1e-30)


def test_outliers_are_cut_to_what_products_can_hold() -> None:
    x = np.array([[1e6, 1.0, 3.0, -4e4]], np.float32)
    format = PairFormat(bits=8, group=4)
    np.testing.assert_array_equal(integers_of(pair_codes(x, format), format), [[2**15, 0, 0, -(2**15)]])


def test_victims_stand_beside_their_outliers_in_a_row() -> None:
    values = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 64)).astype(np.float32)
    values[0, 3], values[1, 4] = 1.0, -1.0
    codes, _ = pair_parts_of(encode(values, PairFormat(bits=4, group=64)))
    assert [*np.flatnonzero(codes[0] == 8)] == [2]
    assert [*np.flatnonzero(codes[1] == 8)] == [5]


@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([0, 1, 3]))
@settings(max_examples=40, deadline=None)
def test_palettes_keep_few_values_and_round_many_to_the_nearest(seed: int, bits: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    format = PaletteFormat(bits=bits, rows=rows)
    few = rng.choice(rng.standard_normal(1 << bits).astype(np.float16), (7, 40)).astype(np.float32)
    np.testing.assert_array_equal(decode(encode(few, format)), few)
    many = rng.standard_normal((7, 40)).astype(np.float32)
    packed = encode(many, format)
    assert packed.nbytes == format.nbytes(7, 40)
    stored, step = decode(packed), rows or 7
    for index, table in enumerate(packed.buffers["table"].astype(np.float32)):
        part = many[index * step : (index + 1) * step]
        nearest = np.abs(part[..., None] - table).min(axis=-1)
        np.testing.assert_allclose(np.abs(stored[index * step : (index + 1) * step] - part), nearest, atol=1e-6)
    np.testing.assert_array_equal(decode(packed, np.array([2, 5])), stored[[2, 5]])


def test_a_palette_is_better_than_an_even_grid() -> None:
    values = np.random.default_rng(0).standard_t(4, (64, 64)).astype(np.float32)
    table = palette(values, 16)
    assert np.all(np.diff(table) > 0)
    error = np.square(values[..., None] - table).min(axis=-1).mean()
    even = np.square(values[..., None] - np.linspace(values.min(), values.max(), 16)).min(axis=-1).mean()
    assert error < even / 4
    # Every value of the table is the mean of what it serves, as a fixed point of Lloyd's iteration.
    owner = np.abs(values.reshape(-1, 1) - table).argmin(axis=1)
    means = [values.reshape(-1)[owner == i].mean() for i in range(16)]
    np.testing.assert_allclose(table, means, atol=1e-5)


@given(st.integers(0, 2**31), st.sampled_from(["fp32", "fp16", "bf16"]), st.integers(1, 30), st.integers(17, 50))
@settings(max_examples=60, deadline=None)
def test_bitmasks_return_what_they_keep(seed: int, value: str, rows: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, cols)) < 0.3
    kept = int(mask.sum())
    format = BitmaskFormat(kept=kept, value=value)
    values = decode(encode(rng.standard_normal((rows, cols)).astype(np.float32), WeightFormat(kind=value))) * mask
    packed = encode(values, format)
    np.testing.assert_array_equal(decode(packed), values)
    assert (
        packed.nbytes
        == format.nbytes(rows, cols)
        == rows * ((cols + 7) // 8) + kept * (4 if value == "fp32" else 2) + 4 * (rows + 1)
    )
    for row in range(rows):
        start, end = packed.buffers["start"][row : row + 2]
        assert end - start == mask[row].sum()
    holed = values * (rng.random(values.shape) < 0.5)  # kept weights that are zero stay kept
    stored = Packed(format, values.shape, encode_bitmask_with(holed, format, mask))
    np.testing.assert_array_equal(mask_of(stored), mask)
    np.testing.assert_array_equal(decode(stored), holed)
    assert np.count_nonzero(mask_of(encode(holed, format))) == kept


def test_bad_input_is_told_in_a_sentence() -> None:
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    broken = values.copy()
    broken[2, 3] = np.nan
    for format in (GridFormat(grid="bitmod", bits=3, group=32), PairFormat(bits=4, group=64), PaletteFormat(bits=3)):
        with pytest.raises(SpecError, match="not finite"):
            encode(broken, format)
        with pytest.raises(SpecError, match="rounded twice"):
            transcode(encode(values, format), GridFormat(grid="int", bits=4, group=32))
    with pytest.raises(SpecError, match="not finite"):
        encode_grid_with(broken, GridFormat(bits=4, group=32), np.ones((4, 2), np.float32))
    with pytest.raises(SpecError, match="a scale is zero"):
        encode_grid_with(values, GridFormat(bits=4, group=32), np.zeros((4, 2), np.float32))
    with pytest.raises(SpecError, match="Try group=64"):
        encode(values, GridFormat(grid="fp", bits=4, group=48))
    with pytest.raises(SpecError, match="odd number"):
        encode(values[:, :63], PairFormat(bits=4, group=2))
    with pytest.raises(SpecError, match="OliVe pairs need 4 or 8 bits"):
        PairFormat(bits=3, group=2)
    with pytest.raises(SpecError, match="at most"):
        encode(values, BitmaskFormat(kept=256))
    with pytest.raises(SpecError, match="keeps"):
        encode(values, BitmaskFormat(kept=20))
    for bad in (
        lambda: PaletteFormat(bits=9),
        lambda: PaletteFormat(bits=4, rows=-1),
        lambda: PaletteFormat(bits=4, tiled=True),
        lambda: BitmaskFormat(kept=-1),
        lambda: BitmaskFormat(kept=3, value="int8"),
        lambda: BitmaskFormat(kept=3, tiled=True),
        lambda: GridFormat(grid="int", bits=4, group=0),
        lambda: GridFormat(grid="fp", bits=5, group=32),
    ):
        with pytest.raises(SpecError):
            bad()


def test_buffers_have_the_types_of_their_format() -> None:
    values = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    for format in (
        *(GridFormat(grid=n, bits=b, group=32, scale=s) for (n, b), s in itertools.product(kinds, SCALES)),
        PairFormat(bits=8, group=64),
        PaletteFormat(bits=3, rows=6),
    ):
        for form in (format, tiled_format(format, 64)) if not isinstance(format, PaletteFormat) else (format,):
            packed = encode(values, form)
            for buffer in form.buffers(20, 64):
                assert packed.buffers[buffer.name].dtype == NUMPY_DTYPES[buffer.dtype]
            assert transcode(packed, FP32).buffers["data"].shape == (20, 64)
