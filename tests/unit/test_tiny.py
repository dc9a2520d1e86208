"""Training from scratch: gradients through the decoder, the schedule, equal seeds, the saved folder, a product that is replaced."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import trimtab
from trimtab.errors import CalibrationError, SpecError
from trimtab.measure.bits import bits_per_byte, ngram_bits_per_byte
from trimtab.model.tensors import learned
from trimtab.model.variant import Model
from trimtab.runtime.numerics import decode, encode
from trimtab.runtime.step import Step
from trimtab.runtime.text.builtin import builtin_text
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.formats import FP32
from trimtab.spec.product import EXACT
from trimtab.train import tiny
from trimtab.train.fit import Fit, _batches, fit
from trimtab.train.tiny import END, TinyConfig, TinyModel, initial_weights, tiny_folder, train_tiny, whole_folder

SMALL = TinyConfig(layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=300, context=16, batch=4, lr=1e-2)
TEXTS = {"a": builtin_text()[:6000], "b": builtin_text()[9000:12000]}


@pytest.fixture(scope="module")
def trained() -> TinyModel:
    return train_tiny(SMALL, TEXTS, 40, seed=1)


def test_loss_falls_from_chance(trained: TinyModel) -> None:
    assert trained.losses[0] == pytest.approx(math.log(trained.spec.vocab_size), abs=0.2)
    assert trained.losses[-5:].mean() < trained.losses[0] - 1.0


def test_equal_seeds_give_equal_weights_and_others_do_not(trained: TinyModel) -> None:
    again, other = (train_tiny(SMALL, TEXTS, 40, seed=seed) for seed in (1, 2))
    for path, packed in trained.weights.items():
        assert np.array_equal(packed.buffers["data"], again.weights[path].buffers["data"]), path
    assert np.array_equal(trained.losses, again.losses)
    assert not np.array_equal(trained.losses, other.losses)


def test_saved_folder_loads_to_the_same_logits(trained: TinyModel, tmp_path: Path) -> None:
    folder = trained.save(tmp_path / "tiny")
    loaded, text = trimtab.load(folder), "The value of n is\n\n2."
    ids = loaded.tokenizer.encode(text)
    assert loaded.tokenizer.decode(ids) == text and ids == trained.backend.encode(text).ids
    assert loaded.tokenizer.eos_id == 0 and loaded.tokenizer.decode([0]) == END
    assert torch.equal(loaded.logits(ids), trained.model().logits(ids))
    assert loaded.spec.num_parameters() == trained.spec.num_parameters()
    assert json.loads((folder / "training.json").read_text())["steps"] == 40
    with pytest.raises(SpecError, match="there already"):
        trained.save(folder)


def test_gradients_are_those_of_finite_differences(tiny_model: Model) -> None:
    """Of every kind of weight, through the decoder that runs everywhere else."""
    private = Weights({path: learned(packed) for path, packed in tiny_model.weights.items()})
    decoder = Model(type(tiny_model.variant)(tiny_model.spec, private)).decoder
    ids, wanted = torch.arange(12) * 7 % 131, np.arange(11, dtype=np.int64)

    def loss() -> torch.Tensor:
        return F.cross_entropy(decoder.logits(ids, Step.of([12], [0]), None, wanted), ids[1:])

    loss().backward()
    for path in (
        "embed_tokens",
        "norm",
        "layers.1.input_layernorm",
        "layers.0.self_attn.k_proj",
        "layers.2.mlp.up_proj",
    ):
        tensor: torch.Tensor = private[path].tensor  # type: ignore[attr-defined]
        assert tensor.grad is not None
        direction = tensor.grad / tensor.grad.norm()
        with torch.no_grad():
            values = []
            for shift in (1e-2, -2e-2):
                tensor += shift * direction
                values.append(loss().item())
            tensor += 1e-2 * direction
        # the slope along the gradient is its norm; float32 and the curvature leave a percent
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(tensor.grad.norm().item(), rel=2e-2), path


def test_fit_leaves_the_model_alone_and_equals_a_step_of_adamw_by_hand(tiny_model: Model) -> None:
    before = {path: decode(packed).copy() for path, packed in tiny_model.weights.items()}
    ids = np.random.default_rng(0).integers(0, 131, 200)
    how = Fit(steps=1, batch=2, window=8, lr=1e-3, warmup=0, weight_decay=0.1, clip=1e9)
    found = fit(tiny_model.spec, tiny_model.weights, ids, how)
    for path, packed in tiny_model.weights.items():
        assert np.array_equal(decode(packed), before[path])
    # the first step of Adam moves every weight that has a gradient by the learning rate, after the decay of matrices
    moved = decode(found.weights["layers.0.mlp.up_proj"]) - before["layers.0.mlp.up_proj"] * (1 - 1e-3 * 0.1)
    assert np.abs(moved).max() == pytest.approx(1e-3, rel=1e-2) and np.median(np.abs(moved)) > 0.9e-3
    moved = decode(found.weights["norm"]) - before["norm"]
    assert np.median(np.abs(moved)) == pytest.approx(1e-3, rel=1e-2)


def test_schedule_and_batches() -> None:
    how = Fit(steps=100, lr=1.0, warmup=0.1, floor=0.2)
    rates = [how.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.6) and 0.2 < rates[99] < 0.205
    ids = np.arange(41)
    stream = _batches(ids, Fit(steps=1, batch=2, window=10, seed=3))
    batches = [next(stream) for _ in range(20)]
    assert all(batch.shape == (2, 11) and (np.diff(batch, axis=1) == 1).all() for batch in batches)
    starts = Counter(int(row[0]) % 10 for batch in batches for row in batch)
    assert len(starts) > 3  # every pass cuts the text elsewhere
    assert {int(i) for batch in batches for i in batch.flat} == set(range(41))


def test_a_replaced_product_sees_every_linear_layer() -> None:
    seen: Counter[str] = Counter()

    def watching(path: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen[path] += 1
        assert x.shape[1] == w.shape[1] and w.requires_grad
        return F.linear(x, w)

    plain, watched = (train_tiny(SMALL, TEXTS, 3, product=product) for product in (None, watching))
    assert np.array_equal(plain.losses, watched.losses)
    assert set(seen) == {path for path, _ in plain.spec.linears()} and set(seen.values()) == {3}
    assert "lm_head" in seen


def test_training_through_rounding_computes_with_rounded_weights_and_returns_unrounded_ones(tiny_model: Model) -> None:
    def signs(w: torch.Tensor) -> torch.Tensor:
        return w.sign() * w.abs().mean(1, keepdim=True)

    def fake_signs(path: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w if path == "lm_head" else w + (signs(w) - w).detach())

    ids = np.random.default_rng(0).integers(0, 131, 200)
    how = Fit(steps=1, batch=1, window=20, lr=1e-3, warmup=0, weight_decay=0)
    found = fit(tiny_model.spec, tiny_model.weights, ids, how, fake_signs)
    matrices = [path for path, _ in tiny_model.spec.linears() if path != "lm_head"]
    float_of = {path: torch.from_numpy(decode(tiny_model.weights[path])) for path in matrices}
    rounded = tiny_model.weights | {path: encode(signs(w).numpy(), FP32) for path, w in float_of.items()}
    window = next(_batches(ids, how))[0]
    logits = Model(type(tiny_model.variant)(tiny_model.spec, rounded)).logits(window[:-1].tolist())[0]
    wanted = F.cross_entropy(logits, torch.from_numpy(window[1:])).item()
    assert found.losses[0] == pytest.approx(wanted, rel=1e-5)
    for path in matrices:
        moved = np.abs(decode(found.weights[path]) - float_of[path].numpy())
        assert 0.9e-3 < np.median(moved) < 1.1e-3, path  # straight through: each weight is the start less one step


def test_the_product_of_a_node_is_trained_as_it_runs(tiny_model: Model) -> None:
    """Without `product` the rule of the node computes: what `fit` minimises is what the decoder gives."""
    ids = np.random.default_rng(0).integers(0, 131, 200)
    how = Fit(steps=1, batch=1, window=20, seed=0)
    window = next(_batches(ids, how))[0]
    logits = tiny_model.logits(window[:-1].tolist())[0]
    wanted = F.cross_entropy(logits, torch.from_numpy(window[1:])).item()
    assert all(node.product == EXACT for _, node in tiny_model.spec.linears())
    assert fit(tiny_model.spec, tiny_model.weights, ids, how).losses[0] == pytest.approx(wanted, rel=1e-5)


def test_folder_is_kept_by_settings_and_text(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = tiny.train_tiny
    monkeypatch.setattr(tiny, "train_tiny", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    first = tiny_folder(SMALL, TEXTS, 2)
    assert tiny_folder(SMALL, list(TEXTS.values()), 2) == first and len(calls) == 1
    others = [
        tiny_folder(SMALL, TEXTS, 3),
        tiny_folder(SMALL, TEXTS, 2, seed=1),
        tiny_folder(dataclasses.replace(SMALL, lr=2e-2), TEXTS, 2),
        tiny_folder(SMALL, {"a": TEXTS["a"]}, 2),
    ]
    assert len({first, *others}) == 5 and len(calls) == 5
    assert first.parent == home / "models" and trimtab.load(first).spec.vocab_size == 300


def test_no_half_folder_after_an_interrupt(trained: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.numpy.save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained.save(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "done") as fresh:
        (fresh / "file").write_text("x")
        assert not (tmp_path / "done").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_ngram_by_hand() -> None:
    train, valid = b"abracadabra", b"abac"
    p = np.full(4, 1 / 256)
    for size in (1, 2, 3):
        for place in range(size - 1, 4):
            context = valid[place - size + 1 : place]
            follow = Counter(
                train[i + size - 1] for i in range(len(train) - size + 1) if train[i : i + size - 1] == context
            )
            if follow:
                p[place] = (follow[valid[place]] + len(follow) * p[place]) / (sum(follow.values()) + len(follow))
    assert ngram_bits_per_byte(train, valid, 3) == pytest.approx(-np.log2(p).mean())
    with pytest.raises(SpecError, match="1..8"):
        ngram_bits_per_byte(train, valid, 9)


def test_bits_per_byte_by_hand(trained: TinyModel) -> None:
    model, text = trained.model(), TEXTS["b"][:200]
    ids = model.tokenizer.encode(text)
    bits = []
    for start in range(0, len(ids) - 15, 16):
        p = model.logits(ids[start : start + 16])[0].double().softmax(-1)
        bits += [-math.log2(p[i, ids[start + i + 1]]) for i in range(15)]
    wanted = np.mean(bits) * len(ids) / len(text.encode())
    assert bits_per_byte(model, text, 16) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heads": 3}, "Try hidden=30"),
        ({"kv_heads": 3}, "kv_heads=1"),
        ({"vocab": 256}, "257"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_bad_shapes(change: dict[str, int], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        dataclasses.replace(SMALL, **change)


def test_bad_input(tiny_model: Model) -> None:
    with pytest.raises(CalibrationError, match="no text"):
        train_tiny(SMALL, [], 1)
    with pytest.raises(CalibrationError, match="window takes 17"):
        train_tiny(SMALL, ["short"], 1)
    for change, said in (({"steps": 0}, "steps=0"), ({"lr": 0.0}, "lr=0"), ({"warmup": 1.0}, "warmup=1")):
        with pytest.raises(SpecError, match=said):
            Fit(**{"steps": 1} | change)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="context of tiny-llama, 512"):
        fit(tiny_model.spec, tiny_model.weights, np.zeros(2000), Fit(steps=1, window=600))
    with pytest.raises(SpecError, match="Lower the learning rate"):
        fit(tiny_model.spec, tiny_model.weights, np.arange(60), Fit(steps=9, batch=1, window=8, lr=1e30, warmup=0))


def test_weights_before_training(tiny_model: Model) -> None:
    found = initial_weights(tiny_model.spec, 0)
    wanted = {"embed_tokens": 0.02, "layers.0.mlp.up_proj": 96**-0.5, "layers.0.mlp.down_proj": (160 * 6) ** -0.5}
    for path, spread in wanted.items():
        assert np.std(decode(found[path])) == pytest.approx(spread, rel=0.05), path
    assert (decode(found["norm"]) == 1).all()
