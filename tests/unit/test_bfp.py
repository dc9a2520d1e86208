"""Block floating point against exact fractions, its storage and its integer products; the technique's edits and key order."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, SpecError, UnsupportedModelError
from trimtab.model.rope import Rotary, rotate, rotate_ordered
from trimtab.model.variant import Model, Variant
from trimtab.papers.bfp_ksort import with_outliers
from trimtab.runtime.native.lower import lowered_spec
from trimtab.runtime.numerics import decode, encode, matrix
from trimtab.runtime.numerics.bfp import (
    BlockFloat,
    bfp_dot,
    decode_bfp,
    encode_bfp,
    pack_bfp,
    parse_shorthand,
    unpack_bfp,
)
from trimtab.runtime.step import Step
from trimtab.runtime.weights.load import open_model
from trimtab.runtime.weights.packed import Weights, packed_float
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.configs import load_spec, spec_from_config
from trimtab.spec.formats import BF16, FP16, FP32, WeightFormat
from trimtab.spec.leaves import RopeSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.cache._key_order import with_rows
from trimtab.techniques.cache.bfp import Bfp
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_technique

LEAST, LARGEST = np.float32(2.0**-149), np.finfo(np.float32).max
FORMATS = [
    BlockFloat(bits=bits, block=block, exp=exp, symmetric=symmetric)
    for bits, block, exp, symmetric in [
        (4, 32, 8, True), (8, 16, 8, True), (16, 8, 8, True), (2, 4, 8, True), (3, 8, 8, True), (4, 8, 4, True),
        (6, 16, 5, True), (4, 32, 8, False), (2, 8, 8, False), (8, 16, 4, False), (16, 8, 8, False), (5, 1, 8, True),
    ]
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------ the definition


def log2_floor(value: Fraction) -> int:
    """By comparison with powers of two alone."""
    found = value.numerator.bit_length() - value.denominator.bit_length()
    return found - (value < Fraction(2) ** found)


def exact_block(block: list[Fraction], form: BlockFloat) -> tuple[list[int], int]:
    """Codes and exponent field by the text of the paper, in integers."""
    bias = 2 ** (form.exp - 1) - 1
    peak = max(abs(x) for x in block)
    exponent = -bias if peak == 0 else min(max(log2_floor(peak), -bias), 2**form.exp - 1 - bias)
    step = Fraction(2) ** (exponent - (form.bits - 2))
    top = 2 ** (form.bits - 1) - 1
    codes = []
    for x in block:
        code = max(-top, min(top, round(x / step)))  # round: ties to even
        below = -top - 1
        if not form.symmetric and exponent < 127 and abs(below * step - x) <= abs(code * step - x):
            code = below
        codes.append(code)
    return codes, exponent + bias


def blocks_of(form: BlockFloat, count: int) -> np.ndarray:
    """Random blocks over the whole range of float32, and the awkward ones."""
    rng = np.random.default_rng([form.bits, form.block, form.exp])
    n = form.block
    plain = rng.standard_normal((count, n)) * 2.0 ** rng.integers(-8, 9, (count, 1))
    wide = np.ldexp(rng.uniform(-2, 2, (count, n)), rng.integers(-150, 127, (count, n)))
    powers = np.ldexp(rng.choice([-1.0, 1.0], (count, n)), rng.integers(-149, 128, (count, 1)))
    step = 2.0 ** rng.integers(-12, 13, (count, 1))
    ties = (rng.integers(-form.top - 1, form.top + 1, (count, n)) + 0.5) * step
    edge = (
        (form.top + rng.choice([-0.5, -0.25, 0, 0.25, 0.5, 0.75], (count, n))) * rng.choice([-1, 1], (count, n)) * step
    )
    small = np.ldexp(rng.integers(-(2**23), 2**23, (count, n)).astype(np.float64), -149)
    sparse = np.where(rng.random((count, n)) < 0.2, plain, 0.0)
    found = np.concatenate([plain, wide, powers, ties, edge, small, sparse]).astype(np.float32)
    awkward = np.zeros((9, n), np.float32)
    for row, value in enumerate((0.0, -0.0, LEAST, -LEAST, LARGEST, -LARGEST, 2.0**-126, -(2.0**-127), 2.0**127)):
        awkward[row, 0] = value
    return np.concatenate([found, awkward, np.full((1, n), -LARGEST, np.float32)])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_exponents_equal_exact_fractions(form: BlockFloat) -> None:
    """About 10^4 blocks over all formats; equality, no tolerance."""
    values = blocks_of(form, 130)
    codes, fields = encode_bfp(values, form)
    back = decode_bfp(codes, fields, form)
    assert (codes.dtype, fields.dtype, back.dtype) == (np.int16, np.uint8, np.float32)
    assert fields.shape == (len(values), 1)
    for row, block in enumerate(values.tolist()):
        wanted, field = exact_block([Fraction(x) for x in block], form)
        assert (codes[row].tolist(), int(fields[row, 0])) == (wanted, field), block
        step = Fraction(2) ** (field - (2 ** (form.exp - 1) - 1) - (form.bits - 2))
        assert [Fraction(x) for x in back[row].tolist()] == [code * step for code in wanted]


def test_the_sample_holds_every_awkward_case() -> None:
    """Were one missing, the test above would say less than it seems to."""
    form = FORMATS[0]
    values = blocks_of(form, 130)
    codes, fields = encode_bfp(values, form)
    peak = np.abs(values).max(1)
    assert len(FORMATS) * len(values) > 10_000
    assert (peak == 0).sum() >= 2 and ((peak > 0) & (peak < 2.0**-126)).sum() > 50
    scaled = values.astype(np.float64) / np.exp2(fields.astype(np.float64) - 127 - 2)
    assert (np.abs(scaled - np.rint(scaled)) == 0.5).sum() > 500
    assert (np.rint(np.abs(scaled)) == 8).sum() > 100  # cut, not renormalised
    assert np.abs(codes).max() == 7 and fields.max() == 254 and fields.min() == 0


def test_known_blocks() -> None:
    form = BlockFloat(bits=4, block=4)
    codes, fields = encode_bfp(np.array([[1.0, -0.5, 0.125, 0.375], [0, 0, 0, 0], [7.9, 1, 0, -7.9]], np.float32), form)
    assert codes.tolist() == [[4, -2, 0, 2], [0, 0, 0, 0], [7, 1, 0, -7]]
    assert fields.ravel().tolist() == [127, 0, 129]
    asymmetric = BlockFloat(bits=4, block=4, symmetric=False)
    assert encode_bfp(np.array([[7.9, 1, 0, -7.9]], np.float32), asymmetric)[0].tolist() == [[7, 1, 0, -8]]
    assert encode_bfp(np.array([[1.0, 0, 0, 0]], np.float16), form)[0].tolist() == [[4, 0, 0, 0]]


def test_few_exponent_bits_cut_what_is_beyond_them() -> None:
    """exp=4: -7..8, so the largest value is 7/4 * 2^8 and half of 2^-9 vanishes."""
    form = BlockFloat(bits=4, block=2, exp=4)
    values = np.array([[1000.0, 256.0], [2.0**-9, 2.0**-11]], np.float32)
    codes, fields = encode_bfp(values, form)
    assert (codes.tolist(), fields.ravel().tolist()) == ([[7, 4], [1, 0]], [15, 0])
    assert decode_bfp(codes, fields, form).tolist() == [[448.0, 256.0], [2.0**-9, 0.0]]


def test_the_error_is_half_a_step_or_the_cut() -> None:
    form = BlockFloat(bits=6, block=16)
    values = np.random.default_rng(3).standard_normal((200, 64)).astype(np.float32)
    codes, fields = encode_bfp(values, form)
    step = np.repeat(np.exp2(fields.astype(np.float64) - 127 - 4), 16, axis=1)
    error = np.abs(decode_bfp(codes, fields, form).astype(np.float64) - values)
    assert (error[np.abs(codes) < form.top] <= step[np.abs(codes) < form.top] / 2).all()
    assert (error <= step).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(SpecError, match="not finite"):
        encode_bfp(np.array([[1.0, bad]], np.float32), BlockFloat(bits=4, block=2))


# ------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("size", [1, 7, 64])
def test_packed_codes_are_one_little_endian_integer_per_row(bits: int, size: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = np.random.default_rng(bits).integers(low, high, (2, 5, size)).astype(np.int16)
    codes[0, 0], codes[0, 1] = low, high - 1
    packed = pack_bfp(codes, bits)
    assert packed.shape == (2, 5, math.ceil(size * bits / 8)) and packed.dtype == np.uint8
    for row, line in zip(codes.reshape(10, size).tolist(), packed.reshape(10, -1), strict=True):
        whole = sum((code % 2**bits) << (bits * at) for at, code in enumerate(row))
        assert int.from_bytes(line.tobytes(), "little") == whole
    np.testing.assert_array_equal(unpack_bfp(packed, bits, size), codes)


@pytest.mark.parametrize(
    ("bits", "block", "size"), [(4, 32, 64), (4, 64, 64), (8, 16, 128), (3, 8, 24), (16, 128, 128)]
)
def test_a_row_takes_the_bytes_of_its_arrays(bits: int, block: int, size: int) -> None:
    """p/8 + 1/n bytes per element."""
    form = BlockFloat(bits=bits, block=block)
    codes, fields = encode_bfp(np.ones((1, size), np.float32), form)
    assert form.row_nbytes(size) == pack_bfp(codes, bits).nbytes + fields.nbytes
    assert Fraction(form.row_nbytes(size), size) == Fraction(bits, 8) + Fraction(1, block)


def test_the_papers_sizes() -> None:
    """BFP12 of 32 takes 4.25 bits: 0.266 of fp16; of BFP16, 0.515."""
    bfp12, bfp16 = (BlockFloat(bits=bits, block=32).row_nbytes(128) for bits in (4, 8))
    assert (bfp12 / 256, bfp12 / bfp16) == (4.25 / 16, 4.25 / 8.25)


# ---------------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize(("a_bits", "b_bits", "block"), [(8, 4, 32), (4, 4, 16), (16, 16, 64), (2, 8, 8)])
def test_products_are_exact_inside_a_block(a_bits: int, b_bits: int, block: int) -> None:
    """Every block's sum by fractions, rounded once to float32, added in float32: equal to the bit."""
    rng = np.random.default_rng(a_bits)
    a_form, b_form = BlockFloat(bits=a_bits, block=block), BlockFloat(bits=b_bits, block=block)
    # Blocks of far different sizes, so that another order of the additions shows.
    scale = np.repeat(2.0 ** rng.integers(-12, 13, (40, 3)), block, axis=1)
    a = encode_bfp((rng.standard_normal((40, 3 * block)) * scale).astype(np.float32), a_form)
    b = encode_bfp(rng.standard_normal((40, 3 * block)).astype(np.float32), b_form)
    found = bfp_dot(a, b, a_form, b_form)
    values = [decode_bfp(*a, a_form), decode_bfp(*b, b_form)]
    for row in range(40):
        wanted = np.float32(0)
        for start in range(0, 3 * block, block):
            pairs = zip(*(v[row, start : start + block].tolist() for v in values), strict=True)
            part = sum(Fraction(x) * Fraction(y) for x, y in pairs)
            wanted = np.float32(wanted + np.float32(float(part)))  # the sum has less than 53 bits
        assert found[row] == wanted
    matrix = bfp_dot((a[0][:, None], a[1][:, None]), (b[0][None], b[1][None]), a_form, b_form)
    np.testing.assert_array_equal(np.diag(matrix), found)


