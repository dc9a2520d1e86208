"""duo: which heads stream, what that costs and saves, gates that ship, gates that are refused, gates that are trained."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, SpecError
from trimtab.model.attention import eager, visible
from trimtab.model.variant import Model, Variant
from trimtab.runtime.weights.random import random_weights
from trimtab.spec.cache import KEEP_ALL, Ring
from trimtab.spec.configs import load_spec, spec_from_config
from trimtab.spec.tree import Edit
from trimtab.techniques.apply import applied, derive
from trimtab.techniques.base import compose
from trimtab.techniques.cache._gates import (
    read_gates,
    shipped,
    shipped_for,
    shipped_ids,
    spread_gates,
    streaming_heads,
    write_gates,
)
from trimtab.techniques.cache._permute import permute_heads
from trimtab.techniques.cache.duo import Duo
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all, parse_technique
from trimtab.train.duo_gates import Branches, streaming, train_gates
from trimtab.train.gates import GateTraining, gate_shape
from trimtab.train.passkeys import NATO, passkey_sample

IDS = np.random.default_rng(0).integers(0, 131, 60).tolist()
GATES = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
STREAMING = [[False, True], [True, False], [False, True]]


class Characters:
    """One token per character: enough to see what is planted where."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(char) % 131 for char in text]


MATERIALS = Materials(tokenizer=Characters(), cache=None)  # type: ignore[arg-type]


@pytest.fixture
def gates_file(tmp_path: Path) -> Path:
    path = tmp_path / "gates.tsv"
    write_gates(path, GATES, ["tiny-llama"], ["made by: hand"])
    return path


def logits(model: Model, prompt: list[int], chunk: int = 512) -> np.ndarray:
    """After the prompt and after each of three more tokens."""
    session = model.session(chunk=chunk)
    found = [session.prefill([prompt])]
    found += [session.decode([token]) for token in (7, 11, 13)]
    return np.concatenate(found)


# --------------------------------------------------------------------------------------------------------- which heads


def test_the_quantile_decides_and_ties_are_broken() -> None:
    np.testing.assert_array_equal(streaming_heads(GATES, 0.5), STREAMING)
    ties = np.ones((30, 3))
    assert streaming_heads(ties, 0.5).sum() == 45  # equal gates still split in half
    np.testing.assert_array_equal(streaming_heads(ties, 0.5), streaming_heads(ties, 0.5))  # the same way every time
    close = np.array([[0.5, 0.5 + 2e-6]])  # the noise is smaller than what training makes
    np.testing.assert_array_equal(streaming_heads(close, 0.5), [[True, False]])
    assert not streaming_heads(GATES, 0.0).any() and streaming_heads(GATES, 1.0).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_the_real_share_is_within_one_head(sparsity: float) -> None:
    for gates in (GATES, shipped("llama-3.1-8b").values, np.zeros((5, 3))):
        share = streaming_heads(gates, sparsity).mean()
        assert abs(share - sparsity) <= 1 / gates.size


def test_negative_gates_are_zero() -> None:
    """As shipped, some lie a little below 0: clipped, they tie, and their order is no information."""
    below = np.array([[-0.3, 0.0, 0.5, 0.9]])
    assert streaming_heads(below, 0.5).tolist() == [[True, True, False, False]]
    falling = -np.arange(30.0).reshape(10, 3)
    np.testing.assert_array_equal(streaming_heads(falling, 0.5), streaming_heads(np.zeros((10, 3)), 0.5))


def test_edits_reach_the_streaming_heads_alone(tiny_model: Model, gates_file: Path) -> None:
    technique = Duo(gates=str(gates_file), sink=2, recent=6)
    spec = compose(tiny_model.spec, [technique])
    found = [[head.keep for head in layer.cache.heads] for layer in spec.layers]
    assert found == [[Ring(2, 6) if streams else KEEP_ALL for streams in row] for row in STREAMING]
    assert technique.streaming(tiny_model.spec).mean() == 0.5
    assert parse_technique(str(technique)) == technique


# ------------------------------------------------------------------------------------------------------- what it costs


def test_no_streaming_head_is_bitwise_the_plain_model(tiny_model: Model, gates_file: Path) -> None:
    before = logits(tiny_model, IDS)
    with applied(tiny_model, f'duo:sparsity=0,gates="{gates_file}"', materials=MATERIALS) as model:
        assert model.spec.hash == tiny_model._variants[0].spec.hash
        np.testing.assert_array_equal(logits(model, IDS), before)


