"""The GGUF reader on files made byte by byte: values, laziness, views, and every kind of broken file."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.spec.configs import load_spec, spec_from_gguf

_TYPES = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "f64": (12, "<d")}
_GGML = {"fp32": 0, "fp16": 1, "q4_0": 2, "q8_0": 8, "q2_k": 10, "bf16": 30}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: str, data: Any) -> bytes:
    if kind == "str":
        return struct.pack("<I", 8) + text(data)
    if kind == "strs":
        return struct.pack("<IIQ", 9, 8, len(data)) + b"".join(map(text, data))
    if kind == "f32s":
        return struct.pack(f"<IIQ{len(data)}f", 9, 6, len(data), *data)
    number, code = _TYPES[kind]
    return struct.pack("<I", number) + struct.pack(code, data)


def gguf_bytes(
    keys: dict[str, tuple[str, Any]], tensors: dict[str, tuple[str, tuple[int, ...], bytes]], version: int = 3
) -> bytes:
    """A file: keys -> (type, value), tensors -> (kind, extents outermost first, data)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    for key, (kind, data) in keys.items():
        head += text(key) + value(kind, data)
    body = b""
    for name, (kind, dims, data) in tensors.items():
        body += b"\0" * (-len(body) % 32)
        head += (
            text(name)
            + struct.pack(f"<I{len(dims)}Q", len(dims), *reversed(dims))
            + struct.pack("<IQ", _GGML[kind], len(body))
        )
        body += data
    return head + b"\0" * (-len(head) % 32) + body


KEYS: dict[str, tuple[str, Any]] = {
    "general.architecture": ("str", "llama"),
    "a.u32": ("u32", 7),
    "a.i32": ("i32", -7),
    "a.eps": ("f32", 1e-5),
    "a.yes": ("bool", True),
    "a.long": ("u64", 2**40),
    "a.f64": ("f64", 0.1),
    "a.words": ("strs", ["ab", "", "ü"]),
    "a.scores": ("f32s", [0.5, -1.0]),
}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    scale = np.array([2.0], np.float16).tobytes()
    blocks = (scale + bytes(range(32))) * 2
    tensors = {
        "f": ("fp32", (3, 4), values.tobytes()),
        "h": ("fp16", (4,), values[0].astype(np.float16).tobytes()),
        "b": ("bf16", (2, 2), np.array([0x3F80, 0xBF80, 0, 0x4000], np.uint16).tobytes()),
        "q": ("q8_0", (2, 32), blocks),
        "stack": ("fp32", (2, 3, 2), values.tobytes()),
    }
    path = tmp_path / "sample.gguf"
    path.write_bytes(gguf_bytes(KEYS, tensors))
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_values(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(KEYS, {}, version))
    metadata = GgufFile(path).metadata
    assert {key: metadata[key] for key in metadata} == {
        "general.architecture": "llama", "a.u32": 7, "a.i32": -7, "a.eps": 1e-5, "a.yes": True, "a.long": 2**40, "a.f64": 0.1,
        "a.words": ["ab", "", "ü"], "a.scores": [0.5, -1.0],
    }  # fmt: skip
    assert "a.none" not in metadata and metadata.get("a.none") is None and len(metadata) == 9


def test_tensors_are_views_of_the_file(sample: Path) -> None:
    file = GgufFile(sample)
    assert {name: (info.shape, info.kind, info.dims) for name, info in file.tensors.items()} == {
        "f": ((3, 4), "fp32", (3, 4)), "h": ((1, 4), "fp16", (4,)), "b": ((2, 2), "bf16", (2, 2)),
        "q": ((2, 32), "q8_0", (2, 32)), "stack": ((6, 2), "fp32", (2, 3, 2)),
    }  # fmt: skip
    np.testing.assert_array_equal(decode(file.packed("f")), np.arange(12, dtype=np.float32).reshape(3, 4))
    np.testing.assert_array_equal(decode(file.packed("h")), [[0, 1, 2, 3]])
    np.testing.assert_array_equal(decode(file.packed("b")), [[1, -1], [0, 2]])
    np.testing.assert_array_equal(decode(file.packed("q")), [2.0 * np.arange(32)] * 2)
    for name in file.tensors:
        (buffer,) = file.packed(name).buffers.values()
        assert not buffer.flags.owndata and not buffer.flags.writeable
    file.release("f")
    np.testing.assert_array_equal(decode(file.packed("f")).sum(), 66)


