"""Text that is always there: CPython's own language topics (technical English), split in two disjoint halves."""

from __future__ import annotations

import functools


@functools.cache
def builtin_text() -> str:
    """The help topics of CPython, joined in the order of their names (about 460 kB; it varies a little by version)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def split(text: str) -> tuple[str, str]:
    r"""Return (calibration, held-out): the first and the second half, cut at a paragraph.

    >>> split("a\n\nb")
    ('a', 'b')
    """
    middle = text.find("\n\n", len(text) // 2 - 1)
    if middle < 0:
        middle = len(text) // 2
    return text[:middle], text[middle:].lstrip("\n")
