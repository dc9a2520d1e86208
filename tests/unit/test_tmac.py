"""Products by table lookup: against dequantized matrices, integer arithmetic and each other, on every instruction set."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import HardwareError, SpecError, UnsupportedModelError
from trimtab.model.linear import Linear
from trimtab.model.variant import Model, Variant
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.kernels import _core, use_isa
from trimtab.runtime.native import lower, products
from trimtab.runtime.native.products import as_tiles, multiply, tiles_of
from trimtab.runtime.numerics import decode, encode, transcode
from trimtab.runtime.numerics.lookup import encode_planes, encode_ternary, lay_out, ternary_of
from trimtab.runtime.numerics.tiles import tile
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.formats import PLANE_KINDS, WeightFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.product import EXACT, LookupTable
from trimtab.techniques.apply import applied, reencode
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all, parse_technique

CPP = Path(products.__file__).parents[1] / "kernels" / "cpp"
ISAS = _core.isas()
GROUPS = (32, 64, 128, -1)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of timings of its own, and nothing remembered by the process."""
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    products._fastest.cache_clear()
    yield tmp_path
    products._fastest.cache_clear()


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def planes(bits: int, group: int, cols: int, zp: bool = False, kind: str = "bitplane") -> WeightFormat:
    return WeightFormat(kind=kind, bits=bits, group=cols if group == -1 else group, sym=not zp, tiled=True)


def ternary(group: int, cols: int) -> WeightFormat:
    return WeightFormat(kind="ternary", group=cols if group == -1 else group, tiled=True)