def test_cut_anywhere_is_refused_in_one_sentence(sample: Path, tmp_path: Path) -> None:
    whole = sample.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(SpecError) as caught:
            GgufFile(cut)
        assert "\n" not in str(caught.value) and str(cut) in str(caught.value)


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_of_the_header_never_escape_as_another_error(sample: Path, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(sample.read_bytes())
    for place in rng.integers(4, 420, 3):
        data[place] = rng.integers(256)
    path = tmp_path / "bad.gguf"
    path.write_bytes(bytes(data))
    try:
        file = GgufFile(path)
        for key in file.metadata:
            file.metadata[key]
        for name in file.tensors:
            file.packed(name)
    except SpecError:
        pass


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a GGUF file"),
        (b"PK\3\4" + b"\0" * 40, "is not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "corrupt"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "corrupt"),
    ],
)
def test_not_a_file_of_ours(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(SpecError, match=says):
        GgufFile(path)


def test_absent_file() -> None:
    with pytest.raises(SpecError, match="does not exist"):
        GgufFile("nowhere.gguf")
    with pytest.raises(SpecError, match="does not exist"):
        load_spec("nowhere.gguf")


def test_other_types_are_refused_by_name_when_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(KEYS, {"t": ("q2_k", (1, 256), bytes(84))}))
    file = GgufFile(path)  # opening is fine
    with pytest.raises(UnsupportedModelError, match=r"tensor t is stored as q2_k.*Known: fp32"):
        file.packed("t")


def _llama(extra: dict[str, tuple[str, tuple[int, ...], bytes]], **keys: tuple[str, Any]) -> bytes:
    sizes = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 16,
        "attention.head_count": 2,
    }
    metadata = {
        "general.architecture": ("str", "llama"),
        **{f"llama.{k}": ("u32", v) for k, v in sizes.items()},
        **keys,
    }
    shapes = {
        "token_embd": (10, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8),
        "blk.0.ffn_down": (8, 16), **{f"blk.0.attn_{x}": (8, 8) for x in ("q", "k", "v", "output")},
    }  # fmt: skip
    tensors = {f"{name}.weight": ("fp32", dims, np.ones(dims, np.float32).tobytes()) for name, dims in shapes.items()}
    return gguf_bytes(metadata, {**tensors, **extra})


def test_spec_follows_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    factors = np.array([1.0, 4.0], np.float32)
    half = ("fp16", (10, 8), np.ones((10, 8), np.float16).tobytes())
    bias = ("fp32", (8,), np.ones(8, np.float32).tobytes())
    path.write_bytes(
        _llama(
            {"rope_freqs.weight": ("fp32", (2,), factors.tobytes()), "output.weight": half, "blk.0.attn_q.bias": bias}
        )
    )
    spec = load_spec(str(path))
    assert (spec.name, spec.tie_word_embeddings, spec.vocab_size) == ("tiny", False, 10)
    assert (str(spec.lm_head.format), str(spec.embed_tokens.format)) == ("fp16", "fp32")
    attention = spec.layers[0].self_attn
    assert (attention.q_proj.bias, attention.o_proj.bias) == (True, False)  # type: ignore[union-attr]
    scaling = dict(attention.rope.scaling)  # type: ignore[union-attr]
    assert (scaling["rope_type"], scaling["long_factor"], scaling["short_factor"], scaling["attention_factor"]) == (
        "longrope",
        (1.0, 4.0),
        (1.0, 4.0),
        1.0,
    )


def test_spec_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_llama({}))
    first = spec_from_gguf(path)
    assert spec_from_gguf(path) is first
    path.write_bytes(_llama({"output.weight": ("fp32", (10, 8), np.ones((10, 8), np.float32).tobytes())}))
    assert spec_from_gguf(path).tie_word_embeddings is False


def test_missing_tensor_and_split_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(_llama({}).replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(SpecError, match=r"lacks weights.*blk\.0\.ffn_up\.weight"):
        load_spec(str(path))
    path.write_bytes(_llama({}, **{"split.count": ("u32", 3)}))
    with pytest.raises(SpecError, match="one part of 3"):
        load_spec(str(path))


def test_header_of_the_built_in_file_is_fast(smollm2_path: Path) -> None:
    best = min(_seconds(smollm2_path) for _ in range(3))
    assert best < 0.15  # 0.02 s alone
    file = GgufFile(smollm2_path)
    assert len(file.tensors) == 272 and len(file.metadata["tokenizer.ggml.tokens"]) == 49152


def _seconds(path: Path) -> float:
    start = time.perf_counter()
    GgufFile(path)
    return time.perf_counter() - start
