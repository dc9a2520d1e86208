"""Fit the constants of kernels to recorded latencies, and say how well they hold on rows the fit never saw.

Three predictions stand side by side for every class: the datasheet's roofline, a roofline with three fitted constants (shares
of peak and of bandwidth, seconds per launch), and the form of the class (`predict.forms`). The shipped files are the fit of
split 0; their figures are those of exactly these constants on the rows held out of it (`held_out`).

The fit minimises a smooth stand-in of the mean of |predicted / measured - 1| over the logarithms of the constants.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import CalibrationError, MissingDependency, SpecError, unknown
from trimtab.measure.recorded.kernel_classes import (
    KERNEL_CLASSES,
    RANGES,
    Columns,
    KernelClass,
    check_columns,
    held_out,
    kernel_class,
)
from trimtab.measure.recorded.tables import load_table, machine_id, read_columns, select
from trimtab.predict.forms import FORMS
from trimtab.spec.machine import load_machine

Array = npt.NDArray[np.float64]
Price = Callable[[Mapping[str, float]], Array]

THREE = FORMS["roofline"].constants
DATASHEET = {"compute_efficiency": 1.0, "bandwidth_efficiency": 1.0, "launch_s": 0.0}
#: Rows per constant that a fit needs on its side of the split.
ROWS_PER_CONSTANT = 3
#: Starting points of every fit, the first at the constants' usual values.
STARTS = 3
#: Weight, per row, of a constant's distance from its usual value: it decides where the rows say nothing about a constant, so
#: that sizes unlike those fitted are not priced by an accident.
PULL = 3e-4
#: A prediction of the datasheet's roofline above this multiple of the measured time is a violation ...
IDEAL_MARGIN = 1.02
#: ... unless the bytes fit this many last-level caches.
IDEAL_CACHES = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """How predictions miss: p over m, minus one.

    Args:
        mape: mean of the absolute error, as a share.
        median: median of the absolute error.
        bias: mean of the error; above 0 = predicted too slow.
    """

    mape: float
    median: float
    bias: float

    @classmethod
    def of(cls, predicted_s: Array, measured_s: Array) -> Error:
        """Compare predictions with measurements."""
        error = predicted_s / measured_s - 1
        size = np.abs(error)
        return cls(mape=float(size.mean()), median=float(np.median(size)), bias=float(error.mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The fit of one class on one machine.

    Args:
        device: as the table names it; `machine` is the id of the catalogue.
        op_class: with its dtype.
        stack: software that was recorded.
        form: name of the form; `constants` are its numbers (split 0) and `three` those of the plain roofline.
        rows_fitted, rows_held_out: of split 0.
        datasheet, roofline, fitted: errors of the three predictions on the rows held out.
        band: P10 and P90 of measured over predicted time on the rows fitted (`residual_band`).
        covered: share of held-out rows inside the P10 and P90 of the rows fitted, mean over splits: 0.8 if the fit carries over
            to new sizes.
        mape_by_seed: of `fitted`, by split, the first being split 0.
        ideal_rows, ideal_violations: rows above twice the last-level cache, and those of them that the datasheet's roofline
            predicts more than 2 % too slow.
    """

    device: str
    machine: str
    op_class: str
    stack: str
    form: str
    constants: Mapping[str, float]
    three: Mapping[str, float]
    rows_fitted: int
    rows_held_out: int
    datasheet: Error
    roofline: Error
    fitted: Error
    band: tuple[float, float]
    covered: float
    mape_by_seed: tuple[float, ...]
    ideal_rows: int
    ideal_violations: int


def read_tables(data: str | Path | None) -> dict[str, Columns]:
    """Read recorded tables by name: from a folder, from one CSV, or (None) those that ship with Trimtab.

    Raises:
        SpecError: there is no such file, or no table that is known.
    """
    names = tuple(dict.fromkeys(kind.table for kind in KERNEL_CLASSES))
    if data is None:
        return {name: load_table(name) for name in names}
    path = Path(data).expanduser()
    if path.is_dir():
        paths = [path / f"{name}.csv" for name in names if (path / f"{name}.csv").is_file()]
        if not paths:
            raise SpecError(
                f"{path} holds no recorded kernels. Expected one or more of {', '.join(names)}, each as .csv."
            )
    elif path.is_file():
        if path.stem not in names:
            raise unknown("table of kernels", path.stem, names, "The name of the file says what it holds.")
        paths = [path]
    else:
        raise SpecError(f"{path} does not exist. Give a folder with {names[0]}.csv and the like, or one such file.")
    return {path.stem: read_columns(path.read_text("utf-8"), str(path)) for path in paths}