def test_short_sequences_are_as_with_full_attention(tiny_model: Model, gates_file: Path) -> None:
    """With sink + recent = 63 tokens nothing is dropped of 60 + 3; with 62 the last step forgets one."""
    before = logits(tiny_model, IDS)
    # Two groups of heads instead of one: another order of the same sums, logits are about 10 in size.
    with applied(tiny_model, f'duo:sink=3,recent=60,gates="{gates_file}"', materials=MATERIALS) as model:
        np.testing.assert_allclose(logits(model, IDS), before, atol=2e-5)
    with applied(tiny_model, f'duo:sink=3,recent=20,gates="{gates_file}"', materials=MATERIALS) as model:
        assert np.abs(logits(model, IDS) - before).max() > 1e-2


@pytest.mark.parametrize("chunk", [512, 17, 1])
def test_streaming_heads_see_sinks_and_the_latest_in_any_chunking(
    tiny_model: Model, gates_file: Path, chunk: int
) -> None:
    """Against attention with a mask per head over the whole sequence."""
    with applied(tiny_model, f'duo:sink=2,recent=6,gates="{gates_file}"', materials=MATERIALS) as model:
        got = logits(model, IDS, chunk)
        whole = model.logits([*IDS, 7, 11, 13])[0, -4:]
    branches = Branches(tiny_model.spec, tiny_model.weights, Ring(2, 6))
    with torch.no_grad():
        branches.gates.copy_(torch.tensor(~np.array(STREAMING)))
    np.testing.assert_allclose(got, whole, atol=1e-4)
    # The student with gates of 0 and 1 on its own keys is the deployed model.
    hidden = _student(branches, [*IDS, 7, 11, 13])[-4:]
    table = torch.from_numpy(tiny_model.weights["embed_tokens"].buffers["data"])
    np.testing.assert_allclose(got, hidden @ table.T, atol=1e-4)


