"""Arrays one after the other into a safetensors file: only the one being written is in memory.

Source: the safetensors format, an 8-byte length, a JSON header, then the data without gaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trimtab.spec.formats import ITEM_BYTES

#: Our names of dtypes -> those of safetensors.
SAFETENSORS_DTYPES = {
    "fp32": "F32", "fp16": "F16", "bf16": "BF16", "u8": "U8", "i8": "I8", "int32": "I32", "int64": "I64",
}  # fmt: skip
assert set(SAFETENSORS_DTYPES) == set(ITEM_BYTES), "every buffer dtype has a name in the file"

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written.

    Args:
        name: in the file.
        dtype: our name of it, or a ggml type in a GGUF file.
        dims: extents, outermost first.
        nbytes: of the data.
        data: makes the array when its turn comes.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    nbytes: int
    data: Callable[[], np.ndarray]


def write_safetensors(path: Path, entries: Sequence[Entry], progress: Progress) -> None:
    """Write a safetensors file; the widest dtypes come first, so that every array is aligned to its elements."""
    ordered = sorted(entries, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        ends = [offset, offset + entry.nbytes]
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.dims),
            "data_offsets": ends,
        }
        offset = ends[1]
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        write_arrays(stream, ordered, progress)


def write_arrays(stream: BinaryIO, entries: Sequence[Entry], progress: Progress, align: int = 1) -> None:
    """Append the arrays, each padded to `align` bytes, and have the disk take them: a full one is found here, not later."""
    for entry in progress("writing", entries):
        array = np.ascontiguousarray(entry.data())
        if array.nbytes != entry.nbytes:
            raise AssertionError(f"{entry.name}: {array.nbytes} bytes where {entry.nbytes} were announced")
        stream.write(array.reshape(-1).view(np.uint8).data)
        stream.write(bytes(-entry.nbytes % align))
    stream.flush()
    os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as people and other programs read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