def fit_tables(
    tables: Mapping[str, Columns],
    *,
    device: str | None = None,
    seeds: int = 5,
    progress: Callable[[str, Iterable[Any]], Iterable[Any]] = lambda _, items: items,
) -> list[FitReport]:
    """Fit every class of every device in the tables.

    Args:
        tables: as `read_tables` returns them.
        device: a device of the tables, a machine id or an alias; None = all.
        seeds: splits to try; the constants are those of the first.
        progress: wraps the list of fits, as ``progress(label, items)``.

    Raises:
        SpecError: the device is not in the tables, or a column is missing.
        CalibrationError: a class has too few rows to fit.
        MissingDependency: scipy is not installed.
    """
    jobs = []
    for kind in KERNEL_CLASSES:
        if kind.table not in tables:
            continue
        columns = tables[kind.table]
        check_columns(kind, columns, kind.table)
        for name in devices(columns) if device is None else _asked(device, columns):
            for op_class, rows in kind.variants(columns).items():
                rows = rows & (columns["device"] == name)
                if rows.any():
                    jobs.append((kind, op_class, name, rows))
    if not jobs:
        known = sorted({name for columns in tables.values() for name in devices(columns)})
        raise unknown("device", str(device), known, "These have rows in the tables.")
    return [
        fit_class(op_class, tables[kind.table], rows, machine_id(name), seeds=seeds)
        for kind, op_class, name, rows in progress("Fitting kernels", jobs)
    ]


def devices(columns: Columns) -> list[str]:
    """Names of the devices in a table."""
    return [str(name) for name in np.unique(columns["device"])]


def _asked(device: str, columns: Columns) -> list[str]:
    """Names in a table that mean the device asked for."""
    names = devices(columns)
    if device in names:
        return [device]
    try:
        machine = load_machine(device).id
    except SpecError:
        return []
    return [name for name in names if machine_id(name) == machine]


def fit_class(
    op_class: str, table: Columns, rows: npt.NDArray[np.bool_], machine_name: str, *, seeds: int = 5
) -> FitReport:
    """Fit one class on one machine.

    Args:
        op_class: with its dtype, as ``gemm.fp8``.
        table: the whole recorded table; the split is made on it.
        rows: rows of the class and the device.
        machine_name: id of the machine in the catalogue.
        seeds: splits to try.

    Raises:
        CalibrationError: too few rows on one side of a split.
        SpecError: no such machine.
    """
    kind, machine = kernel_class(op_class), load_machine(machine_name)
    hardware = kind.device(machine, op_class)
    chosen = select(table, rows)
    names = FORMS[kind.form].constants
    splits = [held_out(table, op_class, seed)[rows] for seed in range(seeds)]
    for hidden in splits:
        least = ROWS_PER_CONSTANT * len(names)
        if min(np.sum(hidden), np.sum(~hidden)) < least:
            raise CalibrationError(
                f"{op_class} on {machine_name} has {np.sum(~hidden)} rows to fit and {np.sum(hidden)} to check; {least} of "
                f"each are needed, of many different {' x '.join(kind.keys)}. Record more, or leave this table out."
            )
    ranges = {name: kind.ranges.get(name, RANGES[name]) for name in names if name not in kind.choices}
    found, mapes, bands, covered = [], [], [], []
    for hidden in splits:
        seen, unseen = select(chosen, ~hidden), select(chosen, hidden)
        price = kind.price(seen, hardware)
        constants = fit_constants(price, _measured(seen), ranges, kind.choices)
        predicted = kind.price(unseen, hardware)(constants)
        found.append((constants, seen, unseen, predicted))
        mapes.append(Error.of(predicted, _measured(unseen)).mape)
        band = residual_band(_measured(seen) / price(constants), _sizes(kind, seen))
        bands.append(band)
        covered.append(_inside(_measured(unseen) / predicted, band))
    constants, seen, unseen, predicted = found[0]
    three = fit_constants(
        kind.roofline(seen, hardware),
        _measured(seen),
        {name: kind.ranges.get(name, RANGES[name]) for name in THREE},
        {},
    )
    measured = _measured(unseen)
    plain = kind.roofline(unseen, hardware)
    ideal, large = _ideal(kind, chosen, hardware)
    return FitReport(
        device=str(chosen["device"][0]),
        machine=machine.id,
        op_class=op_class,
        stack=", ".join(sorted({str(name) for name in chosen["stack"]})),
        form=kind.form,
        constants=constants,
        three=three,
        rows_fitted=len(seen["lat_us"]),
        rows_held_out=len(measured),
        datasheet=Error.of(plain(DATASHEET), measured),
        roofline=Error.of(plain(three), measured),
        fitted=Error.of(predicted, measured),
        band=bands[0],
        covered=float(np.mean(covered)),
        mape_by_seed=tuple(mapes),
        ideal_rows=int(large.sum()),
        ideal_violations=int(np.sum(large & (ideal > IDEAL_MARGIN * _measured(chosen)))),
    )


