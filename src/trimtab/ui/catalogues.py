"""The catalogues of models and techniques as rows, for tables, JSON and the explorer."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, Literal

from trimtab.errors import UnsupportedModelError
from trimtab.spec.configs import active_parameters, load_spec, model_ids
from trimtab.spec.nodes import AttentionSpec, LatentAttentionSpec
from trimtab.techniques.registry import param_name, spelled, technique_class, technique_names


def model_row(name: str) -> dict[str, Any]:
    """Shape, parameters and bytes of one model.

    Raises:
        SpecError, UnsupportedModelError: nothing of that name, or an architecture that is not built.
    """
    spec = load_spec(name)
    mixers = (layer.self_attn for layer in spec.layers)
    attention = next((m for m in mixers if isinstance(m, AttentionSpec | LatentAttentionSpec)), None)
    return {
        "id": spec.name,
        "family": spec.family,
        "num_parameters": spec.num_parameters(),
        "active_parameters": active_parameters(spec),
        "num_hidden_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": attention.num_attention_heads if attention else 0,
        "num_key_value_heads": len(attention.cache.heads) if attention else 0,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "weight_bytes": spec.weight_nbytes(),
        "kv_bytes_per_token": spec.kv_nbytes(1) - spec.state_nbytes(),
        "state_bytes": spec.state_nbytes(),
        "hash": spec.hash,
    }


def model_rows() -> list[dict[str, Any]]:
    """Every model of the catalogue; one that cannot be priced has ``id family why`` alone."""
    rows = []
    for name in model_ids():
        try:
            rows.append(model_row(name))
        except UnsupportedModelError as error:
            rows.append({"id": name, "family": "", "why": str(error)})
    return rows


def technique_row(name: str) -> dict[str, Any]:
    """A technique and its parameters.

    Raises:
        SpecError: no such technique.
    """
    cls = technique_class(name)
    return {
        "name": cls.name,
        "summary": cls.summary,
        "seam": cls.__module__.split(".")[-2],
        "stage": cls.stage.name.lower(),
        "needs": sorted(cls.needs),
        "paper": cls.paper,
        "parameters": [
            {"name": param_name(f), "type": str(f.type), "default": f.default, **f.metadata}
            for f in dataclasses.fields(cls)
        ],
        "doc": inspect.getdoc(cls),
    }


def technique_rows() -> list[dict[str, Any]]:
    """Every technique."""
    return [technique_row(name) for name in technique_names()]


Widget = Literal["int", "float", "bool", "choice", "text"]


def parameter_kinds(name: str) -> dict[str, tuple[Widget, list[str]]]:
    """How a form asks for each parameter of a technique: (``int float bool choice text``, the choices).

    A type that lists its values is a choice; a union of types is text, since no one widget takes all of it.
    """
    widgets: dict[object, Widget] = {int: "int", float: "float", bool: "bool"}
    found: dict[str, tuple[Widget, list[str]]] = {}
    for field, hint in typing.get_type_hints(technique_class(name)).items():
        origin = typing.get_origin(hint)
        if origin is typing.ClassVar or field.startswith("_"):
            continue
        key = spelled(field)
        if origin is typing.Literal:
            found[key] = ("choice", [str(value) for value in typing.get_args(hint)])
        elif isinstance(hint, types.UnionType) or origin is typing.Union:
            found[key] = ("text", [])
        else:
            found[key] = (widgets.get(hint, "text"), [])
    return found
