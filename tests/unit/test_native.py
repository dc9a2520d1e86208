"""The native program against the torch decoder, its counts against the graph, and its tiles against the codecs."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CapacityError, HardwareError, SpecError, UnsupportedModelError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.fuse import fuse
from trimtab.graph.ops import StepShape
from trimtab.model.variant import Model, Variant
from trimtab.runtime import kernels
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.kernels import _core
from trimtab.runtime.native import NativeModel, lower, lowered_spec
from trimtab.runtime.native.lower import core_tiles
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.numerics.tiles import tile, untile
from trimtab.runtime.step import Recorder
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.formats import GGUF_BLOCKS, WeightFormat
from trimtab.spec.machine import load_stack
from trimtab.spec.tree import Edit
from trimtab.techniques.apply import load_engine, reencode


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def blocks(kind: str, rows: int, cols: int, seed: int = 0) -> Packed:
    """Random blocks whose scales are plausible halves."""
    rng = np.random.default_rng(seed)
    elements, nbytes = GGUF_BLOCKS[kind]
    made = rng.integers(0, 256, (rows, cols // elements, nbytes), dtype=np.uint8)
    halves = rng.normal(0, 0.02, (rows, cols // elements, 2)).astype(np.float16).view(np.uint8)
    if kind == "q6_k":
        made[..., 208:] = halves[..., :2]
    else:
        made[..., :2] = halves[..., :2]
        if kind in ("q4_1", "q5_1", "q4_k", "q5_k"):
            made[..., 2:4] = halves[..., 2:]
    return Packed(WeightFormat(kind=kind), (rows, cols), {"blocks": made.reshape(rows, -1)})


# -------------------------------------------------------------------------------------------------------------- tiles

GRIDS = [
    WeightFormat(kind="int", bits=bits, group=group, sym=sym)
    for bits in range(2, 9)
    for group, sym in ((16, True), (32, False), (64, True), (192, False))
]


@pytest.mark.parametrize("form", GRIDS, ids=str)
def test_tiles_hold_what_rows_hold(form: WeightFormat) -> None:
    packed = encode(values(33, 192), form)
    made = tile(packed)
    assert made.nbytes == made.format.nbytes(33, 192)
    np.testing.assert_array_equal(decode(made), decode(packed))
    back = untile(made)
    assert back.format == form
    for name, buffer in packed.buffers.items():
        np.testing.assert_array_equal(back.buffers[name], buffer)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_tiles_of_floats(kind: str) -> None:
    packed = encode(values(33, 77), WeightFormat(kind=kind))
    np.testing.assert_array_equal(decode(tile(packed)), decode(packed))
    np.testing.assert_array_equal(untile(tile(packed)).buffers["data"], packed.buffers["data"])


@pytest.mark.parametrize("kind", sorted(GGUF_BLOCKS))
def test_blocks_of_files_go_into_tiles_exactly(kind: str) -> None:
    packed = blocks(kind, 33, 512)
    np.testing.assert_array_equal(decode(tile(packed)), decode(packed))


def test_what_has_no_tiles_says_so() -> None:
    with pytest.raises(SpecError, match="fp8 weights have no tiled layout"):
        WeightFormat(kind="fp8", tiled=True)
    with pytest.raises(SpecError, match="groups of 16, 32, 48"):
        tile(encode(values(16, 96), WeightFormat(kind="int", bits=4, group=24)))
    with pytest.raises(SpecError, match="stored transposed has no tiles"):
        tile(encode(values(16, 96), WeightFormat(kind="fp32"), layout="transposed"))


# ----------------------------------------------------------------------------------------------------------- products


def product(packed: Packed, x: np.ndarray, threads: int = 1, twice_from: float = -1.0) -> tuple[np.ndarray, int]:
    y = np.empty((len(x), packed.shape[0]), np.float32)
    return y, _core.multiply(core_tiles(packed), x, threads, y, twice_from)


def coded(x: np.ndarray, group: int, twice_from: float) -> np.ndarray:
    """What int8 codes of x stand for: groups of `group` columns with a scale of their largest value / 127.

    Groups whose scale is `twice_from` times the typical one of the row, or more, add the codes of what rounding left.
    """
    padded = np.zeros((len(x), -(-x.shape[1] // group) * group), np.float32)
    padded[:, : x.shape[1]] = x
    parts = padded.reshape(len(x), -1, group)
    peak = np.abs(parts).max(-1, keepdims=True)
    scale = peak / np.float32(127)
    by = np.where(peak > 0, np.float32(127) / np.where(peak > 0, peak, 1), 0).astype(np.float32)
    first = np.rint(parts * by) * scale
    bits = np.where(scale > 0, scale.view(np.int32), 0).sum(1, dtype=np.int64) // np.maximum((scale > 0).sum(1), 1)
    typical = bits.astype(np.int32).view(np.float32)[:, None]
    twice = (scale > 0) & ~(scale < typical * np.float32(twice_from))
    fine = np.where(scale > 0, scale, 1) / np.float32(254)
    return (first + np.where(twice, np.rint((parts - first) / fine) * fine, 0)).reshape(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("form", GRIDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("twice_from", [0.0, 2.0, np.inf])
def test_integer_products_are_those_of_the_coded_input(
    isa: str, form: WeightFormat, tokens: int, twice_from: float
) -> None:
    packed, x = tile(encode(values(33, 192), form)), values(tokens, 192, seed=1)
    x[::2, 70] *= 30
    y, read = product(packed, x, twice_from=twice_from)
    act = 64 if form.group % 64 == 0 else 32 if form.group % 32 == 0 else 16
    wanted = coded(x, act, twice_from).astype(np.float64) @ decode(packed).T.astype(np.float64)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert read == packed.nbytes


@pytest.mark.parametrize(("cols", "group"), [(48, 16), (80, 16), (144, 48)])
def test_rows_of_an_odd_number_of_groups(isa: str, cols: int, group: int) -> None:
    """Codes are padded to 32 columns; there is no scale of the padding."""
    packed, x = tile(encode(values(40, cols), WeightFormat(kind="int", bits=6, group=group))), values(3, cols, seed=1)
    y, read = product(packed, x)
    wanted = coded(x, 16, 3.0).astype(np.float64) @ decode(packed).T.astype(np.float64)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert read == packed.nbytes


@pytest.mark.parametrize("kind", sorted(GGUF_BLOCKS))
def test_products_of_block_formats(isa: str, kind: str) -> None:
    packed, x = tile(blocks(kind, 33, 512)), values(3, 512, seed=1)
    y, read = product(packed, x)
    wanted = coded(x, 16 if kind == "q6_k" else 32, 3.0).astype(np.float64) @ decode(packed).T.astype(np.float64)
    np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert read == packed.nbytes


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_float_products(isa: str, kind: str, tokens: int) -> None:
    packed, x = tile(encode(values(33, 77), WeightFormat(kind=kind))), values(tokens, 77, seed=1)
    y, read = product(packed, x)
    wanted = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert read == packed.nbytes


def test_groups_with_an_outlier_are_coded_twice(isa: str) -> None:
    packed, x = tile(encode(values(32, 256), WeightFormat(kind="int", bits=4, group=64))), values(2, 256, seed=1)
    x[:, 5] *= 30  # one large value makes the other codes of its group coarse
    exact = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
    once, outliers, all_ = (np.abs(product(packed, x, 1, at)[0] - exact).max() for at in (np.inf, 2.0, 0.0))
    assert outliers < once / 4
    assert all_ < once / 100


def test_products_do_not_depend_on_threads() -> None:
    packed, x = tile(encode(values(200, 192), WeightFormat(kind="int", bits=4, group=64))), values(9, 192, seed=1)
    np.testing.assert_array_equal(product(packed, x, 1)[0], product(packed, x, 3)[0])


# ----------------------------------------------------------------------------------------------------------- programs


def native_of(model: Model, threads: int = 2) -> NativeModel:
    return NativeModel(lower(model.spec, model.weights, threads))


def widened(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny configs have heads of 8; the kernels want a multiple of 16."""
    wide = dict(config)
    for name in ("hidden_size", "n_embd", "word_embed_proj_dim"):
        if name in wide:
            wide[name] = 96
    if "head_dim" in wide:
        wide["head_dim"] = 16
    return wide