def _student(branches: Branches, ids: list[int]) -> torch.Tensor:
    """Last hidden states of the student with its full heads on its own hidden states, as deployed."""
    from trimtab.runtime.step import Step

    step, tokens = Step.of([len(ids)], [0]), torch.tensor(ids)
    for index, layer in enumerate(branches.decoder.layers):
        block: Any = layer.self_attn

        def attend(block: Any, q: Any, k: Any, v: Any, bias: Any, heads: Any, index: int = index) -> torch.Tensor:
            gate = branches.gates[index].repeat_interleave(q.shape[1] // len(k))[:, None]
            return gate * eager(block, q, k, v, bias, heads) + (1 - gate) * streaming(block, q, k, v, Ring(2, 6))

        block.backend = attend
    with torch.no_grad():
        return branches._run(tokens, step, teaching=False)


def test_bytes_are_freed(tiny_model: Model, gates_file: Path) -> None:
    prompt = np.random.default_rng(1).integers(0, 131, 400).tolist()
    with applied(tiny_model, f'duo:sink=16,recent=48,gates="{gates_file}"', materials=MATERIALS) as model:
        session = model.session()
        session.prefill([prompt])
        held, predicted = session.store.nbytes(), model.spec.kv_nbytes(400)
    full = tiny_model.spec.kv_nbytes(400)
    assert held.held == predicted and held.held * 800 == full * 464  # (1/2 + 1/2 * 64/400) of full
    page = tiny_model.spec.layers[0].cache.heads[0].token_bytes() * 64
    assert held.reserved - held.held <= 6 * page


# ------------------------------------------------------------------------------------------------- gates that ship


def test_facts_of_shipped_gates() -> None:
    llama2, llama31 = shipped("llama-2-7b-32k").values, shipped("llama-3.1-8b").values
    assert llama2.shape == (32, 32) and llama31.shape == (32, 8)
    assert round((llama2 > 0.5).mean(), 2) == 0.43
    assert round(np.quantile(llama2, 0.75), 2) == 0.94
    assert round((llama31 > 0.5).mean(), 2) == 0.91
    assert np.quantile(llama31, 0.5, method="higher") == 0.953125
    assert streaming_heads(llama31, 0.5).sum() == 128  # where a threshold of 0.5 would make 22 of 256 streaming


def test_shipped_gates_are_those_published(shared_data: Path) -> None:
    published = {
        "llama-2-7b-32k": "Llama-2-7B-32K-Instruct",
        "llama-3-8b-1048k": "Llama-3-8B-Instruct-Gradient-1048k",
        "llama-3.1-8b": "Meta-Llama-3.1-8B-Instruct",
        "mistral-7b-v0.2": "Mistral-7B-Instruct-v0.2",
    }
    for id, name in published.items():
        original = np.loadtxt(shared_data / "kv-attention" / "duo_attn_patterns" / f"{name}.tsv", ndmin=2)
        np.testing.assert_array_equal(shipped(id).values.astype(np.float32), original.astype(np.float32))


@pytest.mark.parametrize("id", shipped_ids())
def test_every_shipped_file_fits_its_model(id: str) -> None:
    spec = load_spec(id)
    assert shipped_for(id) == shipped_for(f"somebody/{id.upper()}") == id
    assert gate_shape(spec) == shipped(id).values.shape
    composed = compose(spec, parse_all(["duo"]))
    rings = sum(isinstance(head.keep, Ring) for layer in composed.layers for head in layer.cache.heads)
    assert abs(rings / shipped(id).values.size - 0.5) <= 0.01


def test_names_of_shipped_gates_are_unique() -> None:
    names = [name for id in shipped_ids() for name in shipped(id).names]
    assert len(names) == len(set(names)) and all(id in shipped(id).names for id in shipped_ids())
    assert shipped_for("llama-3-8b") is None  # same shape as two that ship, another model


def test_gates_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gates.tsv"
    values = np.array([[0.12345, 1.0, 0.0], [0.5, 0.98765, 1e-5]])
    write_gates(path, values, ["Some-Model"], ["a note"])
    found = read_gates(path)
    np.testing.assert_array_equal(found.values, values)
    assert found.names == ("some-model",)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("duo:sparsity=1.2", ("sparsity=1.2", "0..1", "Try sparsity=1")),
        ("duo:sparsity=-0.1", ("0..1", "Try sparsity=0")),
        ("duo:recent=0", ("recent=0", "recent >= 1", "Try sink=64,recent=1")),
        ("duo:sink=-1", ("sink >= 0",)),
        ("duo", ("tiny-llama", "3 lines", "2 numbers", "trimtab train duo", "llama-3.1-8b")),
        ("duo:gates=llama-3.1-8b", ("32 layers x 8 KV heads", "tiny-llama has 3 x 2", "trimtab train duo")),
        ("duo:gates=/no/such.tsv", ("cannot be read", "auto, train")),
    ],
)
def test_bad_parameters_are_refused_with_a_sentence(tiny_model: Model, spec: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError, match=r"^duo: .*Allowed") as refused:
        compose(tiny_model.spec, parse_all([spec]))
    assert all(word in str(refused.value) for word in words)


def test_gates_of_an_8b_model_are_refused_by_smollm2() -> None:
    with pytest.raises(SpecError, match=r"32 layers x 8 KV heads, smollm2-135m has 30 x 3.*trimtab train duo"):
        compose(load_spec("smollm2-135m"), parse_all(["duo:gates=mistral-7b-v0.2"]))


def test_a_shipped_name_with_another_shape_is_refused(tiny_model: Model) -> None:
    import dataclasses

    posing = dataclasses.replace(tiny_model.spec, name="llama-3.1-8b")
    with pytest.raises(SpecError, match="32 layers x 8 KV heads, llama-3.1-8b has 3 x 2"):
        compose(posing, parse_all(["duo"]))


@pytest.mark.parametrize("text", ["", "# names: x\n", "0.1\t0.2\n0.3\n", "0.1\tx\n", "0.1\tnan\n"])
def test_files_that_hold_no_gates_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"no file of gates\. Allowed"):
        read_gates(path)


def test_models_without_kv_heads_are_refused(tiny_model: Model) -> None:
    for name in ("deepseek-v3", "nemotron-h-56b"):
        with pytest.raises(SpecError, match="without keys and values per head"):
            compose(load_spec(name), parse_all(["duo:gates=train"]))


# ------------------------------------------------------------------------------------------------- training the gates


