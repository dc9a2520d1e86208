"""Products of grids and outlier-victim pairs by the native kernels, against their values multiplied in double precision.

Codes are drawn at random, so that every code, table and neighbour occurs, and lie in tiles from the start.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.unit.test_native import coded
from trimtab.model.variant import Model, Variant
from trimtab.runtime import kernels
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.kernels import _core
from trimtab.runtime.native import lower
from trimtab.runtime.native.dataflow import ONLY
from trimtab.runtime.native.products import core_tiles
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.runtime.weights.random import random_weights
from trimtab.spec import tree
from trimtab.spec.bcq import BcqFormat
from trimtab.spec.formats import WeightFormat
from trimtab.spec.grids import GRIDS, SCALES, GridFormat, PairFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec

EVERY = [
    *(GridFormat(grid=grid, bits=bits, group=64, tiled=True) for grid, widths in GRIDS.items() for bits in widths),
    *(PairFormat(normal=normal, bits=bits, group=64, tiled=True) for normal, bits in (("int", 4), ("flint", 4), ("int", 8))),
]  # fmt: skip
#: One of each way to read codes and choices, for what all of them share.
SOME = [
    GridFormat(grid=grid, bits=bits, group=64, tiled=True)
    for grid, bits in (("bipolar", 2), ("int", 3), ("ant", 4), ("bitmod", 4), ("fp", 6), ("int", 8))
] + [form for form in EVERY if form.kind == "pair"]
#: Of 144 columns: a row may end in the middle of a unit, a group may be half of one, three of these, or the row.
GROUPS = (16, 48, 144)


def drawn(form: WeightFormat, rows: int, cols: int, seed: int = 0) -> Packed:
    """A matrix of random codes and choices, with scales near 1/16."""
    rng = np.random.default_rng(seed)
    buffers = {}
    for buffer in form.buffers(rows, cols):
        if buffer.dtype == "fp16":
            found = rng.uniform(0.03, 0.12, buffer.shape)
            found = found / 100 if buffer.name == "step" else found
        elif buffer.name == "scale" and getattr(form, "scale", "") == "e8m0":
            found = rng.integers(121, 125, buffer.shape)
        else:
            found = rng.integers(0, 256, buffer.shape)
        buffers[buffer.name] = found.astype(NUMPY_DTYPES[buffer.dtype])
    return Packed(form, (rows, cols), buffers)


def inputs(tokens: int, cols: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((tokens, cols), dtype=np.float32)
    x[::2, 7] *= 30  # a value that has its group coded twice
    return x


def is_float(form: WeightFormat) -> bool:
    """Pairs of 8 bits reach 2**23 and are multiplied as floats."""
    return form.kind == "pair" and form.bits == 8


def product(packed: Packed, x: np.ndarray, kernel: str = "flat", twice_from: float = 2.0) -> np.ndarray:
    y = np.empty((len(x), packed.shape[0]), np.float32)
    read = _core.multiply(core_tiles(packed), x, 1, y, twice_from, *ONLY[kernel])
    assert read == packed.nbytes
    return y


def check(packed: Packed, tokens: int, kernel: str = "flat", twice_from: float = 2.0) -> None:
    form, cols = packed.format, packed.shape[1]
    x = inputs(tokens, cols)
    act = 64 if form.group % 64 == 0 else 32 if form.group % 32 == 0 else 16
    if form.group == cols:  # the row's scale holds for its padding
        act = 64 if -(-cols // 32) % 2 == 0 else 32
    seen = x if is_float(form) else coded(x, act, twice_from)
    wanted = seen.astype(np.float64) @ decode(packed).T.astype(np.float64)
    y = product(packed, x, kernel, twice_from)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("form", EVERY, ids=str)
@pytest.mark.parametrize("tokens", [1, 15])
def test_products_are_those_of_the_values(isa: str, form: WeightFormat, tokens: int) -> None:
    """15: blocks of 8, 4, 2 and 1 tokens."""
    check(drawn(form, 37, 192), tokens)


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_products_of_every_group(isa: str, form: WeightFormat, group: int) -> None:
    packed = drawn(dataclasses.replace(form, group=group), 21, 144)
    for twice_from in (0.0, 2.0, np.inf):
        check(packed, 3, twice_from=twice_from)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", [form for form in SOME if form.kind == "grid"], ids=str)
def test_products_of_every_kind_of_scale(isa: str, form: GridFormat, scale: str) -> None:
    for group in (16, 64):
        check(drawn(dataclasses.replace(form, scale=scale, group=group), 21, 192), 3)


@pytest.mark.parametrize("form", SOME, ids=str)
def test_the_three_kernels_of_a_product(isa: str, form: WeightFormat) -> None:
    """Token by token gives the bits of blocks; the kernel that decodes adds up floats."""
    packed, x = drawn(form, 33, 320), inputs(9, 320)
    if not is_float(form):
        np.testing.assert_array_equal(product(packed, x, "gemv"), product(packed, x, "flat"))
    check(packed, 9, "gemm")


@pytest.mark.parametrize("form", SOME, ids=str)
def test_instruction_sets_agree(form: WeightFormat) -> None:
    """To the bit where values fit a byte without a sign; the others lose what stands for zero in another order."""
    packed, x, found = drawn(form, 33, 192), inputs(3, 192), []
    for isa in _core.isas():
        kernels.use_isa("scalar" if isa == "baseline" else isa)
        found.append(product(packed, x))
    kernels.use_isa("auto")
    for other in found[1:]:
        if form.bits < 8 and str(form) != "pair-int4-g64-tiled":
            np.testing.assert_array_equal(other, found[0])
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-5 * np.abs(found[0]).max())


def test_values_beyond_the_kernels_are_refused() -> None:
    packed = drawn(GridFormat(grid="fp", bits=4, group=64, tiled=True), 16, 64)

    def tiles(values: list[list[int]], bits: int, coding: int = 7) -> Any:
        flat = packed.buffers["codes"].reshape(-1), packed.buffers["scale"].reshape(-1).view(np.uint8)
        return _core.tiles(coding, 0, bits, 16, 64, 64, *flat, None, None, values=np.array(values, np.int32))

    tiles([list(range(-8, 8))], 4)
    with pytest.raises(ValueError, match="beyond what the kernel"):
        tiles([list(range(2, 18))], 4)
    with pytest.raises(ValueError, match="sign and magnitude alone"):
        tiles([list(range(256))], 8)
    with pytest.raises(ValueError, match=r"2\^bits values"):
        tiles([[0, 1]], 4)
    with pytest.raises(ValueError, match="pairs have two"):
        tiles([list(range(16))], 4, coding=8)


def in_format(model: Model, form: WeightFormat) -> Model:
    """The model with every matrix, the embedding too, in `form`."""
    paths = [path for path, node in tree.walk(model.spec) if isinstance(node, LinearSpec | EmbeddingSpec)]
    spec = model.spec.edit([tree.Edit(path, "format", form) for path in paths], by="test")
    return Model(Variant(spec, random_weights(spec)))


@pytest.mark.parametrize(
    "form",
    [
        GridFormat(grid="bitmod", bits=4, group=16, scale="int8"),
        GridFormat(grid="bipolar", bits=4, group=16),
        GridFormat(grid="int", bits=8, group=16, scale="e8m0"),
        PairFormat(bits=8, group=16),
        PairFormat(normal="flint", bits=4, group=16),
    ],
    ids=str,
)
def test_models_run_at_their_width(tiny_model: Model, form: WeightFormat) -> None:
    """Embedding, products and logits; bytes held and read are those of the format."""
    model = in_format(tiny_model, form)
    program = lower(model.spec, model.weights, 2)
    assert program.weight_bytes == program.spec.weight_nbytes()
    session, record = Session(program), Recorder()
    ids = np.random.default_rng(3).integers(0, 131, 12)
    session.prefill([ids[:11]], reserve=1)
    session.record = record
    found = session.decode([ids[11]])[0]
    wanted = model.logits([ids.tolist()])[0, -1].numpy()
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()  # inputs of products are coded in 8 bits
    embedded = program.spec.embed_tokens
    once = 0 if program.spec.tie_word_embeddings else embedded.format.nbytes(embedded.n, embedded.k)
    row = embedded.format.row_nbytes(embedded.k)
    assert record.total("weight_read") == program.weight_bytes - once + row


@pytest.mark.parametrize("tokens", [1, 12])  # looked up, and decoded
@pytest.mark.parametrize(
    "form",
    [BcqFormat(bits=2, group=16), BcqFormat(bits=3, group=16, mode="acc", rotated=True), BcqFormat(bits=3, mode="acc")],
    ids=str,
)
def test_models_of_binary_codes_run_at_their_width(tiny_model: Model, form: BcqFormat, tokens: int) -> None:
    """Matrices of the layers, in the basis they are coded in."""
    base = tiny_model
    paths = [path for path, _ in base.spec.linears() if path.startswith("layers.")]
    spec = base.spec.edit([tree.Edit(path, "format", form) for path in paths], by="test")
    coded_weights = {path: encode(decode(base.weights[path]), form) for path in paths}
    model = Model(Variant(spec, base.weights | coded_weights))
    program = lower(model.spec, model.weights, 2)
    assert program.weight_bytes == program.spec.weight_nbytes()
    session, ids = Session(program), np.random.default_rng(3).integers(0, 131, 24)
    session.prefill([ids[:12]], reserve=12)
    if tokens == 1:
        found, seen = session.decode([ids[12]])[0], 13
    else:
        other = Session(program)
        found, seen = other.prefill([ids[:24]], reserve=1)[0], 24
    wanted = model.logits([ids[:seen].tolist()])[0, -1].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