def family_model(name: str) -> Model:
    from tests.conftest import FAMILY_CONFIGS
    from trimtab.spec.configs import spec_from_config

    spec = spec_from_config(widened(FAMILY_CONFIGS[name]), f"tiny-{name}").with_dtype("float32")
    return Model(Variant(spec, random_weights(spec)))


LOWERED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt")
REFUSED = {
    "bloom": "ALiBi", "gpt_neox": "side by side", "phi": "side by side", "mixtral": "mixture of experts",
    "gpt_oss": "mixture of experts",
}  # fmt: skip


@pytest.mark.parametrize("name", LOWERED)
def test_every_pass_gives_the_logits_of_the_decoder(isa: str, name: str) -> None:
    model = family_model(name)
    program = native_of(model).program
    ids = np.random.default_rng(3).integers(0, 97, 40)
    wanted = model.logits([ids.tolist()])[0].numpy()
    session = Session(program, chunk=13)  # chunks that divide nothing
    np.testing.assert_allclose(session.prefill([ids[:30]], reserve=10)[0], wanted[29], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(session.extend([ids[30:33]]), wanted[30:33], rtol=1e-4, atol=1e-4)
    for at in range(33, 40):
        np.testing.assert_allclose(session.decode([ids[at]])[0], wanted[at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LOWERED if name != "opt"])
def test_kernels_are_the_fused_graph(name: str) -> None:
    """What is priced is what runs: the names of the fused graph, in order."""
    program = native_of(family_model(name)).program
    session = Session(program)
    session.prefill([[1, 2, 3]])
    fused = fuse(build(program.spec), dataclasses.replace(load_stack("ideal"), fused=frozenset({"native"})))
    assert [name for name, *_ in program.metered()] == [kernel.name for kernel in fused]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_kernel_is_named(name: str) -> None:
    model = family_model(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        lower(model.spec, model.weights)


def test_rows_of_a_batch_do_not_touch_each_other(tiny_model: Model) -> None:
    program = native_of(tiny_model).program
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 131, n) for n in (1, 17, 140)]
    together = Session(program)
    first = together.prefill(prompts, reserve=3)
    second = together.decode([7, 8, 9])
    for row, prompt in enumerate(prompts):
        alone = Session(program)
        np.testing.assert_allclose(alone.prefill([prompt], reserve=3)[0], first[row], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone.decode([7 + row])[0], second[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 300])