def fit_constants(
    price: Price,
    measured_s: Array,
    ranges: Mapping[str, tuple[float, float, float]],
    choices: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    """Constants that bring predictions closest to measurements, by the mean of the absolute relative error.

    Args:
        price: seconds of the measured rows as a function of the constants.
        measured_s: their seconds.
        ranges: constant -> (start, least, most), all above 0.
        choices: constants that take one of a few values; every combination is tried.

    Raises:
        MissingDependency: scipy is not installed.
    """
    least_squares = _least_squares()
    names = tuple(ranges)
    start, low, high = (np.log(np.array([ranges[name][i] for name in names])) for i in range(3))
    best: tuple[float, dict[str, float]] | None = None

    def pull(x: Array) -> Array:
        return PULL * len(measured_s) * (x - start)

    for values in product(*choices.values()):
        fixed = dict(zip(choices, values, strict=True))

        def error(x: Array, fixed: dict[str, float] = fixed) -> Array:
            return price({**dict(zip(names, np.exp(x).tolist(), strict=True)), **fixed}) / measured_s

        for attempt in range(STARTS):
            x = start + np.random.default_rng(attempt).normal(0, 0.5, len(start)) * (attempt > 0)
            x = np.clip(x, low + 1e-3, high - 1e-3)
            # Logarithms first, since a far start would count too slow much more than too fast; then what is to be small.
            shared: dict[str, Any] = {"bounds": (low, high), "loss": "soft_l1", "max_nfev": 60, "diff_step": 1e-4}
            x = least_squares(lambda x: np.concatenate((np.log(error(x)), pull(x))), x, f_scale=0.1, **shared).x
            found = least_squares(lambda x: np.concatenate((error(x) - 1, pull(x))), x, f_scale=0.05, **shared)
            if best is None or found.cost < best[0]:
                best = found.cost, {**dict(zip(names, np.exp(found.x).tolist(), strict=True)), **fixed}
    assert best is not None
    return {name: float(f"{value:.5g}") for name, value in best[1].items()}


def _least_squares() -> Callable[..., Any]:
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise MissingDependency(
            "Fitting needs scipy. Install it: pip install 'trimtab[fit]' (or: pip install scipy)"
        ) from error
    return least_squares


def _measured(columns: Columns) -> Array:
    return np.asarray(columns["lat_us"], np.float64) * 1e-6


def residual_band(ratio: Array, sizes: int) -> tuple[float, float]:
    """P10 and P90 of measured over predicted, a little further out where few different sizes were seen.

    The quantiles are those that hold for another draw after n of them (conformal prediction; Vovk et al., 2005). Rows of one
    size err partly alike, so n lies between the number of sizes and that of rows: their geometric mean.
    """
    count = max(round(float(np.sqrt(min(sizes, len(ratio)) * len(ratio)))), 1)
    levels = max((0.1 * (count + 1) - 1) / count, 0.0), min(0.9 * (count + 1) / count, 1.0)
    low, high = np.quantile(ratio, levels)
    return float(low), float(high)


def _sizes(kind: KernelClass, columns: Columns) -> int:
    """Different whole sizes among rows."""
    return len(np.unique(np.stack([np.asarray(columns[key]) for key in kind.keys], axis=1), axis=0))


def _inside(ratio: Array, band: tuple[float, float]) -> float:
    return float(np.mean((ratio >= band[0]) & (ratio <= band[1])))


def _ideal(kind: KernelClass, columns: Columns, hardware: Any) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Seconds by the datasheet's roofline, and which rows are too large for the last-level cache to help."""
    _, nbytes = kind.work(columns)
    ideal = kind.roofline(columns, hardware)(DATASHEET)
    return ideal, np.asarray(nbytes) >= IDEAL_CACHES * hardware.llc_bytes


def write_files(reports: Iterable[FitReport], folder: Path) -> list[Path]:
    """Write one file per machine.

    Raises:
        SpecError: a file is there and holds classes that were not fitted now, which would be lost.
    """
    by_machine: dict[str, list[FitReport]] = {}
    for report in reports:
        by_machine.setdefault(report.machine, []).append(report)
    paths = {folder / f"{machine}.toml": own for machine, own in by_machine.items()}
    for path, own in paths.items():
        there = tomllib.loads(path.read_text("utf-8")).get("op_class", {}) if path.exists() else {}
        lost = sorted(set(there) - {report.op_class for report in own})
        if lost:
            raise SpecError(
                f"{path} also holds {', '.join(lost)}, which this fit does not. Give another folder as --out."
            )
    for path, own in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(own), "utf-8")
    return list(paths)


