"""What `import trimtab` offers: load, predict, measure, applied, plan. Each imports what it needs when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import SpecError
from trimtab.spec.machine import Machine, Stack, load_machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import ALONE, Parallel
from trimtab.spec.plan import Plan
from trimtab.spec.report import Report
from trimtab.spec.workload import Workload
from trimtab.techniques.apply import applied, load
from trimtab.techniques.plan import make_plan

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.predict.search import Found, Limits
    from trimtab.techniques.base import Technique

__all__ = ["applied", "find_plans", "load", "make_plan", "measure", "predict"]


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
    parallel: Parallel = ALONE,
) -> Report:
    """Price a plan, given whole or by its parts (see `make_plan`)."""
    from trimtab.predict.predict import predict as price

    return price(plan or _plan(model, machine, workload, techniques, dtype, kv_dtype, stack, parallel))


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


def find_plans(
    model: str | Path | ModelSpec,
    machines: Sequence[str | Machine],
    *,
    prompt: int = 512,
    gen: int = 128,
    counts: Sequence[int] = (1, 2, 4, 8),
    concurrency: int = 256,
    dtypes: Sequence[str] = ("bfloat16",),
    kv_dtypes: Sequence[str] = ("bfloat16",),
    techniques: Sequence[str] = (),
    limits: Limits | None = None,
    stack: str | Stack | None = None,
) -> Found:
    """Search machines, layouts, formats and techniques for the plans no other beats.

    Args:
        model: a name `load` takes, or a spec.
        machines: ids, aliases or Machines to try.
        prompt, gen: tokens of a request.
        counts: numbers of devices.
        concurrency: most requests at a time; all smaller numbers are tried too.
        dtypes, kv_dtypes: of weights and cache to try.
        techniques: spec strings to try beside none, each alone; ``spec+spec`` together.
        limits: what must hold.
        stack: as in `make_plan`; default: what fits each machine.

    Raises:
        SpecError, Conflict: unknown names, values out of range.
    """
    from trimtab.predict.search import Limits, search
    from trimtab.techniques.plan import engine_of, variants

    found = [machine if isinstance(machine, Machine) else load_machine(machine) for machine in machines]
    return search(
        variants(model, dtypes, kv_dtypes, techniques), found, lambda machine: engine_of(machine, stack),
        prompt=prompt, gen=gen, counts=counts, concurrency=range(1, concurrency + 1), limits=limits or Limits(),
    )  # fmt: skip


def _plan(model, machine, workload, techniques, dtype, kv_dtype, stack, parallel=ALONE) -> Plan:
    if model is None:
        raise SpecError("No model is given. Pass a Plan, or model=... (for example model='smollm2-135m').")
    return make_plan(
        model, machine, workload, techniques, dtype=dtype, kv_dtype=kv_dtype, stack=stack, parallel=parallel
    )
