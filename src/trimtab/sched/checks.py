"""One sentence for a bad parameter: what was given, what is allowed, what to try."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trimtab.errors import SpecError


def require(owner: object, checks: Iterable[tuple[str, bool, str, str]]) -> None:
    """Raise for the first of (field, is it good, what is allowed, a value to try) that is not good.

    Raises:
        SpecError: one is not good.
    """
    for name, good, allowed, example in checks:
        if not good:
            value = getattr(owner, name)
            raise SpecError(f"{name}={value!r} is not possible. Allowed: {allowed}. Try {name}={example}.")


def whole(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive(value: object) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
