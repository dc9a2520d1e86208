"""Find techniques by name: built-ins by file name, third parties by the ``trimtab.techniques`` entry point."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from trimtab.errors import SpecError, did_you_mean, unknown
from trimtab.spec.strings import PartString, parse_composition, quote
from trimtab.techniques.base import Technique

_SEAMS = ("shape", "linear", "cache", "attention", "ffn", "route", "tokens", "decoding", "head", "place", "train")


@functools.cache
def _targets() -> dict[str, str]:
    """Spec name to ``module`` (built-in) or ``module:Class`` (entry point), found without importing any of them."""
    import trimtab.techniques as package

    found: dict[str, str] = {}
    for folder in pkgutil.iter_modules(package.__path__):
        if folder.ispkg and folder.name in _SEAMS:
            seam = f"{package.__name__}.{folder.name}"
            paths = [f"{path}/{folder.name}" for path in package.__path__]
            for module in pkgutil.iter_modules(paths):
                if not module.name.startswith("_"):
                    found[module.name.replace("_", "-")] = f"{seam}.{module.name}"
    for entry in metadata.entry_points(group="trimtab.techniques"):
        if entry.name in found:
            raise SpecError(
                f"technique '{entry.name}' of {entry.value} has the name of another one. Names are unique; rename it."
            )
        found[entry.name] = entry.value
    return found


def technique_names() -> tuple[str, ...]:
    """All spec names, sorted."""
    return tuple(sorted(_targets()))


def technique_class(name: str) -> type[Technique]:
    """Return the class of a technique.

    Raises:
        SpecError: no technique has this name.
    """
    name = name.replace("_", "-")
    target = _targets().get(name)
    if target is None:
        raise unknown("technique", name, technique_names(), "See `trimtab techniques`.")
    module_name, _, class_name = target.partition(":")
    module = importlib.import_module(module_name)
    if class_name:
        return getattr(module, class_name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Technique) and getattr(value, "name", None) == name:
            return value
    raise SpecError(f"{module_name} holds no technique named '{name}'. File, class and spec name are one word.")


def parse_technique(part: PartString | str) -> Technique:
    """Build a technique from a spec string.

    Raises:
        SpecError: unknown name or parameter, or a value of the wrong type or out of range.
    """
    if isinstance(part, str):
        parts = parse_composition(part)
        if len(parts) != 1:
            raise SpecError(f"'{part}' holds {len(parts)} techniques where one is wanted.")
        part = parts[0]
    cls = technique_class(part.name)
    hints = typing.get_type_hints(cls)
    fields = {param_name(f): f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    for key, text in part.values.items():
        if key not in fields:
            listed = ", ".join(fields) or "none"
            raise SpecError(f"{part.name}: unknown parameter '{key}'.{did_you_mean(key, fields)} Allowed: {listed}.")
        values[fields[key].name] = _read(
            part.name, key, text, hints[fields[key].name], fields[key].metadata.get("allowed", "")
        )
    return cls(**values)


def param_name(field: dataclasses.Field[Any]) -> str:
    """How a spec string spells a parameter: a word that Python keeps for itself has an underscore behind it in the class alone."""
    return spelled(field.name)


def spelled(name: str) -> str:
    """How a spec string spells a field of a technique's class."""
    return name.removesuffix("_")


def parse_all(texts: Iterable[str | Technique]) -> tuple[Technique, ...]:
    """Parse any mix of spec strings (each may be a composition ``a+b``) and techniques, in order."""
    found: list[Technique] = []
    for text in texts:
        if isinstance(text, Technique):
            found.append(text)
        else:
            found.extend(parse_technique(part) for part in parse_composition(text))
    return tuple(found)


def spec_string(technique: Technique) -> str:
    """Print a technique so that parsing it gives an equal one; parameters at their default are left out.

    A tuple prints as ``a|b``.
    """
    shown = []
    for field in dataclasses.fields(technique):
        value = getattr(technique, field.name)
        if value != field.default:
            shown.append(f"{param_name(field)}={quote(_write(value))}")
    return f"{technique.name}:{','.join(shown)}" if shown else technique.name


def _write(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "|".join(_write(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def _read(name: str, key: str, text: str, hint: object, allowed: str) -> object:
    """Convert text to the annotated type: int, float, bool, str, tuple[T, ...] or a union of these."""
    kinds = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    for kind in kinds:
        value = _convert(text, kind)
        if value is not None:
            return value
    meant = allowed or " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise SpecError(f"{name}: {key}={text} is not possible. Allowed: {meant}.")


def _convert(text: str, kind: object) -> object | None:
    if typing.get_origin(kind) is tuple:
        items = [_convert(item, typing.get_args(kind)[0]) for item in text.split("|")]
        return None if any(item is None for item in items) or "|" not in text else tuple(items)
    if typing.get_origin(kind) is typing.Literal:
        return text if text in typing.get_args(kind) else None
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}.get(text.lower())
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if kind is str:
            return text
    except ValueError:
        return None
    return None
