"""Codecs: round-trip bounds, idempotence, exact buffers, packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.runtime.numerics import bfloat16_bits, bfloat16_to_float32, decode, encode, matrix, transcode
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import FP32, GGUF_BLOCKS, WeightFormat

floats = st.sampled_from(["fp32", "fp16", "bf16"]).map(lambda kind: WeightFormat(kind=kind))
grids = st.builds(
    lambda bits, group, sym: WeightFormat(kind="int", bits=bits, group=group, sym=sym),
    st.integers(2, 8),
    st.sampled_from([1, 4, 8, 32, 5]),
    st.booleans(),
)


@st.composite
def matrices(draw: st.DrawFn, group: int = 1) -> np.ndarray:
    rows, groups, seed = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1e-2, 1.0, 30.0]))
    heavy = draw(st.booleans())
    rng = np.random.default_rng(seed)
    shape = (rows, groups * group)
    return (scale * (rng.standard_t(3, shape) if heavy else rng.standard_normal(shape))).astype(np.float32)


@given(st.data(), floats | grids)
@settings(max_examples=150, deadline=None)
def test_buffers_are_exactly_those_of_the_format(data: st.DataObject, format: WeightFormat) -> None:
    values = data.draw(matrices(max(format.group, 1)))
    packed = encode(values, format)
    wanted = format.buffers(*values.shape)
    assert [*packed.buffers] == [buffer.name for buffer in wanted]
    for buffer in wanted:
        array = packed.buffers[buffer.name]
        assert (array.shape, array.dtype, array.nbytes) == (buffer.shape, NUMPY_DTYPES[buffer.dtype], buffer.nbytes)
    assert packed.nbytes == format.nbytes(*values.shape)


@given(st.data(), floats)
@settings(max_examples=60, deadline=None)
def test_floats_round_to_nearest(data: st.DataObject, format: WeightFormat) -> None:
    values = data.draw(matrices(4))
    relative = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}[format.kind]
    # 2**-25: half the smallest subnormal of fp16.
    assert np.all(
        np.abs(decode(encode(values, format)) - values) <= relative * np.abs(values) + 2**-25 * (relative > 0)
    )


@given(st.data(), grids)
@settings(max_examples=200, deadline=None)
def test_grid_error_is_at_most_half_a_step(data: st.DataObject, format: WeightFormat) -> None:
    values = data.draw(matrices(format.group))
    error = np.abs(decode(encode(values, format)) - values).reshape(len(values), -1, format.group)
    groups = values.reshape(error.shape)
    top = np.abs(groups).max(axis=2, keepdims=True)
    levels = 2**format.bits
    if format.sym:
        # Half a step; the side away from the largest element ends one step early, so its far end may miss by one step.
        step = top / (levels / 2)
        signed = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[..., None], axis=2)
        bound = np.where(
            np.sign(groups) == np.sign(signed), step / 2, np.maximum(step / 2, np.abs(groups) - step * (levels / 2 - 1))
        )
    else:
        step = (groups.max(axis=2, keepdims=True) - groups.min(axis=2, keepdims=True)) / (levels - 1)
        bound = step / 2 * np.ones_like(groups)
    # fp16 scale and minimum: a relative 2**-11 each of what they express, and their subnormal floor times the code.
    assert np.all(error <= bound * 1.001 + 2 * top * 2**-11 + levels * 2**-25)


@given(st.data(), floats | grids)
@settings(max_examples=200, deadline=None)
def test_encoding_what_was_decoded_changes_nothing(data: st.DataObject, format: WeightFormat) -> None:
    values = data.draw(matrices(max(format.group, 1)))
    once = decode(encode(values, format))
    twice = decode(encode(once, format))
    if format.kind == "int" and not format.sym:
        # The minimum need not be a multiple of the step, so the top of the range is re-rounded: at most one fp16 unit of the scale.
        top = (
            np.abs(once)
            .reshape(len(once), -1, format.group)
            .max(axis=2)
            .repeat(format.group, axis=1)
            .reshape(once.shape)
        )
        np.testing.assert_allclose(twice, once, rtol=0, atol=float(np.max(top)) * 2**-9 + 1e-6)
    else:
        np.testing.assert_array_equal(twice, once)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_bfloat16_equals_torch(seed: int) -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(seed).integers(0, 2**32, 4096, dtype=np.uint32)
    values = bits.view(np.float32)
    ours = bfloat16_bits(values)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(bfloat16_to_float32(ours[nan])).all()
    np.testing.assert_array_equal(bfloat16_bits(bfloat16_to_float32(ours)), ours)


@given(st.data(), grids)
@settings(max_examples=40, deadline=None)
def test_rows_alone_equal_rows_of_the_whole(data: st.DataObject, format: WeightFormat) -> None:
    packed = encode(data.draw(matrices(format.group)), format)
    whole = decode(packed)
    picked = np.array([0, packed.shape[0] - 1, 0])
    np.testing.assert_array_equal(decode(packed, picked), whole[picked])
    out = np.full_like(whole, np.nan)
    assert decode(packed, out=out) is out
    np.testing.assert_array_equal(out, whole)


def test_transposed_layout_groups_along_the_output() -> None:
    values = (
        np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
    )  # W [n=64, k=12]: 32 divides n, not k
    packed = transcode(encode(values, FP32), WeightFormat(kind="int", bits=8, group=32), "transposed")
    assert packed.shape == (12, 64)
    assert packed.buffers["scale"].shape == (12, 2)
    np.testing.assert_allclose(matrix(packed), values, atol=float(np.abs(values).max()) / 128)


@pytest.mark.parametrize(
    ("source", "format", "layout", "says"),
    [
        ("int", WeightFormat(kind="int", bits=3, group=4), "row", "rounded twice"),
        ("int", WeightFormat(kind="int", bits=4, group=4), "transposed", "other axis"),
        ("fp32", WeightFormat(kind="q4_0"), "row", "read, not written"),
        ("fp32", WeightFormat(kind="int", bits=4, group=7), "row", "does not divide"),
        ("q8_0", WeightFormat(kind="q8_0"), "transposed", "run along a row"),
    ],
)
def test_refused_transcodings_say_why(source: str, format: WeightFormat, layout: str, says: str) -> None:
    if source == "q8_0":
        packed = Packed(WeightFormat(kind="q8_0"), (2, 32), {"blocks": np.zeros((2, 34), np.uint8)})
    else:
        made = WeightFormat(kind="int", bits=4, group=4) if source == "int" else FP32
        packed = encode(np.ones((32, 32), np.float32), made)
    with pytest.raises(SpecError, match=says):
        transcode(packed, format, layout)


@pytest.mark.parametrize("kind", sorted(GGUF_BLOCKS))
def test_blocks_of_files_become_a_grid(kind: str) -> None:
    elements, nbytes = GGUF_BLOCKS[kind]
    packed = Packed(WeightFormat(kind=kind), (3, elements), {"blocks": np.full((3, nbytes), 17, np.uint8)})
    grid = transcode(packed, WeightFormat(kind="int", bits=8, group=32))
    np.testing.assert_allclose(decode(grid), decode(packed), atol=float(np.abs(decode(packed)).max()) / 100)
