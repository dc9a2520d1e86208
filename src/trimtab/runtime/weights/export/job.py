"""What is to be saved, what a target makes of it, and the manifest that goes with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.runtime.weights.export.container import Progress
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.configs import read_config
from trimtab.spec.gguf_header import GgufHeader
from trimtab.spec.model import ModelSpec
from trimtab.spec.serial import is_saved

#: The manifest in a folder, and its key in a GGUF file.
MANIFEST_FILE = "trimtab.json"
MANIFEST_KEY = "trimtab.manifest"


@dataclass(frozen=True, slots=True)
class Job:
    """A model to be saved.

    Args:
        spec: as it is now.
        base: as it was loaded, in the same dtype.
        weights: of `spec`.
        source: the folder or .gguf file it was loaded from: config and tokenizer come from there.
    """

    spec: ModelSpec
    base: ModelSpec
    weights: Weights
    source: Path

    def config(self) -> dict[str, Any]:
        """The config of a Hugging Face source.

        Raises:
            SpecError: a folder of Trimtab's own, which has none, or a broken one.
        """
        if is_saved(self.source):
            raise SpecError(
                f"{self.source} is a folder of Trimtab's own, without the config of the model it was made of. "
                "Convert that model instead."
            )
        return read_config(self.source)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model laid out for one target.

    Args:
        target: ``safetensors``, ``gguf`` or ``own``.
        nbytes: of its tensors in the file.
        write: ``write(path, manifest, progress)`` makes the folder or file.
        notes: what a reader may wonder about, in words.
    """

    target: str
    nbytes: int
    write: Callable[[Path, Mapping[str, Any], Progress], None]
    notes: tuple[str, ...] = ()


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a folder or a GGUF file that `trimtab convert` wrote; None of anything else."""
    try:
        if path.is_dir():
            found = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        else:
            found = json.loads(GgufHeader(path).metadata[MANIFEST_KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and "trimtab" in found else None
