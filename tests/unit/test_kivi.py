"""KIVI and the page formats: codes, bytes, chunks, cuts, and what is read while codes are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.errors import Conflict, NotRewindable, SpecError
from trimtab.runtime.cache.pages import decode, encode
from trimtab.runtime.cache.store import KVStore
from trimtab.runtime.step import Step
from trimtab.spec.cache import PageFormat, page_format
from trimtab.spec.configs import load_spec, spec_from_config
from trimtab.spec.model import ModelSpec
from trimtab.techniques.apply import applied
from trimtab.techniques.base import compose
from trimtab.techniques.registry import parse_all

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
LAYERS, HEADS, SIZE = 2, 3, 16
FORMATS = [
    PageFormat("fp32"), PageFormat("fp16"), PageFormat("bf16"), PageFormat("fp8"), PageFormat("int8", 16), PageFormat("int4", 5),
    PageFormat("int2", 8), PageFormat("int2", 8, by_channel=True), PageFormat("int4", 24, by_channel=True),
    PageFormat("int8", 4, by_channel=True), PageFormat("bfp", 8, bits=4), PageFormat("bfp", 16, bits=11),
]  # fmt: skip


def kivi(text: str, kv: str = "float32") -> ModelSpec:
    return compose(spec_from_config(CONFIG, "kivi").with_dtype("float32", kv), parse_all([text]))


def feed(store: KVStore, seq: Any, k: np.ndarray, v: np.ndarray, chunks: list[int], past: int = 0) -> list[Any]:
    """Append tokens in chunks; returns the views of the last chunk."""
    views: list[Any] = []
    for count in chunks:
        step = Step.of([count], [past], [seq])
        part = slice(past, past + count)
        views = [store.append(layer, k[part], v[part], step)[0] for layer in range(len(store.spec.layers))]
        past += count
    return views


def codes(seq: Any) -> list[np.ndarray]:
    """What every coded page of a sequence stands for, keys and values [G, sealed, H]."""
    return [row.read(side, 0, row.sealed[side]) for rows in seq._rows for row in rows for side in range(2)]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_pages_hold_what_their_format_says(form: PageFormat) -> None:
    """Bytes are those of the format; what is decoded lies within half a step of what was coded."""
    x = np.random.default_rng(0).standard_normal((3, 48, SIZE), dtype=np.float32) * 3
    parts = encode(form, x)
    assert sum(part.nbytes for part in parts) == 3 * form.nbytes(48, SIZE)
    back = decode(form, parts, SIZE)
    if form.kind == "bf16":
        return
    if form.kind.startswith("int"):
        along = 1 if form.by_channel else 2
        grouped = np.array_split(x, range(form.group, x.shape[along], form.group), axis=along)
        span = np.concatenate(
            [np.broadcast_to(np.ptp(g, axis=along, keepdims=True), g.shape) for g in grouped], axis=along
        )
        # Half a step, and what fp16 rounds away of the minimum and of the step times the code.
        assert (np.abs(back - x) <= 0.5 * span / (2**form.bits - 1) + 2e-3 * np.abs(x).max()).all()
    else:
        bound = {"fp32": 0, "fp16": 2**-11, "fp8": 2**-4, "bfp": 2.0 ** -(form.bits - 2)}[form.kind]
        assert (np.abs(back - x) <= bound * np.abs(x).max()).all()


def test_a_group_of_equal_elements_is_exact_and_a_huge_one_refused() -> None:
    x = np.full((1, 8, SIZE), 0.5, np.float32)
    for form in (PageFormat("int2", 8), PageFormat("int2", 8, by_channel=True)):
        np.testing.assert_array_equal(decode(form, encode(form, x), SIZE), x)
        with pytest.raises(SpecError, match="fp16"):
            encode(form, x * np.float32(1e6))
    with pytest.raises(SpecError, match="whole groups"):
        encode(PageFormat("int2", 3, by_channel=True), x)


def test_fp8_pages_are_torch_e4m3() -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal((2, 64, 32), dtype=np.float32) * 20
    mine = decode(PageFormat("fp8"), encode(PageFormat("fp8"), x), 32)
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "text", ["kivi:group=8,residual=8", "kivi:bits=4,group=16,residual=48", "kivi:kbits=8,vbits=2,group=8,residual=24"]
)
def test_codes_do_not_depend_on_chunks(text: str) -> None:
    rng = np.random.default_rng(2)
    k, v = (rng.standard_normal((700, HEADS, SIZE), dtype=np.float32) for _ in range(2))
    spec = kivi(text, "bfloat16")
    found = []
    for size in (1, 7, 64, 300):
        store = KVStore(spec)
        seq = store.open()
        feed(store, seq, k, v, [size] * (700 // size) + ([700 % size] if 700 % size else []))
        assert store.nbytes(seq).held == spec.kv_nbytes(700)
        found.append(codes(seq))
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_keys_by_channel_values_by_token_and_the_residual_as_it_came() -> None:
    """What is read after n tokens: groups of tokens of a channel, groups of channels of a token, then floats."""
    rng = np.random.default_rng(3)
    k, v = (rng.standard_normal((60, HEADS, SIZE), dtype=np.float32) for _ in range(2))
    spec = kivi("kivi:group=8,residual=16")
    store = KVStore(spec)
    seq = store.open()
    view = feed(store, seq, k, v, [59, 1])[0][0]
    k_sealed, v_sealed = 48, 59 - 16  # before the last token
    k_GTH, v_GTH = k.transpose(1, 0, 2), v.transpose(1, 0, 2)
    by_channel, by_token = PageFormat("int2", 8, by_channel=True), PageFormat("int2", 8)
    np.testing.assert_array_equal(
        view.k[:, :k_sealed], decode(by_channel, encode(by_channel, k_GTH[:, :k_sealed]), SIZE)
    )
    np.testing.assert_array_equal(view.v[:, :v_sealed], decode(by_token, encode(by_token, v_GTH[:, :v_sealed]), SIZE))
    np.testing.assert_array_equal(view.k[:, k_sealed:], k_GTH[:, k_sealed:])
    np.testing.assert_array_equal(view.v[:, v_sealed:], v_GTH[:, v_sealed:])


def test_a_cut_keeps_to_the_tail_and_a_mark_brings_codes_back() -> None:
    rng = np.random.default_rng(4)
    k, v = (rng.standard_normal((200, HEADS, SIZE), dtype=np.float32) for _ in range(2))
    store = KVStore(kivi("kivi:group=8,residual=16"))
    seq = store.open()
    feed(store, seq, k, v, [100])
    mark, before = store.mark(seq), codes(seq)
    with pytest.raises(NotRewindable, match="coded its first 96 tokens"):
        store.truncate(seq, 95)
    store.truncate(seq, 97)
    feed(store, seq, v, k, [1, 39], past=97)  # after one token fewer values would be due than are coded
    assert all(np.array_equal(a, b[:, : a.shape[1]]) for a, b in zip(before, codes(seq), strict=True))
    store.reset(seq, mark)
    assert all(np.array_equal(a, b) for a, b in zip(before, codes(seq), strict=True))
    store.free(seq)
    store.release(mark)
    assert store.pages_bytes == 0


def test_forks_share_codes_until_one_writes() -> None:
    rng = np.random.default_rng(5)
    k, v = (rng.standard_normal((300, HEADS, SIZE), dtype=np.float32) for _ in range(2))
    store = KVStore(kivi("kivi:group=8,residual=8"))
    seq = store.open()
    feed(store, seq, k, v, [100])
    alone, before = store.pages_bytes, codes(seq)
    other = store.fork(seq)
    assert store.pages_bytes == alone
    feed(store, other, v, k, [50], past=100)
    assert all(np.array_equal(a, b) for a, b in zip(before, codes(seq), strict=True))
    assert store.pages_bytes > alone


def test_bytes_of_smollm2_at_4096_tokens() -> None:
    """A fifth of the bytes of 16-bit floats: 3 bits an element, and 128 values of a residual."""
    base = load_spec("smollm2-135m").with_dtype("float32", "bfloat16")
    spec = compose(base, parse_all(["kivi"]))
    store = KVStore(spec)
    seq = store.open(reserve_tokens=4096)
    kv = np.random.default_rng(6).standard_normal((512, 3, 64), dtype=np.float32)
    for past in range(0, 4096, 512):
        step = Step.of([512], [past], [seq])
        for layer in range(30):
            store.append(layer, kv, kv, step)
    found = store.nbytes()
    assert found.held == spec.kv_nbytes(4096) <= 0.21 * base.kv_nbytes(4096)
    assert found.reserved == sum(layer.cache.nbytes(4096).reserved for layer in spec.layers) == store.pages_bytes
    assert found.reserved <= 0.21 * base.kv_nbytes(4096)


def test_a_residual_that_holds_everything_changes_nothing(tiny_model: Any, tiny_materials: Any) -> None:
    prompt = list(range(3, 40))

    def logits() -> np.ndarray:
        session = tiny_model.session()
        return np.stack([session.prefill([prompt]), session.decode([7]), session.decode([9])])

    plain = logits()
    with applied(tiny_model, "kivi:group=8,residual=64", materials=tiny_materials):
        np.testing.assert_array_equal(logits(), plain)
    with applied(tiny_model, "kivi:group=8,residual=8", materials=tiny_materials):
        coded = logits()
    np.testing.assert_array_equal(coded[0], plain[0])  # a prompt in one pass is read as it came
    assert not np.array_equal(coded[1], plain[1])


def test_formats_that_clash_are_refused() -> None:
    spec = spec_from_config(CONFIG, "kivi").with_dtype("float32", "bfloat16")
    with pytest.raises(Conflict, match="format"):
        compose(spec, parse_all(["kivi:group=8,residual=8", "bfp:block=8,sort=none"]))
    with pytest.raises(SpecError, match="is kept in int8-g16 already"):
        compose(spec.with_kv_dtype("int8-g16"), parse_all(["kivi:group=8,residual=8"]))
    with pytest.raises(SpecError, match=r"group=24 does not divide head_dim=16.*Allowed: 8, 16\. Try group=16"):
        compose(spec, parse_all(["kivi:group=24,residual=24"]))
    assert str(page_format("int2-g32")) == "int2-g32"


def test_the_engine_keeps_what_a_technique_made_of_the_cache(smollm2_path: Any) -> None:
    """The dtype asked for is that of the tail, whichever engine runs; nothing falls back to plain pages."""
    del smollm2_path  # skips where the model is not installed
    from trimtab.techniques.apply import load_engine

    for kv_dtype, landing in (("bfloat16", "bf16"), ("float32", "fp32")):
        model, why = load_engine("smollm2-135m", kv_dtype=kv_dtype, techniques=("kivi:bits=4",))
        head = model.spec.layers[0].self_attn.cache.heads[0]
        assert (str(head.k_format), str(head.v_format), str(head.tail)) == ("int4-t32", "int4-g32", landing)
        assert not why  # it runs natively
    model, why = load_engine("smollm2-135m", kv_dtype="fp8", engine="torch")
    assert str(model.spec.layers[0].self_attn.cache.heads[0].k_format) == "fp8" and not why
