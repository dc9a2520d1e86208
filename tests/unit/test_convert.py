"""Saving a model: what comes back is what was saved, bit for bit; what a target cannot say is refused; nothing is half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import trimtab
from trimtab.errors import CapacityError, SpecError, UnsupportedModelError
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.export import container, job, own, safetensors, save
from trimtab.runtime.weights.load import open_model, stored_spec
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed, Weights
from trimtab.runtime.weights.random import random_weights
from trimtab.runtime.weights.safetensors import SafetensorsFolder
from trimtab.spec.bcq import BcqFormat
from trimtab.spec.configs import load_spec, model_ids
from trimtab.spec.families.sources import wanted
from trimtab.spec.formats import WeightFormat
from trimtab.spec.grids import GridFormat, PairFormat
from trimtab.spec.serial import from_json, to_json
from trimtab.spec.tree import Edit
from trimtab.techniques.apply import reencode
from trimtab.techniques.base import compose
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float32", "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = [[5, 17, 200, 3, 44, 120, 7, 9, 31]]
TEXT = "It's 12345 naïve apples,\n\n don't they? 你好  x_1 = [0]; the end. " * 12


def tokenizer_files(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of `size` tokens as SmolLM has it, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("a", "p"), ("ap", "p"), ("app", "l"), ("appl", "es")]
    merges = [*merges[:7], ("e", "s"), merges[7]]
    tokens = [*special, *letters, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert backend.get_vocab_size() <= size
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("source") / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    spec = load_spec(str(path))
    weights = random_weights(spec)
    entries = []
    for want in wanted(spec):
        values = np.array(decode(weights[want.key]))
        values = values[0] if want.vector else values
        name = f"model.{want.key}.weight"
        entries.append(container.Entry(name, "fp32", values.shape, values.nbytes, lambda v=values: v))
    container.write_safetensors(path / "model.safetensors", entries, lambda label, items: iter(items))
    tokenizer_files(path, CONFIG["vocab_size"])
    return path


def variant(source: Path, *specs: str, dtype: str = "file") -> tuple[Any, Weights]:
    """Spec and weights of techniques that follow from the weights alone."""
    loaded = open_model(source, dtype)
    spec = compose(loaded.spec, parse_all(specs))
    return spec, reencode(loaded.weights, spec)


def assert_same(ours: Weights, theirs: Weights) -> None:
    assert {*ours} == {*theirs}
    for path, packed in ours.items():
        other = theirs[path]
        assert (packed.format, packed.shape, packed.layout) == (other.format, other.shape, other.layout), path
        assert {*packed.buffers} == {*other.buffers}
        for name, buffer in packed.buffers.items():
            assert buffer.dtype == other.buffers[name].dtype
            np.testing.assert_array_equal(buffer, other.buffers[name], err_msg=f"{path}/{name}")


def assert_values(ours: Weights, theirs: Weights) -> None:
    assert {*ours} == {*theirs}
    for path, packed in ours.items():
        np.testing.assert_array_equal(decode(packed), decode(theirs[path]), err_msg=path)


# ---------------------------------------------------------------------------------------------------------- spec as JSON


def test_every_spec_comes_back_equal_and_with_its_hash() -> None:
    families = {
        "deepseek-v3",
        "gemma-4-26b-a4b",
        "gpt-oss-20b",
        "nemotron-h-56b",
        "qwen3-next-80b-a3b",
        "bloom-560m",
        "opt-125m",
    }
    assert families <= {*model_ids()}
    specs = [load_spec(name) for name in sorted(families)]
    small = load_spec("smollm2-135m")
    for text in ("rtn:bits=3,group=64", "tmac:bits=2", "duo", "snapkv+kivi", "think", "bfp", "cats"):
        specs.append(compose(small, parse_all([text])))
    for spec in specs:
        found = from_json(json.loads(json.dumps(to_json(spec))))
        assert found == spec and found.hash == spec.hash and type(found) is type(spec)
        assert len({id(layer) for layer in found.layers}) == len(set(found.layers))  # equal layers are one object


def test_a_spec_of_another_version_is_refused() -> None:
    data = to_json(load_spec("smollm2-135m"))
    with pytest.raises(SpecError, match="version 99"):
        from_json({**data, "version": 99})
    for broken, says in (
        ({"is": "formats:Nothing"}, "does not know"),
        ({"is": "os:system"}, "does not know"),
        ({"is": "formats:WeightFormat", "kind": "int", "bits": 4, "group": 32, "colour": 1}, "'colour'"),
        ({"is": "formats:WeightFormat", "kind": "int", "bits": 4, "group": 0}, "group=0"),
        ({"is": "formats:WeightFormat"}, "corrupt"),
    ):
        with pytest.raises(SpecError, match=says):
            from_json({"version": 1, "root": {"at": 0}, "values": [broken]})
    with pytest.raises(SpecError, match="cannot be saved"):
        to_json(parse_all(["rtn"])[0])


# -------------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "specs",
    [[], ["rtn:bits=3"], ["rtn:bits=4,sym=false,group=16"], ["tmac:bits=ternary,group=32"], ["tmac:bits=2,group=32"], ["kivi:group=16"],
     ["rtn", "streaming-llm:sink=1,recent=8"]],
    ids="+".join,
)  # fmt: skip
def test_our_own_form_holds_everything(specs: list[str], folder: Path, tmp_path: Path) -> None:
    done = trimtab.convert(folder, tmp_path / "out", techniques=specs, to="own")
    spec, weights = variant(folder, *specs)
    found = open_model(done.out, "auto")
    assert found.spec == spec and found.spec.hash == spec.hash == done.manifest["spec"]
    assert_same(found.weights, weights)
    assert not next(iter(found.weights["norm"].buffers.values())).flags.owndata  # a view of the file
    assert stored_spec(done.out) == load_spec(str(done.out)) == spec
    assert found.tokenizer().encode(TEXT) == open_model(folder).tokenizer().encode(TEXT)


def test_thresholds_come_back_with_the_model(folder: Path, tmp_path: Path) -> None:
    materials = Materials(texts={"here": TEXT * 4}, window=64, windows=2, cache=None)
    done = trimtab.convert(folder, tmp_path / "out", techniques=["rtn", "cats"], materials=materials)
    assert done.manifest["target"] == "own"  # by itself: nobody else knows thresholds
    assert [*done.manifest["calibration"]] == ["here"] and len(done.manifest["calibration"]["here"]) == 64
    model = trimtab.load(folder, techniques=["rtn", "cats"], materials=materials)
    back = trimtab.load(done.out)
    assert back.spec == model.spec and "layers.1.mlp.threshold" in back.weights
    assert_same(back.weights, model.weights)
    assert (back.logits(IDS) == model.logits(IDS)).all()
    # Asking for another dtype changes floats alone.
    half = open_model(done.out, "bfloat16")
    assert half.spec.embed_tokens.format.kind == "bf16" and half.spec.act_dtype == "bf16"
    assert half.spec.layers[0].mlp.executor == model.spec.layers[0].mlp.executor  # type: ignore[union-attr]
    assert half.weights["layers.0.mlp.gate_proj"].format == model.weights["layers.0.mlp.gate_proj"].format


@pytest.mark.parametrize(
    "specs", [["rtn"], ["rtn:bits=3"], ["rtn:bits=5,group=16"], ["rtn:bits=8,group=32"]], ids="+".join
)
def test_a_hugging_face_folder_keeps_codes_and_scales(specs: list[str], folder: Path, tmp_path: Path) -> None:
    done = trimtab.convert(folder, tmp_path / "out", techniques=specs)
    assert done.manifest["target"] == "safetensors"
    spec, weights = variant(folder, *specs)
    found = open_model(done.out, "auto")
    assert found.spec.layers == spec.layers and found.spec.lm_head == spec.lm_head
    assert_same(found.weights, weights)
    assert_values(open_model(done.out, "float32").weights, weights)  # and as floats
    # By the words of the format: value j at bit j * bits of a row of 32-bit words, offset by half the range.
    config = json.loads((done.out / "config.json").read_text())
    told = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    bits = told["num_bits"]
    tensors = SafetensorsFolder(done.out)
    name = "model.layers.1.mlp.down_proj.weight"
    rows, cols = tensors.array(f"{name}_shape")
    words = tensors.array(f"{name}_packed").view(np.uint32)
    scale = tensors.array(f"{name}_scale").astype(np.float32)
    assert words.shape == (rows, -(-int(cols) * bits // 32)) and scale.shape == (rows, cols // told["group_size"])
    for row, col in ((0, 0), (3, 41), (63, int(cols) - 1)):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(words[row]))
        code = stream >> (col * bits) & ((1 << bits) - 1)
        value = np.float32(code - (1 << (bits - 1))) * scale[row, col // told["group_size"]]
        assert value == decode(weights["layers.1.mlp.down_proj"])[row, col]


@pytest.mark.parametrize(
    ("specs", "kind"),
    [
        (["rtn"], "q4_0"), (["rtn:bits=2,group=64"], None), (["rtn:bits=3"], "q4_0"), (["rtn:sym=false"], "q4_1"), (["rtn:bits=5"], "q5_0"),
        (["rtn:bits=5,sym=false"], "q5_1"), (["rtn:bits=8"], "q8_0"), (["rtn:bits=6"], "q8_0"), (["tmac:bits=ternary,group=32"], "q4_0"),
        ([], "fp32"),
    ],
)  # fmt: skip
def test_a_gguf_file_keeps_every_value_and_token(
    specs: list[str], kind: str | None, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    if kind is None:  # groups of 64 do not divide rows of 96
        with pytest.raises(SpecError, match="group=64"):
            trimtab.convert(folder, out, techniques=specs)
        return
    done = trimtab.convert(folder, out, techniques=specs)
    assert done.manifest["target"] == "gguf" and job.read_manifest(out) == done.manifest
    _, weights = variant(folder, *specs)
    stored = open_model(out, "file")
    assert stored.spec.layers[0].self_attn.k_proj.format.kind == kind  # type: ignore[union-attr]
    assert_values(stored.weights, weights)
    for text in (TEXT, "<|im_start|>hi<|im_end|>"):
        ours, theirs = (one.tokenizer().encode(text, parse_special=True) for one in (stored, open_model(folder)))
        assert ours == theirs
    assert stored.tokenizer().chat_template == open_model(folder).tokenizer().chat_template
    # Once more, from the file: blocks pass through; and from there to a folder.
    again = trimtab.convert(out, tmp_path / "again.gguf")
    assert_same(open_model(again.out, "file").weights, stored.weights)
    if kind in ("q4_0", "q5_0", "q8_0", "fp32"):
        back = trimtab.convert(out, tmp_path / "back", to="safetensors")
        assert_values(open_model(back.out, "auto").weights, weights)
        assert open_model(back.out).tokenizer().encode(TEXT) == open_model(folder).tokenizer().encode(TEXT)


def test_small_floats_and_ternary_blocks(folder: Path, tmp_path: Path) -> None:
    loaded = open_model(folder)
    spec = loaded.spec.with_dtype("mxfp4")
    weights = reencode(loaded.weights, spec)
    found = save.prepare(job.Job(spec, spec, weights, folder), tmp_path / "m.gguf", "gguf")
    save.write(found, tmp_path / "m.gguf", {"trimtab": 1}, lambda label, items: iter(items))
    back = open_model(tmp_path / "m.gguf", "file")
    assert back.spec.layers[1].mlp.up_proj.format.kind == "mxfp4"  # type: ignore[union-attr]
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        for name, buffer in weights[path].buffers.items():
            np.testing.assert_array_equal(back.weights[path].buffers[name], buffer)


def test_bits_may_differ_from_matrix_to_matrix(folder: Path, tmp_path: Path) -> None:
    loaded = open_model(folder)
    forms = {
        "layers.*.self_attn.q_proj": WeightFormat(kind="int", bits=8, group=64),
        "layers.0.mlp.down_proj": WeightFormat(kind="int", bits=3, group=32),
        "layers.1.mlp.up_proj": WeightFormat(kind="int", bits=4, group=16),
    }
    spec = loaded.spec.edit([Edit(at, "format", form) for at, form in forms.items()], "by hand")
    weights = reencode(loaded.weights, spec)
    prepared = save.prepare(job.Job(spec, loaded.spec, weights, folder), tmp_path / "out", "auto")
    save.write(prepared, tmp_path / "out", {"trimtab": 1}, lambda label, items: iter(items))
    assert any("vLLM" in note for note in prepared.notes)
    back = open_model(tmp_path / "out", "auto")
    assert back.spec.layers == spec.layers
    assert_same(back.weights, weights)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [target for group in told["config_groups"].values() for target in group["targets"]]
    assert len(told["config_groups"]) == 3 and len(targets) == 4 and all(t.startswith("re:^model") for t in targets)
    assert "model.layers.0.mlp.up_proj" in told["ignore"] and "model.layers.1.mlp.up_proj" not in told["ignore"]


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("specs", "out", "to", "says"),
    [
        (["rtn:sym=false"], "o", "safetensors", r"layers\.0\.self_attn\.q_proj, which is in int4-g32-asym.*--to gguf, --to own"),
        (["rtn:group=16"], "o.gguf", "auto", r"q_proj, which is in int4-g16.*--to safetensors, --to own"),
        (["rtn:bits=6,sym=false"], "o.gguf", "gguf", r"int6-g32-asym.*can hold it: --to own"),
        (["kivi:group=16"], "o.gguf", "gguf", r"heads\.0: k_format = .*set by kivi.*--to own"),
        (["streaming-llm"], "o", "safetensors", r"keep = .*set by streaming-llm.*can hold it: --to own"),
        (["rtn"], "o.gguf", "own", r"folder\. Try .*o\."),
        (["rtn"], "o", "gguf", r"ends in \.gguf. Try .*o\.gguf"),
        (["rtn"], "o", "guff", r"Did you mean 'gguf'"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_say_is_refused(
    specs: list[str], out: str, to: str, says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=says):
        trimtab.convert(folder, tmp_path / out, techniques=specs, to=to)
    assert not [*tmp_path.iterdir()] or [p.name for p in tmp_path.iterdir()] == ["trimtab-home"]


def test_a_folder_of_ours_is_a_source_too(folder: Path, tmp_path: Path) -> None:
    out = trimtab.convert(folder, tmp_path / "out", techniques=["rtn"], to="own").out
    with pytest.raises(SpecError, match=r"Convert that model instead.*--to own"):
        trimtab.convert(out, tmp_path / "m.gguf")
    again = trimtab.convert(out, tmp_path / "again", techniques=["kivi:group=16"])
    spec, weights = variant(folder, "rtn", "kivi:group=16")
    found = open_model(again.out, "auto")
    assert again.manifest["target"] == "own" and found.spec == spec
    assert_same(found.weights, weights)


def test_a_kind_of_format_nobody_else_knows_goes_into_our_own_form(folder: Path, tmp_path: Path) -> None:
    loaded = open_model(folder)
    spec = loaded.spec.with_dtype("fp8")
    weights = reencode(loaded.weights, spec)
    one = job.Job(spec, spec, weights, folder)
    with pytest.raises(SpecError, match=r"fp8: .*can hold it: --to own"):
        save.prepare(one, tmp_path / "o.gguf", "gguf")
    prepared = save.prepare(one, tmp_path / "o", "auto")
    assert prepared.target == "own"
    save.write(prepared, tmp_path / "o", {"trimtab": 1}, lambda label, items: iter(items))
    found = own.read(tmp_path / "o")
    assert found[0] == spec
    assert_same(found[1], weights)


@pytest.mark.parametrize(
    "format",
    [GridFormat(grid="bitmod", bits=4, group=32), GridFormat(grid="fp", bits=6, group=16, scale="int8"), PairFormat(bits=4, group=32),
     BcqFormat(bits=3, group=32)],
    ids=str,
)  # fmt: skip
def test_formats_with_fields_of_their_own_are_saved_by_their_buffers(
    format: WeightFormat, folder: Path, tmp_path: Path
) -> None:
    """Whatever `buffers` says is in the file; nothing here knows the kind."""
    loaded, rng = open_model(folder), np.random.default_rng(0)
    spec = loaded.spec.edit([Edit("layers.*.mlp.up_proj", "format", format)], "by hand")
    made = {}
    for path in ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj"):
        wanted_buffers = format.buffers(96, 64)
        buffers = {
            b.name: rng.integers(0, 256, b.nbytes, np.uint8).view(NUMPY_DTYPES[b.dtype]).reshape(b.shape)
            for b in wanted_buffers
        }
        made[path] = Packed(format, (96, 64), buffers)
    weights = loaded.weights | made
    one = job.Job(spec, loaded.spec, weights, folder)
    for target, out in (("safetensors", "o"), ("gguf", "o.gguf")):
        with pytest.raises(SpecError, match=r"layers\.0\.mlp\.up_proj.*can hold it: --to own"):
            save.prepare(one, tmp_path / out, target)
    save.write(
        save.prepare(one, tmp_path / "o", "auto"), tmp_path / "o", {"trimtab": 1}, lambda label, items: iter(items)
    )
    found = open_model(tmp_path / "o", "file")
    assert found.spec == spec and type(found.weights["layers.0.mlp.up_proj"].format) is type(format)
    assert_same(found.weights, weights)


def test_foreign_codes_that_are_not_read_are_named(folder: Path, tmp_path: Path) -> None:
    done = trimtab.convert(folder, tmp_path / "out", techniques=["rtn"])
    config = json.loads((done.out / "config.json").read_text())
    for change, says in (({"format": "nvfp4-pack-quantized"}, "nvfp4"), ({"config_groups": {}}, "q_proj.*not read")):
        told = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (done.out / "config.json").write_text(json.dumps(told))
        with pytest.raises(UnsupportedModelError, match=says):
            open_model(done.out)


# ------------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("out", ["out", "out.gguf"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_attempt_that_failed(
    out: str, error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place" / out
    trimtab.convert(folder, place, techniques=["rtn:bits=8"])
    before = {p.relative_to(place): p.read_bytes() for p in [place, *place.rglob("*")] if p.is_file()}

    def full(handle: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(container.os, "fsync", full)
        with pytest.raises(CapacityError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            trimtab.convert(folder, place, techniques=["rtn"], force=True)
        if isinstance(error, OSError):
            assert "disk is full" in str(caught.value) and str(place) in str(caught.value)
        with pytest.raises((CapacityError, KeyboardInterrupt)):
            trimtab.convert(folder, place.with_stem("new"), techniques=["rtn"])
    assert {p.relative_to(place): p.read_bytes() for p in [place, *place.rglob("*")] if p.is_file()} == before
    assert os.listdir(place.parent) == [out]


def test_a_disk_without_room_is_told_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(CapacityError, match=r"takes \d+ bytes and its disk has 0 left"):
        trimtab.convert(folder, tmp_path / "place" / "out", techniques=["rtn"])
    assert os.listdir(tmp_path / "place") == []


def test_the_same_request_again_does_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = trimtab.convert(folder, out, techniques=["rtn"])
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    second = trimtab.convert(folder, out, techniques=["rtn:bits=4"])  # the same, said otherwise
    assert first.fresh and not second.fresh and second.manifest == first.manifest
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(SpecError, match=r"made otherwise \(techniques\).*--force"):
        trimtab.convert(folder, out, techniques=["rtn:bits=3"])
    with pytest.raises(SpecError, match=r"made otherwise \(target\)"):
        trimtab.convert(folder, out, techniques=["rtn"], to="own")
    third = trimtab.convert(folder, out, techniques=["rtn:bits=3"], force=True)
    assert third.fresh and job.read_manifest(out) == third.manifest
    assert open_model(out, "auto").spec.layers[0].mlp.up_proj.format.bits == 3  # type: ignore[union-attr]


def test_what_convert_did_not_write_is_never_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for force in (False, True):
        with pytest.raises(SpecError, match="did not write it"):
            trimtab.convert(folder, tmp_path / "mine", force=force)
        with pytest.raises(SpecError, match="is the model itself"):
            trimtab.convert(folder, folder, force=force)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    assert trimtab.convert(folder, tmp_path / "empty").fresh


def test_a_broken_folder_of_ours_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    out = trimtab.convert(folder, tmp_path / "out", to="own").out
    whole = (out / "trimtab.safetensors").read_bytes()
    (out / "trimtab.safetensors").write_bytes(whole[:-100])
    with pytest.raises(SpecError, match="truncated"):
        open_model(out)
    (out / "trimtab.safetensors").write_bytes(whole)
    data = json.loads((out / "trimtab.spec.json").read_text())
    data["weights"]["norm"]["shape"] = [1, 63]
    (out / "trimtab.spec.json").write_text(json.dumps(data))
    with pytest.raises(SpecError, match="norm is not what"):
        open_model(out)


def test_the_manifest_tells_quality_where_it_was_measured(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "held-out.txt"
    text.write_text(TEXT * 3)
    done = trimtab.convert(folder, tmp_path / "out", techniques=["rtn:bits=2"], eval=text)
    found = json.loads((tmp_path / "out" / "trimtab.json").read_text())
    assert found == done.manifest
    quality = found["quality"]["held-out.txt"]
    # Two bits of random weights change the distribution, and the file is the model that was measured.
    assert quality["kl_nats"] > 1e-3 and quality["tokens"] > 0
    from trimtab.measure.quality import evaluate_text, windows

    base, back = trimtab.load(folder), trimtab.load(done.out)
    again = evaluate_text(base.variant, back.variant, windows(base.tokenizer.encode(TEXT * 3), 128, 8))
    assert again.kl_nats == pytest.approx(quality["kl_nats"], rel=1e-6)
    assert found["bytes"]["weights"] == back.weights.nbytes


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trimtab.cli.main", "convert", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    out = str(tmp_path / "out.gguf")
    done = run(str(folder), out, "-t", "rtn", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fresh"] and told["target"] == "gguf" and told["resolved"] == ["rtn"]
    again = run(str(folder), out, "-t", "rtn")
    assert again.returncode == 0 and "there already" in again.stdout
    refused = run(str(folder), str(tmp_path / "hf"), "-t", "kivi:group=16", "--to", "safetensors")
    assert refused.returncode == 2 and "--to own" in refused.stderr and "Traceback" not in refused.stderr
    assert refused.stdout == ""


def test_scheme_and_carrier_agree_on_what_is_symmetric() -> None:
    from trimtab.runtime.numerics.blocks import carrier

    for kind in ("q4_0", "q5_0", "q8_0"):
        assert safetensors.scheme(WeightFormat(kind=kind), 64) and carrier(WeightFormat(kind=kind), 64) == kind
    assert safetensors.scheme(WeightFormat(kind="int", bits=4, group=64), 64) == (4, 0)  # one group is a row
    assert carrier(WeightFormat(kind="int", bits=4, group=48), 96) is None
    assert carrier(WeightFormat(kind="ternary", group=300, tiled=True), 256) == "tq2_0"


def test_a_saved_model_is_priced_as_it_was_saved(folder: Path, tmp_path: Path) -> None:
    out = trimtab.convert(folder, tmp_path / "out", techniques=["rtn", "kivi:group=16"], to="own").out
    spec, _ = variant(folder, "rtn", "kivi:group=16")
    plan = trimtab.make_plan(str(out), "a100")
    assert plan.base == spec and plan.dtype == "fp32"
    loaded = trimtab.load(out, kv_dtype="int8")
    assert loaded.spec == spec  # its cache is what the techniques made of it
    assert trimtab.predict(plan).counts["weight_bytes"] == loaded.weights.nbytes


def test_matrices_a_technique_left_alone_get_their_blocks_back(folder: Path, tmp_path: Path) -> None:
    """`cats` starts from floats, for it stores some matrices otherwise; the others are blocks of the file before and after."""
    source = trimtab.convert(folder, tmp_path / "m.gguf", techniques=["rtn"]).out
    materials = Materials(texts={"here": TEXT * 4}, window=64, windows=2, cache=None)
    out = trimtab.convert(source, tmp_path / "out", techniques=["cats"], materials=materials).out
    stored, found = open_model(source, "file"), open_model(out)
    for path in ("layers.0.self_attn.q_proj", "layers.1.mlp.gate_proj"):
        assert found.weights[path].format.kind == "q4_0"
        np.testing.assert_array_equal(found.weights[path].buffers["blocks"], stored.weights[path].buffers["blocks"])
    assert found.weights["layers.0.mlp.down_proj"].layout == "transposed"
    assert found.weights.nbytes == found.spec.weight_nbytes()
    model = trimtab.load(source, techniques=["cats"], materials=materials)
    assert (trimtab.load(out).logits(IDS) == model.logits(IDS)).all()
