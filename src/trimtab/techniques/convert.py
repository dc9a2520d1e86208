"""Save a model with techniques on it as files: load, derive, lay out, measure if asked, write."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError
from trimtab.runtime.weights.export.job import Job
from trimtab.runtime.weights.export.save import existing, prepare, write
from trimtab.runtime.weights.load import Loaded, find, open_model, read_tokenizer
from trimtab.runtime.weights.packed import Weights, fingerprint
from trimtab.spec import tree
from trimtab.spec.families.sources import wanted
from trimtab.spec.model import ModelSpec
from trimtab.techniques.apply import builtin_materials, derive, reencode, resolve_all
from trimtab.techniques.base import Technique, compose
from trimtab.techniques.materials import Materials, Progress, no_progress
from trimtab.techniques.registry import parse_all

if TYPE_CHECKING:
    from trimtab.model.variant import Model

#: Of the manifest.
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, or was there already.

    Args:
        out: the folder or file.
        manifest: as it lies in it.
        fresh: False if the same request had been done before.
        notes: what a reader may wonder about.
    """

    out: Path
    manifest: Mapping[str, Any]
    fresh: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """A text quality is measured on.

    Args:
        name: of it.
        text: the text.
        measure: ``measure(base, variant, text)`` gives figures by name.
    """

    name: str
    text: str
    measure: Callable[[Model, Model, str], dict[str, Any]]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    version: str,
    techniques: Sequence[str | Technique] = (),
    to: str = "auto",
    dtype: str = "auto",
    materials: Materials | None = None,
    held: Held | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> Converted:
    """Save a model as files, whole or not at all.

    Args:
        source: as in `load`.
        out: a folder, or a name that ends in .gguf.
        version: of the package, for the manifest.
        techniques: on the model.
        to: ``safetensors``, ``gguf``, ``own`` or ``auto``, see `export.save.prepare`.
        dtype: of what is not in codes: ``float32 | bfloat16 | float16``; ``file`` keeps what the source holds, and ``auto``
            does too, but lets techniques that fill weights of their own start from float32.
        materials: calibration texts; by default the built-in text.
        held: text quality is measured on, for the manifest; None measures nothing.
        force: do it again, and replace what an earlier call wrote under this name.
        progress: shows how far it got.

    Raises:
        SpecError: the target cannot express the model, or `out` holds something else.
        CapacityError: the disk is full.
        Conflict, CalibrationError, MissingDependency: as `load`.
    """
    chosen, path, out = parse_all(techniques), find(source), Path(out).expanduser()
    before = existing(out, path, force)
    plain = all(type(technique).convert is Technique.convert for technique in chosen)
    stored = ("file" if plain else "float32") if dtype == "auto" else dtype
    loaded = open_model(source, dtype=stored)
    calibrates = any(technique.unresolved or technique.needs for technique in chosen)
    materials = materials or builtin_materials()
    request: dict[str, Any] = {
        "model": loaded.spec.name,
        "source": {"spec": loaded.spec.hash, "weights": fingerprint(loaded.weights)},
        "techniques": [str(technique) for technique in chosen],
        "dtype": dtype,
        "calibration": {name: _digest(text) for name, text in materials.texts.items()} if calibrates else {},
        "eval": {held.name: _digest(held.text)} if held else {},
        "version": version,
    }
    if before is not None and not force:
        asked = request | {"target": before.get("target") if to == "auto" else to}
        if all(before.get(key) == value for key, value in asked.items()):
            return Converted(out, before, fresh=False)
        differ = ", ".join(key for key, value in asked.items() if before.get(key) != value)
        raise SpecError(f"{out} exists and was made otherwise ({differ}). --force replaces it; or give another name.")
    spec, weights, resolved = _derived(loaded, chosen, materials, calibrates, progress)
    if dtype == "auto" and not plain:
        spec, weights = _untouched(spec, weights, loaded.weights, path)
    prepared = prepare(Job(spec, loaded.spec, weights, path), out, to)
    manifest = {"trimtab": SCHEMA, "target": prepared.target, **request}
    manifest |= {
        "resolved": [str(technique) for technique in resolved],
        "spec": spec.hash,
        "bytes": {"weights": weights.nbytes, "tensors": prepared.nbytes},
    }
    if held is not None:
        base, variant = _models(loaded, spec, weights)
        manifest["quality"] = {held.name: held.measure(base, variant, held.text)}
    write(prepared, out, manifest, progress)
    return Converted(out, manifest, fresh=True, notes=prepared.notes)


def _derived(
    loaded: Loaded, chosen: Sequence[Technique], materials: Materials, calibrates: bool, progress: Progress
) -> tuple[ModelSpec, Weights, Sequence[Technique]]:
    """Spec and weights with the techniques on them; torch is needed only where one calibrates."""
    spec = compose(loaded.spec, chosen)
    if calibrates:
        base, _ = _models(loaded, loaded.spec, loaded.weights)
        materials = materials.for_model(base, progress)
        resolved = resolve_all(base, chosen, materials)
        variant = derive(base.variant, resolved, materials)
        return variant.spec, variant.weights, resolved
    weights = loaded.weights
    for technique in sorted(chosen, key=lambda technique: technique.stage):
        weights = technique.convert(weights, loaded.spec, spec, Materials(progress=progress))
    return spec, reencode(weights, spec, progress), chosen


def _models(loaded: Loaded, spec: ModelSpec, weights: Weights) -> tuple[Model, Model]:
    from trimtab.model.variant import Model, Variant

    tokenizer = functools.partial(read_tokenizer, loaded.tokenizer_source)
    return Model(Variant(loaded.spec, loaded.weights), tokenizer), Model(Variant(spec, weights), tokenizer)


def _untouched(spec: ModelSpec, weights: Weights, floats: Weights, source: Path) -> tuple[ModelSpec, Weights]:
    """Put the blocks of the file back where techniques left a matrix as it was decoded."""
    stored = open_model(source, dtype="file").weights
    nodes, touched = {}, set()
    for want in wanted(spec):
        path = want.path if want.layer is None else f"layers.{want.layer}.{want.path}"
        if want.part != "weight":
            continue
        if want.key in floats and weights[want.key] is floats[want.key] and not stored[want.key].format.is_float:
            nodes.setdefault(path, {})[want.key] = stored[want.key]
        else:
            touched.add(path)
    kept = {path: packed for path, packed in nodes.items() if path not in touched}
    edits = [tree.Edit(path, "format", next(iter(packed.values())).format) for path, packed in kept.items()]
    if spec.tie_word_embeddings and "embed_tokens" in kept:
        edits.append(tree.Edit("lm_head", "format", kept["embed_tokens"]["embed_tokens"].format))
    edited = dataclasses.replace(tree.edit(spec, edits, "file", ())[0], history=spec.history)
    return edited, weights | {key: packed for group in kept.values() for key, packed in group.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
