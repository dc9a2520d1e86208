"""Every error Trimtab raises on purpose, as one tree.

    TrimtabError
    ├── SpecError            a name, parameter, config or file is not what it must be (also a ValueError)
    │   ├── Conflict         two techniques write different values to one field
    │   └── UnsupportedModelError   an architecture, format or tokenizer Trimtab does not know
    ├── HardwareError        the machine lacks what was asked for (an ISA, a device, a format)
    ├── CapacityError        it does not fit: weights, cache or activations
    ├── NotRewindable        the cache cannot return to the state asked for
    ├── CalibrationError     measured or calibration data is missing or unusable
    ├── MissingDependency    an optional package is needed; the message holds the install command
    └── Interrupted          the user stopped it (exit code 130)

A message says what was asked, what is allowed, the nearest valid value and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of all errors that are meant for the user; the command line prints them without a traceback."""


class SpecError(TrimtabError, ValueError):
    """A name, a parameter, a config or a file is not what it must be."""


class Conflict(SpecError):
    """Two techniques write different values to one field of one node."""


class UnsupportedModelError(SpecError):
    """An architecture, weight format or tokenizer that Trimtab does not know."""


class HardwareError(TrimtabError):
    """The machine lacks what was asked for."""


class CapacityError(TrimtabError):
    """It does not fit; the message holds the sum and the largest case that fits."""


class NotRewindable(TrimtabError):
    """The cache cannot return to the state asked for."""


class CalibrationError(TrimtabError):
    """Calibration data is missing or unusable."""


class MissingDependency(TrimtabError):
    """An optional package is needed; the message holds the exact install command."""


class Interrupted(TrimtabError):
    """The user stopped the work."""


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or an empty string.

    >>> did_you_mean("kvi", ["kivi", "rtn"])
    " Did you mean 'kivi'?"
    """
    close = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, asked: str, known: Iterable[str], hint: str = "") -> SpecError:
    """Build the error for an unknown name: what was asked, the nearest, and what is allowed."""
    names = sorted(known)
    listed = ", ".join(names) if len(names) <= 24 else f"{', '.join(names[:24])}, ... ({len(names)} in all)"
    return SpecError(
        f"Unknown {kind} '{asked}'.{did_you_mean(asked, names)} Known: {listed}.{' ' + hint if hint else ''}"
    )