def test_only_gates_have_gradients_and_every_gate_has_one(tiny_model: Model) -> None:
    stored = {path: packed.buffers["data"].copy() for path, packed in tiny_model.weights.items()}
    branches = Branches(tiny_model.spec, tiny_model.weights, Ring(2, 6))
    assert branches.distance(IDS, 40).item() == 0.0  # gates of 1: the student is the teacher
    with torch.no_grad():
        branches.gates.fill_(0.5)
    loss = branches.distance(IDS, 40)
    leaves = _leaves(loss)
    loss.backward()
    assert leaves == {id(branches.gates)}
    assert branches.gates.grad is not None and bool((branches.gates.grad != 0).all())
    assert not list(branches.decoder.parameters())
    for path, packed in tiny_model.weights.items():
        np.testing.assert_array_equal(packed.buffers["data"], stored[path])


def _leaves(loss: torch.Tensor) -> set[int]:
    """Ids of the tensors a backward pass would leave gradients on."""
    found, open_, seen = set(), [loss.grad_fn], set()
    while open_:
        node: Any = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        open_ += [parent for parent, _ in node.next_functions]
    return found


def test_gradients_are_those_of_finite_differences(tiny_model: Model) -> None:
    branches = Branches(tiny_model.spec, tiny_model.weights, Ring(2, 6))
    with torch.no_grad():
        branches.gates.copy_(torch.tensor(GATES))
    branches.distance(IDS, 40).backward()
    assert branches.gates.grad is not None
    for place in ((0, 0), (1, 1), (2, 1)):
        around = []
        for shift in (1e-2, -1e-2):
            with torch.no_grad():
                branches.gates[place] += shift
                around.append(branches.distance(IDS, 40).item())
                branches.gates[place] -= shift
        # float32 sums of about 0.1 over a difference of 2e-2: three digits
        assert branches.gates.grad[place].item() == pytest.approx((around[0] - around[1]) / 2e-2, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize(("tokens", "sink", "recent"), [(150, 16, 32), (70, 0, 33), (40, 50, 8), (9, 2, 1)])
def test_streaming_by_blocks_is_the_mask(tiny_model: Model, tokens: int, sink: int, recent: int) -> None:
    block: Any = tiny_model.decoder.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, 6, 16, generator=generator)
    k, v = torch.randn(2, 2, tokens, 16, generator=generator)
    at = torch.arange(tokens)
    mask = visible(at, at, None, Ring(sink, recent))
    assert mask is not None
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(
        streaming(block, q, k, v, Ring(sink, recent)), eager(block, q, k, v, bias, slice(0, 6)), atol=1e-5, rtol=1e-5
    )


def test_training_lowers_gates_that_do_not_matter(tiny_model: Model) -> None:
    """A layer whose heads have no output (o_proj of 0) cannot matter: its gates fall fastest, by the penalty alone."""
    from trimtab.runtime.weights.packed import packed_float

    path = "layers.1.self_attn.o_proj"
    silent = packed_float(np.zeros(tiny_model.weights[path].shape, np.float32), "fp32")
    weights = tiny_model.weights | {path: silent}
    how = GateTraining(
        steps=20, sink=2, recent=6, needles=1, words=1, min_tokens=120, max_tokens=140, lengths=3, lr=0.05, l1=1e-3
    )
    haystack = " ".join(str(number) for number in range(400))
    spec = tiny_model.spec
    found = train_gates(spec, weights, Characters(), haystack, how)  # type: ignore[arg-type]
    again = train_gates(spec, weights, Characters(), haystack, how)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.gates, again.gates)
    assert found.gates.shape == (3, 2) and found.gates.min() >= 0 and found.gates.max() <= 1
    assert found.gates[1].max() < found.gates[[0, 2]].min()
    assert found.distilled[0] == 0.0 and len(found.losses) == 20
    assert found.penalty[0] == pytest.approx(1e-3)


def test_gates_stay_between_0_and_1(tiny_model: Model) -> None:
    """With a penalty that rules all and steps of 1, gates reach 0 in the second step and stay there."""
    how = GateTraining(
        steps=6, sink=2, recent=6, needles=1, words=1, min_tokens=120, max_tokens=120, lengths=1, lr=1.0, l1=100.0
    )
    found = train_gates(tiny_model.spec, tiny_model.weights, Characters(), "text " * 99, how)  # type: ignore[arg-type]
    assert found.penalty[:2] == pytest.approx([100.0, 90.0]) and found.penalty[2:] == [0.0] * 4