def test_split_attention_is_whole_attention(tiny_model: Model, tokens: int) -> None:
    """Decode cuts long contexts into ranges of keys; prefill does not."""
    program = native_of(tiny_model).program
    ids = np.random.default_rng(6).integers(0, 131, tokens + 1)
    wanted = tiny_model.logits([ids.tolist()])[0, -1].numpy()
    session = Session(program)
    session.prefill([ids[:-1]], reserve=1)
    np.testing.assert_allclose(session.decode([ids[-1]])[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float16"])
def test_cache_formats(tiny_model: Model, kv_dtype: str) -> None:
    spec = tiny_model.spec.with_kv_dtype(kv_dtype)
    program = lower(spec, tiny_model.weights, 2)
    reference = Model(Variant(spec, tiny_model.weights))
    ids = np.random.default_rng(7).integers(0, 131, 90)
    both = [Session(runner) for runner in (program, reference.runner())]
    first, second = (session.prefill([ids], reserve=1)[0] for session in both)
    np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)
    assert both[0].store.nbytes() == both[1].store.nbytes()


@pytest.mark.parametrize("form", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("new,past", [(1, 0), (1, 150), (5, 20)])
def test_counts_are_those_of_the_graph(tiny_model: Model, form: str, new: int, past: int) -> None:
    spec = tiny_model.spec
    if form == "int4":
        spec = dataclasses.replace(spec)
        from trimtab.techniques.base import compose
        from trimtab.techniques.registry import parse_all

        spec = compose(spec, parse_all(["rtn:bits=4,group=32"]))
    else:
        spec = spec.with_dtype(form, "float32")
    weights = Weights({p: transcoded(packed, form) for p, packed in tiny_model.weights.items()})
    program = lower(spec, reencode(weights, spec), 2)
    assert program.weight_bytes == program.spec.weight_nbytes()
    ids = np.random.default_rng(8).integers(0, 131, past + new)
    session = Session(program)
    if past:
        session.prefill([ids[:past]], reserve=new)
    record = session.record = Recorder()
    if past:
        session.extend([ids[past:]])
    else:
        session.prefill([ids])
    step = StepShape.of([new], [past], logits=new if past else 1)
    wanted = [count(op, step, "tiled") for op in build(program.spec).ops]
    assert record.total("weight_read") == sum(int(c.weight_read) for c in wanted)
    assert record.total("kv_written") == sum(int(c.kv_written) for c in wanted)
    assert record.total("kv_read") == sum(int(c.kv_read) for c in wanted)


def transcoded(packed: Packed, form: str) -> Packed:
    if form == "bf16":
        return encode(decode(packed), WeightFormat(kind="bf16"), packed.layout)
    return packed


@pytest.mark.parametrize("tokens", [48, pytest.param(256, marks=pytest.mark.slow)])
def test_greedy_tokens_of_the_built_in_model(smollm2_path: Any, tokens: int) -> None:
    """In fp32; where they part, the two likeliest tokens must be closer than 1e-3."""
    import trimtab
    from trimtab.techniques.apply import load_native

    native, model = load_native("smollm2-135m", dtype="float32"), trimtab.load("smollm2-135m")
    prompt = model.tokenizer.encode("Once upon a time", add_special_tokens=True)
    options: dict[str, Any] = {"max_new_tokens": tokens, "ignore_eos": True}
    ours, theirs = native.generate(prompt, **options).ids, model.generate(prompt, **options).ids
    parts = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if parts is not None:
        logits = model.logits([prompt + list(theirs[:parts])])[0, -1]
        top = torch.topk(logits, 2).values
        assert float(top[0] - top[1]) < 1e-3


PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "In 1969,", "Water boils at")


@pytest.mark.parametrize("dtype", ["file", "float32"])
def test_instruction_sets_give_the_same_tokens(smollm2_path: Any, dtype: str) -> None:
    """5 prompts, 64 greedy tokens; where two sets part, the two likeliest tokens must be closer than 1e-3.

    Inputs coded in int8 need more: one rounding that differs can move a code, and a code moves the logits by 0.1. There the
    sets of eight lanes agree to the bit.
    """
    from trimtab.techniques.apply import load_native

    model = load_native("smollm2-135m", dtype=dtype, threads=1)
    prompts = [model.tokenizer.encode(text, add_special_tokens=True) for text in PROMPTS]
    found, logits = {}, {}
    try:
        for name in ["scalar", *(name for name in _core.isas()[1:] if name != "avx512")]:
            kernels.use_isa(name)
            logits[name] = Session(model.program).prefill(prompts)
            outputs = model.generate(prompts, max_new_tokens=64, ignore_eos=True)
            found[name] = [output.ids for output in outputs]
    finally:
        kernels.use_isa("auto")
    for name, rows in found.items():
        assert dtype == "float32" or np.array_equal(logits[name], logits["scalar"])
        for prompt, ids, wanted in zip(prompts, rows, found["scalar"], strict=True):
            parts = next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=True)) if a != b), None)
            if parts is not None:
                top = np.sort(Session(model.program).prefill([prompt + list(wanted[:parts])])[0])[-2:]
                assert top[1] - top[0] < 1e-3, name