def to_toml(reports: Sequence[FitReport]) -> str:
    """The file of one machine: constants as stacks read them, and the facts of the fit."""
    lines = [
        f"# Constants of kernels on {reports[0].machine}, fitted to recorded latencies by `trimtab fit-stack`; formulas:",
        "# trimtab/predict/forms.py. Fitted were the rows outside held_out(table, op_class, seed=0) of",
        "# trimtab/measure/recorded/kernel_classes.py; rows and mape (mean of |predicted / measured - 1|) are those of these very",
        "# constants on the rows held out, band is P10 and P90 of measured over predicted on the rows fitted, as far out as so",
        "# few sizes ask for; covered: share of rows held out inside it, mean over splits. Do not edit by hand.",
    ]
    return "\n".join([*lines, *(line for report in reports for line in _class_lines(report)), ""])


def _class_lines(report: FitReport) -> list[str]:
    table = f'op_class."{report.op_class}"'
    # A form without arithmetic has no share of peak; what only shows its parts then counts the datasheet's.
    three = {name: report.constants.get(name, 1.0) for name in THREE}
    own = {name: value for name, value in report.constants.items() if name not in THREE}
    source = f"{report.rows_fitted} recorded {report.op_class} kernels of {report.stack} on {report.device}"
    by_seed = ", ".join(f"{value:.4f}" for value in report.mape_by_seed)
    return [
        *("", f"[{table}]", f'form = "{report.form}"', *_assignments(three)),
        f"band = [{report.band[0]:.4f}, {report.band[1]:.4f}]",
        *(f"rows = {report.rows_held_out}", f"mape = {report.fitted.mape:.4f}", f'source = "{source}"'),
        *("", f"[{table}.constants]", *_assignments(own)),
        *("", f"[{table}.fit]", f'device = "{report.device}"', f'stack = "{report.stack}"'),
        *(f"rows_fitted = {report.rows_fitted}", f"rows_held_out = {report.rows_held_out}"),
        *(
            f"median = {report.fitted.median:.4f}",
            f"bias = {report.fitted.bias:.4f}",
            f"covered = {report.covered:.4f}",
        ),
        f"mape_by_seed = [{by_seed}]",
        f"mape_datasheet = {report.datasheet.mape:.4f}",
        f"mape_three_constants = {report.roofline.mape:.4f}",
        f"three_constants = {{ {', '.join(_assignments(report.three))} }}",
        *(f"ideal_rows = {report.ideal_rows}", f"ideal_violations = {report.ideal_violations}"),
    ]


def _assignments(constants: Mapping[str, float]) -> list[str]:
    return [f"{name} = {float(value)!r}" for name, value in constants.items()]
