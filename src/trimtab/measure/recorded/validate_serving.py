"""How recorded serving points are predicted: columns -> cases.

Twice: with the shipped stack of their engine, on the half of the rows it was not fitted on; and after a fresh fit on a fifth
of the rows, five times over (needs scipy; left out without it).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np

from trimtab.measure.recorded.fit_serving import fit_engine, held_out
from trimtab.measure.recorded.scoreboard import Case, limits_of
from trimtab.measure.recorded.serving_points import DENSE, MACHINES, MODELS, Features, impossible, predict_points
from trimtab.measure.recorded.tables import Columns
from trimtab.spec.machine import Stack, load_machine, load_stack

ENGINES = ("vllm", "sglang", "trtllm")
_SEEDS, _SHARE = 5, 0.2


def serving(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """TPOT of dense models against limits, TTFT and models with experts shown."""
    backend, model, system = (np.array([str(v) for v in columns[c]]) for c in ("backend", "model_path", "system"))
    machines = {name: load_machine(alias).id for name, alias in MACHINES.items()}
    here = np.array([device is None or machines.get(name) == device for name in system])
    if not here.any():
        return
    bad, unseen = impossible(columns), held_out(columns)
    dense = np.isin([MODELS[name] for name in model], list(DENSE))
    stacks = {engine: load_stack(engine) for engine in ENGINES}
    ttft, tpot = predict_points(columns, stacks, np.flatnonzero(here & unseen).tolist())
    measured = {name: np.asarray(columns[f"silicon_{name}_ms"], float) / 1e3 for name in ("ttft", "tpot")}
    predicted = {"ttft": ttft, "tpot": tpot}
    for engine in ENGINES:
        mine = here & unseen & ~bad & (backend == engine) & np.isfinite(tpot)
        out = int((bad & (backend == engine)).sum())
        note = f"{engine}; {out} impossible rows left out" if out else engine
        for name in ("tpot", "ttft"):
            for rows, label in ((dense, ""), (~dense, ", experts")):
                chosen = mine & rows
                if chosen.any():
                    op_class = f"{name.upper()}{label}"
                    bands = stacks[engine].bands
                    band = bands.get(f"{name}_s.experts" if label else f"{name}_s", bands[f"{name}_s"])
                    yield Case(
                        table="e2e_serving", device=device or "h100, h200", stack=engine, op_class=op_class,
                        measured_s=measured[name][chosen], predicted_s=predicted[name][chosen],
                        band=band, held_out=True,
                        limits=limits_of(op_class, ""), note=note,
                    )  # fmt: skip
        if device is None and importlib.util.find_spec("scipy") is not None:
            yield _refitted(columns, engine, stacks[engine], bad)


def _refitted(columns: Columns, engine: str, stack: Stack, bad: np.ndarray) -> Case:
    """TPOT of the dense rows that five fits to a fifth of them have not seen, together."""
    features = Features(columns, stack, engine, DENSE, without=bad)
    measured, predicted = [], []
    for seed in range(_SEEDS):
        order = np.random.default_rng(seed).permutation(len(features.rows))
        count = max(int(_SHARE * len(order)), 6)
        constants = fit_engine(features, order[:count])
        measured.append(features.tpot_s[order[count:]])
        predicted.append(features.tpot(constants)[order[count:]])
    op_class = "TPOT, fitted on a fifth"
    return Case(
        table="e2e_serving", device="h100, h200", stack=engine, op_class=op_class, measured_s=np.concatenate(measured),
        predicted_s=np.concatenate(predicted), held_out=True, limits=limits_of(op_class, ""),
        note=f"{engine}; {_SEEDS} fits together",
    )  # fmt: skip