#: Every path whose inputs are coded in int8: (dtype, techniques, tokens of a pass).
CODED = (
    ("file", ("",), 512),
    ("float32", ("rtn:bits=8,group=64",), 512),
    ("float32", ("rtn:bits=4,group=64",), 512),
    ("float32", ("rtn:bits=3,group=64",), 512),
    ("float32", ("tmac:bits=4,group=64,kernel=lut",), 8),
    ("float32", ("2 bits",), 512),
    ("float32", ("2 bits by lookup",), 8),
)


def coded_model(dtype: str, technique: str) -> tuple[NativeModel, Weights]:
    """A native model and its weights. All of it in 2 bits is noise (perplexity 26,447): there, ten matrices have them."""
    import trimtab
    from trimtab.spec.product import LookupTable
    from trimtab.techniques.apply import load_native

    if not technique.startswith("2 bits"):
        names = (technique,) if technique else ()
        loaded = load_native("smollm2-135m", dtype=dtype, techniques=names)
        return loaded, trimtab.load("smollm2-135m", dtype=dtype, techniques=names).weights
    plain = trimtab.load("smollm2-135m")
    paths = [f"layers.{index}.mlp.up_proj" for index in range(0, 30, 3)]
    lookup = technique.endswith("lookup")
    form = WeightFormat(kind="bitplane" if lookup else "int", bits=2, group=32, sym=False, tiled=lookup)
    edits = [Edit(path, "format", form) for path in paths]
    if lookup:
        edits += [Edit(path, "product", LookupTable()) for path in paths]
    spec = plain.spec.edit(edits, by="test")
    weights = reencode(plain.weights, spec)
    return NativeModel(lower(spec, weights)), weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype,techniques,chunk", CODED, ids=lambda value: str(value))
