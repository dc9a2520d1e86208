"""Functions of CPython's own library, to be found by their description and repeated (after RepoQA, arXiv 2406.06025)."""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
from pathlib import Path

from trimtab.measure.kv.dialogue import Room, Turn, few_facts

#: Modules of plain functions that every CPython has.
_MODULES = (
    "bisect", "calendar", "colorsys", "fnmatch", "fractions", "heapq", "inspect", "ipaddress", "keyword", "linecache",
    "numbers", "posixpath", "pprint", "random", "shlex", "shutil", "statistics", "string", "textwrap", "tokenize",
)  # fmt: skip
#: Lines a function may have once its docstring is gone.
_LINES = range(3, 12)


@functools.cache
def functions() -> tuple[tuple[str, str, str], ...]:
    """(name, description, source without docstring and comments) of short functions, sorted by name."""
    found: dict[str, tuple[str, str]] = {}
    for module in _MODULES:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
                continue
            described = (ast.get_docstring(node) or "").split("\n\n")[0]
            if not described or len(node.body) < 2:
                continue
            node.body = node.body[1:]
            source = ast.unparse(node)
            if len(source.splitlines()) in _LINES and 20 <= len(described) <= 240:
                found.setdefault(node.name, (" ".join(described.split()), source))
    return tuple((name, *found[name]) for name in sorted(found))


def repoqa(rng: random.Random, room: Room, turns: int) -> tuple[str, tuple[Turn, ...]]:
    """Functions one after the other; a turn describes one of them and wants its source back."""
    head = "Below are Python functions.\n\n"
    chosen, left = [], room.tokens - room.count(head)
    for name, described, source in rng.sample(functions(), len(functions())):
        cost = room.count(f"{source}\n\n")
        if cost <= left:
            left -= cost
            chosen.append((name, described, source))
    if turns > len(chosen):
        raise few_facts("repoqa", room.tokens, len(chosen), turns)
    asked = rng.sample(range(len(chosen)), turns)
    context = head + "\n\n".join(source for *_, source in chosen)
    return context, tuple(
        Turn(
            question=f"Repeat exactly the function that does this: {chosen[index][1]}",
            prefix="```python\n",
            answers=(chosen[index][2],),
            rivals=tuple(source for at, (*_, source) in enumerate(chosen) if at != index),
            scorer="similarity",
            max_new_tokens=room.count(chosen[index][2]) + 8,
            glued=True,
            lines=True,
            task="repoqa",
        )
        for index in asked
    )