def test_the_schedule_rises_stays_and_falls() -> None:
    how = GateTraining(steps=150)
    assert how.factor(0) == pytest.approx(0.1) and how.factor(149) == pytest.approx(0.1)
    assert how.factor(30) == how.factor(75) == how.factor(119) == 1.0
    assert 0.1 < how.factor(15) < 1 > how.factor(135) > 0.1
    assert GateTraining(steps=1).factor(0) == pytest.approx(0.1)


def test_samples_hide_every_answer_once_and_supervise_the_tail() -> None:
    haystack = [ord(char) % 131 for char in "the road is long and the night is cold. " * 40]
    sample = passkey_sample(Characters(), haystack, 700, 3, 4, random.Random(3))  # type: ignore[arg-type]
    text = "".join(chr(token) for token in sample.ids)
    body, tail = text[: sample.tail], text[sample.tail :]
    assert len(body) == 700 and tail.startswith("\n\nQuestion: What is the first passkey")
    places = []
    for nth, (first, end) in zip(("first", "second", "third"), sample.answers, strict=True):
        answer = text[first:end]
        assert len(answer.split()) == 4 and all(word.strip(".") in NATO for word in answer.split())
        assert f"the {nth} passkey to the vault is{answer}" in body and tail.count(answer) == 1
        places.append(body.index(answer))
    assert places == sorted(places) and len(set(places)) == 3
    other = passkey_sample(Characters(), haystack, 700, 3, 4, random.Random(4))  # type: ignore[arg-type]
    assert other.ids != sample.ids


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"min_tokens": 900, "max_tokens": 300}, "min_tokens <= max_tokens"),
        ({"lr": 0.0}, "lr > 0"),
        ({"recent": 0}, "recent >= 1"),
    ],
)
def test_bad_training_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        GateTraining(**settings)


def test_samples_that_cannot_be_are_refused(tiny_model: Model) -> None:
    with pytest.raises(SpecError, match=r"do not fit 100 tokens\. Allowed here: \d+ or more"):
        passkey_sample(Characters(), [1] * 999, 100, 4, 8, random.Random(0))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"11 passkeys.*Allowed: 1\.\.10"):
        passkey_sample(Characters(), [1] * 999, 9999, 11, 8, random.Random(0))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"context of tiny-llama, 512"):
        train_gates(
            tiny_model.spec,
            tiny_model.weights,
            Characters(),  # type: ignore[arg-type]
            "text " * 200,
            GateTraining(min_tokens=500, max_tokens=510, needles=1, words=1),
        )


def test_gates_are_trained_once_and_kept(tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.train import duo_gates

    calls: list[GateTraining] = []

    def stub(spec: Any, weights: Any, tokenizer: Any, text: str, how: GateTraining, progress: Any) -> Any:
        calls.append(how)
        return duo_gates.Trained(GATES.astype(np.float32))

    monkeypatch.setattr(duo_gates, "train_gates", stub)
    materials = Materials(texts={"t": "1 2 3"}, tokenizer=Characters(), cache=tmp_path)  # type: ignore[arg-type]
    asked = parse_technique("duo:sink=2,recent=6,gates=train")
    assert asked.unresolved
    first, second = asked.resolve(tiny_model, materials), asked.resolve(tiny_model, materials)
    assert first == second and len(calls) == 1 and not first.unresolved
    assert (calls[0].sink, calls[0].recent, calls[0].min_tokens) == (2, 6, 16)
    spec = derive(tiny_model.variant, [first], materials).spec
    assert [[isinstance(head.keep, Ring) for head in layer.cache.heads] for layer in spec.layers] == STREAMING
    # Before training heads are spread evenly: as many of them, the same bytes.
    assert compose(tiny_model.spec, [asked]).kv_nbytes(100) == spec.kv_nbytes(100)
    assert len(set(spread_gates(30, 3).ravel())) == 90
    for broken, words in (({"cache": None}, "trimtab train duo"), ({"texts": {}}, "--calibration")):
        other = Materials(**{"texts": {"t": "1"}, "tokenizer": Characters(), "cache": tmp_path, **broken})  # type: ignore[arg-type]
        with pytest.raises(CalibrationError, match=words):
            asked.resolve(tiny_model, other)


def test_auto_becomes_the_gates_that_ship(tiny_model: Model) -> None:
    class Posing:
        spec = load_spec("llama-3.1-8b")

    assert str(parse_technique("duo").resolve(Posing(), Materials())) == "duo:gates=llama-3.1-8b"  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="gates=auto finds none"):
        parse_technique("duo").resolve(tiny_model, Materials())


