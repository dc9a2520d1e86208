"""GGUF files cut, flipped and made up: the reader returns, or says in one sentence what is wrong with the file."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.spec.configs import load_spec
from trimtab.spec.gguf_header import TYPE_NAMES

_SIZES = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 8,
    "feed_forward_length": 16,
    "attention.head_count": 2,
}
_SHAPES = {
    "token_embd": (10, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (16, 8),
    "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16), **{f"blk.0.attn_{x}": (8, 8) for x in ("q", "k", "v", "output")},
}  # fmt: skip
#: Numbers that headers get wrong: nothing, signs, the ends of every width.
EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    13,
    31,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(keys: list[tuple[bytes, bytes]], tensors: list[tuple[bytes, tuple[int, ...], int, int]]) -> bytes:
    """Keys -> encoded values; tensors: name, extents innermost first, type id, offset."""
    made = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    made += b"".join(text(key) + value for key, value in keys)
    for name, extents, kind, offset in tensors:
        made += (
            text(name) + struct.pack(f"<I{len(extents)}Q", len(extents), *extents) + struct.pack("<IQ", kind, offset)
        )
    return made


def small_model() -> tuple[bytes, int]:
    """A llama of one layer as a file, and where its header ends."""
    keys = [(b"general.architecture", struct.pack("<I", 8) + text(b"llama"))]
    keys += [(f"llama.{key}".encode(), struct.pack("<II", 4, size)) for key, size in _SIZES.items()]
    keys.append((b"llama.rope.freq_base", struct.pack("<If", 6, 1e4)))
    keys.append(
        (b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 10) + b"".join(text(b"t%d" % i) for i in range(10)))
    )
    tensors, body = [], 0
    for name, dims in _SHAPES.items():
        tensors.append((f"{name}.weight".encode(), dims[::-1], 0, body))
        body += -(-4 * int(np.prod(dims)) // 32) * 32
    head = header(keys, tensors)
    return head + b"\0" * (-len(head) % 32 + body), len(head)


MODEL, HEADER = small_model()


def with_key(key: str, value: tuple[int, bytes]) -> bytes:
    """The model with one key more; the last of two alike counts."""
    count = struct.unpack_from("<Q", MODEL, 16)[0]
    inserted = text(key.encode()) + struct.pack("<I", value[0]) + value[1]
    at = MODEL.index(text(b"token_embd.weight"))
    head = MODEL[:16] + struct.pack("<Q", count + 1) + MODEL[24:at] + inserted + MODEL[at:HEADER]
    return head + b"\0" * (-len(head) % 32) + MODEL[HEADER + -HEADER % 32 :]


def outcome(data: bytes) -> str:
    """Read everything a file holds; returns the sentence of the error, or an empty one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        path.write_bytes(data)
        try:
            file = GgufFile(path)
            for key in file.metadata:
                file.metadata[key]
            for name, info in file.tensors.items():
                packed = file.packed(name)
                if info.shape[0] * info.shape[1] <= 1 << 20:
                    decode(packed)
            load_spec(str(path))
        except TrimtabError as error:
            assert "\n" not in str(error), str(error)
            return str(error)
    return ""


def test_the_file_that_is_mutated_is_sound() -> None:
    assert outcome(MODEL) == ""


@given(st.integers(0, len(MODEL) - 1))
@settings(max_examples=100, deadline=None)
def test_truncated(length: int) -> None:
    assert outcome(MODEL[:length])


@given(st.lists(st.tuples(st.integers(4, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_flipped_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(MODEL)
    for place, byte in changes:
        data[place] = byte
    outcome(bytes(data))


@given(st.integers(4, HEADER - 8), st.sampled_from(EDGES), st.sampled_from([4, 8]))
@settings(max_examples=200, deadline=None)
def test_overwritten_numbers(place: int, number: int, width: int) -> None:
    data = bytearray(MODEL)
    data[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    outcome(bytes(data))


@given(st.integers(4, HEADER), st.integers(0, 40), st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_spliced(place: int, drop: int, insert: bytes) -> None:
    outcome(MODEL[:place] + insert + MODEL[place + drop :])


extents = st.integers(0, 70) | st.sampled_from(EDGES)
kinds = st.sampled_from(sorted(TYPE_NAMES)) | st.integers(0, 60)
offsets = st.sampled_from([0, 0, 0, 32, 1]) | st.sampled_from(EDGES)


@given(
    st.lists(
        st.tuples(st.binary(max_size=6), st.lists(extents, max_size=5).map(tuple), kinds, offsets),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 4096),
)
@settings(max_examples=200, deadline=None)
def test_random_shapes_and_types(tensors: list[tuple[bytes, tuple[int, ...], int, int]], body: int) -> None:
    outcome(header([], tensors) + b"\x3c" * body)


scalars = st.sampled_from([(0, "<B"), (1, "<b"), (4, "<I"), (5, "<i"), (10, "<Q"), (11, "<q")]).flatmap(
    lambda pair: st.integers(0, 100).map(lambda v: (pair[0], struct.pack(pair[1], v)))
)
floats = st.floats(width=32, allow_nan=True).map(lambda v: (6, struct.pack("<f", v)))
texts = st.binary(max_size=8).map(lambda raw: (8, text(raw)))
leaves = scalars | floats | texts


def array(items: list[tuple[int, bytes]]) -> tuple[int, bytes]:
    kind = items[0][0] if items else 0
    same = [raw for number, raw in items if number == kind]
    return 9, struct.pack("<IQ", kind, len(same)) + b"".join(same)


values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4).map(array), max_leaves=6)


@given(st.sampled_from(["general.alignment", "general.architecture", *(f"llama.{key}" for key in _SIZES)]), values)
@settings(max_examples=200, deadline=None)
def test_metadata_of_any_type(key: str, value: tuple[int, bytes]) -> None:
    """A known key with a value nobody expects there."""
    outcome(with_key(key, value))


@pytest.mark.parametrize("number", [0, 2**31 - 1, 2**64 - 1])
@pytest.mark.parametrize(
    "key", [*_SIZES, "attention.head_count_kv", "attention.key_length", "attention.sliding_window", "vocab_size"]
)
def test_sizes_out_of_all_proportion(key: str, number: int) -> None:
    """Refused from the header alone, before anything of that size is made."""
    outcome(with_key(f"llama.{key}", (10, struct.pack("<Q", number))))


@pytest.mark.parametrize("depth", [2, 500, 100_000])
def test_nested_arrays(depth: int) -> None:
    nested = struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 0, 0)
    said = outcome(header([(b"a", struct.pack("<I", 9) + nested)], []))
    assert depth == 2 or "nested" in said


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        GgufFile(tmp_path)
