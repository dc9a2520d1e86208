"""The tree of nodes that describes a model: walking it and editing it.

A node is a frozen dataclass; its children are the fields that hold nodes or tuples of nodes. The path of a node
(``layers.3.self_attn.q_proj``) is its name everywhere: weight, module, operator and counter carry the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from trimtab.errors import Conflict, SpecError

N = TypeVar("N", bound="Node")


class Node:
    """Base of every node of a ModelSpec."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Edit:
    """Set `field` of every node at `at` (a path; ``*`` stands for one segment) to `value`."""

    at: str
    field: str
    value: object


@dataclass(frozen=True, slots=True)
class Written:
    """Who wrote which field: kept so that a second writer of another value is found."""

    path: str
    field: str
    by: str


def children(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield (name, child) of a node; the children of a tuple are named ``field.index``."""
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, field.name)
        if isinstance(value, Node):
            yield field.name, value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Node):
                    yield f"{field.name}.{index}", item


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Yield (path, node) of every node below `node`, depth first, in order of the fields."""
    for name, child in children(node):
        here = f"{path}.{name}" if path else name
        yield here, child
        yield from walk(child, here)


def matches(pattern: str, path: str) -> bool:
    """True if `pattern` names `path`; ``*`` stands for exactly one segment.

    >>> matches("layers.*.mlp", "layers.3.mlp"), matches("layers.*", "layers.3.mlp")
    (True, False)
    """
    wanted, found = pattern.split("."), path.split(".")
    return len(wanted) == len(found) and all(w in ("*", f) for w, f in zip(wanted, found, strict=True))


def edit(root: N, edits: Iterable[Edit], by: str, history: tuple[Written, ...]) -> tuple[N, tuple[Written, ...]]:
    """Return `root` with the edits made, and the history grown by them.

    Raises:
        SpecError: an edit matches no node, or the node has no such field.
        Conflict: another writer set the same field of the same node to another value.
    """
    nodes = dict(walk(root))
    writers = {(w.path, w.field): w.by for w in history}
    changes: dict[str, dict[str, object]] = {}
    for change in edits:
        exact = change.at in nodes
        hits = [change.at] if exact else [path for path in nodes if matches(change.at, path)]
        if not hits:
            raise SpecError(f"{by}: no node matches '{change.at}'.")
        for path in hits:
            node = nodes[path]
            if change.field not in {f.name for f in dataclasses.fields(node)}:  # type: ignore[arg-type]
                raise SpecError(f"{by}: {path} ({type(node).__name__}) has no field '{change.field}'.")
            other = writers.get((path, change.field))
            current = changes.get(path, {}).get(change.field, getattr(node, change.field))
            if other is not None and other != by and current != change.value:
                raise Conflict(
                    f"'{by}' and '{other}' write different values to {change.field} of {path}: "
                    f"{change.value} and {current}. Use one of the two."
                )
            writers[path, change.field] = by
            changes.setdefault(path, {})[change.field] = change.value
    grown = tuple(Written(path, field, writer) for (path, field), writer in writers.items())
    return _rebuild(root, "", _by_parent(changes), changes), grown


def mapped(root: N, change: Callable[[Node], Mapping[str, object]]) -> N:
    """Return `root` with the fields replaced that `change` names for each of its nodes.

    A node that stands in several places, as equal layers do, is changed once and stays one object. A child that `change`
    names is taken as given, its own children included.
    """
    done: dict[int, Node] = {}

    def once(node: Node) -> Node:
        if id(node) not in done:
            updates = dict(change(node))
            for field in dataclasses.fields(node):  # type: ignore[arg-type]
                value = getattr(node, field.name)
                if field.name in updates:
                    continue
                if isinstance(value, Node):
                    updates[field.name] = once(value)
                elif isinstance(value, tuple) and value and isinstance(value[0], Node):
                    updates[field.name] = tuple(once(item) for item in value)
            done[id(node)] = dataclasses.replace(node, **updates)  # type: ignore[type-var]
        return done[id(node)]

    return once(root)  # type: ignore[return-value]


def _by_parent(changes: dict[str, dict[str, object]]) -> frozenset[str]:
    """Every path that lies on the way to a change; the rest of the tree is shared, not copied."""
    touched = set()
    for path in changes:
        parts = path.split(".")
        touched.update(".".join(parts[:depth]) for depth in range(len(parts) + 1))
    return frozenset(touched)


def _rebuild(node: N, path: str, touched: frozenset[str], changes: dict[str, dict[str, object]]) -> N:
    updates: dict[str, object] = {}
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        value = getattr(node, field.name)
        here = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Node) and here in touched:
            updates[field.name] = _rebuild(value, here, touched, changes)
        elif isinstance(value, tuple) and here in touched and any(isinstance(item, Node) for item in value):
            updates[field.name] = tuple(
                _rebuild(item, f"{here}.{i}", touched, changes) if f"{here}.{i}" in touched else item
                for i, item in enumerate(value)
            )
    updates.update(changes.get(path, {}))
    return dataclasses.replace(node, **updates) if updates else node  # type: ignore[type-var]
