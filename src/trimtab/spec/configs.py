"""From a name to a ModelSpec: the catalogue, a folder with config.json, a GGUF file.

Only the file asked for is parsed; a spec is remembered by path, size and modification time.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, UnsupportedModelError, did_you_mean, unknown
from trimtab.spec import tree
from trimtab.spec.families.facts import Facts
from trimtab.spec.model import ModelSpec, owned
from trimtab.spec.nodes import MoESpec

#: The built-in model: id, and the GGUF file inside the package that carries it.
BUILT_IN = "smollm2-135m"

#: model_type of config.json -> (module below trimtab.spec.families, function).
FAMILIES = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "mimo", "minimax_m2"),
        ("llama", "llama"),
    ),
    **dict.fromkeys(("deepseek_v3", "kimi_k2"), ("llama", "deepseek")),
    "gpt_oss": ("llama", "gpt_oss"),
    **dict.fromkeys(("llama4", "llama4_text"), ("llama", "llama4")),
    "nemotron_h": ("recurrent", "nemotron_h"),
    "qwen3_next": ("recurrent", "qwen3_next"),
    "gemma2": ("gemma", "gemma2"),
    **dict.fromkeys(("gemma3", "gemma3_text"), ("gemma", "gemma3")),
    **dict.fromkeys(("gemma4", "gemma4_text"), ("gemma", "gemma4")),
    "gpt2": ("layernorm", "gpt2"),
    "opt": ("layernorm", "opt"),
    "bloom": ("layernorm", "bloom"),
    "phi": ("layernorm", "phi"),
    "gpt_neox": ("layernorm", "gpt_neox"),
}

#: Architectures that are known by name and why they are not built.
NOT_BUILT = {
    "bert": "it is an encoder",
    "deepseek_v32": "its attention reads the tokens that an indexer picks",
    "gemma3n": "its layers read embeddings of their own",
    "mamba": "a state-space model of the first kind; Mamba-2 layers are built",
    "t5": "it has an encoder",
}

#: What the config of any decoder names, in one spelling or another.
_EVERY = (
    ("hidden_size", "n_embd", "n_embed"),
    ("num_hidden_layers", "n_layer"),
    ("num_attention_heads", "n_head"),
    ("vocab_size",),
)


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Build the spec of a Hugging Face ``config.json``.

    Args:
        config: parsed config; a nested ``text_config`` is the language model of a multimodal one.
        name: what the model is called in reports.

    Returns:
        The spec; float weights, activations and cache in the config's dtype (bf16 if it names none).

    Raises:
        SpecError: a key is missing or has a value that is not possible.
        UnsupportedModelError: an architecture or variant that is not built.
    """
    facts = Facts(name, config)
    kind = facts.of("model_type", None)
    if kind is None:
        raise SpecError(f"{name}: the config lacks the key model_type. Known: {', '.join(sorted(FAMILIES))}.")
    family = FAMILIES.get(kind)
    if family is None:
        why = NOT_BUILT.get(str(kind).removesuffix("_text"), "")
        why = f" ({why})." if why else f".{did_you_mean(str(kind), FAMILIES)}"
        missing = [keys[0] for keys in _EVERY if not any(key in facts for key in keys)]
        lacks = f" The config lacks {', '.join(missing)} as well, which they all need." if missing else ""
        raise UnsupportedModelError(
            f"{name}: architecture '{kind}' is not built{why} Known: {', '.join(sorted(FAMILIES))}.{lacks}"
        )
    try:
        return _builder(*family)(facts)
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise SpecError(f"{name}: a value in the config has the wrong type or size ({error}).") from error


def _builder(module: str, function: str) -> Callable[[Facts], ModelSpec]:
    import importlib

    return getattr(importlib.import_module(f"trimtab.spec.families.{module}"), function)


