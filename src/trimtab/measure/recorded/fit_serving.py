"""Fit an engine's constants to recorded serving points, and write them into its stack.

Ten numbers (`BOUNDS`), none of a model or a machine. Those of TPOT are fitted to models without experts first, pulled weakly
towards "as recorded alone, no overhead", which keeps what few rows cannot tell apart near what it means; then the factor on
experts to the other models; then the queue and the host time before a request to TTFT.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import MissingDependency, SpecError
from trimtab.measure.recorded.fit_stack import residual_band
from trimtab.measure.recorded.serving_points import Array, Constants, Features, impossible, with_constants
from trimtab.measure.recorded.tables import Columns
from trimtab.spec.machine import Stack, load_stack

Mask = npt.NDArray[np.bool_]

#: Constant -> (where it starts and is pulled to, least, most, unit of the search).
BOUNDS = {
    "gemm": (1.0, 0.5, 1.6, 1.0),
    "attention": (1.0, 0.4, 2.0, 1.0),
    "moe": (1.0, 0.3, 3.0, 1.0),
    "link": (1.0, 0.2, 2.0, 1.0),
    "graph_saving_s": (2e-6, 0.0, 2e-5, 1e-5),
    "overhead_per_step_s": (5e-4, 0.0, 1e-2, 1e-3),
    "overhead_per_sequence_s": (5e-6, 0.0, 2e-4, 1e-5),
    "interference": (1.0, 0.02, 2.0, 1.0),
    "overhead_per_prefill_s": (2e-2, 1e-4, 1.0, 1e-2),
    "queue": (0.1, 1e-3, 1.5, 1e-1),
}

_STEP = (
    "gemm", "attention", "link", "graph_saving_s", "overhead_per_step_s", "overhead_per_sequence_s", "interference",
)  # fmt: skip
_FIRST_TOKEN = ("overhead_per_prefill_s", "queue")

#: Strength of the pull, per unit of a factor and per unit of the search of an overhead.
_PULL, _PULL_OVERHEAD = 0.40, 0.06

#: Columns that name a serving point.
_NAMED_BY = (
    "model_path", "system", "backend", "backend_version", "precision", "isl", "osl", "concurrency", "tp_size", "moe_tp_size",
    "moe_ep_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """Constants of an engine and how they do on rows they have not seen.

    Args:
        stack: with the constants and bands put in.
        constants: by name.
        rows_fitted, rows_held_out: numbers of rows; `impossible` others contradict their own description.
        tpot, ttft: of the rows held out: mean and median of |predicted / measured - 1|, and share inside the band.
    """

    engine: str
    stack: Stack
    constants: Constants
    rows_fitted: int
    rows_held_out: int
    impossible: int
    tpot: tuple[float, float, float]
    ttft: tuple[float, float, float]


def held_out(columns: Columns) -> Mask:
    """[rows] that the shipped constants were not fitted on: every second point of each engine and model, in order of a hash."""
    texts = ["|".join(text) for text in zip(*(map(str, columns[name]) for name in _NAMED_BY), strict=True)]
    order: dict[tuple[str, str], list[int]] = {}
    for row in sorted(range(len(texts)), key=lambda row: zlib.crc32(texts[row].encode())):
        order.setdefault((str(columns["backend"][row]), str(columns["model_path"][row])), []).append(row)
    found = np.zeros(len(texts), bool)
    for rows in order.values():
        found[rows[1::2]] = True
    return found


def fit_engine(features: Features, chosen: npt.NDArray[np.int64] | None = None) -> Constants:
    """Fit an engine's constants to some rows.

    Args:
        features: of one engine.
        chosen: indices of the rows used; None = all.

    Raises:
        SpecError: too few rows.
        MissingDependency: scipy is not installed.
    """
    index = np.arange(len(features.rows)) if chosen is None else np.asarray(chosen)
    dense = index[features.dense[index]]
    if len(dense) < 5:
        raise SpecError(
            f"{len(dense)} rows of models without experts are too few to fit an engine. Allowed: 5 or more."
        )
    found = {name: numbers[0] for name, numbers in BOUNDS.items()}
    found = _search(found, _STEP, lambda c: np.log(features.tpot(c)[dense] / features.tpot_s[dense]), pull=True)
    experts = index[~features.dense[index]]
    if len(experts):
        found = _search(found, ("moe",), lambda c: np.log(features.tpot(c)[experts] / features.tpot_s[experts]))
    # Where requests wait for a place the first token says nothing about prefills.
    first = dense[features.crowd[dense] <= 1.0]
    return _search(found, _FIRST_TOKEN, lambda c: np.log(features.ttft(c)[first] / features.ttft_s[first]))


def _search(
    known: Constants, names: Sequence[str], errors: Callable[[Constants], Array], *, pull: bool = False
) -> Constants:
    """Least squares over some constants, few far rows counting little."""
    try:
        from scipy.optimize import least_squares
    except ImportError:
        raise MissingDependency("Fitting needs scipy: pip install 'trimtab[fit]'.") from None
    start, low, high, unit = (np.array([BOUNDS[name][i] for name in names]) for i in range(4))
    strength = np.where(np.isin(names, ["gemm", "attention", "link", "interference"]), _PULL, _PULL_OVERHEAD)

    def residuals(x: Array) -> Array:
        error = errors(known | dict(zip(names, (x * unit).tolist(), strict=True)))
        return np.concatenate([error, strength * (x - start / unit)]) if pull else error

    found: Any = least_squares(
        residuals, np.clip(start / unit, low / unit + 1e-6, high / unit - 1e-6), bounds=(low / unit, high / unit),
        loss="cauchy", f_scale=0.08,
    )  # fmt: skip
    return known | dict(zip(names, (found.x * unit).tolist(), strict=True))


def fit_stack(columns: Columns, engine: str, stack: Stack | None = None) -> EngineFit:
    """Fit the stack of an engine to one half of its rows and judge it on the other.

    Args:
        columns: the table ``e2e_serving``.
        engine: its name in the table.
        stack: to put the constants into; None = the shipped one of that name.

    Raises:
        SpecError: no rows of that engine, or too few.
    """
    stack = stack or load_stack(engine)
    bad = impossible(columns)
    features = Features(columns, stack, engine, without=bad)
    unseen = held_out(columns)[features.rows]
    seen = np.flatnonzero(~unseen)
    constants = fit_engine(features, seen)
    fitted = with_constants(stack, constants)
    ratios = _ratios(features, constants)
    # The band is that of rows each left out of a fit of its own: ten constants flatter the rows they were fitted on.
    apart = {name: np.empty(0) for name in ratios}
    for fold in range(_FOLDS):
        left_out = seen[fold::_FOLDS]
        trial = _ratios(features, fit_engine(features, np.setdiff1d(seen, left_out)))
        apart = {name: np.concatenate([known, trial[name][left_out]]) for name, known in apart.items()}
    order = np.concatenate([seen[fold::_FOLDS] for fold in range(_FOLDS)])
    # Models with experts err otherwise than those without, so they have bands of their own.
    bands = {
        f"{name}{kind}": residual_band(ratio[rows], len(np.unique(features.point[order][rows])))
        for name, ratio in apart.items()
        for kind, rows in (("", features.dense[order]), (".experts", ~features.dense[order]))
        if rows.any()
    }

    def errors(name: str) -> tuple[float, float, float]:
        ratio = ratios[name][unseen]
        error = np.abs(1 / ratio - 1)
        kinds = np.where(features.dense[unseen], name, f"{name}.experts")
        low, high = np.array([bands.get(str(kind), bands[name]) for kind in kinds]).T
        inside = (ratio >= low) & (ratio <= high)
        return float(error.mean()), float(np.median(error)), float(inside.mean())

    mine = np.array([str(name) == engine for name in columns["backend"]])
    return EngineFit(
        engine=engine, stack=replace(fitted, bands=bands), constants=constants, rows_fitted=int((~unseen).sum()),
        rows_held_out=int(unseen.sum()), impossible=int((bad & mine).sum()), tpot=errors("tpot_s"), ttft=errors("ttft_s"),
    )  # fmt: skip


def _ratios(features: Features, c: Constants) -> dict[str, Array]:
    """Measured over predicted of every row."""
    return {"tpot_s": features.tpot_s / features.tpot(c), "ttft_s": features.ttft_s / features.ttft(c)}


#: Parts the fitted half is cut into for its band.
_FOLDS = 5


#: What of a stack's file is written by the fit: everything from this line on.
MARK = "# Written by the fit; see `trimtab validate`. Do not edit below."


def write_stack(fit: EngineFit, path: Path) -> None:
    """Replace the fitted part of a stack's TOML.

    Raises:
        SpecError: the file has no fitted part.
    """
    from trimtab.runtime.files import write_atomically

    text = path.read_text("utf-8")
    if MARK not in text:
        raise SpecError(f"{path} has no line '{MARK}' that tells where the fitted part begins. Add it.")
    write_atomically(path, text[: text.index(MARK)] + to_toml(fit))


def to_toml(fit: EngineFit) -> str:
    """The fitted part of a stack's TOML."""
    c = fit.constants
    lines = [
        MARK,
        f"# {fit.rows_fitted} rows fitted; on the {fit.rows_held_out} others: TPOT mean error {fit.tpot[0]:.1%}, median "
        f"{fit.tpot[1]:.1%}, {fit.tpot[2]:.0%} in",
        f"# the band; TTFT {fit.ttft[0]:.1%}, {fit.ttft[1]:.1%}, {fit.ttft[2]:.0%}. {fit.impossible} rows contradict their own "
        "description and are left out.",
    ]
    lines += ["", "[overheads]", *(f"{name} = {c[name]:.4g}" for name in (*_STEP[3:6], "overhead_per_prefill_s"))]
    lines += ["", "[factors]", *(f"{name} = {c[name]:.4g}" for name in ("gemm", "attention", "moe", "link"))]
    lines += ["", "[serving]", *(f"{name} = {c[name]:.4g}" for name in ("interference", "queue"))]
    lines.append(f"held = {fit.stack.serving.held:g}")
    for name, (low, high) in fit.stack.bands.items():
        lines += ["", f'[bands."{name}"]', f"p10 = {low:.4g}", f"p90 = {high:.4g}"]
    return "\n".join(lines) + "\n"