def test_products_of_different_blocks_are_refused() -> None:
    forms = BlockFloat(bits=4, block=2), BlockFloat(bits=4, block=4)
    coded = [encode_bfp(np.ones((1, 4), np.float32), form) for form in forms]
    with pytest.raises(SpecError, match="no sum of integers"):
        bfp_dot(coded[0], coded[1], *forms)


# --------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("BFP[4|8]{32}(SN)", BlockFloat(bits=4, block=32)),
        ("BFP[8|8]{128}(_N)", BlockFloat(bits=8, block=128, symmetric=False)),
        ("BFP[16|8]{16}(SN)", BlockFloat(bits=16, block=16)),
        ("BFP[6|5]{64}(SN)", BlockFloat(bits=6, block=64, exp=5)),
    ],
)
def test_shorthand(text: str, wanted: BlockFloat) -> None:
    assert parse_shorthand(text) == wanted and str(wanted) == text


@pytest.mark.parametrize(
    "text", ["BFP[4|8]{32}", "BFP[4]{32}(SN)", "BFP[4|8]{0}(SN)", "BFP[1|8]{32}(SN)", "BFP[4|8]{32}(SU)", "BFP[4|9]{32}(SN)", "INT8"]
)  # fmt: skip
def test_bad_shorthand_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_shorthand(text)


