"""What `import trimtab` offers: load, predict, measure, applied, plan. Each imports what it needs when it is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.spec.machine import THIS, Machine, Stack, load_machine, load_stack, this_machine_path
from trimtab.spec.nodes import ModelSpec
from trimtab.spec.plan import Plan
from trimtab.spec.report import Report
from trimtab.spec.workload import Workload

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.techniques.base import Technique
    from trimtab.techniques.materials import Materials


def load(
    model: str | Path,
    *,
    dtype: str = "float32",
    techniques: Sequence[str | Technique] = (),
    materials: Materials | None = None,
) -> Model:
    """Load a model: ``smollm2-135m``, a folder, a .gguf file or a hub id.

    Args:
        model: where it is.
        dtype: ``float32 | bfloat16 | float16``, or ``file`` to keep quantized blocks as they are in the file.
        techniques: applied for good while loading; the matrices they replace are freed.
        materials: calibration texts; by default the built-in text.

    Raises:
        SpecError: no such model, a broken file, a technique that does not fit.
        MissingDependency: the built-in model's package or torch is not installed; the message holds the command.
    """
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.weights.load import open_model
    from trimtab.techniques.apply import default_materials, derive, resolve_all
    from trimtab.techniques.registry import parse_all

    chosen = parse_all(techniques)  # a typo is found before the weights are read
    loaded = open_model(model, dtype=dtype)
    found = Model(Variant(loaded.spec, loaded.weights), loaded.tokenizer)
    if chosen:
        materials = (materials or default_materials(found)).for_model(found)
        found = Model(derive(found.variant, resolve_all(found, chosen, materials), materials), loaded.tokenizer)
    return found


def make_plan(
    model: str | Path | ModelSpec | Model,
    machine: str | Machine | None = None,
    workload: Workload | None = None,
    techniques: Sequence[str | Technique] = (),
    *,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    stack: str | Stack | None = None,
) -> Plan:
    """Build a Plan.

    Args:
        model: a name `load` takes (no weights are read), a ModelSpec or a loaded model.
        machine: id, alias or Machine; default: this machine once calibrated, else an A100.
        workload: batch, prompt and generated tokens.
        techniques: spec strings in order.
        dtype: of weights and activations; ``file`` keeps the blocks of a quantized file.
        kv_dtype: of the cache.
        stack: name or Stack; default `this` on this machine, else `datasheet`.

    Raises:
        SpecError, Conflict: unknown names, values out of range, techniques that do not fit.
    """
    from trimtab.spec.configs import load_spec
    from trimtab.spec.formats import dtype_name
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    spec = (
        model
        if isinstance(model, ModelSpec)
        else load_spec(str(model))
        if isinstance(model, str | Path)
        else model.spec
    )
    keep_packed = dtype == "file"
    weights_dtype = spec.act_dtype if keep_packed else dtype
    base = spec.with_dtype(weights_dtype, kv_dtype, keep_packed=keep_packed)
    chosen = parse_all(techniques)
    if machine is None:
        machine = THIS if this_machine_path().exists() else "a100"
    found = machine if isinstance(machine, Machine) else load_machine(machine)
    if stack is None:
        stack = THIS if found.id == THIS else "datasheet"
    return Plan(
        base=base,
        model=compose(base, chosen),
        machine=found,
        stack=stack if isinstance(stack, Stack) else load_stack(stack),
        workload=workload or Workload(),
        techniques=tuple(str(technique) for technique in chosen),
        dtype=dtype_name(weights_dtype),
        kv_dtype=dtype_name(kv_dtype),
        assumed=tuple(f"{t.name}:{f.name}" for t in chosen for f in dataclasses.fields(t) if getattr(t, f.name) == "auto"),
    )


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
    **options: object,
) -> Report:
    """Run a plan on this machine and measure it; same arguments as `predict`, same Report.

    `options` go to `trimtab.measure.measure.measure`: rounds, text, progress.
    """
    from trimtab.measure.measure import measure as run

    return run(plan or _plan(model, machine, workload, techniques, dtype, kv_dtype, stack), **options)  # type: ignore[arg-type]


def applied(model: Model, *techniques: str | Technique, materials: Materials | None = None):
    """Use a model with techniques on it; see `trimtab.techniques.apply.applied`."""
    from trimtab.techniques.apply import applied as apply

    return apply(model, *techniques, materials=materials)


def _plan(model, machine, workload, techniques, dtype, kv_dtype, stack) -> Plan:
    from trimtab.errors import SpecError

    if model is None:
        raise SpecError("No model is given. Pass a Plan, or model=... (for example model='smollm2-135m').")
    return make_plan(model, machine, workload, techniques, dtype=dtype, kv_dtype=kv_dtype, stack=stack)
