"""The scoreboard: predictions beside measurements, one line per device and class of op, and what is allowed.

Errors are relative and every row counts the same, so that big shapes do not hide small ones. Rows that constants were
fitted on are left out where the fit can say which they were. Each line stands beside the datasheet's roofline, to show
what the fitted constants are worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.measure.recorded.fit_stack import IDEAL_MARGIN

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest errors a line may have, as shares; None = not judged.

    Args:
        mape: mean of |predicted / measured - 1|.
        median, largest: median and largest of the same.
    """

    mape: float | None = None
    median: float | None = None
    largest: float | None = None


#: Op class -> limits; by machine id where a device has its own. A class that is not here is shown and not judged.
LIMITS: dict[str, Mapping[str, Limits]] = {
    "gemm.bf16": {"": Limits(mape=0.10), "l40s": Limits(mape=0.15)},
    "gemm.fp8": {"": Limits(mape=0.20), "l40s": Limits(mape=0.24)},
    "attention_prefill": {"": Limits(mape=0.18)},
    "attention_prefill.fp8": {"": Limits(mape=0.18)},
    "attention_decode": {"": Limits(mape=0.22), "l40s": Limits(mape=0.28)},
    "attention_decode.fp8": {"": Limits(mape=0.22), "l40s": Limits(mape=0.28)},
    **{key: {"": Limits(mape=0.25)} for key in ("moe.bf16", "moe.fp8", "moe.fp8_block")},
    **{key: {"": Limits(mape=0.20)} for key in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")},
    # Ratios of recorded times scatter by about 10 % themselves (skewed routers are drawn at random).
    "moe, by distinct experts": {"": Limits(mape=0.15)},
    "moe, by picks": {"": Limits(mape=0.15)},
    "llama.cpp decode": {
        "": Limits(mape=0.06, largest=0.15),
        "m1-max-32c": Limits(largest=0.21),
        "m3-max-40c": Limits(largest=0.21),
        "m1-7c": Limits(),  # three rows, faster the longer they are: its 8 GB hardly hold the model
        "all": Limits(median=0.12),
    },
    "llama.cpp decode, one share for all": {"": Limits(mape=0.06, median=0.12, largest=0.21)},
    "TPOT": {"": Limits(mape=0.22)},
    "TPOT, fitted on a fifth": {"": Limits(mape=0.12)},
    "Megatron generation": {"": Limits(median=0.12)},
    "Megatron generation, as shipped": {"": Limits(median=0.12)},
    "Megatron generation, no time per layer": {"": Limits(median=0.12)},
    # 5 points of the 45 that are usual; the note has the points.
    "FSDP training step": {"": Limits(mape=0.11)},
    "Megatron training step": {"": Limits(largest=0.12)},
}
LIMITS["llama.cpp decode, as shipped"] = LIMITS["llama.cpp decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Predictions to judge: rows of one table that share constants.

    Args:
        device: machine id, or a name for several devices.
        measured_s, predicted_s: [rows].
        datasheet_s: [rows] of the datasheet's roofline; None = there is none.
        loose: [rows] that may run faster than the datasheet says: their data may stay in the last-level cache between runs,
            or chance decides how much they touch.
        band: P10 and P90 of measured / predicted that the constants claim, if they were not taken from these very rows.
        half: without such a band, [rows] of one half of the sizes, to see how a band of the other half holds.
        held_out: rows are other ones than the constants were fitted on.
        limits: what is allowed.
        contrast: a worse method, which must not stay within the limits.
        note: what a reader must know.
    """

    table: str
    device: str
    stack: str
    op_class: str
    measured_s: FloatArray
    predicted_s: FloatArray
    datasheet_s: FloatArray | None = None
    loose: npt.NDArray[np.bool_] | None = None
    band: tuple[float, float] | None = None
    half: npt.NDArray[np.bool_] | None = None
    held_out: bool = False
    limits: Limits = Limits()
    contrast: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the scoreboard; shares, not percent.

    Args:
        bias: median of predicted / measured, minus 1.
        in_band: share of rows whose measured / predicted lies in the claimed band, or within P10 and P90 of the other half of
            the rows; 0.8 is what to expect.
        datasheet_mape: mean error of the datasheet's roofline on the same rows.
        above_measured: rows, loose ones apart, that the datasheet's roofline calls slower than they ran: errors of the count.
        ok: every prediction a number; and where there are limits, within them (a contrast: outside) and no row above the
            measurement.
    """

    table: str
    device: str
    stack: str
    op_class: str
    rows: int
    held_out: bool
    mape: float
    median: float
    largest: float
    bias: float
    in_band: float | None
    datasheet_mape: float | None
    above_measured: int
    limits: Limits
    contrast: bool
    ok: bool
    note: str


def judge(case: Case) -> Line:
    """Errors of a case against its limits."""
    ratio = case.predicted_s / case.measured_s
    error = np.abs(ratio - 1)
    figures = {"mape": float(error.mean()), "median": float(np.median(error)), "largest": float(error.max())}
    within = all(figures[name] <= limit for name, limit in asdict(case.limits).items() if limit is not None)
    datasheet = above = None
    if case.datasheet_s is not None:
        against = case.datasheet_s / case.measured_s
        datasheet = float(np.abs(against - 1).mean())
        loose = np.zeros(len(against), bool) if case.loose is None else case.loose
        above = int(((against > IDEAL_MARGIN) & ~loose).sum())
    return Line(
        table=case.table,
        device=case.device,
        stack=case.stack,
        op_class=case.op_class,
        rows=len(ratio),
        held_out=case.held_out,
        **figures,
        bias=float(np.median(ratio)) - 1,
        in_band=_in_band(1 / ratio, case),
        datasheet_mape=datasheet,
        above_measured=above or 0,
        limits=case.limits,
        contrast=case.contrast,
        ok=within != case.contrast and bool(np.isfinite(ratio).all()) and not (above and case.limits != Limits()),
        note=case.note,
    )


def _in_band(ratio: FloatArray, case: Case) -> float | None:
    """Share of rows within the claimed band, or within that of the other half; None where there is neither."""
    if case.band is not None:
        return float(((ratio >= case.band[0]) & (ratio <= case.band[1])).mean())
    half = case.half
    if half is None or half.all() or not half.any():
        return None
    inside = 0
    for mine in (half, ~half):
        low, high = np.quantile(ratio[~mine], (0.1, 0.9))
        inside += int(((ratio[mine] >= low) & (ratio[mine] <= high)).sum())
    return inside / len(ratio)


def limits_of(op_class: str, device: str) -> Limits:
    """Limits of an op class on a device; no limits where none are set."""
    found = LIMITS.get(op_class, {})
    return found.get(device, found.get("", Limits()))


def passed(lines: Iterable[Line]) -> bool:
    """Whether every line is within its limits."""
    return all(line.ok for line in lines)


def as_json(lines: Iterable[Line]) -> dict[str, Any]:
    """The scoreboard as JSON."""
    rows = [asdict(line) for line in lines]
    return {"schema": 1, "ok": all(row["ok"] for row in rows), "lines": rows}


def table_rows(lines: Iterable[Line]) -> Iterator[tuple[str, ...]]:
    """The scoreboard as text, one tuple per line."""
    for line in lines:
        verdict = "" if line.limits == Limits() and line.ok else "yes" if line.ok else "NO"
        yield (
            line.device,
            line.op_class,
            f"{line.rows:,}{'' if line.held_out else ' *'}",
            f"{100 * line.mape:.1f}",
            f"{100 * line.median:.1f}",
            f"{100 * line.bias:+.1f}",
            "" if line.in_band is None else f"{100 * line.in_band:.0f}",
            _limits(line),
            verdict,
            "" if line.datasheet_mape is None else f"{100 * line.datasheet_mape:.1f}",
            line.note or line.stack,
        )


#: Heads of `table_rows`.
COLUMNS = (
    "device", "op class", ">rows", ">MAPE %", ">median %", ">bias %", ">in band %", ">limit %", "ok", ">roofline %",
    "software",
)  # fmt: skip


def _limits(line: Line) -> str:
    names = {"mape": "", "median": "median ", "largest": "max "}
    limits = asdict(line.limits)
    shown = ", ".join(f"{word}{100 * limits[key]:.0f}" for key, word in names.items() if limits[key] is not None)
    return f"over {shown}" if line.contrast else shown