def test_refusals_name_what_is_allowed() -> None:
    with pytest.raises(SpecError, match=r"block=48 does not divide a row of 64. Allowed: 1, 2, 4, .*Try block=32"):
        encode_bfp(np.ones((1, 64), np.float32), BlockFloat(bits=4, block=48))
    with pytest.raises(SpecError, match=r"block=128 does not divide a row of 64"):
        BlockFloat(bits=4, block=128).row_nbytes(64)
    for bad in ({"bits": 1}, {"bits": 17}, {"exp": 3}, {"exp": 9}, {"block": 0}):
        with pytest.raises(SpecError, match="Allowed"):
            BlockFloat(**{"bits": 4, "block": 32, **bad})


# ---------------------------------------------------------------------------------------------------- the order of keys

ATTENTION = "layers.{}.self_attn"


def with_bfp_pages() -> bool:
    """Whether the cache has the format yet."""
    try:
        return bool(Bfp().format)
    except (SpecError, TypeError):
        return False


pages = pytest.mark.skipif(not with_bfp_pages(), reason="PageFormat has no kind 'bfp' yet")


def tiny(family: str, **changes: Any) -> ModelSpec:
    """A tiny model of a family, in fp32."""
    from tests.conftest import FAMILY_CONFIGS

    return spec_from_config({**FAMILY_CONFIGS[family], **changes}, "tiny").with_dtype("float32")


