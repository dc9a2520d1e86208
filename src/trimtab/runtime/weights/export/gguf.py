"""GGUF files whose blocks carry our codes and scales as they are; llama.cpp loads them.

Matrices go into the ggml type that holds them exactly (`numerics.blocks.carrier`), vectors into F32, which llama.cpp asks
for. Metadata are copied from a GGUF source, and built from config and tokenizer for a Hugging Face folder.

Source: ggml `docs/gguf.md`, version 3.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.blocks import carrier, to_blocks
from trimtab.runtime.weights.export.container import Entry, Progress, write_arrays
from trimtab.runtime.weights.export.gguf_metadata import Value, from_folder
from trimtab.runtime.weights.export.job import MANIFEST_KEY, Job, Prepared
from trimtab.runtime.weights.export.places import Part, Whole, one_format, unsaid, wholes
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.spec.families.gguf import spelling_of
from trimtab.spec.families.sources import Source, sources
from trimtab.spec.formats import FILE_BLOCKS, ITEM_BYTES
from trimtab.spec.gguf_header import TYPE_NAMES

_TYPES = {name: index for index, name in TYPE_NAMES.items()}
_ALIGN = 32
#: Value of ``general.file_type`` by the type most bytes are in. Source: `llama.h`, enum llama_ftype.
_FILE_TYPES = {
    "fp32": 0, "fp16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 15, "q5_k": 17, "q6_k": 18,
    "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
}  # fmt: skip


def refusal(part: Part) -> str:
    """Why a GGUF file cannot hold a weight as it is; empty if it can."""
    packed, cols = part.packed, part.packed.shape[1]
    if part.want.vector:
        return ""
    if packed.layout != "row" and not packed.format.is_float:
        return "blocks run along the inputs, its groups along the outputs"
    if carrier(packed.format, cols) is None:
        return f"no ggml type holds such codes in rows of {cols}"
    return ""


def prepare(job: Job) -> Prepared:
    """Lay a model out as a GGUF file; nothing is written yet.

    Raises:
        SpecError: something of the model, or of its tokenizer, cannot be said there.
    """
    if why := unsaid(job.spec, job.base, job.weights):
        raise SpecError(f"A GGUF file cannot say this of {job.spec.name}: {why}.")
    metadata, found, entries = _from_file(job) if job.source.suffix == ".gguf" else from_folder(job)
    notes = []
    for whole in wholes(job.spec, job.weights, found, stacked=True):
        for part in whole.parts:
            if why := refusal(part):
                raise SpecError(
                    f"A GGUF file cannot hold {part.want.key}, which is in {part.packed.format}"
                    f"{', transposed' if part.packed.layout != 'row' else ''}: {why}."
                )
        one_format(whole, "A GGUF file")
        entry = _entry(whole)
        entries.append(entry)
        held = sum(part.packed.nbytes for part in whole.parts)
        if not whole.parts[0].packed.format.is_float and entry.nbytes > 1.02 * held:
            notes.append((str(whole.parts[0].packed.format), entry.dtype))
    told = tuple(
        f"{count} matrices in {form} are written as {kind}: every value is kept, in more bytes"
        for (form, kind), count in Counter(notes).items()
    )
    sizes = Counter[str]()
    for entry in entries:
        sizes[entry.dtype] += entry.nbytes
    metadata["general.file_type"] = 4, _FILE_TYPES[sizes.most_common(1)[0][0]]
    if any(entry.dtype in FILE_BLOCKS for entry in entries):
        metadata["general.quantization_version"] = 4, 2

    def write(path: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
        told = {**metadata, MANIFEST_KEY: (8, json.dumps(manifest, ensure_ascii=False))}
        with open(path, "wb") as stream:
            write_header(stream, told, entries)
            write_arrays(stream, entries, progress, _ALIGN)

    return Prepared("gguf", sum(entry.nbytes for entry in entries), write, told)


def _from_file(job: Job) -> tuple[dict[str, Value], Mapping[str, Source], list[Entry]]:
    """Metadata of a GGUF source as they are, where it keeps every weight, and the tensors that are no weights."""
    file = GgufFile(job.source)
    found = sources(job.spec, file.tensors, spelling_of(job.spec, file), str(job.source))
    own = ("general.alignment", MANIFEST_KEY)
    metadata: dict[str, Value] = {key: file.raw(key) for key in file.metadata if key not in own}
    used = {source.tensor for source in found.values()}
    entries = []
    for name, info in file.tensors.items():
        if name in used or (name == "output.weight" and job.spec.tie_word_embeddings):
            continue
        if info.nbytes is None:
            raise SpecError(f"{job.source}: tensor {name} is stored as {info.kind}, which is not copied.")
        data = np.frombuffer(file.buffer, np.uint8, info.nbytes, info.offset)
        entries.append(Entry(name, info.kind, info.dims, info.nbytes, lambda data=data: data))
    return metadata, found, entries


def _entry(whole: Whole) -> Entry:
    first, count = whole.parts[0], int(np.prod(whole.dims))
    cols = whole.dims[-1]
    kind = None if first.want.vector else carrier(first.packed.format, cols)
    if kind is None or (first.want.path.endswith("router") and first.packed.format.is_float):
        return Entry(whole.name, "fp32", whole.dims, count * 4, whole.floats)
    if kind in ITEM_BYTES:
        nbytes = count * ITEM_BYTES[kind]
    else:
        elements, size = FILE_BLOCKS[kind]
        nbytes = count // elements * size

    def data() -> np.ndarray:
        return whole.rows([to_blocks(part.packed) for part in whole.parts])

    return Entry(whole.name, kind, whole.dims, nbytes, data)


def write_header(stream: BinaryIO, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> None:
    """Write everything that stands before the data, padded to its first byte.

    Args:
        stream: at its beginning.
        metadata: key -> (type of the value, the value or its bytes).
        entries: the tensors, in the order of their data.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [
            _text(key),
            struct.pack("<I", kind),
            value if isinstance(value, bytes) else b"".join(_bytes(kind, value)),
        ]
    offset = 0
    for entry in entries:
        parts += [
            _text(entry.name),
            struct.pack(f"<I{len(entry.dims)}Q", len(entry.dims), *reversed(entry.dims)),
            struct.pack("<IQ", _TYPES[entry.dtype], offset),
        ]
        offset += entry.nbytes + -entry.nbytes % _ALIGN
    header = b"".join(parts)
    stream.write(header + bytes(-len(header) % _ALIGN))


_CODES = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}


def _bytes(kind: int, value: Any) -> Iterator[bytes]:
    """A value as the file has it; arrays are (type of the elements, elements)."""
    if kind == 8:
        yield _text(value)
    elif kind == 9:
        inner, items = value
        yield struct.pack("<IQ", inner, len(items))
        for item in items:
            yield from _bytes(inner, item)
    else:
        yield struct.pack(_CODES[kind], value)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
