"""What a search for a plan found, as a table and as JSON."""

from __future__ import annotations

from typing import Any

from trimtab.predict.search import Candidate, Found
from trimtab.spec.report import SCHEMA
from trimtab.ui.output import print_table
from trimtab.units import format_bytes, format_seconds

_COLUMNS = (
    "devices",
    "machine",
    "layout",
    "weights, cache, techniques",
    "requests",
    "TTFT",
    "TPOT",
    "tokens/s",
    "USD/Mtoken",
    "peak",
)


def print_found(found: Found, losers: int) -> None:
    """Print the Pareto set and the first `losers` of the rest, each with its reason."""
    if found.best:
        print_table(_COLUMNS, [_row(candidate) for candidate in found.best])
    else:
        print("No plan keeps the limits.")
    shown = found.lost[:losers]
    if shown:
        print_table(("lost", "because"), [(candidate.name, candidate.lost) for candidate in shown])
    rest = len(found.lost) - len(shown)
    more = f"; {rest} more losers (--losers {len(found.lost)})" if rest > 0 else ""
    print(f"{found.evaluated} plans priced, {len(found.best)} that no other beats{more}.")


def found_to_dict(found: Found, command: str = "") -> dict[str, Any]:
    """As JSON."""
    return {
        "schema": SCHEMA,
        "best": [_plain(candidate) for candidate in found.best],
        "lost": [_plain(candidate) for candidate in found.lost],
        "evaluated": found.evaluated,
        "command": command,
    }


def _row(candidate: Candidate) -> tuple[str, ...]:
    f = candidate.figures
    seconds = [format_seconds(value) if (value := f.get(name)) is not None else "-" for name in ("ttft_s", "tpot_s")]
    rate, usd, peak = f.get("tokens_per_s"), f.get("usd_per_million_tokens"), f.get("peak_bytes")
    return (
        str(candidate.parallel.devices), candidate.machine.id, str(candidate.parallel), str(candidate.variant),
        str(candidate.concurrency), *seconds, "-" if rate is None else f"{rate:.0f}",
        "no price" if usd is None else f"{usd:.3g}", "-" if peak is None else format_bytes(peak),
    )  # fmt: skip


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {
        "machine": candidate.machine.id,
        "stack": candidate.stack.name,
        "parallel": candidate.parallel.to_dict(),
        "dtype": candidate.variant.dtype,
        "kv_dtype": candidate.variant.kv_dtype,
        "techniques": list(candidate.variant.techniques),
        "concurrency": candidate.concurrency,
        "figures": candidate.figures,
        "lost": candidate.lost,
    }
