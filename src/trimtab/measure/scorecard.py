"""The scorecard of runs: every metric family of resource-efficient language models, predicted beside measured, and who dominates.

Families and definitions: Bai et al., arXiv 2401.00625, section 7: computation, memory, energy, money, network, fidelity.
Nothing is one number: a row better in one metric and worse in another is on the Pareto front, and stays there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import Conflict, SpecError, unknown
from trimtab.measure.costs import JOULES_PER_KWH, WORLD_2023, PowerGrid, usd_per_million_tokens
from trimtab.measure.pareto import Front, Sense, pareto
from trimtab.spec.report import Report

Column = Literal["predicted", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One cell: a number with its interval, or None with the reason."""

    value: float | None
    p10: float | None = None
    p90: float | None = None
    why: str = ""

    def scaled(self, factor: float, why: str) -> Value:
        """Value and interval times a positive factor."""
        if self.value is None:
            return self
        ends = tuple(None if end is None else end * factor for end in (self.p10, self.p90))
        return Value(value=self.value * factor, p10=ends[0], p90=ends[1], why=why)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "p10": self.p10, "p90": self.p90, "why": self.why}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of a scorecard.

    Args:
        name, family, unit: as printed.
        sense: which direction is better; ``none`` where neither is.
        predicted, measured: one cell per run.
    """

    name: str
    family: str
    unit: str
    sense: Sense
    predicted: tuple[Value, ...]
    measured: tuple[Value, ...]

    def column(self, column: Column | None = None) -> tuple[float | None, ...]:
        """Numbers of one column; None: each run's measured one, or the predicted one where nothing was measured."""
        if column is not None:
            return tuple(each.value for each in getattr(self, column))
        pairs = zip(self.measured, self.predicted, strict=True)
        return tuple(m.value if m.value is not None else p.value for m, p in pairs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        columns = {name: [each.to_dict() for each in getattr(self, name)] for name in ("predicted", "measured")}
        return {"name": self.name, "family": self.family, "unit": self.unit, "sense": self.sense, **columns}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReports:
    """What is known of one run: its prediction, its measurement, or both, as report JSON."""

    label: str
    predicted: Mapping[str, Any] | None = None
    measured: Mapping[str, Any] | None = None

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan of the report that is there."""
        return (self.measured or self.predicted or {})["plan"]

    @property
    def machine(self) -> str:
        """Id of the machine."""
        return str(self.plan["machine"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    """Runs side by side.

    Args:
        labels, machines: of the runs.
        baseline: label of the run that speed-up is against.
        metrics: the rows, by family.
        notes: sentences for the reader.
    """

    labels: tuple[str, ...]
    machines: tuple[str, ...]
    baseline: str
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...] = ()

    def metric(self, name: str) -> Metric:
        """A row by name.

        Raises:
            SpecError: there is none.
        """
        found = {each.name: each for each in self.metrics}
        if name not in found:
            raise unknown("metric", name, found)
        return found[name]

    def front(self, names: Sequence[str], column: Column | None = None) -> Front:
        """The Pareto front over two or more metrics, each in its own sense.

        Raises:
            SpecError: fewer than two, an unknown one, or one that has no better direction.
        """
        chosen = [self.metric(name) for name in names]
        if len(set(names)) < 2:
            raise SpecError(f"A front needs two metrics or more; {', '.join(names) or 'none'} given.")
        neutral = [each.name for each in chosen if each.sense == "none"]
        if neutral:
            raise SpecError(f"{', '.join(neutral)} has no better direction. Choose others.")
        points = list(zip(*(each.column(column) for each in chosen), strict=True))
        return pareto(points, [each.sense for each in chosen])

    def to_dict(self) -> dict[str, Any]:
        """As JSON, schema 1."""
        return {
            "schema": 1,
            "labels": list(self.labels),
            "machines": list(self.machines),
            "baseline": self.baseline,
            "metrics": [each.to_dict() for each in self.metrics],
            "notes": list(self.notes),
        }


def read_run(source: Path | Report | Mapping[str, Any], label: str = "") -> RunReports:
    """Read one run: a report, its JSON, or the JSON of `trimtab measure`, which holds the prediction too.

    Raises:
        SpecError: the file cannot be read or holds no report.
    """
    if isinstance(source, Path):
        try:
            facts: Any = json.loads(source.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SpecError(f"{source} cannot be read as JSON: {error}.") from None
        label = label or source.stem
    else:
        facts = source.to_dict() if isinstance(source, Report) else source
    name = str(source) if isinstance(source, Path) else "this"
    if not isinstance(facts, Mapping):
        raise SpecError(f"{name} is not a report of predict or measure.")
    pair = facts if "measured" in facts or "predicted" in facts else {facts.get("source"): facts}
    found = {key: pair.get(key) for key in ("predicted", "measured")}
    for report in found.values():
        if report is not None and not all(key in report for key in ("plan", "counts", "figures")):
            raise SpecError(f"{name} is not a report of predict or measure: plan, counts or figures are missing.")
    if found["predicted"] is None and found["measured"] is None:
        raise SpecError(f"{name} is not a report of predict or measure.")
    run = RunReports(label=label, predicted=found["predicted"], measured=found["measured"])
    return run if label else replace(run, label=" + ".join(run.plan["techniques"]) or "baseline")


def scorecard(
    runs: Sequence[RunReports],
    *,
    baseline: str | None = None,
    cross_machine: bool = False,
    grid: PowerGrid = WORLD_2023,
    price_usd_per_h: float | None = None,
    devices: int = 1,
) -> Scorecard:
    """Gather the metrics of runs.

    Args:
        runs: see `read_run`; labels differ.
        baseline: label of the run speed-up is against; default: the first.
        cross_machine: True compares runs of different machines all the same; speed-up stays within one machine.
        grid: where the electricity comes from.
        price_usd_per_h: of one device, where the report has no price or another one shall go.
        devices: that a run occupies, where its plan does not say.

    Raises:
        SpecError: no run, equal labels, no such baseline.
        Conflict: runs of different machines; the message names them.
    """
    labels = [run.label for run in runs]
    if not runs or len(set(labels)) < len(labels):
        raise SpecError(
            f"A scorecard wants one run or more with labels that differ; given: {', '.join(labels) or 'none'}."
        )
    if baseline is not None and baseline not in labels:
        raise unknown("baseline", baseline, labels)
    base = runs[labels.index(baseline)] if baseline else runs[0]
    machines = {run.label: run.machine for run in runs}
    if len(set(machines.values())) > 1 and not cross_machine:
        shown = ", ".join(f"{label} on {machine}" for label, machine in machines.items())
        raise Conflict(
            f"These runs are of different machines: {shown}. Run both on one, or ask for it (cross_machine=True)."
        )
    context = _Context(base=base, grid=grid, price=price_usd_per_h, devices=devices)
    metrics = [
        Metric(
            name=rule.name, family=rule.family, unit=rule.unit, sense=rule.sense,
            predicted=tuple(_cell(rule, run, "predicted", context) for run in runs),
            measured=tuple(_cell(rule, run, "measured", context) for run in runs),
        )
        for rule in RULES
    ]  # fmt: skip
    return Scorecard(
        labels=tuple(labels),
        machines=tuple(machines.values()),
        baseline=base.label,
        metrics=tuple(metrics),
        notes=_notes(runs, grid, cross_machine),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    base: RunReports
    grid: PowerGrid
    price: float | None
    devices: int


Facts = Mapping[str, Any]
Compute = Callable[[Facts, Column, "_Context"], Value]


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a metric is found in one report."""

    name: str
    family: str
    unit: str
    sense: Sense
    compute: Compute


def _cell(rule: _Rule, run: RunReports, column: Column, context: _Context) -> Value:
    facts = getattr(run, column)
    return Value(value=None, why=f"not {column}") if facts is None else rule.compute(facts, column, context)


def _count(name: str) -> Compute:
    def compute(facts: Facts, column: Column, context: _Context) -> Value:
        value = facts["counts"].get(name)
        return (
            Value(value=None, why="not counted in this run")
            if value is None
            else Value(value=float(value), why="exact")
        )

    return compute


def _figure(name: str) -> Compute:
    def compute(facts: Facts, column: Column, context: _Context) -> Value:
        return _figure_of(facts, name)

    return compute


def _figure_of(facts: Facts, name: str) -> Value:
    found = facts["figures"].get(name)
    if found is None:
        return Value(value=None, why="not a figure of this report")
    return Value(value=found["value"], p10=found.get("p10"), p90=found.get("p90"), why=found.get("why", ""))


def _latency(facts: Facts, column: Column, context: _Context) -> Value:
    """A request from its arrival to its last token; the ends of the interval are sums of ends, so it is wide rather than narrow."""
    first, step = _figure_of(facts, "ttft_s"), _figure_of(facts, "tpot_s")
    steps = facts["plan"]["workload"]["gen"] - 1
    if first.value is None or steps == 0:
        return first
    if step.value is None:
        return step
    ends = [
        None if a is None or b is None else a + steps * b for a, b in ((first.p10, step.p10), (first.p90, step.p90))
    ]
    return Value(value=first.value + steps * step.value, p10=ends[0], p90=ends[1], why=f"ttft_s + {steps} tpot_s")


def _speed_up(facts: Facts, column: Column, context: _Context) -> Value:
    """Latency of the baseline over that of the run: same machine, stack, model and workload, or no number."""
    base = getattr(context.base, column)
    if base is None:
        return Value(value=None, why=f"the baseline {context.base.label} is not {column}")
    for part in ("machine", "stack", "workload"):
        if facts["plan"][part] != base["plan"][part]:
            return Value(value=None, why=f"another {part} than the baseline {context.base.label}")
    ours, theirs = _latency(facts, column, context), _latency(base, column, context)
    if not ours.value or theirs.value is None:
        return Value(value=None, why=ours.why if ours.value is None else theirs.why)
    return Value(value=theirs.value / ours.value, why=f"latency of {context.base.label} / latency")


def _energy_kwh(facts: Facts, column: Column, context: _Context) -> Value:
    return _figure_of(facts, "energy_j").scaled(1 / JOULES_PER_KWH, "energy_j / 3.6e6")


def _carbon(facts: Facts, column: Column, context: _Context) -> Value:
    grid = context.grid
    factor = grid.pue * grid.kg_co2eq_per_kwh
    why = f"kWh x PUE {grid.pue:g} x {grid.kg_co2eq_per_kwh:g} kg/kWh"
    return _energy_kwh(facts, column, context).scaled(factor, why)


def _dollars(facts: Facts, column: Column, context: _Context) -> Value:
    """Dollars per million decoded tokens: the report's own figure, or from the price that was given."""
    if context.price is None:
        return _figure_of(facts, "usd_per_million_tokens")
    rate = _figure_of(facts, "tokens_per_s")
    if not rate.value:
        return Value(value=None, why=rate.why)
    n = _devices(facts, context)
    why = f"{context.price:g} USD/h x {n} / (3600 tokens_per_s) x 1e6"

    def cost(tokens_per_s: float | None) -> float | None:
        return usd_per_million_tokens(context.price or 0.0, tokens_per_s, n) if tokens_per_s else None

    return Value(value=cost(rate.value), p10=cost(rate.p90), p90=cost(rate.p10), why=why)


def _network(name: str) -> Compute:
    """Bytes the collectives of a pass move: as counted, and none at all where there is one device."""

    def compute(facts: Facts, column: Column, context: _Context) -> Value:
        if name not in facts["counts"] and _devices(facts, context) == 1:
            return Value(value=0.0, why="one device: no collective")
        return _count(name)(facts, column, context)

    return compute


def _devices(facts: Facts, context: _Context) -> int:
    parallel = facts["plan"].get("parallel")
    return math.prod(parallel[axis] for axis in ("tp", "pp", "dp")) if parallel else context.devices


#: Every metric: its family, unit, better direction, and how it is found in a report.
RULES = (
    _Rule("prefill FLOPs", "compute", "FLOP", "min", _count("prefill_flops")),
    _Rule("decode FLOPs", "compute", "FLOP/step", "min", _count("decode_flops")),
    _Rule("TTFT", "compute", "s", "min", _figure("ttft_s")),
    _Rule("TPOT", "compute", "s", "min", _figure("tpot_s")),
    _Rule("latency", "compute", "s", "min", _latency),
    _Rule("throughput", "compute", "tokens/s", "max", _figure("tokens_per_s")),
    _Rule("speed-up", "compute", "x", "max", _speed_up),
    _Rule("parameters", "memory", "", "none", _count("parameters")),
    _Rule("weights", "memory", "B", "min", _count("weight_bytes")),
    _Rule("cache", "memory", "B", "min", _count("kv_reserved_bytes")),
    _Rule("peak memory", "memory", "B", "min", _count("peak_bytes")),
    _Rule("energy", "energy", "kWh", "min", _energy_kwh),
    _Rule("carbon", "energy", "kgCO2eq", "min", _carbon),
    _Rule("price", "money", "USD/Mtoken", "min", _dollars),
    _Rule("prefill network", "network", "B", "min", _network("prefill_comm_bytes")),
    _Rule("decode network", "network", "B/step", "min", _network("comm_bytes")),
    _Rule("agreement", "fidelity", "", "max", _figure("top1_agreement")),
    _Rule("KL to base", "fidelity", "nats", "min", _figure("kl_nats")),
)

FAMILIES = tuple(dict.fromkeys(rule.family for rule in RULES))


def _notes(runs: Sequence[RunReports], grid: PowerGrid, cross_machine: bool) -> tuple[str, ...]:
    notes = [f"Carbon: {grid.source}."]
    machines = sorted({run.machine for run in runs})
    if cross_machine and len(machines) > 1:
        notes.append(f"Different machines are compared: {', '.join(machines)}. Speed-up is left out between them.")
    for part, name in (("workload", "workloads"), ("stack", "stacks"), ("dtype", "dtypes")):
        seen = {json.dumps(run.plan[part], sort_keys=True) for run in runs}
        if len(seen) > 1:
            notes.append(f"The runs have different {name}: {', '.join(sorted(seen))}.")
    return tuple(notes)
