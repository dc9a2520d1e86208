"""One progress helper: bars on stderr when it is a terminal, silence otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any


@contextmanager
def bars() -> Iterator[Callable[[str, Iterable[Any]], Iterator[Any]]]:
    """Yield ``progress(label, items)``, which passes the items through and shows how far it got."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as shown:

        def progress(label: str, items: Iterable[Any]) -> Iterator[Any]:
            total = len(items) if isinstance(items, Sized) else None
            yield from shown.track(items, description=label, total=total)

        yield progress
