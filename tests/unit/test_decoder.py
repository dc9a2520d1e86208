"""The decoder's own promises: no copies, packed products, taps, partial runs, skipped rows, rings, clear refusals.

That it computes what transformers computes is checked in tests/oracle/test_decoder_oracle.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import StepShape
from trimtab.model.attention import visible
from trimtab.model.decoder import Decoder, run_blocks
from trimtab.model.ffn import FFN
from trimtab.model.flow import select_tokens
from trimtab.model.linear import Embedding, Linear, Norm
from trimtab.model.rope import Rotary
from trimtab.model.taps import POINTS
from trimtab.model.tensors import as_array, as_tensor, float_tensor
from trimtab.model.variant import Model, Variant
from trimtab.runtime.numerics import decode, encode, transcode
from trimtab.runtime.step import Recorder, Step
from trimtab.runtime.weights.load import open_model
from trimtab.runtime.weights.packed import Packed, Weights, packed_float
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.cache import All, Ring
from trimtab.spec.configs import load_spec
from trimtab.spec.formats import BF16, FP32, WeightFormat
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec, RopeSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import FFNSpec, GateFirst
from trimtab.spec.tree import Edit

#: Logits of the random models here are about 10 in size: 1e-4 is float32 noise, a wrong mask shows from 1e-2 on.
IDS = np.random.default_rng(0).integers(0, 131, 23)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain_step(tokens: int, record: Recorder | None = None) -> Step:
    return Step.of([tokens], [0], record=record)


# ------------------------------------------------------------------------------------------------------------ buffers


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_buffers_are_wrapped_without_a_copy(kind: str) -> None:
    stored = encode(normal(3, 8), WeightFormat(kind=kind))
    stored.buffers["data"].setflags(write=False)  # as those of a mapped file
    tensor = float_tensor(stored)
    assert tensor.data_ptr() == stored.buffers["data"].__array_interface__["data"][0]
    np.testing.assert_array_equal(tensor.float().numpy(), decode(stored))
    assert as_array(as_tensor(stored.buffers["data"], kind)).tobytes() == stored.buffers["data"].tobytes()


@pytest.mark.parametrize("form", [FP32, BF16, WeightFormat(kind="int", bits=4, group=16)])
def test_nothing_dequantized_is_kept(tiny_model: Model, form: WeightFormat) -> None:
    """After a run the decoder holds no tensor but the frequencies of its rotary positions."""
    spec = tiny_model.spec.edit((Edit(path, "format", form) for path, _ in tiny_model.spec.linears()), by="test")
    decoder = Decoder(spec, random_weights(spec))
    decoder(torch.from_numpy(IDS), plain_step(23), None, np.arange(23))
    assert not list(decoder.parameters()) and not list(decoder.buffers())
    held = [value for module in decoder.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert not held
    assert all(module.rotary.inverse.numel() == 8 for module in decoder.modules() if hasattr(module, "rotary"))


# ------------------------------------------------------------------------------------------------- linear, embedding


@pytest.mark.parametrize("layout", ["row", "transposed"])
@pytest.mark.parametrize(
    "form",
    [
        FP32,
        BF16,
        WeightFormat(kind="fp16"),
        WeightFormat(kind="int", bits=2, group=8),
        WeightFormat(kind="int", bits=4, group=16, sym=False),
        WeightFormat(kind="int", bits=7, group=8),
    ],
    ids=str,
)
def test_linear_multiplies_by_the_decoded_matrix(form: WeightFormat, layout: str) -> None:
    """Few tokens go through the packed kernel, more through a decoded matrix: both are y = x W.T + b."""
    spec = LinearSpec(n=32, k=48, bias=True, format=form, bias_format=BF16, layout=layout)
    stored = encode(normal(*spec.stored_shape), form, layout)
    bias = encode(normal(1, 32, seed=1), BF16)
    linear = Linear("m", spec, Weights({"m": stored, "m.bias": bias}))
    values = decode(stored) if layout == "row" else decode(stored).T
    for tokens in (1, 3, 8, 9, 21):
        x = normal(tokens, 48, seed=tokens)
        record = Recorder()
        found = linear(torch.from_numpy(x), plain_step(tokens, record))
        np.testing.assert_allclose(found, x @ values.T + decode(bias)[0], atol=2e-5, rtol=1e-5)
        assert (record.ops["m"].flops, record.ops["m"].weight_read) == (2 * tokens * 32 * 48, spec.nbytes())


def test_linear_keeps_the_dtype_of_its_input() -> None:
    for form in (FP32, WeightFormat(kind="int", bits=4, group=16)):
        linear = Linear("m", LinearSpec(n=8, k=16, format=form), Weights({"m": encode(normal(8, 16), form)}))
        for tokens in (2, 12):
            assert linear(torch.ones(tokens, 16, dtype=torch.bfloat16), plain_step(tokens)).dtype == torch.bfloat16


def test_embedding_decodes_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    form = WeightFormat(kind="int", bits=4, group=8)
    stored = encode(normal(20, 16), form)
    asked: list[Any] = []
    monkeypatch.setattr("trimtab.model.linear.decode", lambda p, rows: asked.append(rows) or decode(p, rows))
    spec = EmbeddingSpec(n=20, k=16, format=form, scale=3.0, offset=2)
    record = Recorder()
    found = Embedding("e", spec, Weights({"e": stored}), torch.float32)(torch.tensor([4, 4, 17]), plain_step(3, record))
    np.testing.assert_array_equal(found, 3 * decode(stored)[[6, 6, 19]])
    assert [rows.tolist() for rows in asked] == [[6, 6, 19]]
    assert record.ops["e"].weight_read == 3 * form.nbytes(1, 16)


def test_norms_are_over_the_last_axis_in_float32() -> None:
    x, w, b = normal(5, 12), normal(1, 12, seed=1), normal(1, 12, seed=2)
    weights = Weights({"n": packed_float(w, "fp32"), "n.bias": packed_float(b, "fp32")})
    variants = {
        (False, "rms"): x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * w,
        (True, "rms"): x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * (1 + w),
        (False, "layer"): (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * w + b,
    }
    for (offset, kind), wanted in variants.items():
        spec = NormSpec(size=12, kind=kind, eps=0.1, bias=kind == "layer", unit_offset=offset, format=FP32)
        np.testing.assert_allclose(Norm("n", spec, weights)(torch.from_numpy(x), plain_step(5)), wanted, atol=1e-5)


def test_a_files_own_blocks_give_the_logits_of_its_floats(smollm2_path: Path) -> None:
    """The Q4_1 and Q8_0 blocks of SmolLM2 multiplied as stored: the same numbers, in a quarter of the bytes."""
    blocks, floats = (
        Model(Variant(m.spec, m.weights)) for m in (open_model(smollm2_path, "file"), open_model(smollm2_path))
    )
    assert blocks.weights.nbytes < 0.25 * floats.weights.nbytes
    # The file's activations are bf16 by default; both run in fp32 here.
    spec = dataclasses.replace(blocks.spec, act_dtype="fp32")
    ids = torch.arange(1000, 1012)
    wanted = floats.logits(ids)
    torch.testing.assert_close(Model(Variant(spec, blocks.weights)).logits(ids), wanted, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------ decoder


def test_logits_repeat_to_the_bit(tiny_model: Model) -> None:
    again = Model(Variant(tiny_model.spec, tiny_model.weights))
    wanted = tiny_model.logits(IDS)
    assert torch.equal(tiny_model.logits(IDS), wanted) and torch.equal(again.logits(IDS), wanted)
    assert wanted.shape == (1, 23, 131) and wanted.dtype == torch.float32


def test_wanted_rows_are_rows_of_the_whole(tiny_model: Model) -> None:
    whole = tiny_model.logits(IDS)[0]
    for rows in ([22], [0, 7, 22], [9, 3], [4, 4], [], list(range(23))[::-1], [0] * 23):
        some = tiny_model.decoder(torch.from_numpy(IDS), plain_step(23), None, np.array(rows, dtype=np.int64))
        assert some.shape == (len(rows), 131)
        torch.testing.assert_close(some, whole[rows], atol=1e-4, rtol=0)


def test_a_run_may_stop_and_go_on(tiny_model: Model) -> None:
    """`run_blocks` over a part of the layers: what token filters and probes use."""
    decoder, step = tiny_model.decoder, plain_step(23)
    seen: list[torch.Tensor] = []
    tapped = plain_step(23)
    tapped.taps = {"resid": lambda path, h: seen.append(h)}
    wanted = decoder(torch.from_numpy(IDS), tapped, None, np.arange(23))
    with torch.inference_mode():
        h = decoder.embed(torch.from_numpy(IDS), step)
        for index, layer in enumerate(decoder.layers):
            h = run_blocks([layer], h, step, None)  # type: ignore[list-item]
            assert torch.equal(h, seen[index])
        assert torch.equal(decoder.head(h, step, np.arange(23)), wanted)


def test_taps_see_every_layer_and_may_replace(tiny_model: Model) -> None:
    decoder, heads = tiny_model.decoder, (6, 2, 16)
    seen: list[tuple[str, str, list[tuple[int, ...]]]] = []

    def look(point: str) -> Any:
        def tap(path: str, value: Any) -> None:
            parts = value if isinstance(value, tuple) else (value,)
            seen.append((point, path, [tuple(part.shape) for part in parts]))

        return tap

    step = plain_step(23)
    step.taps = {point: look(point) for point in POINTS}
    found = decoder(torch.from_numpy(IDS), step, None, np.arange(23))
    assert torch.equal(found, tiny_model.logits(IDS)[0])  # looking changes nothing
    n, g, h = heads
    assert seen == [
        entry
        for i in range(3)
        for entry in (
            *(("linear", f"layers.{i}.self_attn.{name}_proj", [(23, 96)]) for name in "qkv"),
            ("self_attn.qk", f"layers.{i}.self_attn", [(23, n, h), (23, g, h)]),
            ("linear", f"layers.{i}.self_attn.o_proj", [(23, n * h)]),
            ("linear", f"layers.{i}.mlp.gate_proj", [(23, 96)]),
            ("mlp.gate_pre", f"layers.{i}.mlp", [(23, 160)]),
            ("linear", f"layers.{i}.mlp.up_proj", [(23, 96)]),
            ("mlp.gate", f"layers.{i}.mlp", [(23, 160)]),
            ("linear", f"layers.{i}.mlp.down_proj", [(23, 160)]),
            ("resid", f"layers.{i}", [(23, 96)]),
        )
    ] + [("linear", "lm_head", [(23, 96)])]
    for point in POINTS:
        step.taps = {
            point: lambda path, value: tuple(2 * part for part in value) if isinstance(value, tuple) else 2 * value + 1
        }
        changed = decoder(torch.from_numpy(IDS), step, None, np.arange(23))
        assert (changed - found).abs().max() > 0.01, point


def test_what_is_not_built_says_so() -> None:
    latent = load_spec("deepseek-v3")
    with pytest.raises(UnsupportedModelError, match=r"latent attention.*predict"):
        Decoder(dataclasses.replace(latent, layers=latent.layers[:1]), _Zeros())  # type: ignore[arg-type]
    plain = load_spec("opt-125m").edit([Edit("layers.*.mlp", "act", "snake")], by="test")
    with pytest.raises(UnsupportedModelError, match=r"'snake' is not known. Known: silu"):
        Decoder(plain, _Zeros())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"'spiral' is not known. Known: default, linear"):
        Rotary(RopeSpec(dim=8, scaling=(("rope_type", "spiral"),)), 64)
    short = (
        ("rope_type", "longrope"),
        ("factor", 2.0),
        ("original_max_position_embeddings", 32),
        ("short_factor", (1.0,) * 3),
    )
    with pytest.raises(UnsupportedModelError, match="each of the 4 rotated pairs"):
        Rotary(RopeSpec(dim=8, scaling=short), 64)


class _Zeros:
    """Something for every path: a decoder that is refused needs no weights."""

    def __getitem__(self, path: str) -> Packed:
        return packed_float(np.zeros((1, 1), np.float32), "fp32")


def test_long_factors_hold_for_a_whole_sequence() -> None:
    """A sequence that will outgrow the original context is rotated alike from its first token on; its neighbours are not."""
    scaling = (
        ("rope_type", "longrope"), ("factor", 4.0), ("long_factor", (2.0, 4.0)), ("original_max_position_embeddings", 16),
        ("short_factor", (1.0, 1.0)),
    )  # fmt: skip
    rotary = Rotary(RopeSpec(dim=4, scaling=scaling), 64)
    cos, _ = rotary.tables(Step.of([3, 3], [2, 2], reach=[17, 16]), torch.float32)
    at = torch.arange(2, 5).float()[:, None]
    long, short = (at / torch.tensor(by) / torch.tensor([1.0, 100.0]) for by in ((2.0, 4.0), (1.0, 1.0)))
    torch.testing.assert_close(cos[:, :2] / rotary.scale, torch.cat((long, short)).cos())
    assert Step.of([3], [15]).reaches.tolist() == [18] and Step.of([1], [0]).reaches.tolist() == [1]


# ------------------------------------------------------------------------------------------------------- attention


def test_what_a_query_sees() -> None:
    at = torch.arange(6)

    def seen(queries: slice, window: int | None, keep: Any) -> list[str]:
        mask = visible(at[queries], at, window, keep)
        assert mask is not None
        return ["".join("x" if key else "." for key in row) for row in mask.tolist()]

    assert seen(slice(3, 6), None, All()) == ["xxxx..", "xxxxx.", "xxxxxx"]
    assert seen(slice(3, 6), 2, All()) == ["..xx..", "...xx.", "....xx"]
    assert seen(slice(3, 6), None, Ring(1, 2)) == ["x.xx..", "x..xx.", "x...xx"]
    assert visible(at[5:], at, None, All()) is None  # one token sees all it is given


@pytest.mark.parametrize("keep", [Ring(2, 5), Ring(0, 3), Ring(1, 1)])
def test_a_ring_in_the_store_is_a_mask_over_everything(tiny_model: Model, keep: Ring) -> None:
    """Bounded memory, chunk borders and overwritten slots give what a mask over all tokens gives."""
    spec = tiny_model.spec.edit([Edit("layers.*.self_attn.cache.heads.*", "keep", keep)], by="test")
    ringed = Model(Variant(spec, tiny_model.weights))
    masked = ringed.logits(IDS)[0]
    assert (masked - tiny_model.logits(IDS)[0]).abs().max() > 0.01
    for chunk in (1, 4, 100):
        session = ringed.session(chunk=chunk)
        found = [session.prefill([IDS[:14]])[0]] + [session.decode([token])[0] for token in IDS[14:]]
        torch.testing.assert_close(torch.from_numpy(np.stack(found)), masked[13:], atol=1e-4, rtol=0)
        assert session.store.nbytes().held == spec.kv_nbytes(23) < tiny_model.spec.kv_nbytes(23)


def test_heads_of_one_layer_may_keep_differently(tiny_model: Model) -> None:
    """Head groups: head 1 of layer 0 keeps a ring, all else keeps everything."""
    spec = tiny_model.spec.edit([Edit("layers.0.self_attn.cache.heads.1", "keep", Ring(1, 4))], by="test")
    mixed = Model(Variant(spec, tiny_model.weights))
    session = mixed.session(chunk=5)
    found = [session.prefill([IDS[:14]])[0]] + [session.decode([token])[0] for token in IDS[14:]]
    torch.testing.assert_close(torch.from_numpy(np.stack(found)), mixed.logits(IDS)[0][13:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_pages_may_be_narrower_than_activations(tiny_model: Model, kv_dtype: str) -> None:
    spec = tiny_model.spec.with_dtype("float32", kv_dtype)
    session = Model(Variant(spec, tiny_model.weights)).session(chunk=9)
    found = torch.from_numpy(session.prefill([IDS])[0])
    exact = tiny_model.logits(IDS)[0, -1]
    difference = (found - exact).abs().max()
    assert 0 < difference < 0.1 * exact.std()  # rounded to 8 or 11 bits, not to nonsense
    assert session.store.nbytes().held * 2 == tiny_model.spec.kv_nbytes(23)


@pytest.mark.parametrize(("pool", "topk"), [(1, 4), (5, 7), (5, 2), (13, 3), (13, 30)])
def test_tokens_are_chosen_by_pooled_inner_products(pool: int, topk: int) -> None:
    """Algorithm 1 of GemFilter, head by head and token by token; beyond the ends stand zeros that count."""
    for seed in range(20):
        q, k = normal(19, 6, 8, seed=seed), normal(19, 2, 8, seed=100 + seed)
        scores = [sum(float(q[-1, head] @ k[token, head // 3]) for head in range(6)) for token in range(19)]
        padded = np.concatenate([np.zeros(pool // 2), scores, np.zeros(pool // 2)])
        pooled = [padded[token : token + pool].mean() for token in range(19)]
        wanted = sorted(np.argsort(pooled)[::-1][:topk].tolist())
        assert select_tokens(torch.from_numpy(q), torch.from_numpy(k), topk=topk, pool=pool).tolist() == wanted


# --------------------------------------------------------------------------------------------------- skipped rows


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "int"])
def test_skipped_rows_are_a_threshold_on_the_gate(kind: str, act: str, bias: bool) -> None:
    """Passes of 1 to 4 tokens skip rows, longer ones zero the gate: the same output, and what was read is what ran."""
    form = WeightFormat(kind="int", bits=6, group=8) if kind == "int" else WeightFormat(kind=kind)

    def linear(n: int, k: int, layout: str = "row") -> LinearSpec:
        return LinearSpec(n=n, k=k, bias=bias, format=form, bias_format=FP32, layout=layout)

    spec = FFNSpec(
        gate_proj=linear(40, 24), up_proj=linear(40, 24), down_proj=linear(24, 40, "transposed"), act=act,
        executor=GateFirst(expected=0.3),
    )  # fmt: skip
    items = {"m.threshold": encode(np.full((1, 1), 0.3, np.float32), FP32)}
    for index, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        node = getattr(spec, name)
        items[f"m.{name}"] = encode(0.4 * normal(*node.stored_shape, seed=index), form, node.layout)
        if bias:
            items[f"m.{name}.bias"] = encode(normal(1, node.n, seed=10 + index), FP32)
    block = FFN("m", spec, Weights(items))
    x = torch.from_numpy(normal(5, 24, seed=20))
    wanted = block(x, plain_step(5))
    gate = block.act(block.gate_proj(x, plain_step(5)))  # type: ignore[misc]
    active = gate.abs() > 0.3
    assert 0.1 < active.float().mean() < 0.9
    for tokens in (1, 2, 4):
        record = Recorder()
        torch.testing.assert_close(block(x[:tokens], plain_step(tokens, record)), wanted[:tokens], atol=1e-4, rtol=1e-4)
        rows, pairs = int(active[:tokens].any(0).sum()), int(active[:tokens].sum())
        assert record.observed == {"m.active_rows": rows, "m.active_pairs": pairs}
        extra = {"up_proj": 40 * 4 * bias, "down_proj": 24 * 4 * bias}
        for name, nbytes in extra.items():
            assert record.ops[f"m.{name}"].flops == 2 * 24 * pairs
            assert record.ops[f"m.{name}"].weight_read == rows * form.nbytes(1, 24) + nbytes
    assert list(record.ops) == ["m.gate_proj", "m.act", "m.up_proj", "m.down_proj"]


@pytest.mark.parametrize(
    ("config", "setting"), [({"mlp_bias": True}, "cats:sparsity=0.5"), ({"hidden_act": "relu"}, "cats:sparsity=0.5")]
)
def test_skipped_rows_of_biased_and_relu_models_are_counted(
    tiny_materials: Any, config: dict[str, Any], setting: str
) -> None:
    from trimtab.spec.configs import spec_from_config
    from trimtab.techniques.apply import derive
    from trimtab.techniques.registry import parse_all

    spec = spec_from_config(
        {
            "model_type": "llama", "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, **config,
        },
        "tiny",
    ).with_dtype("float32")  # fmt: skip
    model = Model(derive(Variant(spec, random_weights(spec)), parse_all([setting]), tiny_materials))
    session = model.session()
    session.prefill([IDS])
    session.record = record = Recorder()
    session.decode([5])
    step = StepShape.of([1], [23], logits=1, observed=record.observed)
    names = ("flops", "weight_read", "kv_read", "kv_written")
    wanted = {op.name: [int(getattr(count(op, step), name)) for name in names] for op in build(model.spec).ops}
    assert {name: [getattr(op, count) for count in names] for name, op in record.ops.items()} == wanted


def test_rows_of_a_matrix_stored_the_other_way_cannot_be_skipped(tiny_model: Model) -> None:
    spec: ModelSpec = tiny_model.spec.edit([Edit("layers.*.mlp", "executor", GateFirst(expected=0.5))], by="test")
    with pytest.raises(UnsupportedModelError, match="down_proj transposed"):
        Decoder(spec, random_weights(spec))


# ------------------------------------------------------------------------------------------------------ model, variant


def test_variants_stack_and_come_off_again(tiny_model: Model) -> None:
    base = tiny_model.logits(IDS)
    model = Model(tiny_model.variant)
    form = WeightFormat(kind="int", bits=4, group=16)
    spec = model.spec.edit([Edit("layers.0.mlp.up_proj", "format", form)], by="test")
    rounded = transcode(model.weights["layers.0.mlp.up_proj"], form)
    model.push(Variant(spec, model.weights | {"layers.0.mlp.up_proj": rounded}))
    assert model.spec is spec and not torch.equal(model.logits(IDS), base)
    assert model.decoder is model.decoder  # built once per variant
    model.pop()
    assert torch.equal(model.logits(IDS), base)
    with pytest.raises(SpecError, match="cannot be popped"):
        model.pop()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "no token"),
        ([[1, 2], []], "no token"),
        ([[1, 2], [3]], "one length"),
        ([131], r"0\.\.130"),
        ([-1], r"0\.\.130"),
        ([0] * 513, r"513 tokens, the context of tiny-llama is 512"),
    ],
)
def test_bad_ids_are_refused(tiny_model: Model, ids: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        tiny_model.logits(ids)


def test_ids_come_in_many_shapes(tiny_model: Model) -> None:
    rows = IDS[:12].reshape(2, 6)
    wanted = tiny_model.logits(rows.tolist())
    assert wanted.shape == (2, 6, 131)
    for ids in (rows, torch.from_numpy(rows), [list(row) for row in rows], tuple(map(tuple, rows.tolist()))):
        assert torch.equal(tiny_model.logits(ids), wanted)
    torch.testing.assert_close(tiny_model.logits(rows[0]), wanted[:1], atol=1e-4, rtol=0)
