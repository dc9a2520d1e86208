"""Build a Plan from names: the model, the machine, the stack and the techniques, looked up and composed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.spec.cache import page_format
from trimtab.spec.configs import load_spec
from trimtab.spec.formats import weights_name
from trimtab.spec.machine import (
    NATIVE,
    THIS,
    Machine,
    Stack,
    kernel_machines,
    load_machine,
    load_stack,
    this_machine_path,
)
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import ALONE, Parallel
from trimtab.spec.plan import Plan
from trimtab.spec.serial import is_saved
from trimtab.spec.workload import Workload
from trimtab.techniques.base import Technique, compose
from trimtab.techniques.registry import parse_all

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.predict.search import Variant


def make_plan(
    model: str | Path | ModelSpec | Model,
    machine: str | Machine | None = None,
    workload: Workload | None = None,
    techniques: Sequence[str | Technique] = (),
    *,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    stack: str | Stack | None = None,
    parallel: Parallel = ALONE,
) -> Plan:
    """Build a Plan.

    Args:
        model: a name `load` takes (no weights are read), a ModelSpec or a loaded model. A folder of Trimtab's own is priced as
            it was saved, whatever dtypes are asked for.
        machine: id, alias or Machine; default: this machine once calibrated, else an A100.
        workload: batch, prompt and generated tokens.
        techniques: spec strings in order.
        dtype: of weights and activations; ``file`` keeps the blocks of a quantized file.
        kv_dtype: of the cache.
        parallel: devices the model is spread over.
        stack: name or Stack; default `this` on this machine, `vllm` where kernels were recorded, else `datasheet`.

    Raises:
        SpecError, Conflict: unknown names, values out of range, techniques that do not fit.
    """
    saved = isinstance(model, str | Path) and is_saved(Path(model).expanduser())
    keep_packed = dtype == "file" or saved
    spec = _spec(model, keep_packed)
    weights_dtype = spec.act_dtype if keep_packed else dtype
    base = spec if saved else spec.with_dtype(weights_dtype, kv_dtype, keep_packed=keep_packed)
    chosen = parse_all(techniques)
    if machine is None:
        machine = THIS if this_machine_path().exists() else "a100"
    found = machine if isinstance(machine, Machine) else load_machine(machine)
    engine = engine_of(found, stack)
    composed = compose(base, chosen)
    if engine.name == NATIVE:  # priced as it is held: matrices in tiles, activations in fp32
        from trimtab.runtime.native import lowered_spec

        base, composed = lowered_spec(base), lowered_spec(composed)
    return Plan(
        base=base,
        model=composed,
        machine=found,
        stack=engine.on(found),
        workload=workload or Workload(),
        techniques=tuple(str(technique) for technique in chosen),
        dtype=weights_name(weights_dtype),
        kv_dtype=str(page_format(kv_dtype)),
        source=str(model) if isinstance(model, str | Path) else "",
        parallel=parallel,
        assumed=tuple(
            f"{t.name}:{f.name}" for t in chosen for f in dataclasses.fields(t) if getattr(t, f.name) == "auto"
        ),
    )


def engine_of(machine: Machine, stack: str | Stack | None = None) -> Stack:
    """The stack asked for; else the one that says most about a machine: a serving engine where its kernels were recorded."""
    if isinstance(stack, Stack):
        return stack
    if stack is None:
        stack = THIS if machine.id == THIS else "vllm" if machine.id in kernel_machines() else "datasheet"
    return load_stack(stack)


def variants(
    model: str | Path | ModelSpec, dtypes: Sequence[str], kv_dtypes: Sequence[str], techniques: Sequence[str] = ()
) -> list[Variant]:
    """A model in every combination of dtypes, plain and with each of `techniques` (``spec+spec`` are one).

    Raises:
        SpecError, Conflict: unknown names, or a technique that does not fit.
    """
    from trimtab.predict.search import Variant

    spec = _spec(model, as_stored=False)
    chosen: list[tuple[Technique, ...]] = [(), *(parse_all([text]) for text in techniques)]
    found = []
    for dtype in dict.fromkeys(map(weights_name, dtypes)):
        for kv_dtype in dict.fromkeys(str(page_format(kv)) for kv in kv_dtypes):
            base = spec.with_dtype(dtype, kv_dtype, keep_packed=False)
            found += [
                Variant(spec=compose(base, parts), dtype=dtype, kv_dtype=kv_dtype, techniques=tuple(map(str, parts)))
                for parts in chosen
            ]
    return found


def _spec(model: str | Path | ModelSpec | Model, as_stored: bool) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if not isinstance(model, str | Path):
        return model.spec
    if as_stored:  # the catalogue knows shapes; only the file knows in which blocks it is stored
        from trimtab.runtime.weights.load import stored_spec

        return stored_spec(model)
    return load_spec(str(model))
