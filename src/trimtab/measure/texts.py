"""Texts that quality is scored on."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import CalibrationError
from trimtab.runtime.text.builtin import builtin_text, split

#: Names that stand for the two halves of the built-in text.
BUILT_IN = {"topics-calibration": 0, "topics": 1}


def read_text(source: str | Path) -> str:
    """Return a text file, or ``topics`` (held-out half of the built-in text) or ``topics-calibration`` (the other half).

    Raises:
        CalibrationError: it cannot be read.
    """
    if str(source) in BUILT_IN:
        return split(builtin_text())[BUILT_IN[str(source)]]
    try:
        return Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"Text {source} cannot be read: {error}. Give a UTF-8 file, or topics (built-in)."
        ) from None
