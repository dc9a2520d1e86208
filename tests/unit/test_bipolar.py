"""Bipolar codes: the grid, planes of bits, products of planes against int64 on every instruction set, and the technique."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.model.grid_rule import GridRule
from trimtab.model.linear import Linear
from trimtab.model.sweep import factor, sweep
from trimtab.runtime.native import bitserial, lower
from trimtab.runtime.native.bitserial import Written, code, integers, kernel_of, metered, multiply, odd, reference
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.numerics.bipolar import grid_of, pack_planes, planes_of, unpack_planes
from trimtab.runtime.numerics.grids import encode_grid_with, grid_scales
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.bipolar import BipolarPlanes
from trimtab.spec.formats import FP32
from trimtab.spec.grids import GridFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import CLIPPED, BitSerial
from trimtab.techniques.apply import applied, reencode
from trimtab.techniques.base import compose
from trimtab.techniques.linear.bipolar import SHARES
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all, parse_technique

KERNELS = ("cpu-popcnt", "cpu-vnni")
#: Columns: below a word, a word and a bit, a block and two words, blocks and words and bits.
COLS = (31, 33, 97, 576, 1100)


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def codes(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)


# --------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_are_the_odd_integers_and_round_to_themselves(bits: int) -> None:
    most = 2**bits - 1
    every = np.arange(2**bits, dtype=np.uint8)
    assert odd(every, bits).tolist() == list(range(-most, most + 1, 2))
    w = np.tile(odd(every, bits).astype(np.float32), (3, 1)) * 0.5
    packed = encode(w, BipolarPlanes(bits=bits, group=w.shape[1]))
    np.testing.assert_array_equal(unpack_planes(packed.buffers["planes"], bits, w.shape[1], w.shape[1]), [every] * 3)
    np.testing.assert_array_equal(decode(packed), w)
    found, scale = code(w, BitSerial(abits=bits))
    np.testing.assert_array_equal(found, [every] * 3)
    assert scale.tolist() == [0.5] * 3


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_planes_hold_the_codes(isa: str, bits: int, cols: int) -> None:
    """Bit c of word w of plane i of a block is bit i of the code of column 32 w + c, and nothing stands behind the row."""
    made = codes(bits, 5, cols)
    planes = pack_planes(made, bits, cols)
    words = -(-cols // 32)
    assert planes.shape == (5, 4 * bits * words)
    np.testing.assert_array_equal(unpack_planes(planes, bits, cols, cols), made)
    padded = np.zeros((5, 32 * words), np.uint8)
    padded[:, :cols] = made
    at = 0
    for first in range(0, words, 16):
        width = min(16, words - first)
        for plane in range(bits):
            part = planes[:, at : at + 4 * width]
            wanted = (padded[:, 32 * first : 32 * (first + width)] >> plane) & 1
            np.testing.assert_array_equal(np.unpackbits(part, axis=1, bitorder="little"), wanted)
            at += 4 * width


@pytest.mark.parametrize("group", [32, 96, 576])
def test_planes_are_the_grid_in_another_order(group: int) -> None:
    format = BipolarPlanes(bits=3, group=group)
    packed = encode(values(7, 576), format)
    rows = encode(values(7, 576), format.grid)
    np.testing.assert_array_equal(decode(packed), decode(rows))
    assert packed.nbytes == format.nbytes(7, 576) == rows.nbytes  # whole words: nothing is padded
    for name, buffer in grid_of(planes_of(rows, format)).buffers.items():
        np.testing.assert_array_equal(buffer, rows.buffers[name])


def test_formats_are_refused_with_a_sentence() -> None:
    with pytest.raises(SpecError, match=r"64, 96, 192, 288"):
        BipolarPlanes(bits=2, group=128).buffers(4, 576)
    for bits, group, tiled in ((0, 32, False), (9, 32, False), (2, 0, False), (2, 32, True)):
        with pytest.raises(SpecError, match=r"llowed|no tiled layout"):
            BipolarPlanes(bits=bits, group=group, tiled=tiled)


@pytest.mark.parametrize("ascale", ["absmax", "percentile"])
@pytest.mark.parametrize("cols", [31, 576])
def test_tokens_are_coded_as_defined(isa: str, ascale: str, cols: int) -> None:
    x = values(6, cols) * np.array([[1], [1e-20], [1e20], [0], [3], [7]], np.float32)
    for abits in (1, 2, 5, 8):
        most = np.float32(2**abits - 1)
        found, scale = code(x, BitSerial(abits=abits, ascale=ascale))
        cut = int(CLIPPED[abits - 1] * cols) if ascale == "percentile" else 0
        largest = np.sort(np.abs(x), axis=1)[:, cols - 1 - cut]
        np.testing.assert_array_equal(scale, largest / most)
        inverse = np.divide(np.float32(0.5), scale, out=np.zeros_like(scale), where=scale > 0)
        wanted = np.rint(np.clip(x * inverse[:, None] + np.float32(0.5) * most, 0, most))
        np.testing.assert_array_equal(found, wanted)


# ------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("kernel", KERNELS)
def test_integers_are_exact_for_all_bits(isa: str, kernel: str) -> None:
    rng = np.random.default_rng(len(isa))
    for bits in range(1, 9):
        for abits in range(1, 9):
            rows, tokens, cols = int(rng.integers(1, 40)), int(rng.integers(1, 7)), int(rng.integers(1, 1400))
            w, x = codes(bits, rows, cols, seed=bits), codes(abits, tokens, cols, seed=abits + 9)
            found = integers(pack_planes(w, bits, cols), bits, pack_planes(x, abits, cols), abits, cols, kernel)
            np.testing.assert_array_equal(
                found, odd(x, abits) @ odd(w, bits).T, f"{bits} {abits} {rows} {tokens} {cols}"
            )


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("group", [0, 32, 64, 96])
def test_products_equal_the_reference(isa: str, group: int, tokens: int) -> None:
    """One scale a row: the same floats. Several: sums of at most 18 floats in another order, so rounding of float32."""
    for bits, abits, rows in ((1, 1, 21), (2, 3, 16), (4, 4, 37), (8, 8, 5)):
        packed = encode(values(rows, 576, seed=bits), BipolarPlanes(bits=bits, group=group or 576))
        x = values(tokens, 576, seed=tokens)
        wanted = reference(packed, BitSerial(abits=abits), x)
        for kernel in KERNELS:
            product = BitSerial(abits=abits, backend=kernel)
            found = multiply(packed, product, x)
            if not group:
                np.testing.assert_array_equal(found, wanted)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * float(np.abs(wanted).max()))
            np.testing.assert_array_equal(multiply(packed, product, x, threads=3), found)


def test_rows_that_are_no_whole_words(isa: str) -> None:
    for cols in COLS:
        packed = encode(values(19, cols), BipolarPlanes(bits=2, group=cols))
        x = values(3, cols, seed=1)
        wanted = reference(packed, BitSerial(abits=3), x)
        for kernel in KERNELS:
            np.testing.assert_array_equal(multiply(packed, BitSerial(abits=3, backend=kernel), x), wanted)


def test_sums_beyond_32_bits(isa: str) -> None:
    """255 * 255 * 20000 doubled is more than an int32 holds; a lane holds 32 columns of up to 1024 blocks."""
    for cols in (20000, 16512):
        w, x = np.full((3, cols), 255, np.uint8), np.full((2, cols), 255, np.uint8)
        x[1] = 0
        wanted = np.array([[255 * 255 * cols] * 3, [-255 * 255 * cols] * 3])
        planes = pack_planes(w, 8, cols)
        packed = Packed(
            BipolarPlanes(bits=8, group=cols), (3, cols), {"planes": planes, "scale": np.ones((3, 1), np.float16)}
        )
        for kernel in KERNELS:
            np.testing.assert_array_equal(integers(planes, 8, pack_planes(x, 8, cols), 8, cols, kernel), wanted)
            found = multiply(packed, BitSerial(abits=8, backend=kernel), np.where(x == 0, -255, 255).astype(np.float32))
            np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.mark.parametrize(("bits", "abits"), [(1, 1), (1, 2), (3, 4)])
def test_recovery_in_registers_writes_less_by_the_pairs_of_planes(isa: str, bits: int, abits: int) -> None:
    packed, x = encode(values(37, 200), BipolarPlanes(bits=bits, group=200)), values(5, 200, seed=1)
    product = BitSerial(abits=abits, backend="cpu-popcnt")
    fused, written = metered(packed, product, x)
    parts, apart = metered(packed, product, x, fused=False)
    np.testing.assert_array_equal(fused, parts)
    assert written == Written(4 * 5 * 37, 0) and apart == Written(4 * 5 * 37 * bits * abits, 4 * 5 * 37)


def test_parts_need_one_scale_a_row() -> None:
    packed = encode(values(4, 64), BipolarPlanes(bits=2, group=32))
    with pytest.raises(SpecError, match="one scale a row"):
        metered(packed, BitSerial(abits=2), values(1, 64), fused=False)


def test_inputs_need_not_be_contiguous_and_broken_ones_are_seen(isa: str) -> None:
    packed = encode(values(8, 96), BipolarPlanes(bits=4, group=32))
    x = values(96, 10, seed=1).T
    for kernel in KERNELS:
        product = BitSerial(abits=4, backend=kernel)
        np.testing.assert_array_equal(
            multiply(packed, product, x[::2]), multiply(packed, product, x.copy()[::2].copy())
        )
        bad = x.copy()
        bad[3, 50] = np.nan
        found = multiply(packed, product, bad)
        assert np.isnan(found[3]).all() and np.isfinite(np.delete(found, 3, 0)).all()
    with pytest.raises(SpecError, match="96 columns"):
        multiply(packed, BitSerial(abits=4), values(1, 95))


def test_auto_times_both_kernels_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    bitserial._bytes_from.cache_clear()
    asked = []

    def timed(format: Any, abits: int, rows: int, cols: int) -> dict[int, dict[str, float]]:
        asked.append((str(format), abits, rows, cols))
        return {n: {"cpu-popcnt": 1.0 * n, "cpu-vnni": 20.0} for n in (1, 4, 16, 32, 64)}

    monkeypatch.setattr(bitserial, "time_kernels", timed)
    packed = encode(values(8, 64), BipolarPlanes(bits=2, group=64))
    product = BitSerial(abits=2)
    assert [kernel_of(packed, product, n) for n in (1, 31, 32, 100)] == ["cpu-popcnt"] * 2 + ["cpu-vnni"] * 2
    bitserial._bytes_from.cache_clear()
    assert kernel_of(packed, product, 40) == "cpu-vnni"
    assert asked == [("bipolar2-g64-planes", 2, 8, 64)]  # the second time from the file
    assert list(json.loads((tmp_path / "bitserial-kernels.json").read_text()).values()) == [32]
    assert kernel_of(packed, BitSerial(abits=2, backend="cpu-vnni"), 1) == "cpu-vnni"
    bitserial._bytes_from.cache_clear()


def test_both_kernels_are_timed_at_every_number_of_tokens() -> None:
    found = bitserial.time_kernels(BipolarPlanes(bits=1, group=64), 1, 16, 64)
    assert all(0 < seconds < 60 for times in found.values() for seconds in times.values())
    assert set(found) == {1, 4, 16, 32, 64, 128}


# ----------------------------------------------------------------------------------------------------- technique


def _mse(w: np.ndarray, format: GridFormat, shares: tuple[float, ...]) -> float:
    packed = Packed(format, w.shape, encode_grid_with(w, format, *grid_scales(w, format, None, shares)))
    return float(((decode(packed) - w) ** 2).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_on_gaussian_weights_are_below_those_of_symmetric_integers(bits: int) -> None:
    w = values(128, 512)
    for shares in ((1.0,), SHARES):
        ours, theirs = (_mse(w, GridFormat(grid=grid, bits=bits, group=64), shares) for grid in ("bipolar", "int"))
        assert ours < 0.9 * theirs


def test_scales_of_least_error_are_searched_from_the_range_down(tiny_model: Any) -> None:
    spec = compose(tiny_model.spec, parse_all(["bipolar:wbits=2,abits=16,group=32"]))
    technique = parse_technique("bipolar:wbits=2,abits=16,group=32")
    found = technique.convert(tiny_model.weights, tiny_model.spec, spec, Materials())
    ranged = reencode(tiny_model.weights, spec)
    path = "layers.0.mlp.up_proj"
    w = decode(tiny_model.weights[path])
    errors = [((decode(weights[path]) - w) ** 2).sum() for weights in (found, ranged)]
    assert errors[0] < 0.8 * errors[1]
    ratio = found[path].buffers["scale"].astype(np.float32) / ranged[path].buffers["scale"].astype(np.float32)
    assert 0.39 < ratio.min() < ratio.max() <= 1.001


def test_the_sweep_makes_up_for_the_missing_zero() -> None:
    """Columns that are nearly copies of each other: an error in one can be undone in its neighbour."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(
        rng.standard_normal((400, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((400, 64))
    )
    h = x.T @ x / len(x)
    w = torch.from_numpy(values(32, 64))
    format = GridFormat(grid="bipolar", bits=2, group=32)
    how = factor(h)
    rule = GridRule(format, (32, 64), how.order, SHARES)
    done, _ = sweep(w, how, rule)
    packed = Packed(format, (32, 64), rule.buffers())
    np.testing.assert_allclose(done.numpy(), decode(packed), rtol=1e-6)
    plain = Packed(format, (32, 64), encode_grid_with(w.numpy(), format, *grid_scales(w.numpy(), format, None, SHARES)))

    def loss(found: Packed) -> float:
        error = torch.from_numpy(decode(found)).double() - w
        return float((error @ h * error).sum())

    assert loss(packed) < 0.5 * loss(plain)


@pytest.mark.filterwarnings("ignore:bipolar. the calibration text")
def test_gptq_calibrates_block_by_block(tiny_model: Any, tiny_materials: Any) -> None:
    words = " ".join(str(t) for t in np.random.default_rng(2).integers(0, 131, 4096))
    materials = dataclasses.replace(tiny_materials, texts={"random": words})
    path = "layers.1.mlp.down_proj"
    w = decode(tiny_model.weights[path])
    with applied(tiny_model, "bipolar:wbits=2,abits=4,group=32,wscale=gptq", materials=materials) as model:
        packed = model.weights[path]
        assert packed.format == BipolarPlanes(bits=2, group=32)
        plain = encode(w, packed.format)
        assert (packed.buffers["planes"] != plain.buffers["planes"]).any()
        assert torch.isfinite(model.logits([[1, 2, 3]])[0]).all()


@pytest.mark.parametrize("backend", [*KERNELS, "auto"])
def test_a_layer_multiplies_codes_and_adds_its_bias(backend: str) -> None:
    format = BipolarPlanes(bits=3, group=64)
    node = LinearSpec(
        n=24, k=64, bias=True, format=format, bias_format=FP32, product=BitSerial(abits=4, backend=backend)
    )
    w, bias = encode(values(24, 64), format), values(24, seed=3)
    linear = Linear("x", node, Weights({"x": w, "x.bias": encode(bias, FP32)}))
    x = torch.from_numpy(values(64, 5, seed=2)).T
    y = linear(x, Step.of([5], [0]))
    wanted = reference(w, BitSerial(abits=4), x.numpy()) + bias
    np.testing.assert_array_equal(y.numpy(), wanted)
    # The product is close to that of the values: 4 bits of a token are off by at most a 15th of its largest.
    plain = x.numpy() @ decode(w).T + bias
    assert np.abs(y.numpy() - plain).max() < np.abs(x.numpy()).max() / 15 * np.abs(decode(w)).sum(1).max()
    with pytest.raises(SpecError, match="planes"):
        Linear("x", node, Weights({"x": encode(values(24, 64), format.grid), "x.bias": encode(bias, FP32)}))


def test_bad_input_is_told() -> None:
    from trimtab.spec.configs import spec_from_config

    spec = spec_from_config(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        },
        "tiny",
    )  # fmt: skip
    for asked, told in (
        ("bipolar:wbits=0", "out of range"),
        ("bipolar:wbits=9", "out of range"),
        ("bipolar:abits=16,backend=cpu-popcnt", "activations must be quantized"),
        ("bipolar:group=128", "64, 96, 192, 288"),
        ("bipolar:backend=triton", "GPU"),
        ("bipolar:wbits=4+rtn:bits=4", "rounded|different values|both|already quantized"),
    ):
        with pytest.raises(SpecError, match=told):
            compose(spec, parse_all(asked.split("+")))


def test_coded_inputs_have_no_native_kernel(tiny_model: Any) -> None:
    spec = compose(tiny_model.spec, parse_all(["bipolar:wbits=2,abits=2"]))
    with pytest.raises(UnsupportedModelError, match="BitSerial"):
        lower(spec, reencode(tiny_model.weights, spec), 1)


def test_coded_inputs_cost_no_decoding(tiny_model: Any) -> None:
    from trimtab.graph.count import _coding, _decoding

    node = dict(compose(tiny_model.spec, parse_all(["bipolar:wbits=2,abits=2"])).linears())["layers.0.mlp.up_proj"]
    assert _decoding(node) == 0 and _coding(node, 3) > 0
