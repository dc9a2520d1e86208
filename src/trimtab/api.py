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
    from trimtab.techniques.convert import Converted
    from trimtab.techniques.materials import Materials, Progress

__all__ = ["applied", "convert", "find_plans", "load", "make_plan", "measure", "predict"]


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


def convert(
    model: str | Path,
    out: str | Path,
    *,
    techniques: Sequence[str | Technique] = (),
    to: str = "auto",
    dtype: str = "auto",
    materials: Materials | None = None,
    eval: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Save a model with techniques on it as files that transformers, llama.cpp or `load` read; whole or not at all.

    Args:
        model: as in `load`.
        out: a folder, or a name that ends in .gguf.
        techniques: spec strings in order.
        to: ``safetensors``, ``gguf``, ``own`` or ``auto``.
        dtype: of what is not in codes; see `trimtab.techniques.convert.convert`.
        materials: calibration texts; by default the built-in text.
        eval: text to measure quality on, a file or ``topics``, for the manifest.
        force: do it again, and replace what an earlier call wrote.
        progress: ``progress(label, items)``; None shows nothing.

    Raises:
        SpecError: the target cannot express the model (the message says which can), or `out` holds something else.
        CapacityError: the disk is full.
    """
    from trimtab import __version__
    from trimtab.techniques.convert import Held
    from trimtab.techniques.convert import convert as save
    from trimtab.techniques.materials import no_progress

    held = None
    if eval is not None:
        from trimtab.measure.texts import read_text

        held = Held(Path(eval).name, read_text(eval), _quality)
    return save(
        model, out, version=__version__, techniques=techniques, to=to, dtype=dtype, materials=materials, held=held,
        force=force, progress=progress or no_progress,
    )  # fmt: skip


def _quality(base: Model, variant: Model, text: str) -> dict[str, Any]:
    """What `trimtab eval text` measures: 8 windows of 1024 tokens, or one shorter text."""
    import dataclasses

    from trimtab.measure.quality import evaluate_text, windows

    ids = base.tokenizer.encode(text)
    pieces = windows(ids, min(1024, base.spec.max_position_embeddings, max(len(ids), 2)), 8)
    return dataclasses.asdict(evaluate_text(base.variant, variant.variant, pieces))


def _plan(model, machine, workload, techniques, dtype, kv_dtype, stack, parallel=ALONE) -> Plan:
    if model is None:
        raise SpecError("No model is given. Pass a Plan, or model=... (for example model='smollm2-135m').")
    return make_plan(
        model, machine, workload, techniques, dtype=dtype, kv_dtype=kv_dtype, stack=stack, parallel=parallel
    )