def sorted_variant(spec: ModelSpec, weights: Weights, sort: str = "row", materials: Any = None) -> Variant:
    """Keys in another order and nothing rounded."""
    paths = [ATTENTION.format(i) for i in range(spec.num_hidden_layers)]
    new = spec.edit([Edit(path, "key_order", sort) for path in paths], by="test")
    technique = Bfp(sort=sort, block=1)  # type: ignore[arg-type]
    return Variant(new, technique.convert(weights, spec, new, materials or Materials()))


def uneven(spec: ModelSpec, seed: int = 0) -> Weights:
    """Random weights whose key channels and norms differ in size, so that no order is the model's by chance."""
    rng, weights = np.random.default_rng(seed), random_weights(spec, seed)
    changed = {}
    for index, layer in enumerate(spec.layers):
        node, path = layer.self_attn, ATTENTION.format(index)
        assert isinstance(node, AttentionSpec)
        gain = rng.uniform(0.3, 2.0, (node.k_proj.n, 1)).astype(np.float32)
        changed[f"{path}.k_proj"] = packed_float(weights[f"{path}.k_proj"].buffers["data"] * gain, "fp32")
        for name, norm in (("q_norm", node.q_norm), ("k_norm", node.k_norm)):
            if norm is not None:
                changed[f"{path}.{name}"] = packed_float(rng.uniform(0.5, 1.5, norm.size).astype(np.float32), "fp32")
    return weights | changed


