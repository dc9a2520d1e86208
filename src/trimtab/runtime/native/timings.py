"""Choices that a timing on this processor settled once, kept in a file of the user."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trimtab.runtime.files import write_atomically

T = TypeVar("T")


def processor() -> str:
    """Name of the processor and how many of it there are: part of the key of timings."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} processors)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} processors)"


def settled(path: Path, key: str, valid: Callable[[object], bool], find: Callable[[], T]) -> T:
    """The choice kept under `key`, or what `find` chooses, which is kept.

    Args:
        path: a JSON file; a broken one counts as empty, one that cannot be written as absent.
        key: processor, instruction set, format, shape.
        valid: whether a stored value is such a choice.
        find: times and chooses.
    """
    known = _read(path)
    if key in known and valid(known[key]):
        return known[key]  # type: ignore[return-value]
    found = find()
    with contextlib.suppress(OSError):  # a home that cannot be written to: timed again next time
        write_atomically(path, json.dumps(_read(path) | {key: found}, indent=1, sort_keys=True))
    return found


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
