"""Prices cases for the page: the calls of the command line, with plans and graphs kept between them."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import SpecError, TrimtabError
from trimtab.predict.explain import explain
from trimtab.predict.predict import kinds_of_bound, predict
from trimtab.predict.slices import Slices
from trimtab.serve.errors import ApiError
from trimtab.spec.configs import catalogue_file, load_spec
from trimtab.spec.machine import THIS, Machine, Stack, load_machine, this_machine_path
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import Parallel
from trimtab.spec.plan import Plan
from trimtab.spec.report import Report
from trimtab.spec.runnable import check_runnable
from trimtab.spec.workload import Workload
from trimtab.techniques.plan import engine_of, make_plan
from trimtab.techniques.registry import parse_all
from trimtab.ui.explorer.types import (
    Bandwidth,
    Bound,
    Case,
    Delta,
    ExplainReply,
    FigureReply,
    OpReply,
    Peak,
    PredictReply,
    ReportReply,
)

#: Largest numbers of a case; beyond them counts say nothing and integers grow without end.
MOST = {"batch": 1 << 20, "prompt": 1 << 24, "gen": 1 << 20, "tp": 1 << 10, "pp": 1 << 10}
#: Models with techniques whose plan and graph are kept.
_KEPT = 48


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan, the graphs of its model, and why that cannot run here (empty: it can)."""

    plan: Plan
    slices: Slices
    refused: str

    def report(self) -> Report:
        """Its prediction.

        Raises:
            ApiError: 400, the layout does not divide the model.
        """
        with blamed("tp"):
            return predict(self.plan, self.slices)


