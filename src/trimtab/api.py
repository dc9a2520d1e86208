"""What `import trimtab` offers: load, predict, measure, applied, plan. Each imports what it needs when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError
from trimtab.spec.machine import Machine, Stack
from trimtab.spec.nodes import ModelSpec
from trimtab.spec.plan import Plan
from trimtab.spec.report import Report
from trimtab.spec.workload import Workload
from trimtab.techniques.apply import applied, load
from trimtab.techniques.plan import make_plan

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.techniques.base import Technique

__all__ = ["applied", "load", "make_plan", "measure", "predict"]


def predict(
    plan: Plan | None = None,
    *,
    model: str | Path | ModelSpec | Model | None = None,
    machine: str | Machine | None = None,
    workload: Workload | None = None,
    techniques: Sequence[str | Technique] = (),
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    stack: str | Stack | None = None,
) -> Report:
    """Price a plan, given whole or by its parts (see `make_plan`)."""
    from trimtab.predict.predict import predict as price

    return price(plan or _plan(model, machine, workload, techniques, dtype, kv_dtype, stack))


def measure(
    plan: Plan | None = None,
    *,
    model: str | Path | Model | None = None,
    machine: str | Machine | None = None,
    workload: Workload | None = None,
    techniques: Sequence[str | Technique] = (),
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    stack: str | Stack | None = None,
    **options: Any,
) -> Report:
    """Run a plan on this machine and measure it; same arguments as `predict`, same Report.

    `options` go to `trimtab.measure.measure.measure`: rounds, text, progress.
    """
    from trimtab.measure.measure import measure as run

    return run(plan or _plan(model, machine, workload, techniques, dtype, kv_dtype, stack), **options)


def _plan(model, machine, workload, techniques, dtype, kv_dtype, stack) -> Plan:
    if model is None:
        raise SpecError("No model is given. Pass a Plan, or model=... (for example model='smollm2-135m').")
    return make_plan(model, machine, workload, techniques, dtype=dtype, kv_dtype=kv_dtype, stack=stack)
