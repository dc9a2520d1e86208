"""Formats of modern checkpoints and caches: bytes by hand, names, and what has no kernel yet."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.runtime.numerics import decode, encode
from trimtab.spec.cache import PageFormat, page_format
from trimtab.spec.configs import load_spec
from trimtab.spec.formats import WeightFormat, weights_name
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.runnable import check_runnable
from trimtab.spec.tree import Edit

FP8, MXFP4 = WeightFormat(kind="fp8"), WeightFormat(kind="mxfp4")


@pytest.mark.parametrize(("form", "nbytes"), [(FP8, 3 * 64 + 3 * 4), (MXFP4, 3 * 2 * 17)])
def test_bytes_are_those_of_the_buffers(form: WeightFormat, nbytes: int) -> None:
    packed = encode(np.random.default_rng(0).standard_normal((3, 64)), form)
    assert form.nbytes(3, 64) == packed.nbytes == nbytes


def test_mxfp4_by_hand() -> None:
    # Largest magnitude 12 = 1.5 * 2^3: the scale is 2^(3 - 2) = 2, so 12 is 6 (code 7), -3 is -1.5, 0.4 is 0.2 -> 0.
    row = np.zeros((1, 32), np.float32)
    row[0, :4] = 12, -3, 0.4, 16
    row[0, 4:] = 1.0
    packed = encode(row, MXFP4)
    assert packed.buffers["scale"].tolist() == [[127 + 2]]  # 16 is the largest: 2^(4 - 2)
    assert packed.buffers["codes"][0, :3].tolist() == [5 | (8 | 2) << 4, 0 | 6 << 4, 0 | 0 << 4]
    np.testing.assert_array_equal(decode(packed)[0, :5], [12, -4, 0, 16, 0])  # -0.75 and 0.25 are ties: to even


def test_mxfp4_refuses_rows_that_do_not_divide_and_values_that_are_not_finite() -> None:
    with pytest.raises(SpecError, match="blocks of 32"):
        encode(np.zeros((2, 48)), MXFP4)
    for form in (FP8, MXFP4):
        with pytest.raises(SpecError, match="not finite"):
            encode(np.full((1, 32), np.inf), form)


@pytest.mark.parametrize(
    ("asked", "nbytes"),
    [
        ("bf16", 96 * 2), ("float32", 96 * 4), ("fp8", 96), ("int8", 96 + 2 * 4), ("int4", 48 + 2 * 4), ("int4-g32", 48 + 3 * 4),
        ("int8-g96", 96 + 4),
    ],
)  # fmt: skip
def test_bytes_of_a_cached_key(asked: str, nbytes: int) -> None:
    """A head of 96: groups of 64 are two, each with an fp16 scale and minimum."""
    assert page_format(asked).nbytes(1, 96) == nbytes
    assert page_format(asked).nbytes(5, 96) == 5 * nbytes


@pytest.mark.parametrize("asked", ["int3", "fp4", "int4-g", "int4-g0", "bf16-g32", "int8g32"])
def test_an_unknown_page_format_is_refused_with_the_known_ones(asked: str) -> None:
    with pytest.raises(SpecError, match="int4"):
        page_format(asked)


def test_names() -> None:
    assert str(PageFormat("int4", 32)) == "int4-g32"
    assert weights_name("float16") == "fp16"
    with pytest.raises(SpecError, match="mxfp4"):
        weights_name("fp6")


def test_fp8_codes_every_linear_but_router_and_head() -> None:
    spec = load_spec("qwen1.5-moe-a2.7b").with_dtype("fp8", "fp8")
    coded = {path.rpartition(".")[2] for path, node in spec.linears() if node.act == "fp8" and node.format == FP8}
    plain = {path.rpartition(".")[2] for path, node in spec.linears() if node.act == "none" and node.format.is_float}
    assert coded == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert plain == {"router", "shared_gate", "lm_head"}
    assert spec.act_dtype == "bf16"
    assert spec.embed_tokens.format.is_float
    assert spec.kv_nbytes(10) * 2 == load_spec("qwen1.5-moe-a2.7b").kv_nbytes(10)
    assert spec.with_dtype("bfloat16", keep_packed=False) == load_spec("qwen1.5-moe-a2.7b")


def test_mxfp4_codes_the_experts_alone_where_there_are_any() -> None:
    """gpt-oss-20b: 24 layers of 32 experts with three matrices of 2880 x 2880 in 17 bytes per 32, the rest in 2 bytes."""
    spec = load_spec("gpt-oss-20b")
    experts = 24 * 32 * 3 * 2880 * 2880
    assert spec.with_dtype("mxfp4").weight_nbytes() == 2 * (spec.num_parameters() - experts) + experts * 17 // 32


def test_weights_of_a_coded_product_are_not_decoded() -> None:
    spec = load_spec("smollm2-135m")
    at = "layers.0.self_attn.q_proj"
    for format_, act, vector in ((FP8, "none", 2 * 576 * 576), (FP8, "fp8", 7 * (2 * 576 + 576))):
        edited = spec.edit([Edit(at, "format", format_), Edit(at, "act", act)], "test")
        op = next(op for op in build(edited).ops if op.name == at)
        counts = count(op, StepShape.of([7], [0]))
        assert int(counts.vector_flops) == vector
        assert int(counts.weight_read) == 576 * 576 + 4 * 576
        assert int(counts.flops) == 2 * 7 * 576 * 576
    with pytest.raises(SpecError, match="fp4"):
        LinearSpec(n=1, k=1, act="fp16")


def test_a_coded_cache_is_decoded_where_it_is_read() -> None:
    plain, coded = load_spec("llama-3.1-8b"), load_spec("llama-3.1-8b").with_dtype("bfloat16", "int8")
    step = StepShape.of([1], [99])
    for name in ("append", "attend"):
        a, b = (next(op for op in build(s).ops if op.name == f"layers.0.self_attn.{name}") for s in (plain, coded))
        keys = 100 if name == "attend" else 1
        more = int(count(b, step, "tiled").vector_flops) - int(count(a, step, "tiled").vector_flops)
        assert more == 2 * keys * 8 * 2 * 128
        read = count(b, step, "tiled")
        assert int(read.kv_read + read.kv_written) == keys * 8 * 2 * (128 + 2 * 4)


@pytest.mark.parametrize(
    ("name", "dtype", "kv_dtype", "told"),
    [
        ("smollm2-135m", "fp8", None, "fp8"),
        ("deepseek-v3", "bfloat16", None, "latent attention"),
    ],
)
def test_what_has_no_kernel_is_refused_in_one_sentence(name: str, dtype: str, kv_dtype: str | None, told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told) as found:
        check_runnable(load_spec(name).with_dtype(dtype, kv_dtype))
    assert "trimtab predict" in str(found.value)


def test_what_runs_is_let_through(family: object) -> None:
    check_runnable(family)  # type: ignore[arg-type]
    check_runnable(load_spec("smollm2-135m").with_dtype("mxfp4"))  # weights alone are decoded


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_model_with_coded_weights_runs_on_their_decoded_values(tiny_model: object, kind: str) -> None:
    """Logits over packed weights equal those over the same weights decoded before."""
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.weights.packed import Weights
    from trimtab.runtime.weights.random import random_weights

    spec = tiny_model.spec.with_dtype("float32")  # type: ignore[attr-defined]
    edits = [Edit(path, "format", WeightFormat(kind=kind)) for path, _ in spec.linears() if path != "lm_head"]
    packed_spec = spec.edit(edits, "test")
    packed = random_weights(packed_spec)
    plain = Weights({path: encode(decode(item), WeightFormat(kind="fp32")) for path, item in packed.items()})
    ids = [[5, 9, 2, 77, 31]]
    ours, theirs = Model(Variant(packed_spec, packed)).logits(ids), Model(Variant(spec, plain)).logits(ids)
    assert (ours - theirs).abs().max() < 1e-5
    assert packed.nbytes == packed_spec.weight_nbytes() < plain.nbytes / 2