class Desk:
    """Everything the page asks about cases.

    Args:
        paths: whether a model may be a folder or file of this machine; only where nobody else can ask.
    """

    def __init__(self, *, paths: bool) -> None:
        self.paths = paths
        self._plans: OrderedDict[tuple[Any, ...], Priced] = OrderedDict()
        self._turn = threading.Lock()

    def price(self, case: Case) -> Priced:
        """The plan of a case.

        Raises:
            ApiError: 400 that names the field at fault.
        """
        work = workload_of(case)
        with blamed("tp"):
            parallel = Parallel(tp=case.tp, pp=case.pp)
        with blamed("model"):
            model, changed = self._model(case.model)
        calibrated = this_machine_path()
        # A file that was written anew is another model, a machine calibrated anew another machine.
        stamp = calibrated.stat().st_mtime_ns if calibrated.exists() else 0
        key = (case.model, changed, case.machine, case.stack, tuple(case.techniques), case.dtype, case.kv_dtype, stamp)
        with self._turn:
            known = self._plans.get(key)
            if known is not None:
                self._plans.move_to_end(key)
        if known is None:
            known = self._priced(case, model)
            with self._turn:
                self._plans[key] = known
                while len(self._plans) > _KEPT:
                    self._plans.popitem(last=False)
        plan = replace(known.plan, workload=work, parallel=parallel)
        if case.usd_per_h is not None:
            with blamed("usd_per_h"):
                plan = replace(plan, machine=plan.machine.priced(case.usd_per_h))
        return Priced(plan, known.slices, known.refused)

    def _priced(self, case: Case, model: str | ModelSpec) -> Priced:
        with blamed("machine"):
            machine = load_machine(case.machine or (THIS if this_machine_path().exists() else "a100"))
        with blamed("stack"):
            stack = engine_of(machine, case.stack or None)
        with blamed("dtype"):
            make_plan(model, machine, dtype=case.dtype, stack=stack)
        with blamed("kv_dtype"):
            make_plan(model, machine, dtype=case.dtype, kv_dtype=case.kv_dtype, stack=stack)
        with blamed("techniques"):
            plan = make_plan(
                model, machine, None, case.techniques, dtype=case.dtype, kv_dtype=case.kv_dtype, stack=stack
            )
        return Priced(plan, Slices(plan.model, plan.stack), _refused(plan.model))

    def _model(self, name: str) -> tuple[str | ModelSpec, int]:
        """What `make_plan` takes for a name, and when its file was changed.

        Raises:
            SpecError: no such model, or a path where none may be named.
        """
        if not name.strip():
            raise SpecError("No model is named. Give a catalogue id such as llama-3.1-8b; `trimtab models` lists them.")
        if self.paths:
            load_spec(name)
            return name, _changed(Path(name).expanduser())
        try:
            return load_spec(str(catalogue_file(name))), 0
        except SpecError:
            if "/" not in name and "." not in name.replace("-", ""):
                raise
            raise SpecError(
                f"Unknown model '{name}'. This server lets other machines in, so only models of the catalogue can be named, "
                "no folder and no file; `trimtab models` lists them."
            ) from None

    def named(self, name: str) -> str | ModelSpec:
        """What `make_plan` takes for a model's name.

        Raises:
            SpecError: no such model, or a path where none may be named.
        """
        return self._model(name)[0]

    def predict(self, case: Case) -> PredictReply:
        """Price a case, and the same without its techniques."""
        priced = self.price(case)
        report = priced.report()
        base = self._base(case).report() if case.techniques else None
        plan = priced.plan
        usable = report.counts["capacity_bytes"]
        return PredictReply(
            report=reply_of(report),
            base=reply_of(base) if base else None,
            bandwidths=bandwidths(plan.machine, plan.stack),
            peaks=_peaks(plan, report),
            bounds={phase: Bound(bound=b, share=share) for phase, (b, share) in kinds_of_bound(report).items()},
            fits=report.counts["peak_bytes"] <= usable,
            capacity_bytes=float(usable),
            command=command_of(plan),
            measurable=measurable(priced),
        )

    def _base(self, case: Case) -> Priced:
        return self.price(_with(case, techniques=[]))

    def explain(self, case: Case, name: str) -> ExplainReply:
        """What is behind one number.

        Raises:
            ApiError: 400, no such count or figure.
        """
        priced = self.price(case)
        with blamed("name"):
            text = explain(priced.report(), name, priced.plan)
        return ExplainReply(text=text, command=f"{command_of(priced.plan)} --explain {name}")

    def deltas(self, case: Case, candidates: list[str]) -> list[Delta]:
        """What each candidate would change on top of the case."""
        before = self.price(case).report()
        found = []
        for text in candidates:
            try:
                found.append(
                    _delta(text, before, self.price(_with(case, techniques=[*case.techniques, text])).report())
                )
            except ApiError as error:
                found.append(Delta(technique=text, refused=error.message))
        return found


def _with(case: Case, **changes: Any) -> Case:
    fields = {name: getattr(case, name) for name in Case.__struct_fields__}
    return Case(**{**fields, **changes})


def _changed(path: Path) -> int:
    """When what describes a model was last written; 0 for what is no path."""
    files = [path, *path.glob("*.json")] if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def workload_of(case: Case) -> Workload:
    """The workload of a case.

    Raises:
        ApiError: 400, naming the number that is out of range.
    """
    for name in ("batch", "prompt", "gen", "tp", "pp"):
        value = getattr(case, name)
        if not 1 <= value <= MOST[name]:
            raise ApiError(
                400, f"{name}={value} is not possible. Allowed: a whole number from 1 to {MOST[name]:,}.", param=name
            )
    return Workload(batch=case.batch, prompt=case.prompt, gen=case.gen, continuous=case.continuous)


@contextlib.contextmanager
def blamed(field: str) -> Iterator[None]:
    """Turn what is refused inside into a 400 that names a field of the request."""
    try:
        yield
    except ApiError:
        raise
    except TrimtabError as error:
        named = re.match(r"(batch|prompt|gen|tp|pp)=", str(error))
        raise ApiError(400, str(error), param=named.group(1) if named else field) from None