def session_logits(variant: Variant, chunk: int) -> np.ndarray:
    """Prompts of three lengths through the cache, in chunks, and three decode steps."""
    session = Model(variant).session(chunk=chunk)
    rng = np.random.default_rng(5)
    found = [session.prefill([rng.integers(0, 97, n).tolist() for n in (1, 8, 21)])]
    return np.stack(found + [session.decode(rng.integers(0, 97, 3).tolist()) for _ in range(3)])


def whole_logits(variant: Variant) -> np.ndarray:
    """Without a cache."""
    return Model(variant).logits(np.random.default_rng(6).integers(0, 97, (2, 19))).numpy()


@pytest.mark.parametrize("sort", ["row", "random"])
def test_any_order_gives_the_same_logits(family: ModelSpec, sort: str) -> None:
    """Sums in another order: 1e-5 of the largest logit. A wrong partner, table, query head or bias shows from 1e-2 on."""
    weights = uneven(family)
    plain, sorted_ = Variant(family, weights), sorted_variant(family, weights, sort)
    changed = {path for path in sorted_.weights if path not in weights or sorted_.weights[path] is not weights[path]}
    assert {"k_proj", "q_proj", "key_order"} <= {path.split(".")[3] for path in changed}
    assert not any(part in path for path in changed for part in ("v_proj", "o_proj", "mlp"))
    for found, wanted in (
        (whole_logits(sorted_), whole_logits(plain)),
        (session_logits(sorted_, 512), session_logits(plain, 512)),
        (session_logits(sorted_, 7), session_logits(plain, 512)),
    ):
        assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def test_any_order_with_two_sets_of_frequencies() -> None:
    """LongRoPE: a short and a long row in one step turn by different tables."""
    facts = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    spec = tiny("phi3", rope_scaling=facts, original_max_position_embeddings=16)
    weights = uneven(spec)
    wanted = session_logits(Variant(spec, weights), 7)
    assert np.abs(session_logits(sorted_variant(spec, weights), 7) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_families_hold_every_kind_of_norm_and_rotation() -> None:
    """Else the test of all families would say less than it seems to."""
    nodes = {
        name: tiny(name).layers[0].self_attn for name in ("llama", "qwen3", "minimax_m2", "phi", "gemma3", "bloom")
    }
    norms = {name: node.k_norm and node.k_norm.size // node.head_dim for name, node in nodes.items()}  # type: ignore[union-attr]
    assert norms == {"llama": None, "qwen3": 1, "minimax_m2": 2, "phi": None, "gemma3": 1, "bloom": None}
    assert nodes["gemma3"].k_norm.unit_offset and nodes["llama"].k_proj.bias  # type: ignore[union-attr]
    assert nodes["phi"].rope.dim < nodes["phi"].head_dim and nodes["bloom"].rope is None  # type: ignore[union-attr]


def taps(variant: Variant, tokens: int = 17) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys after rotation of every layer."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    step = Step.of([tokens], [3])
    step.taps = {"self_attn.qk": lambda path, value: found.update({path: value})}
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 97, tokens))
    variant.decoder(ids, step, None, np.zeros(0, dtype=np.int64))
    return found


def test_keys_are_the_models_in_descending_order_of_their_rows() -> None:
    """Rotated queries and keys of the first layer equal the model's, permuted, and the row norms descend."""
    spec = tiny("llama")
    weights = uneven(spec)
    found = sorted_variant(spec, weights)
    path = ATTENTION.format(0)
    order = found.weights[f"{path}.key_order"].buffers["codes"]
    assert sorted(order[0]) == list(range(8)) and order.tolist() != [list(range(8))] * 2
    assert (order[0] != order[1]).any()  # each head has its own
    (q, k), (q_sorted, k_sorted) = (taps(variant)[path] for variant in (Variant(spec, weights), found))
    for head in range(2):
        at = torch.from_numpy(order[head].astype(np.int64))
        torch.testing.assert_close(k_sorted[:, head], k[:, head, at], atol=1e-6, rtol=0)
        torch.testing.assert_close(
            q_sorted[:, 3 * head : 3 * head + 3], q[:, 3 * head : 3 * head + 3, at], atol=1e-6, rtol=0
        )
    rows, bias = decode(found.weights[f"{path}.k_proj"]), decode(found.weights[f"{path}.k_proj.bias"])[0]
    norms = np.sqrt((rows**2).sum(1) + bias**2).reshape(2, 8)
    assert (np.diff(norms, axis=1) <= 1e-6).all()