def test_the_command_writes_gates_that_duo_reads(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from typer.testing import CliRunner

    import trimtab
    from trimtab.cli.main import app

    loaded = Model(tiny_model.variant, Characters)  # type: ignore[arg-type]
    monkeypatch.setattr(trimtab, "load", lambda source: loaded, raising=False)
    out = tmp_path / "gates.tsv"
    options = "--steps 3 --sink 2 --recent 6 --needles 1 --words 1 --min-tokens 120 --max-tokens 130 --seed 5"
    done = CliRunner().invoke(app, ["train", "duo", "tiny", "--out", str(out), *options.split(), "--json"])
    assert done.exit_code == 0, done.output
    shown, text = json.loads(done.stdout), out.read_text()
    np.testing.assert_allclose(read_gates(out).values, shown["gates"], atol=1e-5)
    assert read_gates(out).names == ("tiny-llama",) and len(shown["loss"]) == 3
    made = next(line for line in text.splitlines() if line.startswith("# made by: "))
    assert "trimtab train duo tiny --steps 3 --sink 2 --recent 6" in made and "--seed 5" in made
    assert "# loss: 0.0500 at first" in text
    compose(tiny_model.spec, [Duo(gates=str(out))])


# ---------------------------------------------------------------------------------------------------- order of heads


@pytest.mark.parametrize("name", ["tiny_model", "biased", "sinks", "whole-norm"])
def test_the_order_of_heads_does_not_matter(tiny_model: Model, request: pytest.FixtureRequest, name: str) -> None:
    model = tiny_model if name == "tiny_model" else _peculiar(name)
    spec, orders = model.spec, [[1, 0], [0, 1], [1, 0]]
    ids = [token % spec.vocab_size for token in IDS]
    moved = Model(Variant(spec, permute_heads(spec, model.weights, orders)))
    before, after = model.logits(ids).numpy(), moved.logits(ids).numpy()
    assert np.abs(after - before).max() < 1e-5 * max(1.0, np.abs(before).max())
    data = moved.weights["layers.0.self_attn.k_proj"].buffers["data"]
    size = spec.layers[0].self_attn.head_dim  # type: ignore[union-attr]
    np.testing.assert_array_equal(data[:size], model.weights["layers.0.self_attn.k_proj"].buffers["data"][size:])
    assert moved.weights["layers.0.input_layernorm"] is model.weights["layers.0.input_layernorm"]


def _peculiar(name: str) -> Model:
    """Models whose heads carry more than their projections: biases, sink logits, a norm over all heads."""
    config: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config |= {
        "biased": {"model_type": "qwen2"},
        "sinks": {"model_type": "gpt_oss", "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
        "whole-norm": {"model_type": "minimax_m2", "num_local_experts": 5, "num_experts_per_tok": 2},
    }[name]
    spec = spec_from_config(config, name).with_dtype("float32")
    return Model(Variant(spec, random_weights(spec)))


def test_orders_that_are_none_are_refused(tiny_model: Model) -> None:
    with pytest.raises(SpecError, match=r"\[0, 0\] is no order of its 2 KV heads"):
        permute_heads(tiny_model.spec, tiny_model.weights, [[0, 1], [0, 0], [0, 1]])
    spec = tiny_model.spec.edit([Edit("layers.*.self_attn.q_proj", "layout", "transposed")], by="test")
    with pytest.raises(SpecError, match="plain floats by row"):
        permute_heads(spec, random_weights(spec), [[1, 0]] * 3)


# ------------------------------------------------------------------------------------------------- checks of the paper


def test_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    from trimtab.papers.duoattention import spearman

    a, b = np.random.default_rng(0).integers(0, 9, (2, 90)).astype(float)  # many ties, as gates at 0 and 1 have
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(a, -a) == pytest.approx(-1)


def test_the_fall_of_the_loss_is_not_that_of_one_step() -> None:
    from trimtab.papers.duoattention import smoothed_fall

    losses = np.full(100, 1.0)
    losses[50] = 100.0  # one hard sample
    losses[60:] = 0.5
    peak, last = smoothed_fall(losses, over=10)
    assert peak == pytest.approx(10.9) and last == pytest.approx(0.5)