def test_coded_inputs_keep_the_model(smollm2_path: Any, dtype: str, techniques: tuple[str], chunk: int) -> None:
    """Against the same codes in floats, fp32: KL at most 0.01 nats, top-1 at least 97 %, perplexity within 0.5 %."""
    import trimtab
    from trimtab.runtime.text.builtin import builtin_text
    from trimtab.spec.formats import FP32

    native, weights = coded_model(dtype, *techniques)
    plain = {
        path: packed if packed.format.is_float else encode(decode(packed), FP32) for path, packed in weights.items()
    }
    whole = trimtab.load("smollm2-135m")
    reference = Model(Variant(whole.spec, Weights(plain)))
    text, logs = builtin_text(), []
    for start in (5000, 60000, 200000, 330000):
        ids = np.asarray(whole.tokenizer.encode(text[start : start + 9000], add_special_tokens=True))[:513]
        session = Session(native.program)
        rows = [session.prefill([ids[:1]], reserve=512)]
        rows += [session.extend([ids[at : min(at + chunk, 512)]]) for at in range(1, 512, chunk)]
        ours = torch.log_softmax(torch.from_numpy(np.concatenate(rows)), -1)
        theirs = torch.log_softmax(reference.logits([ids[:512].tolist()])[0], -1)
        target = torch.from_numpy(ids[1:513])[:, None]
        logs.append(
            (
                (theirs.exp() * (theirs - ours)).sum(-1).mean().item(),
                (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
                -ours.gather(1, target).mean().item(),
                -theirs.gather(1, target).mean().item(),
            )
        )
    kl, top1, nll, nll_floats = np.mean(logs, axis=0)
    change = float(np.exp(nll - nll_floats) - 1)
    print(f"{dtype} {techniques}: KL {kl:.5f} nats, top-1 {top1:.2%}, perplexity {np.exp(nll):.1f}, {change:+.3%}")
    assert kl <= 0.01
    assert top1 >= 0.97
    assert abs(change) <= 0.005


def test_the_native_run_never_imports_torch(smollm2_path: Any) -> None:
    code = (
        "import sys; from trimtab.techniques.apply import load_native; m = load_native('smollm2-135m');"
        "print(m.generate('The sky is', max_new_tokens=3).text); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_engines_and_instruction_sets_are_asked_for_by_name(smollm2_path: Any) -> None:
    with pytest.raises(SpecError, match="engine"):
        load_engine("smollm2-135m", engine="cuda")
    with pytest.raises(SpecError, match="threads=-1"):
        load_engine("smollm2-135m", threads=-1)
    with pytest.raises(SpecError, match="instruction set"):
        kernels.use_isa("neon")
    for name in ("avx2", "avx512"):
        missing = _core.missing_flags(name)
        if missing:
            with pytest.raises(HardwareError, match=missing.split(",")[0] if missing != "?" else "no"):
                kernels.use_isa(name)


def test_a_step_that_does_not_fit_names_its_bytes() -> None:
    """In a process of its own, whose address space is cut to a little more than it has."""
    code = """
import resource, numpy as np
from trimtab.errors import CapacityError
from trimtab.measure.calibrate_native import random_program
from trimtab.runtime.engine.generate import Session
from trimtab.spec.formats import WeightFormat
program = random_program(WeightFormat(kind="int", bits=2, group=128), layers=1)
session = Session(program, chunk=4096)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (100 << 20),) * 2)
try:
    session.prefill([np.zeros(4096, np.int64)])
except CapacityError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert re.search(r"take \d+ bytes, and the system refuses them", done.stdout), done.stdout + done.stderr


def test_too_little_memory_names_the_bytes() -> None:
    from trimtab.runtime.native.arena import Arena

    with pytest.raises(CapacityError, match="EiB|PiB|TiB"):
        Arena(1 << 60)


def test_lowering_keeps_the_model(tiny_model: Model) -> None:
    spec = lowered_spec(tiny_model.spec)
    assert spec.num_parameters() == tiny_model.spec.num_parameters()
    assert all(node.format.tiled for _, node in spec.linears())


@pytest.mark.parametrize("with_rtn", [False, True])
@pytest.mark.parametrize("prefill", [True, False])
def test_skipped_rows_are_those_of_the_decoder(
    tiny_model: Model, tiny_materials: Any, with_rtn: bool, prefill: bool
) -> None:
    """CATS natively: same logits, same rows touched, and only those read."""
    from trimtab.techniques.apply import derive, resolve_all
    from trimtab.techniques.registry import parse_all

    wanted = (["rtn:bits=8,group=32"] if with_rtn else []) + ["cats:sparsity=0.5"]
    chosen = resolve_all(tiny_model, parse_all(wanted), tiny_materials.for_model(tiny_model))
    variant = derive(tiny_model.variant, chosen, tiny_materials.for_model(tiny_model))
    spec = variant.spec
    if not prefill:
        edits = [
            Edit(f"layers.{i}.mlp", "executor", dataclasses.replace(layer.mlp.executor, threshold_prefill=False))
            for i, layer in enumerate(spec.layers)
        ]
        spec = dataclasses.replace(spec, history=()).edit(edits, by="test")
        variant = Variant(spec, variant.weights)
    reference = Session(Model(variant).runner())
    program = lower(spec, variant.weights, 2)
    assert program.weight_bytes == program.spec.weight_nbytes()
    native = Session(program)
    ids = np.random.default_rng(4).integers(0, 131, 24)
    # int8 codes of the input differ from floats in rtn's case: the gate decides a few neurons another way
    tolerance = {"rtol": 0.1, "atol": 1.0} if with_rtn else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(
        native.prefill([ids[:20]], reserve=4)[0], reference.prefill([ids[:20]], reserve=4)[0], **tolerance
    )
    native.record, reference.record = Recorder(), Recorder()
    np.testing.assert_allclose(native.decode([ids[20]]), reference.decode([ids[20]]), **tolerance)
    if not with_rtn:
        assert native.record.observed == reference.record.observed
        step = StepShape.of([1], [20], logits=1, observed=native.record.observed)
        counts = [count(op, step, "tiled") for op in build(program.spec).ops]
        assert native.record.total("weight_read") == sum(int(c.weight_read) for c in counts)
        assert native.record.total("flops") == sum(int(c.flops) for c in counts)
