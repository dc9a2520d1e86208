"""The catalogue of papers: one row each, read from ``catalogue.toml``."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any

from trimtab.errors import unknown


@functools.cache
def load_papers() -> tuple[dict[str, Any], ...]:
    """Every row, in order of its number."""
    text = (resources.files("trimtab.papers") / "catalogue.toml").read_text("utf-8")
    return tuple(sorted(tomllib.loads(text)["paper"], key=lambda row: row["number"]))


def find_paper(asked: str) -> dict[str, Any]:
    """Return the row of a number or a short name.

    Raises:
        SpecError: no such paper.
    """
    rows = load_papers()
    for row in rows:
        if asked.lstrip("0") == str(row["number"]) or asked.lower() in (
            row["short"].lower(),
            *(p.lower() for p in row.get("parts", ())),
        ):
            return row
    raise unknown("paper", asked, [row["short"] for row in rows], "A number from 1 to 90 works too.")