def test_rows_count_with_their_bias_and_gain() -> None:
    """Channel 5 is large by its bias alone, channel 2 by its gain alone."""
    llama = tiny("llama")
    path = ATTENTION.format(1)
    weights = random_weights(llama)
    bias = decode(weights[f"{path}.k_proj.bias"]).copy()
    bias[0, 5] = -50.0
    biased = weights | {f"{path}.k_proj.bias": packed_float(bias, "fp32")}
    assert sorted_variant(llama, biased).weights[f"{path}.key_order"].buffers["codes"][:, 0].tolist()[0] == 5
    qwen = tiny("qwen3")
    gain = np.ones(16, np.float32)
    gain[2] = -40.0
    normed = random_weights(qwen) | {f"{path}.k_norm": packed_float(gain, "fp32")}
    assert sorted_variant(qwen, normed).weights[f"{path}.key_order"].buffers["codes"][:, 0].tolist() == [2, 2]


def test_rotation_in_another_order_is_the_rotation_permuted_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    for size, dim in ((16, 16), (16, 8), (64, 64)):
        rotary = Rotary(RopeSpec(dim=dim), 64)
        cos, sin = rotary.tables(Step.of([9], [4]), torch.float32)
        x = torch.from_numpy(rng.standard_normal((9, 6, size)).astype(np.float32))
        order = torch.from_numpy(np.stack([rng.permutation(size) for _ in range(2)]))
        by_head = order.repeat_interleave(3, 0).expand_as(x)
        wanted = rotate(x, cos, sin).gather(-1, by_head)
        assert torch.equal(rotate_ordered(x.gather(-1, by_head), cos, sin, order), wanted)


def test_one_block_per_head_is_the_same_in_any_order() -> None:
    form = BlockFloat(bits=4, block=64)
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    order = np.random.default_rng(1).permutation(64)
    codes, fields = encode_bfp(x, form)
    found = encode_bfp(x[:, order], form)
    np.testing.assert_array_equal(found[0], codes[:, order])
    np.testing.assert_array_equal(found[1], fields)