def exact(packed: Packed, x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ decode(packed).T.astype(np.float64)


def nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


# ------------------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("zp", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_planes_hold_what_the_grid_holds(bits: int, zp: bool, group: int) -> None:
    made = encode(values(33, 576), planes(bits, group, 576, zp))
    assert made.nbytes == made.format.nbytes(33, 576)
    other = lay_out(made, "bitlane")
    ints = lay_out(other, "int")
    assert made.nbytes == other.nbytes == ints.nbytes
    for each in (other, ints, lay_out(ints, "bitplane")):
        np.testing.assert_array_equal(decode(each), decode(made))
    if bits > 1 and group in (32, 64):  # integer rows know no single bit, and no shorter last group
        rows = encode(values(33, 576), WeightFormat(kind="int", bits=bits, group=group, sym=not zp))
        np.testing.assert_array_equal(decode(made), decode(rows))
        np.testing.assert_array_equal(decode(lay_out(rows, "bitplane")), decode(rows))
        np.testing.assert_array_equal(decode(lay_out(tile(rows), "bitlane")), decode(rows))


def test_ternary_is_absmean_and_keeps_what_is_ternary() -> None:
    w = values(20, 100)
    packed = encode(w, ternary(32, 100))
    weights, scale = ternary_of(packed)
    assert scale.shape == (20, 4) and set(np.unique(weights)) == {-1, 0, 1}
    mean = np.abs(w[:, 96:]).mean(axis=1)  # the last group is shorter
    np.testing.assert_allclose(scale[:, 3], mean, rtol=1e-3)
    np.testing.assert_array_equal(weights[:, 96:], np.clip(np.rint(w[:, 96:] / scale[:, 3:].astype(np.float32)), -1, 1))
    np.testing.assert_array_equal(decode(encode(decode(packed), packed.format)), decode(packed))
    assert len(np.unique(encode_ternary(w, ternary(-1, 100), one_scale=True).buffers["scale"][:, :, :4])) == 1
    assert packed.nbytes == packed.format.nbytes(20, 100)
    # 5 bits for every 3 weights where units of 48 columns fill the row, plus the scale
    assert ternary(-1, 480).nbytes(16, 480) == 16 * 480 * 5 // 24 + 32


def test_impossible_formats_say_so() -> None:
    with pytest.raises(SpecError, match="tiled layout only"):
        WeightFormat(kind="bitplane", bits=2, group=32)
    with pytest.raises(SpecError, match=r"1\.\.4"):
        planes(5, 32, 64)
    with pytest.raises(SpecError, match="group=0"):
        WeightFormat(kind="ternary", group=0, tiled=True)
    with pytest.raises(SpecError, match="multiple of 4"):
        encode(values(16, 96), planes(2, 33, 96))
    with pytest.raises(SpecError, match="rounded twice"):
        transcode(encode(values(16, 96), planes(4, 32, 96)), planes(2, 32, 96))
    with pytest.raises(SpecError, match="holds no codes"):
        lay_out(encode(values(16, 96), WeightFormat(kind="int", bits=5, group=32)), "bitplane")
    with pytest.raises(SpecError, match="not finite"):
        encode(np.full((16, 96), np.inf, np.float32), ternary(32, 96))


# ------------------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("bits", [1, 2, 3, 4, "ternary"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("cols", [576, 1536, 100])
def test_float_tables_equal_the_dequantized_matrix(isa: str, bits: Any, group: int, cols: int) -> None:
    for rows in (192, 33):
        for zp in (False,) if bits == "ternary" else (False, True):
            form = ternary(group, cols) if bits == "ternary" else planes(bits, group, cols, zp)
            packed, x = encode(values(rows, cols), form), values(2, cols, seed=1)
            wanted = exact(packed, x)
            found = multiply(packed, LookupTable(table="f32"), x)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", PLANE_KINDS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("group", "act_group"), [(32, 64), (64, 64), (128, 32), (-1, 64), (36, 64), (-1, 0)])
def test_integer_tables_are_the_rounded_sums(isa: str, kind: str, bits: int, group: int, act_group: int) -> None:
    """Entry by entry in numpy: the sums of every block, rounded half to even by the scale of their group."""
    for cols in (576, 100):
        packed, x = encode(values(33, cols), planes(bits, group, cols, kind=kind)), values(1, cols, seed=1)
        for table, top in (("i8", 127), ("i16", 32639)):
            found = multiply(packed, LookupTable(table=table, act_group=act_group), x)
            np.testing.assert_allclose(
                found, tabulated(packed, x, act_group, top), rtol=2e-5, atol=2e-5 * np.abs(found).max()
            )


def tabulated(packed: Packed, x: np.ndarray, act_group: int, top: int) -> np.ndarray:
    """y [1, N] with table entries rounded to whole multiples of largest sum / top."""
    rows, cols = packed.shape
    bits, wide = packed.format.bits, -(-cols // 32) * 32
    act = act_group or wide
    padded = np.zeros(wide, np.float32)
    padded[:cols] = x[0]
    codes, scale, _ = products_grid(packed)
    whole = np.zeros((rows, wide), np.int64)
    whole[:, :cols] = codes
    y = np.zeros(rows)
    step = np.repeat([np.abs(padded[a : a + act].reshape(-1, 4)).sum(1).max() / top for a in range(0, wide, act)], act)[
        :wide
    ]
    group = packed.format.group
    for first in range(0, cols, 4):
        block = padded[first : first + 4].astype(np.float64)
        sign = 2 * (whole[:, first : first + 4, None] >> np.arange(bits) & 1) - 1  # [N, 4, planes]
        entries = np.rint((sign * block[None, :, None]).sum(1) / step[first]) * step[first]
        weighted = (entries * 2.0 ** np.arange(bits)).sum(1)
        y += scale[:, first // group].astype(np.float64) * (weighted - block.sum()) / 2
    return y[None]


def products_grid(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    from trimtab.runtime.numerics.tiles import grid_of

    return grid_of(packed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_table_error_is_there_and_small(isa: str, bits: int) -> None:
    """A stub that dequantizes has none; the bound is that of the paper's repository."""
    packed, x = encode(values(192, 1536), planes(bits, 64, 1536, zp=True)), values(4, 1536, seed=1)
    wanted = exact(packed, x)
    assert 1e-7 < nmse(multiply(packed, LookupTable(), x), wanted) <= 5e-4
    assert nmse(multiply(packed, LookupTable(table="i16"), x), wanted) < 1e-8


@pytest.mark.parametrize("cols", [576, 1536, 100, 8192])
@pytest.mark.parametrize("group", [32, 128, 100, -1])
def test_ternary_products_are_those_of_integers(isa: str, cols: int, group: int) -> None:
    packed, x = encode(values(33, cols), ternary(group, cols)), values(3, cols, seed=1)
    packed.buffers["scale"][...] = 1  # sums of groups stay whole numbers, so that floats add them exactly
    most = np.abs(x).max(axis=1, keepdims=True)
    codes = np.rint(x * (np.float32(127) / most)).astype(np.int64)
    wanted = (codes @ ternary_of(packed)[0].T.astype(np.int64)).astype(np.float32) * (most / np.float32(127))
    np.testing.assert_array_equal(multiply(packed, LookupTable(), x), wanted)


def test_ternary_sums_at_their_largest(isa: str) -> None:
    """Every weight one sign and every activation at the end of its range: no counter may wrap."""
    cols = 12 * 1024
    for sign in (1, -1):
        packed = encode(np.full((16, cols), sign, np.float32), ternary(-1, cols))
        found = multiply(packed, LookupTable(), np.ones((1, cols), np.float32))
        np.testing.assert_array_equal(found, np.full((1, 16), sign * 127 * cols, np.float32) * np.float32(1 / 127))


@pytest.mark.parametrize("kind", PLANE_KINDS)
@pytest.mark.parametrize("bits", [1, 4])
def test_plane_sums_at_their_largest(isa: str, kind: str, bits: int) -> None:
    """Codes all ones and all zeros, with tables full of their largest entries."""
    cols = 4096
    codes = np.zeros((16, cols), np.uint8)
    codes[::2] = 2**bits - 1
    packed = encode(values(16, cols), planes(bits, -1, cols, kind=kind))
    _core.pack_planes(codes, bits, kind == "bitlane", packed.buffers["codes"].reshape(-1))
    packed.buffers["scale"][...] = 1
    for x in (np.ones((1, cols), np.float32), -np.ones((1, cols), np.float32)):
        for act_group in (64, 0):
            wanted = exact(packed, x)
            np.testing.assert_allclose(multiply(packed, LookupTable(act_group=act_group), x), wanted, rtol=1e-4)


@pytest.mark.parametrize("act_group", [32, 64])
def test_averages_are_lossy_and_not_biased(isa: str, act_group: int) -> None:
    """Rounding up a half at every level would shift all sums one way; what is left has no direction."""
    packed, x = encode(values(512, 576), planes(2, 64, 576, zp=True)), values(4, 576, seed=1)  # no scale is negative
    wanted = exact(packed, x)
    sums, averages = (multiply(packed, LookupTable(act_group=act_group, fast_agg=fast), x) for fast in (False, True))
    assert 3 * nmse(sums, wanted) < nmse(averages, wanted) < 0.1
    # What rounding up would add: N log2(N) / 4 entries a table group, weighted 1 + 2, at half the scale of the weights.
    count = act_group // 4
    largest = np.abs(x).reshape(4, -1, 4).sum(-1).reshape(4, -1, count).max(-1) / 127
    scale = float(packed.buffers["scale"].astype(np.float32).mean())
    bias = float(largest.sum(-1).mean()) * count * np.log2(count) / 4 * 3 / 2 * scale
    assert abs(float((averages - wanted).mean())) < 0.2 * bias


def test_every_instruction_set_averages_alike() -> None:
    packed, x = encode(values(33, 100), planes(3, 64, 100)), values(2, 100, seed=1)
    found = []
    for name in ISAS:
        _core.use_isa(name)
        found.append(multiply(packed, LookupTable(fast_agg=True), x))
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=1e-5, atol=1e-5)


def test_many_tokens_take_the_decoded_matrix(isa: str) -> None:
    for form in (planes(2, 64, 576), planes(3, 128, 576, zp=True, kind="bitlane"), ternary(64, 576)):
        packed, x = encode(values(33, 576), form), values(9, 576, seed=1)
        wanted = exact(packed, x)
        np.testing.assert_allclose(multiply(packed, LookupTable(), x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_lookups_do_not_depend_on_threads() -> None:
    for form in (planes(2, 64, 576), ternary(64, 576)):
        packed = encode(values(200, 576), form)
        for tokens in (1, 3, 8, 20):
            x = values(tokens, 576, seed=1)
            np.testing.assert_array_equal(multiply(packed, LookupTable(), x, 1), multiply(packed, LookupTable(), x, 3))


def test_the_avx512_loop_under_emulation(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None or not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("needs a C++ compiler and the headers of SIMDe")
    program = tmp_path / "lanes"
    source = Path(__file__).with_name("lookup_lanes.cpp")
    subprocess.run([compiler, "-std=c++17", "-O1", "-w", f"-I{CPP}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


# -------------------------------------------------------------------------------------------------------------- kernels


def test_the_kernel_is_timed_once_and_remembered(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form, asked = planes(2, 64, 128), []

    def timed(*args: Any) -> dict[str, float]:
        asked.append(args)
        return {"lut": 2.0, "vnni": 1.0}

    monkeypatch.setattr(products, "time_kernels", timed)
    assert tiles_of(form, LookupTable(), 32, 128).kind == "int"
    assert tiles_of(form, LookupTable(), 32, 128).kind == "int" and len(asked) == 1
    products._fastest.cache_clear()  # as another process: the file knows
    assert tiles_of(form, LookupTable(), 32, 128).kind == "int" and len(asked) == 1
    (own_home / "kernels.json").write_text("broken")
    products._fastest.cache_clear()
    assert tiles_of(form, LookupTable(), 32, 128).kind == "int" and len(asked) == 2
    for product in (LookupTable(kernel="lut"), LookupTable(table="i16"), LookupTable(fast_agg=True)):
        assert tiles_of(form, product, 32, 128).kind in PLANE_KINDS
    assert (
        tiles_of(planes(2, 36, 128), LookupTable(), 32, 128).kind in PLANE_KINDS
    )  # groups that other tiles cannot hold
    assert len(asked) == 2


def test_both_kernels_can_be_timed() -> None:
    found = products.time_kernels(planes(2, 64, 128), LookupTable(), 32, 128)
    assert set(found) == {"lut", "vnni"} and all(0 < seconds < 10 for seconds in found.values())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("cols", "group"), [(576, 128), (160, 64), (100, 32), (1536, -1)])
def test_the_other_kernel_multiplies_the_same_codes(isa: str, bits: int, cols: int, group: int) -> None:
    for zp in (False, True):
        packed, x = encode(values(33, cols), planes(bits, group, cols, zp)), values(2, cols, seed=1)
        product = LookupTable(kernel="vnni")
        made = as_tiles(packed, tiles_of(packed.format, product, 33, cols))
        assert made.format.kind == "int"
        assert nmse(multiply(made, product, x), exact(packed, x)) < 5e-4


# --------------------------------------------------------------------------------------------------------------- models


def spec_of(model: Model, text: str) -> Any:
    return compose(model.spec, parse_all([text]))


@pytest.mark.parametrize(
    "text", ["tmac:bits=2,group=32,kernel=lut", "tmac:bits=4,group=64,zp=1,kernel=lut", "tmac:bits=3,group=-1,table=i16",
             "tmac:bits=1,group=32,kernel=lut,fast_agg=1", "tmac:bits=ternary,group=tensor", "rtn:bits=4,group=32+tmac:kernel=lut"]
)  # fmt: skip
def test_decoder_and_program_agree(tiny_model: Model, tiny_materials: Any, text: str) -> None:
    with applied(tiny_model, text, materials=tiny_materials) as model:
        program = lower(model.spec, model.weights, 2)
        assert program.weight_bytes == program.spec.weight_nbytes()
        ids = np.random.default_rng(3).integers(0, 131, 40)
        both = [Session(program), model.session()]
        for at, count in ((0, 20), (20, 3), (23, 1), (24, 1)):
            step = [ids[at : at + count]]
            first, second = (s.prefill(step, reserve=20) if at == 0 else s.extend(step) for s in both)
            # The last digit of an activation may round a table entry to the next byte, which is seldom and small.
            assert nmse(first, second) < 2e-5


def test_products_of_a_model_are_the_kernel_s(tiny_model: Model, tiny_materials: Any) -> None:
    """One token differs from the decoded matrix by the error of the tables, and by no more."""
    ids = np.random.default_rng(3).integers(0, 131, 30)
    last = {}
    for table in ("f32", "i8"):
        with applied(tiny_model, f"tmac:bits=4,group=32,kernel=lut,table={table}", materials=tiny_materials) as model:
            session = model.session()
            session.prefill([ids[:-1]], reserve=1)
            last[table] = session.decode([int(ids[-1])])[0]
            whole = model.logits([ids.tolist()])[0, -1].numpy()
    np.testing.assert_allclose(last["f32"], whole, rtol=1e-3, atol=1e-4)
    assert 1e-9 < nmse(last["i8"], whole) < 1e-2


def test_codes_of_a_grid_are_kept(tiny_model: Model) -> None:
    first = compose(tiny_model.spec, parse_all(["rtn:bits=4,group=32"]))
    both = compose(tiny_model.spec, parse_all(["rtn:bits=4,group=32", "tmac:bits=4,kernel=lut"]))
    path = "layers.0.mlp.up_proj"
    found = [dict(spec.linears())[path] for spec in (first, both)]
    assert found[0].format == found[1].format and isinstance(found[1].product, LookupTable)
    weights = reencode(tiny_model.weights, both)
    linear = Linear(path, found[1], weights)
    np.testing.assert_array_equal(decode(linear.packed[0]), decode(weights[path]))
    with pytest.raises(SpecError, match="round it twice"):
        compose(tiny_model.spec, parse_all(["rtn:bits=4,group=32", "tmac:bits=2"]))


def test_one_scale_for_a_whole_matrix(tiny_model: Model, tiny_materials: Any) -> None:
    with applied(tiny_model, "tmac:bits=ternary,group=tensor", materials=tiny_materials) as model:
        for path, node in model.spec.linears():
            if path.startswith("layers."):
                scale = ternary_of(model.weights[path])[1]
                assert node.format.kind == "ternary" and len(np.unique(scale)) == 1


@pytest.mark.parametrize("kernel", ["lut", "vnni"])
def test_a_bias_is_kept(kernel: str) -> None:
    import torch

    node = LinearSpec(
        n=33,
        k=100,
        bias=True,
        format=planes(4, 32, 100),
        bias_format=WeightFormat(kind="fp32"),
        product=LookupTable(kernel=kernel),
    )
    packed, bias = encode(values(33, 100), node.format), values(33, seed=2) * 100
    linear = Linear("x", node, Weights({"x": packed, "x.bias": encode(bias, node.bias_format)}))
    for tokens in (1, 20):
        x = values(tokens, 100, seed=1)
        found = linear(torch.from_numpy(x), Step.of([tokens], [0])).numpy()
        wanted = exact(packed, x) + bias
        assert nmse(found - bias, wanted - bias) < 5e-4


def test_a_bias_is_kept_in_the_program(tiny_materials: Any) -> None:
    from tests.conftest import FAMILY_CONFIGS
    from tests.unit.test_native import widened
    from trimtab.spec.configs import spec_from_config

    spec = spec_from_config(widened(FAMILY_CONFIGS["qwen2"]), "tiny").with_dtype("float32")
    model = Model(Variant(spec, random_weights(spec)))
    assert any(node.bias for path, node in spec.linears())
    with applied(model, "tmac:bits=4,group=32,kernel=lut,table=i16", materials=tiny_materials) as changed:
        program = lower(changed.spec, changed.weights, 1)
        ids = np.random.default_rng(3).integers(0, 97, 6)
        wanted = changed.logits([ids.tolist()])[0].numpy()
        # A sum that is added up in another order may move an entry of a table by a step of its 16 bits.
        np.testing.assert_allclose(Session(program).prefill([ids])[0], wanted[-1], rtol=1e-3, atol=5e-3)


def test_with_dtype_gives_up_the_product(tiny_model: Model) -> None:
    spec = spec_of(tiny_model, "tmac:bits=2,group=32")
    node = dict(spec.linears())["layers.0.mlp.up_proj"]
    assert hash(node) == hash(dataclasses.replace(node)) and node.product != EXACT
    plain = dict(spec.with_dtype("float32", keep_packed=False).linears())["layers.0.mlp.up_proj"]
    assert plain.product == EXACT and plain.format.is_float


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_the_technique_refuses(tiny_model: Model) -> None:
    with pytest.raises(SpecError, match="T-MAC handles 1-4 bits or ternary"):
        parse_technique("tmac:bits=5")
    with pytest.raises(SpecError, match=r"group=34 .* g=4"):
        parse_technique("tmac:group=34")
    with pytest.raises(SpecError, match="g=3"):
        parse_technique("tmac:g=3")
    assert parse_technique("tmac:bits=ternary,g=3,group=34")
    with pytest.raises(SpecError, match="longer than its rows of 96"):
        spec_of(tiny_model, "tmac:group=128")
    for text in ("cats:sparsity=0.5+tmac:group=32", "tmac:group=32+cats:sparsity=0.5"):
        with pytest.raises(SpecError, match="transposed"):
            spec_of(tiny_model, text)
    with pytest.raises(SpecError, match="no product by table lookup"):
        tiles_of(WeightFormat(kind="fp32"), LookupTable(), 16, 32)
    with pytest.raises(SpecError, match="act_group=6"):
        LookupTable(act_group=6)


def test_rows_that_no_table_divides_are_padded(isa: str) -> None:
    packed, x = encode(values(16, 37), planes(3, -1, 37)), values(2, 37, seed=1)
    assert packed.shape == (16, 37)
    wanted = exact(packed, x)
    np.testing.assert_allclose(
        multiply(packed, LookupTable(table="f32"), x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    "text", ["tmac:bits=2,group=32,kernel=lut,isa=avx512", "tmac:bits=ternary,group=32,isa=avx512"]
)
def test_an_instruction_set_that_is_missing_is_named(tiny_model: Model, tiny_materials: Any, text: str) -> None:
    missing = _core.missing_flags("avx512")
    if not missing or missing == "?":
        pytest.skip("this processor has AVX-512, or the build has not")
    with pytest.raises(HardwareError, match="avx512vbmi"), applied(tiny_model, text, materials=tiny_materials) as model:
        model.logits([[1, 2]])
    spec = spec_of(tiny_model, text)
    with pytest.raises(HardwareError, match="avx512vbmi"):
        lower(spec, reencode(tiny_model.weights, spec))


def test_an_instruction_set_can_be_chosen(tiny_model: Model) -> None:
    spec = spec_of(tiny_model, "tmac:bits=2,group=32,kernel=lut,isa=scalar,threads=1")
    try:
        program = lower(spec, reencode(tiny_model.weights, spec))
        assert program.isa == "baseline" and program.threads == 1
    finally:
        use_isa("auto")


def test_a_matrix_that_cannot_be_looked_up_is_named_by_lowering(tiny_model: Model) -> None:
    from trimtab.spec.tree import Edit

    spec = tiny_model.spec.edit([Edit("layers.0.mlp.up_proj", "product", LookupTable())], by="test")
    with pytest.raises(UnsupportedModelError, match="no product by table lookup"):
        lower(spec, tiny_model.weights)


def test_encoders_are_what_encode_calls() -> None:
    form = planes(2, 32, 64)
    np.testing.assert_array_equal(decode(encode(values(16, 64), form)), decode(encode_planes(values(16, 64), form)))
