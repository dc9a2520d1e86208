"""Apply techniques to a loaded model: derive a variant, use it inside a block, come back unchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import SpecError, UnsupportedModelError, unknown
from trimtab.runtime.numerics import transcode
from trimtab.runtime.text.builtin import builtin_text, split
from trimtab.runtime.weights.load import Loaded, open_model, read_tokenizer
from trimtab.spec.formats import GGUF_BLOCKS
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import MoESpec
from trimtab.techniques.base import Technique, compose
from trimtab.techniques.materials import Materials, Progress, no_progress
from trimtab.techniques.registry import parse_all

if TYPE_CHECKING:
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.engine.generator import Generator
    from trimtab.runtime.native import NativeModel
    from trimtab.runtime.native.lower import SharedTiles
    from trimtab.runtime.weights.packed import Packed, Weights


def load(
    source: str | Path,
    *,
    dtype: str = "auto",
    kv_dtype: str | None = None,
    techniques: Sequence[str | Technique] = (),
    materials: Materials | None = None,
) -> Model:
    """Load a model: ``smollm2-135m``, a folder, a .gguf file or a hub id.

    Args:
        source: where it is.
        dtype: ``float32 | bfloat16 | float16``, or ``file`` to keep quantized blocks as they are in the file. ``auto`` is
            float32, but keeps the codes of a folder that `trimtab convert` or compressed-tensors wrote.
        kv_dtype: of the cache: a floating dtype, ``fp8``, ``int8``, ``int4``, ``int2`` (``int4-g32``: groups of 32); None = as
            the activations. A folder that says how its cache is kept (`trimtab convert --to own`) has it so.
        techniques: applied for good while loading; the matrices they replace are freed.
        materials: calibration texts; by default the built-in text.

    Raises:
        SpecError: no such model, a broken file, a technique that does not fit.
        MissingDependency: the built-in model's package or torch is not installed; the message holds the command.
    """
    chosen = parse_all(techniques)  # a typo is found before the weights are read
    loaded = open_model(source, dtype=dtype)
    spec = loaded.spec if kv_dtype is None or loaded.saved else loaded.spec.with_kv_dtype(kv_dtype)
    compose(spec, chosen)
    from trimtab.model.variant import Model, Variant

    # The tokenizer must not hold on to `loaded`: the weights that techniques replace are freed with it.
    tokenizer = functools.partial(read_tokenizer, loaded.tokenizer_source)
    found = Model(Variant(spec, loaded.weights), tokenizer)
    if not chosen:
        return found
    materials = (materials or default_materials(found)).for_model(found)
    return Model(derive(found.variant, resolve_all(found, chosen, materials), materials), tokenizer)


def load_native(
    source: str | Path,
    *,
    dtype: str = "file",
    techniques: Sequence[str | Technique] = (),
    threads: int = 0,
    kv_dtype: str = "float32",
    materials: Materials | None = None,
) -> NativeModel:
    """Load a model as a native program, without torch unless a technique calibrates.

    Args:
        source: as in `load`.
        dtype: of the weights: ``file`` keeps what the file holds, quantized blocks included.
        techniques: whose conversion follows from the weights alone. What one leaves to calibration (``phi=auto``) is found
            with the torch decoder first.
        threads: workers; 0 = as many as this process may run on.
        kv_dtype: of the cache: ``float32 | bfloat16 | float16 | int8``.
        materials: calibration texts; by default the built-in text.

    Raises:
        UnsupportedModelError: the model, or what the techniques make of it, has no native kernels; `load` runs it.
        SpecError, Conflict, MissingDependency: as `load`.
    """
    return native_of(
        open_model(source, dtype=dtype), techniques, threads=threads, kv_dtype=kv_dtype, materials=materials
    )


def native_of(
    loaded: Loaded,
    techniques: Sequence[str | Technique] = (),
    *,
    threads: int = 0,
    kv_dtype: str = "float32",
    materials: Materials | None = None,
    shared: SharedTiles | None = None,
) -> NativeModel:
    """As `load_native`, from a model that has been read.

    Args:
        loaded: the model; not kept.
        techniques, threads, kv_dtype, materials: as there.
        shared: matrices in common with other programs of the same `loaded`, see `lower`.
    """
    from trimtab.runtime.native import NativeModel, lower, lowered_spec

    chosen = parse_all(techniques)
    # The tokenizer must not hold on to `loaded`: its weights are freed once they are tiled.
    tokenizer = functools.partial(read_tokenizer, loaded.tokenizer_source)
    base = loaded.spec if loaded.saved else loaded.spec.with_kv_dtype(kv_dtype)
    spec = compose(base, chosen)
    lowered_spec(spec)  # refuses before anything is calibrated or converted
    if any(technique.unresolved or technique.needs for technique in chosen):  # found on the torch decoder
        from trimtab.model.variant import Model, Variant

        model = Model(Variant(base, loaded.weights), tokenizer)
        materials = (materials or default_materials(model)).for_model(model)
        variant = derive(model.variant, resolve_all(model, chosen, materials), materials)
        spec, weights = variant.spec, variant.weights
        del model, variant
    else:
        weights = loaded.weights
        for technique in sorted(chosen, key=lambda t: t.stage):
            weights = technique.convert(weights, base, spec, Materials())
        weights = reencode(weights, spec)
    del loaded
    return NativeModel(lower(spec, weights, threads, shared=shared), tokenizer)


def load_engine(
    source: str | Path,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "float32",
    techniques: Sequence[str | Technique] = (),
    materials: Materials | None = None,
    threads: int = 0,
    isa: str = "auto",
) -> tuple[Generator, str]:
    """Load a model into the native program where it can be lowered, else into the torch decoder.

    Args:
        source, kv_dtype, techniques, materials, threads: as in `load` and `load_native`.
        dtype: as there; ``auto`` is what each of the two takes by default.
        engine: ``auto``, or ``native`` or ``torch`` to insist.
        isa: instruction set of the kernels, see `use_isa`.

    Returns:
        The model, and why it does not run natively (empty if it does, or torch was asked for).

    Raises:
        UnsupportedModelError: native was asked for and is not possible.
        HardwareError: this processor has not that instruction set.
        SpecError, Conflict, MissingDependency: as `load`.
    """
    from trimtab.runtime.kernels import use_isa

    if engine not in ("auto", "native", "torch"):
        raise unknown("engine", engine, ("auto", "native", "torch"))
    if not 0 <= threads <= 1024:
        raise SpecError(f"threads={threads} is not possible. Allowed: 1..1024, or 0 for all this process may use.")
    use_isa(isa)
    why = ""
    if engine != "torch":
        try:
            # A technique that fills weights of its own starts from floats.
            plain = all(type(technique).convert is Technique.convert for technique in parse_all(techniques))
            stored = ("file" if plain else "float32") if dtype == "auto" else dtype
            return load_native(
                source, dtype=stored, techniques=techniques, threads=threads, kv_dtype=kv_dtype, materials=materials
            ), ""
        except UnsupportedModelError as error:
            if engine == "native":
                raise
            why = str(error)
    stored = "float32" if dtype == "auto" else dtype
    model = load(source, dtype=stored, kv_dtype=kv_dtype, techniques=techniques, materials=materials)
    if threads:
        import torch

        torch.set_num_threads(threads)
    return model, why


def derive(variant: Variant, techniques: Sequence[Technique], materials: Materials) -> Variant:
    """Return the variant with the techniques on it; every buffer they do not replace is shared.

    Raises:
        SpecError, Conflict: see `compose`.
        CalibrationError: a technique needs text and there is none.
    """
    from trimtab.model.variant import Variant

    spec = compose(variant.spec, techniques)
    weights = variant.weights
    for technique in sorted(techniques, key=lambda t: t.stage):
        weights = technique.convert(weights, variant.spec, spec, materials)
    return Variant(spec, reencode(weights, spec))


def reencode(weights: Weights, spec: ModelSpec, progress: Progress = no_progress) -> Weights:
    """Store every linear in the format and layout its node asks for; what already is, is shared.

    Args:
        weights: of the model before.
        spec: of the model after.
        progress: shows how far it got.

    Raises:
        SpecError: a matrix would have to move from one integer grid to another.
    """
    replaced: dict[str, Packed] = {}
    for path, node in progress("encoding", list(linear_weights(spec))):
        packed = weights[path]
        if packed.format == node.format and packed.layout == node.layout:
            continue
        if not packed.format.is_float and packed.format.kind not in GGUF_BLOCKS:
            raise SpecError(
                f"{path} is stored as {packed.format} ({packed.layout}) and would become {node.format} ({node.layout}): "
                "rounding twice. Give all techniques at once, for example -t rtn -t cats, instead of one after the other."
            )
        replaced[path] = transcode(packed, node.format, node.layout)
    return weights | replaced


def linear_weights(spec: ModelSpec) -> Iterator[tuple[str, LinearSpec]]:
    """Yield (weight path, node) of every linear that owns a matrix; experts one by one."""
    counts = {
        f"layers.{index}.mlp.experts": layer.mlp.num_experts
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mlp, MoESpec)
    }
    for path, node in spec.linears():
        if path == "lm_head" and spec.tie_word_embeddings:
            continue
        parent, _, leaf = path.rpartition(".")
        if parent in counts:
            for expert in range(counts[parent]):
                yield f"{parent}.{expert}.{leaf}", node
        else:
            yield path, node


def resolve_all(model: Model, techniques: Sequence[Technique], materials: Materials) -> tuple[Technique, ...]:
    """Replace every ``auto`` by a value found on the model at hand."""
    return tuple(technique.resolve(model, materials) for technique in techniques)


@contextmanager
def applied(model: Model, *techniques: str | Technique, materials: Materials | None = None) -> Iterator[Model]:
    """Use a model with techniques on it; leaving the block, by an exception too, brings the old one back bit for bit.

    Args:
        model: a loaded model.
        techniques: spec strings (``"rtn:bits=4"``, ``"rtn+cats"``) or techniques.
        materials: calibration texts; by default the built-in text.

    Raises:
        SpecError, Conflict, CalibrationError: before the model is touched.
    """
    materials = (materials or default_materials(model)).for_model(model)
    chosen = resolve_all(model, parse_all(techniques), materials)
    model.push(derive(model.variant, chosen, materials))
    try:
        yield model
    finally:
        model.pop()


def default_materials(model: Model) -> Materials:
    """Calibrate on the first half of the built-in text; what is measured by default comes from the second half."""
    return dataclasses.replace(builtin_materials(), tokenizer=model.tokenizer)


def builtin_materials() -> Materials:
    """The same, of no model yet."""
    return Materials(texts={"topics": split(builtin_text())[0]})