def load_spec(name: str) -> ModelSpec:
    """Return the spec of a model.

    Args:
        name: catalogue id, Hugging Face id or alias of a catalogued model, a folder with config.json, a .gguf file (whose
            matrices keep the file's block formats), or a folder of Trimtab's own (whose spec is read as it was saved).

    Raises:
        SpecError: nothing of that name, or the file is broken.
        UnsupportedModelError: an architecture that is not built.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return spec_from_gguf(path)
    if path.is_dir():
        from trimtab.spec.serial import is_saved, read_saved

        if is_saved(path):
            return read_saved(path)[0]
        return _from_json(path / "config.json", path.resolve().name)
    if path.is_file() and path.suffix == ".json":
        return _from_json(path, path.stem)
    file = catalogue_file(name)
    return _from_json(file, file.stem)


def model_ids() -> tuple[str, ...]:
    """Ids of the catalogue, sorted."""
    return tuple(sorted(file.stem for file in _folder().glob("*.json")))


def catalogue_entry(name: str) -> dict[str, Any]:
    """The catalogue's own JSON of a model, with ``_source``, ``_confidence`` and ``_aliases``.

    Raises:
        SpecError: nothing of that name.
    """
    return json.loads(catalogue_file(name).read_text(encoding="utf-8"))


def catalogue_file(name: str) -> Path:
    """The catalogue file of an id, a Hugging Face id or an alias.

    Raises:
        SpecError: nothing of that name.
    """
    asked = name.strip()
    exact = _folder() / f"{asked.lower()}.json"
    if "/" not in asked and exact.is_file():
        return exact
    aliases = _aliases()
    found = aliases.get(asked.lower())
    if found is None:
        hint = "Or give a folder with config.json or a .gguf file; `trimtab models` lists all."
        if "/" in asked or asked.startswith("."):
            hint = f"There is no folder '{asked}' either. {hint}"
        close = did_you_mean(asked.lower(), aliases)
        names = sorted(model_ids())
        if not close:
            raise unknown("model", asked, names, hint)
        raise SpecError(
            f"Unknown model '{asked}'.{close} Known: {', '.join(names[:12])}, ... ({len(names)} in all). {hint}"
        )
    return found


def active_parameters(spec: ModelSpec) -> int:
    """Parameters one token meets: all of them, but of the experts only the chosen ones. Ties count once."""
    nodes = dict(tree.walk(spec))
    total = 0
    for path, node, count in owned(spec):
        size = getattr(node, "num_parameters", None)
        if size is None:
            continue
        experts = path.rpartition(".experts")[0]
        moe = nodes.get(experts) if experts else None
        total += size() * (moe.num_experts_per_tok if isinstance(moe, MoESpec) else count)
    return total


# -------------------------------------------------------------------------------------------------------------- sources


def _folder() -> Path:
    return Path(__file__).parents[1] / "data" / "models"


@functools.lru_cache(maxsize=1)
def _aliases() -> dict[str, Path]:
    """Every id and alias in lower case -> file. Only the alias line of a file is parsed."""
    found: dict[str, Path] = {}
    for file in sorted(_folder().glob("*.json")):
        found[file.stem] = file
        match = re.search(r'"_aliases":\s*(\[[^\]]*\])', file.read_text(encoding="utf-8"))
        for alias in json.loads(match.group(1)) if match else ():
            found.setdefault(alias.lower(), file)
    return found


def _from_json(file: Path, name: str) -> ModelSpec:
    if not file.is_file():
        raise SpecError(f"{file.parent} has no config.json, so it is not a model folder.")
    status = file.stat()
    return _cached_json(file, name, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _cached_json(file: Path, name: str, size: int, modified: int) -> ModelSpec:
    return spec_from_config(_parsed(file), name)


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder.

    Raises:
        SpecError: there is none, or it is no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise SpecError(f"{folder} has no config.json, so it is not a model folder.")
    return _parsed(folder / "config.json")


def _parsed(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{file} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise SpecError(f"{file} is not a config: a JSON object is needed.")
    return config


def spec_from_gguf(path: str | Path, name: str | None = None) -> ModelSpec:
    """The spec of a GGUF file: shapes from its metadata, the format of every matrix from its tensors.

    Args:
        path: the file.
        name: what the model is called; None = the stem of the file.

    Raises:
        SpecError: not a GGUF file, truncated or corrupt, a key missing.
        UnsupportedModelError: an architecture or weight type that is not built.
    """
    file = Path(path)
    if not file.is_file():
        raise SpecError(f"{file} does not exist. Give the path of a .gguf file.")
    status = file.stat()
    return _cached_gguf(file, name or file.stem, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _cached_gguf(file: Path, name: str, size: int, modified: int) -> ModelSpec:
    from trimtab.spec.families.gguf import config_from_gguf, from_header, refuse_parts
    from trimtab.spec.gguf_header import GgufHeader

    header = GgufHeader(file)
    try:
        refuse_parts(header)
        return from_header(spec_from_config(config_from_gguf(header.metadata, header.tensors), name), header)
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise SpecError(f"{file}: a value in the metadata has the wrong type or size ({error}).") from error


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A Hugging Face style config from GGUF metadata; see `trimtab.spec.families.gguf`."""
    from trimtab.spec.families.gguf import config_from_gguf

    return config_from_gguf(metadata, tensors)
