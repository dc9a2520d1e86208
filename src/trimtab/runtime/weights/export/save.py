"""Choose what a model is saved as, and write it whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, unknown
from trimtab.runtime.files import replaced
from trimtab.runtime.weights.export import gguf, own, safetensors
from trimtab.runtime.weights.export.container import Progress
from trimtab.runtime.weights.export.job import Job, Prepared, read_manifest

#: In the order in which ``auto`` prefers them for a folder.
TARGETS = {"safetensors": safetensors.prepare, "gguf": gguf.prepare, "own": own.prepare}


def prepare(job: Job, out: Path, to: str) -> Prepared:
    """Lay a model out for a target.

    Args:
        job: the model.
        out: the final name; one that ends in .gguf is a GGUF file, any other a folder.
        to: of `TARGETS`, or ``auto``: GGUF by the name, else a Hugging Face folder if that can hold the model, else our own.

    Raises:
        SpecError: the target cannot express the model; the message says what of it, and which target can.
    """
    if to not in (*TARGETS, "auto"):
        raise unknown("target", to, (*TARGETS, "auto"))
    file = out.suffix == ".gguf"
    if to == "auto":
        try:
            return TARGETS["gguf" if file else "safetensors"](job)
        except SpecError as error:
            if file:
                raise _with_others(error, job, "gguf") from None
            return own.prepare(job)
    if file != (to == "gguf"):
        raise SpecError(
            f"{out}: --to {to} writes a {'file whose name ends in .gguf' if to == 'gguf' else 'folder'}. "
            f"Try {out.with_suffix('.gguf') if to == 'gguf' else out.with_suffix('')}."
        )
    try:
        return TARGETS[to](job)
    except SpecError as error:
        raise _with_others(error, job, to) from None


def _with_others(error: SpecError, job: Job, refused: str) -> SpecError:
    can = []
    for name, other in TARGETS.items():
        if name != refused:
            try:
                other(job)
            except SpecError:
                continue
            can.append(f"--to {name}")
    return SpecError(f"{error} These can hold it: {', '.join(can)}." if can else f"{error} No target can hold it.")


def write(prepared: Prepared, out: Path, manifest: Mapping[str, Any], progress: Progress) -> None:
    """Write the files; `out` is there whole afterwards, or after an error what it was before.

    Raises:
        CapacityError: the disk is full, or would be.
        SpecError: the place cannot be written to.
    """
    with replaced(out, prepared.nbytes) as fresh:
        prepared.write(fresh, manifest, progress)


def existing(out: Path, source: Path, force: bool) -> dict[str, Any] | None:
    """The manifest of what bears the name `out`; None if nothing does, or an empty folder.

    Raises:
        SpecError: something that `trimtab convert` did not write, or the model itself.
    """
    if not out.exists():
        return None
    if out.resolve() == source.resolve():
        raise SpecError(f"{out} is the model itself. Give another name.")
    found = read_manifest(out)
    if found is not None or (out.is_dir() and not any(out.iterdir())):
        return found
    more = " --force replaces only what trimtab convert wrote." if force else ""
    raise SpecError(
        f"{out} exists and trimtab convert did not write it.{more} Give another name, or remove it yourself."
    )
