"""The form of our own: every buffer of every weight as it is, and the ModelSpec beside them.

It holds whatever a Variant holds: any format, thresholds and orders, how caches are kept and products computed. Reading it
gives the Variant back bit for bit, as views of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.runtime.weights.export.container import Entry, Progress, write_json, write_safetensors
from trimtab.runtime.weights.export.job import MANIFEST_FILE, Job, Prepared
from trimtab.runtime.weights.export.tokenizer import write_tokenizer
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.safetensors import SafetensorsFolder
from trimtab.spec.model import ModelSpec
from trimtab.spec.serial import SPEC_FILE, VERSION, Table, read_saved

WEIGHTS_FILE = "trimtab.safetensors"


def prepare(job: Job) -> Prepared:
    """Lay a model out as a folder of Trimtab's own; nothing is written yet.

    Raises:
        SpecError: a value in the spec that cannot be saved.
    """
    table = Table()
    root = table.add(job.spec)
    listed = {
        path: {"format": table.add(packed.format), "shape": list(packed.shape), "layout": packed.layout}
        for path, packed in job.weights.items()
    }
    found = entries(job.weights)

    def write(folder: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
        folder.mkdir()
        write_safetensors(folder / WEIGHTS_FILE, found, progress)
        write_json(folder / SPEC_FILE, {"version": VERSION, "root": root, "weights": listed, "values": table.rows})
        write_tokenizer(job.source, folder)
        write_json(folder / MANIFEST_FILE, manifest)

    return Prepared("own", sum(entry.nbytes for entry in found), write)


def entries(weights: Weights) -> list[Entry]:
    """One entry for each buffer, named ``path/buffer``."""
    return [
        Entry(f"{path}/{b.name}", b.dtype, b.shape, b.nbytes, lambda p=packed, n=b.name: p.buffers[n])
        for path, packed in weights.items()
        for b in packed.format.buffers(*packed.shape)
    ]


def read(folder: Path) -> tuple[ModelSpec, Weights]:
    """Return the spec and the weights of a folder, as views of its file.

    Raises:
        SpecError: a broken folder, or one of a newer version.
    """
    spec, listed, values = read_saved(folder)
    file, items = SafetensorsFolder(folder), {}
    for path, entry in listed.items():
        try:
            format, (rows, cols) = values.get(entry["format"]), entry["shape"]
            buffers = {
                b.name: file.array(f"{path}/{b.name}").reshape(b.shape) for b in format.buffers(int(rows), int(cols))
            }
            items[path] = Packed(format, (int(rows), int(cols)), buffers, entry["layout"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"{folder} is corrupt: {path} is not what {SPEC_FILE} says ({error}).") from None
    return spec, Weights(items)