def command_of(plan: Plan) -> str:
    """The command line that prints the same prediction."""
    text = plan.command("predict")
    if plan.workload.continuous:
        text = text.replace(f"--batch {plan.workload.batch}", f"--concurrency {plan.workload.batch}")
    for name in ("tp", "pp"):
        degree = getattr(plan.parallel, name)
        text += f" --{name} {degree}" if degree > 1 else ""
    return f"{text} --stack {plan.stack.name}"


def measurable(priced: Priced) -> str:
    """Why a plan cannot be measured here; empty if it can."""
    plan = priced.plan
    if plan.parallel.devices > 1:
        return "It takes several devices; measuring runs on this one machine."
    if plan.workload.continuous:
        return "It is a serving point; measuring runs one batch. Turn off continuous batching."
    longest = plan.workload.tokens
    if longest > plan.model.max_position_embeddings:
        return f"{longest} tokens are beyond the {plan.model.max_position_embeddings} positions of {plan.model.name}."
    return priced.refused


def _refused(model: ModelSpec) -> str:
    try:
        check_runnable(model)
    except TrimtabError as error:
        return str(error)
    return ""


def reply_of(report: Report) -> ReportReply:
    """A report as JSON."""
    return ReportReply(
        plan=dict(report.plan),
        counts={name: float(value) for name, value in report.counts.items()},
        figures={name: FigureReply(**figure.to_dict()) for name, figure in report.figures.items()},
        observed=dict(report.observed),
        ops=[
            OpReply(**{**op.to_dict(), "flops": float(op.flops), "bytes": float(op.bytes), "count": int(op.count)})
            for op in report.ops
        ],
        notes=list(report.notes),
    )


def bandwidths(machine: Machine, stack: Stack) -> list[Bandwidth]:
    """Memory levels of a roofline, the largest last: cache where it is known, then main memory as it is priced."""
    steps = stack.bandwidth_by_working_set
    if steps:
        first, last = steps[0], steps[-1]
        near = [Bandwidth(name="cache (measured)", bytes_per_s=first[1])] if first[1] > last[1] else []
        return [*near, Bandwidth(name="memory (measured)", bytes_per_s=last[1])]
    near = machine.llc_bandwidth_bytes_per_s
    cache = [Bandwidth(name="last-level cache", bytes_per_s=near)] if near else []
    return [*cache, Bandwidth(name=machine.memory_type or "memory", bytes_per_s=machine.memory_bandwidth_bytes_per_s)]


def _peaks(plan: Plan, report: Report) -> list[Peak]:
    used = {op.dtype for op in report.ops if op.flops}
    found = []
    for dtype in sorted(used):
        rate, priced_as = plan.machine.peak(dtype)
        found.append(Peak(dtype=dtype, priced_as=priced_as, flops_per_s=rate))
    return found


def _delta(text: str, before: Report, after: Report) -> Delta:
    def ratio(new: float | None, old: float | None) -> float | None:
        return new / old if new is not None and old else None

    def figure(name: str) -> float | None:
        return ratio(after.figures[name].value, before.figures[name].value)

    def count(name: str) -> float | None:
        return ratio(float(after.counts[name]), float(before.counts[name]))

    with blamed("candidates"):
        spelled = " ".join(map(str, parse_all([text])))
    return Delta(
        technique=spelled, refused="", ttft=figure("ttft_s"), tpot=figure("tpot_s"), weights=count("weight_bytes"),
        kv=count("kv_peak_bytes"), peak=count("peak_bytes"), tokens_per_s=figure("tokens_per_s"),
        fits=after.counts["peak_bytes"] <= after.counts["capacity_bytes"],
    )  # fmt: skip


def grid(values: list[int], most: int, name: str) -> np.ndarray:
    """An axis: distinct numbers in order.

    Raises:
        ApiError: 400, one is out of range.
    """
    for value in values:
        if not 1 <= value <= most:
            raise ApiError(400, f"{name} holds {value}. Allowed: whole numbers from 1 to {most:,}.", param=name)
    return np.asarray(sorted(set(values)), np.int64)
