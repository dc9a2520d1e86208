"""The C++ kernels against their numpy definition and, for ggml blocks, against the gguf package."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError
from trimtab.runtime import kernels
from trimtab.runtime.kernels import IntRows, reference
from trimtab.spec.formats import GGUF_BLOCKS, WeightFormat

SHAPES = [
    (1, 8, 8),
    (5, 24, 8),
    (17, 64, 32),
    (33, 96, 24),
    (7, 35, 7),
    (3, 60, 12),
    (130, 576, 32),
    (9, 1040, 16),
    (2, 13, 13),
]


def int_rows(rng: np.random.Generator, rows: int, cols: int, bits: int, group: int, sym: bool) -> IntRows:
    codes = reference.pack_codes(rng.integers(0, 2**bits, (rows, cols), dtype=np.uint8), bits)
    groups = (rows, cols // group)
    scale = rng.uniform(0.5, 1.5, groups).astype(np.float16) / np.float16(2**bits)
    return IntRows(codes, scale, None if sym else rng.normal(0, 0.5, groups).astype(np.float16), bits, group)


def bf16_bits(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def close(found: np.ndarray, wanted: np.ndarray, terms: np.ndarray) -> None:
    """float32 sums: the error is bounded by the sum of magnitudes; a few ulps of it leave room for any order."""
    assert found.shape == wanted.shape
    np.testing.assert_array_less(np.abs(found - wanted), 8 * np.finfo(np.float32).eps * terms + 1e-30)


# ---------------------------------------------------------------------------------------------------- ggml blocks


@pytest.mark.parametrize("kind", kernels.BLOCK_KINDS)
def test_dequantize_is_bit_identical_to_gguf(isa: str, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(1)
    elements, nbytes = GGUF_BLOCKS[kind]
    blocks = rng.integers(0, 256, (1031, nbytes), dtype=np.uint8)  # random halves: infinities, NaN and subnormals too
    with np.errstate(all="ignore"):
        wanted = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()]).reshape(-1)
        plain = reference.dequantize_gguf(kind, blocks)
    out = np.empty(1031 * elements, np.float32)
    kernels.dequantize_gguf(kind, blocks.reshape(-1), out, threads=2)
    nan = np.isnan(wanted)
    assert 0 < nan.sum() < nan.size / 4
    for found in (out, plain):
        np.testing.assert_array_equal(np.isnan(found), nan)
        np.testing.assert_array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


def test_block_table_agrees_with_spec() -> None:
    assert set(kernels.BLOCK_KINDS) == set(GGUF_BLOCKS)
    with pytest.raises(SpecError, match="did you mean|q4_1"):
        kernels.dequantize_gguf("q4_2", np.zeros(18, np.uint8), np.zeros(32, np.float32))
    with pytest.raises(SpecError, match="18 bytes and 32 elements"):
        kernels.dequantize_gguf("q4_0", np.zeros(18, np.uint8), np.zeros(31, np.float32))


# -------------------------------------------------------------------------------------------------------- packing


@given(bits=st.integers(1, 8), rows=st.integers(0, 5), cols=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=120, deadline=None)
def test_packing_round_trips_and_is_little_endian(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols), dtype=np.uint8)
    packed = kernels.pack_codes(codes, bits)
    assert packed.nbytes == rows * -(-cols * bits // 8)
    np.testing.assert_array_equal(packed, reference.pack_codes(codes, bits))
    np.testing.assert_array_equal(kernels.unpack_codes(packed, bits, cols), codes)
    np.testing.assert_array_equal(reference.unpack_codes(packed, bits, cols), codes)


def test_bits_above_the_code_are_dropped() -> None:
    wide = np.arange(256, dtype=np.uint8).reshape(8, 32)
    for bits in range(1, 8):
        np.testing.assert_array_equal(kernels.pack_codes(wide, bits), kernels.pack_codes(wide % 2**bits, bits))


def test_packing_refuses_bad_arguments() -> None:
    codes = np.zeros((2, 8), np.uint8)
    with pytest.raises(SpecError, match=r"bits=9.*1\.\.8"):
        kernels.pack_codes(codes, 9)
    with pytest.raises(SpecError, match="uint8"):
        kernels.pack_codes(codes.astype(np.int32), 4)
    with pytest.raises(SpecError, match="4 bytes a row, not 8"):
        kernels.unpack_codes(codes, 4, 8)


# --------------------------------------------------------------------------------------- integer matrix times vector


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_int_gemv_equals_reference(isa: str, bits: int, sym: bool) -> None:
    rng = np.random.default_rng(bits)
    for rows, cols, group in SHAPES:
        w = int_rows(rng, rows, cols, bits, group, sym)
        for tokens in (1, 2, 3, 4, 6):
            x = rng.standard_normal((tokens, cols)).astype(np.float32)
            y, nbytes = kernels.int_gemv(x, w, threads=2)
            wanted, wanted_bytes = reference.int_gemv(x, w)
            # codes and offsets are summed apart, so the bound is over their magnitudes, not over |w|
            close(y, wanted, np.abs(x).astype(np.float64) @ (np.abs(reference.decode(w)) + 3.0).T)
            assert nbytes == wanted_bytes

            ones = np.ones((tokens, rows), np.float32)
            y, nbytes = kernels.int_gemv_t(ones, w, threads=2)
            close(y, ones @ reference.decode(w), ones @ (np.abs(reference.decode(w)) + 3.0))
            assert nbytes == wanted_bytes


@pytest.mark.parametrize("group", [8, 32, 20])
def test_int_gemv_t_equals_reference(isa: str, group: int) -> None:
    rng = np.random.default_rng(group)
    for tokens in (1, 2, 3, 4, 5):
        w_t = int_rows(rng, 96, 480, 4, group, sym=False)
        x = rng.standard_normal((tokens, 96)).astype(np.float32)
        y, nbytes = kernels.int_gemv_t(x, w_t)
        wanted, wanted_bytes = reference.int_gemv_t(x, w_t)
        close(y, wanted, np.abs(x).astype(np.float64) @ (np.abs(reference.decode(w_t)) + 3.0))
        assert nbytes == wanted_bytes


@pytest.mark.parametrize("op", [kernels.int_gemv, kernels.int_gemv_t])
def test_results_and_bytes_do_not_depend_on_threads(op) -> None:
    rng = np.random.default_rng(5)
    w = int_rows(rng, 704, 704, 5, 704, sym=False)  # one group a row: it spans the ranges of all workers
    x = rng.standard_normal((2, 704)).astype(np.float32)
    one, bytes_one = op(x, w, threads=1)
    for threads in (2, 3, 4):
        many, bytes_many = op(x, w, threads=threads)
        np.testing.assert_array_equal(one, many)
        assert bytes_one == bytes_many == WeightFormat(kind="int", bits=5, group=704, sym=False).nbytes(704, 704)


def test_gemv_refuses_shapes_that_disagree() -> None:
    w = int_rows(np.random.default_rng(0), 4, 32, 4, 8, sym=True)
    x = np.zeros((1, 32), np.float32)
    with pytest.raises(SpecError, match="31 columns"):
        kernels.int_gemv(np.zeros((1, 31), np.float32), w)
    with pytest.raises(SpecError, match="32 columns, W.T has 4 rows"):
        kernels.int_gemv_t(x, w)
    with pytest.raises(SpecError, match="non-contiguous"):
        kernels.int_gemv(np.zeros((32, 2), np.float32).T, w)
    with pytest.raises(SpecError, match="no matrix of 5-bit codes"):
        kernels.int_gemv(x, w._replace(bits=5))
    with pytest.raises(SpecError, match="differ in shape"):
        kernels.int_gemv(x, w._replace(minimum=np.zeros((4, 3), np.float16)))


# ---------------------------------------------------------------------------------------------- row-skipping FFN


def ffn_weights(rng: np.random.Generator, form: str, neurons: int, hidden: int) -> list:
    if form == "int":
        return [int_rows(rng, neurons, hidden, 4, 8, sym) for sym in (True, False, True)]
    dense = [rng.normal(0, hidden**-0.5, (neurons, hidden)).astype(np.float32) for _ in range(3)]
    return dense if form == "f32" else [bf16_bits(d) for d in dense]


@pytest.mark.parametrize("form", ["f32", "bf16", "int"])
@pytest.mark.parametrize("act", kernels.ACTS)
@pytest.mark.parametrize("threshold", [-1.0, 1e-3, 0.12, 1e9], ids=["all", "most", "some", "none"])
def test_gate_first_equals_threshold_then_dense(isa: str, form: str, act: str, threshold: float) -> None:
    rng = np.random.default_rng(7)
    for neurons, hidden in ((1, 8), (37, 40), (160, 136)):
        weights = ffn_weights(rng, form, neurons, hidden)
        for tokens in (1, 2, 3, 4, 5):
            x = rng.standard_normal((tokens, hidden)).astype(np.float32)
            found = kernels.gate_first(x, *weights, threshold=threshold, act=act, threads=2)
            wanted = reference.gate_first(x, *weights, threshold=threshold, act=act)
            np.testing.assert_array_equal(found.active, wanted.active)
            assert found.rows_touched == wanted.rows_touched
            assert found.bytes_read == wanted.bytes_read
            # three chained float32 products of `hidden` and `neurons` terms
            np.testing.assert_allclose(found.y, wanted.y, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(wanted.y).max()))
            if threshold == 1e9:
                assert found.rows_touched == 0 and not found.y.any() and found.bytes_read[1:] == (0, 0)
            if threshold == -1.0:
                assert found.rows_touched == neurons and (found.active == neurons).all()


@pytest.mark.parametrize("form", ["f32", "bf16", "int"])
def test_inactive_rows_are_never_read(isa: str, form: str) -> None:
    rng = np.random.default_rng(11)
    gate, up, down_t = ffn_weights(rng, form, 96, 72)
    x = rng.standard_normal((3, 72)).astype(np.float32)
    clean = kernels.gate_first(x, gate, up, down_t, threshold=0.3)
    g = reference.activate("silu", x.astype(np.float64) @ reference.decode(gate).T)
    idle = ~(np.abs(g) > 0.3).any(axis=0)
    assert 0 < idle.sum() < 96

    def poisoned(w, rows):
        if isinstance(w, IntRows):
            scale = w.scale.copy()
            scale[rows] = np.nan
            return w._replace(scale=scale)
        w = w.copy()
        w[rows] = np.nan if w.dtype == np.float32 else 0x7FC0
        return w

    again = kernels.gate_first(x, gate, poisoned(up, idle), poisoned(down_t, idle), threshold=0.3, threads=2)
    np.testing.assert_array_equal(again.y, clean.y)
    # and the poison is live: in an active row it reaches exactly the tokens for which the row is active
    row = int(np.flatnonzero((np.abs(g) > 0.3).sum(axis=0) == 1)[0])
    struck = kernels.gate_first(x, gate, up, poisoned(down_t, [row]), threshold=0.3)
    np.testing.assert_array_equal(np.isnan(struck.y).all(axis=1), np.abs(g[:, row]) > 0.3)
    np.testing.assert_array_equal(np.isnan(struck.y).any(axis=1), np.abs(g[:, row]) > 0.3)


def test_nan_activations_stay_visible() -> None:
    weights = ffn_weights(np.random.default_rng(3), "f32", 16, 8)
    x = np.full((1, 8), np.nan, np.float32)
    assert np.isnan(kernels.gate_first(x, *weights, threshold=0.5).y).all()


def test_gate_first_does_not_depend_on_threads() -> None:
    rng = np.random.default_rng(13)
    weights = ffn_weights(rng, "f32", 512, 320)
    x = rng.standard_normal((2, 320)).astype(np.float32)
    one = kernels.gate_first(x, *weights, threshold=0.2, threads=1)
    four = kernels.gate_first(x, *weights, threshold=0.2, threads=4)
    np.testing.assert_array_equal(one.y, four.y)
    assert one.bytes_read == four.bytes_read


def test_gate_first_refuses_bad_arguments() -> None:
    gate, up, down_t = ffn_weights(np.random.default_rng(0), "f32", 6, 8)
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(SpecError, match="silu"):
        kernels.gate_first(x, gate, up, down_t, threshold=0.1, act="swish")
    with pytest.raises(SpecError, match="one shape"):
        kernels.gate_first(x, gate, up, np.ascontiguousarray(down_t.T), threshold=0.1)
    with pytest.raises(SpecError, match="float64"):
        kernels.gate_first(x, gate, up, down_t.astype(np.float64), threshold=0.1)


# ---------------------------------------------------------------------------------------------------------- process


def test_a_forked_child_can_use_threads() -> None:
    """The workers of the parent do not exist in a forked child; it must start its own instead of waiting for them."""
    code = """
import os, signal, numpy as np
from trimtab.runtime import kernels
w = kernels.IntRows(np.full((1024, 512), 0x77, np.uint8), np.ones((1024, 32), np.float16), None, 4, 32)
x = np.ones((1, 1024), np.float32)
wanted = kernels.int_gemv(x, w, threads=2)[0]
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    os._exit(0 if (kernels.int_gemv(x, w, threads=2)[0] == wanted).all() else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=60, check=False)
    assert done.returncode == 0
