"""Units, said once: a FLOP is counted 2 per multiply-add; KiB, MiB, GiB are binary, kB, MB, GB decimal; times are seconds."""

from __future__ import annotations

FLOPS_PER_MULTIPLY_ADD = 2

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
KB, MB, GB = 10**3, 10**6, 10**9

_BINARY = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_DECIMAL = {"b": 1, "kb": KB, "mb": MB, "gb": GB, "tb": 10**12}


def parse_bytes(text: str) -> int:
    """Read a size such as ``8GiB``, ``24 GB`` or ``1024``.

    Raises:
        SpecError: the text is not a number with one of the units B kB MB GB TB KiB MiB GiB TiB.

    >>> parse_bytes("8GiB")
    8589934592
    """
    from trimtab.errors import SpecError

    raw = text.strip().replace(" ", "")
    digits = raw.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = raw[len(digits) :].lower() or "b"
    scale = _BINARY.get(unit) or _DECIMAL.get(unit)
    try:
        number = float(digits)
    except ValueError:
        scale = None
        number = 0.0
    if scale is None or number < 0:
        raise SpecError(
            f"'{text}' is not a size. Write a number with B, kB, MB, GB, KiB, MiB or GiB, for example 8GiB."
        )
    return int(number * scale)


def format_bytes(count: float) -> str:
    """Print bytes with a binary unit and three significant digits: ``257 MiB``."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= scale:
            return f"{_three(count / scale)} {unit}"
    return f"{count:.0f} B"


def format_si(value: float, unit: str = "") -> str:
    """Print a number with an SI prefix and three significant digits: ``312 TFLOP/s``."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{_three(value / scale)} {prefix}{unit}".rstrip()
    return f"{_three(value)} {unit}".rstrip()


def format_seconds(time_s: float) -> str:
    """Print a time with s, ms or µs and three significant digits: ``12.5 ms``."""
    magnitude = abs(time_s)
    if magnitude >= 1 or magnitude == 0:
        return f"{_three(time_s)} s"
    if magnitude >= 1e-3:
        return f"{_three(time_s * 1e3)} ms"
    return f"{_three(time_s * 1e6)} µs"


def _three(value: float) -> str:
    magnitude = abs(value)
    digits = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2
    return f"{value:.{digits}f}"