def test_calibrated_order_follows_the_keys() -> None:
    """sort=rms: mean squares of the rotated keys of the calibration text descend."""
    spec = tiny("llama")
    weights = uneven(spec)

    class Windows(Materials):
        def token_windows(self) -> list[np.ndarray]:
            return [np.random.default_rng(seed).integers(0, 97, 17) for seed in (3, 4)]

    materials = Windows(texts={"a": "b"}, cache=None)
    found = sorted_variant(spec, weights, "rms", materials)
    squares = 0
    for window in materials.token_windows():
        seen: dict[str, Any] = {}
        step = Step.of([17], [0])
        step.taps = {"self_attn.qk": lambda path, value, seen=seen: seen.update({path: value[1]})}
        found.decoder(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
        squares = squares + torch.stack(list(seen.values())).double().square().sum(1)
    assert (squares.diff(dim=-1) <= 1e-5 * squares.max()).all()  # type: ignore[attr-defined]
    assert np.abs(whole_logits(found) - whole_logits(Variant(spec, weights))).max() < 1e-4
    with pytest.raises(CalibrationError):
        sorted_variant(spec, weights, "rms", Materials())


# ---------------------------------------------------------------------------------------------------- rows of any format


@pytest.mark.parametrize(
    "form",
    [FP32, BF16, FP16, WeightFormat(kind="int", bits=3, group=16), WeightFormat(kind="int", bits=4, group=32, sym=False),
     WeightFormat(kind="fp8"), WeightFormat(kind="mxfp4")],
    ids=str,
)  # fmt: skip
def test_rows_move_without_being_decoded(form: WeightFormat) -> None:
    rng = np.random.default_rng(0)
    stored = encode(rng.standard_normal((24, 64)).astype(np.float32), form)
    rows = rng.permutation(24)
    moved = with_rows("m", stored, rows)
    np.testing.assert_array_equal(decode(moved), decode(stored)[rows])
    assert (moved.format, moved.shape, moved.nbytes) == (stored.format, stored.shape, stored.nbytes)


def test_outputs_of_a_transposed_float_matrix_are_its_columns() -> None:
    rng = np.random.default_rng(0)
    stored = encode(rng.standard_normal((64, 24)).astype(np.float32), BF16, "transposed")
    rows = rng.permutation(24)
    np.testing.assert_array_equal(matrix(with_rows("m", stored, rows)), matrix(stored)[rows])


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    values = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    tiled = encode(values, WeightFormat(kind="bitplane", bits=2, group=32, tiled=True))
    transposed = encode(values, WeightFormat(kind="int", bits=4, group=32), "transposed")
    for packed in (tiled, transposed):
        with pytest.raises(SpecError, match=r"bfp: the rows of layers.0.self_attn.k_proj.*Allowed: floats.*sort=none"):
            with_rows("layers.0.self_attn.k_proj", packed, np.arange(packed.shape[0]))


def test_a_files_own_blocks_are_sorted_without_decoding(smollm2_path: Path) -> None:
    """Q4_1 rows of SmolLM2: bytes stay, values move, logits agree."""
    loaded = open_model(smollm2_path, "file")
    spec = dataclasses.replace(loaded.spec, act_dtype="fp32")
    found = sorted_variant(spec, loaded.weights)
    path = ATTENTION.format(4)
    old, new = (weights[f"{path}.k_proj"] for weights in (loaded.weights, found.weights))
    assert new.format == old.format and not new.format.is_float and new.nbytes == old.nbytes
    rows = (np.arange(3)[:, None] * 64 + found.weights[f"{path}.key_order"].buffers["codes"]).reshape(-1)
    np.testing.assert_array_equal(decode(new), decode(old)[rows])
    ids = [[(7 * i) % 4000 for i in range(12)]]
    wanted = Model(Variant(spec, loaded.weights)).logits(ids)
    # 30 layers of sums in another order
    assert (Model(found).logits(ids) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# ------------------------------------------------------------------------------------------------ spec, counts, refusals


def test_the_order_is_a_weight_of_its_own_size(tiny_model: Model) -> None:
    found = sorted_variant(tiny_model.spec, tiny_model.weights)
    node = found.spec.layers[0].self_attn
    assert isinstance(node, AttentionSpec)
    assert node.key_order_nbytes == found.weights[ATTENTION.format(0) + ".key_order"].nbytes == 2 * 16 + 2 * 4
    assert tiny_model.spec.layers[0].self_attn.key_order_nbytes == 0  # type: ignore[union-attr]
    assert found.spec.hash != tiny_model.spec.hash
    np.testing.assert_array_equal(decode(found.weights[ATTENTION.format(0) + ".key_order"])[0].argsort().argsort(),
                                  found.weights[ATTENTION.format(0) + ".key_order"].buffers["codes"][0])  # fmt: skip
    with pytest.raises(SpecError, match="row"):
        tiny_model.spec.edit([Edit("layers.*.self_attn", "key_order", "rows")], by="test")


def test_sorting_twice_changes_nothing(tiny_model: Model) -> None:
    once = sorted_variant(tiny_model.spec, tiny_model.weights)
    again = Bfp(block=1).convert(once.weights, once.spec, once.spec, Materials())
    assert all(again[path] is once.weights[path] for path in again)


def test_injected_outliers_leave_the_function_as_it_is() -> None:
    """Factors are powers of two and rotary pairs are scaled alike: bit for bit, with eight larger rows in each head of 16."""
    spec = tiny("mistral", head_dim=16)
    weights = random_weights(spec)
    found = with_outliers(Variant(spec, weights), rows=8, factor=16.0)
    np.testing.assert_array_equal(whole_logits(found), whole_logits(Variant(spec, weights)))
    path = ATTENTION.format(1)
    norms = np.linalg.norm(decode(found.weights[f"{path}.k_proj"]), axis=1).reshape(2, 16)
    assert ((norms > 5).sum(1) == 8).all() and (norms[0] > 5).tolist() != (norms[1] > 5).tolist()
    sorted_ = sorted_variant(spec, found.weights)
    rows = np.linalg.norm(decode(sorted_.weights[f"{path}.k_proj"]), axis=1).reshape(2, 16)
    assert (rows[:, :8] > 5).all() and (rows[:, 8:] < 5).all()


def test_the_native_program_refuses_sorted_keys(tiny_model: Model) -> None:
    lowered_spec(tiny_model.spec)
    with pytest.raises(UnsupportedModelError, match="order of channels"):
        lowered_spec(sorted_variant(tiny_model.spec, tiny_model.weights).spec)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("bfp:man=1", "Allowed: 2..16"), ("bfp:man=17", "Try man=16"), ("bfp:exp=3", "Allowed: 4..8"),
        ("bfp:exp=5", "exponents of 8 bits"), ("bfp:block=0", "Allowed: 1 or more"), ("bfp:block=32", "does not divide"),
        ("bfp:block=6", "Allowed: 1, 2, 4, 8, 16"), ("bfp:sort=rows", "row, none, rms, random"), ("bfp:on=w", "k, v, kv"),
    ],
)  # fmt: skip
def test_bad_parameters(tiny_model: Model, bad: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_technique(bad).check(tiny_model.spec)
    assert said in str(refused.value) and str(refused.value).startswith("bfp:")


@pytest.mark.parametrize(
    ("model", "setting", "said"),
    [
        ("deepseek-v3", "bfp", "one latent"), ("qwen3-next-80b-a3b", "bfp", "gates.*Allowed: sort=none"),
        ("gemma-4-26b-a4b", "bfp", "values from the keys.*Allowed: sort=none"),
    ],
)  # fmt: skip
def test_models_whose_keys_cannot_be_sorted_are_refused(model: str, setting: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"^bfp: .*{said}"):
        parse_technique(setting).check(load_spec(model))


def test_heads_that_outgrow_a_byte_are_refused() -> None:
    with pytest.raises(SpecError, match=r"heads of 512.*sort=none"):
        Bfp().check(tiny("mistral", head_dim=512))
    Bfp(sort="none").check(tiny("mistral", head_dim=512))
    Bfp().check(tiny("mistral", head_dim=256))


@pages
@pytest.mark.parametrize("on", ["k", "v", "kv"])
def test_edits_set_the_format_of_what_was_asked_for(tiny_model: Model, on: str) -> None:
    technique = Bfp(man=8, block=16, on=on)  # type: ignore[arg-type]
    technique.check(tiny_model.spec)
    spec = tiny_model.spec.edit(technique.edits(tiny_model.spec), by="bfp")
    for layer in spec.layers:
        assert isinstance(layer.self_attn, AttentionSpec)
        assert layer.self_attn.key_order == ("row" if "k" in on else "model")
        for head in layer.self_attn.cache.heads:
            assert (head.k_format == technique.format) == ("k" in on)
            assert (head.v_format == technique.format) == ("v" in on)
            assert head.k_format.nbytes(10, 16) == 10 * (17 if "k" in on else 64)


@pages
def test_pages_hold_what_the_codec_makes(tiny_model: Model) -> None:
    """Bytes of a head equal those of the codec's arrays."""
    for man, block, size in ((4, 32, 64), (8, 16, 64), (3, 8, 24), (16, 128, 128)):
        form = Bfp(man=man, block=block).format
        assert form.nbytes(7, size) == 7 * BlockFloat(bits=man, block=block).row_nbytes(size)
