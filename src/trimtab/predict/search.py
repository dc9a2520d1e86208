"""Search for a plan: every combination of model variant, machine, parallelism and concurrency, priced and sorted out.

The combinations that share a graph are priced together, as arrays over the number of concurrent requests; the arithmetic is
that of `predict`, so a candidate's figures are those its plan would be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard
from trimtab.predict.memory import Footprint
from trimtab.predict.request import Costs, Requests
from trimtab.spec.machine import Machine, Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import Parallel
from trimtab.units import format_bytes, format_seconds

#: Figures a candidate is judged by; smaller is better.
OBJECTIVES = ("ttft_s", "tpot_s", "usd_per_million_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan must keep; None = no limit.

    Args:
        ttft_s, tpot_s: most seconds to the first and between further tokens.
        tokens_per_s: least tokens per second of all requests.
        usd_per_h: most dollars per hour of all devices.
        usd_per_million_tokens: most dollars.
        devices: most devices.
        memory_bytes: most bytes on one device.

    Raises:
        SpecError: a limit of 0 or less.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    usd_per_h: float | None = None
    usd_per_million_tokens: float | None = None
    devices: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SpecError(f"The limit {name}={value:g} is not possible. Allowed: more than 0, or none.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A model as it could be served: its name, spec, dtypes and techniques."""

    spec: ModelSpec
    dtype: str
    kv_dtype: str
    techniques: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((self.dtype, f"kv {self.kv_dtype}", *self.techniques))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One combination at its best number of requests, or the reason it has none.

    Args:
        concurrency: requests at a time.
        figures: ttft_s, tpot_s, tokens_per_s, usd_per_million_tokens (None without a price), peak_bytes.
        lost: why it is not in the Pareto set; empty for those that are.
    """

    variant: Variant
    machine: Machine
    stack: Stack
    parallel: Parallel
    concurrency: int = 0
    figures: dict[str, float | None] = field(default_factory=dict)
    lost: str = ""

    @property
    def name(self) -> str:
        """For messages: ``4 x h100 tp4, fp8 kv bf16``."""
        return f"{self.parallel.devices} x {self.machine.id} {self.parallel}, {self.variant}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The answer of a search.

    Args:
        best: the Pareto set, cheapest first.
        lost: the other combinations, each with its reason.
        evaluated: plans that were priced.
    """

    best: tuple[Candidate, ...]
    lost: tuple[Candidate, ...]
    evaluated: int


def search(
    variants: Sequence[Variant],
    machines: Sequence[Machine],
    stack_of: Callable[[Machine], Stack],
    *,
    prompt: int,
    gen: int,
    counts: Sequence[int] = (1, 2, 4, 8),
    concurrency: Sequence[int] = tuple(range(1, 257)),
    limits: Limits = Limits(),
) -> Found:
    """Price every combination and return those no other one beats.

    Args:
        variants: the model in the formats and with the techniques to try.
        machines: to try.
        stack_of: the stack a machine is run with.
        prompt, gen: tokens of a request.
        counts: numbers of devices; each is cut in every way into tp x pp.
        concurrency: numbers of concurrent requests.
        limits: what must hold.

    Raises:
        SpecError: nothing to search.
    """
    if not variants or not machines or not concurrency:
        raise SpecError("Nothing to search: name at least one machine, one dtype and one concurrency.")
    batch = np.asarray(sorted(set(concurrency)), np.int64)
    candidates, evaluated = [], 0
    for case in grid(variants, machines, stack_of, counts, prompt, gen):
        if isinstance(case, Candidate):
            candidates.append(case)
            continue
        variant, requests = case
        costs = requests.costs(batch)
        evaluated += len(batch)
        candidates.append(_judge(variant, requests, batch, costs, limits))
    return _pareto(candidates, evaluated)


def grid(
    variants: Iterable[Variant],
    machines: Sequence[Machine],
    stack_of: Callable[[Machine], Stack],
    counts: Sequence[int],
    prompt: int,
    gen: int,
) -> Iterable[Candidate | tuple[Variant, Requests]]:
    """Every combination ready to be priced, or a candidate that says why it cannot be."""
    stacks = [(machine, stack_of(machine).on(machine)) for machine in machines]
    for variant in variants:
        for parallel in layouts(counts):
            fit = [(m, s) for m, s in stacks if parallel.tp <= m.node_devices]
            try:
                graphs = Graphs(shard(variant.spec, parallel))
                footprints: dict[tuple[Any, ...], Footprint] = {}
                for machine, stack in fit:
                    if parallel.devices > 1 and machine.link_bytes_per_s_per_dir is None:
                        why = f"{machine.id} has no link between devices in the catalogue."
                        yield Candidate(variant=variant, machine=machine, stack=stack, parallel=parallel, lost=why)
                        continue
                    key = (
                        stack.fused,
                        stack.attention,
                        stack.max_batched_tokens,
                        stack.prefill_chunk,
                        stack.reserve_bytes,
                    )
                    if key not in footprints:
                        footprints[key] = Footprint(graphs, stack, parallel)
                    yield variant, Requests(
                        graphs, machine, stack, parallel,
                        prompt=prompt, gen=gen, concurrent=True, footprint=footprints[key],
                    )  # fmt: skip
            except SpecError as error:
                for machine, stack in fit:
                    yield Candidate(variant=variant, machine=machine, stack=stack, parallel=parallel, lost=str(error))


def layouts(counts: Iterable[int]) -> list[Parallel]:
    """Every tp x pp of these numbers of devices."""
    return [Parallel(tp=n // pp, pp=pp) for n in sorted(set(counts)) for pp in range(1, n + 1) if n % pp == 0]


def _judge(variant: Variant, requests: Requests, batch: np.ndarray, costs: Costs, limits: Limits) -> Candidate:
    """The number of requests that keeps all limits at the lowest price per token, or why there is none."""
    machine, parallel = requests.machine, requests.parallel
    known = dict(variant=variant, machine=machine, stack=requests.stack, parallel=parallel)
    peak = np.broadcast_to(np.asarray(costs.memory.peak, np.float64), batch.shape)
    table = {"ttft_s": costs.ttft_s, "tpot_s": costs.tpot_s, "tokens_per_s": costs.tokens_per_s, "peak_bytes": peak}
    hourly = None if machine.usd_per_h is None else machine.usd_per_h * parallel.devices
    if hourly is not None and costs.tokens_per_s is not None:
        table["usd_per_million_tokens"] = hourly / 3600 / costs.tokens_per_s * 1e6
    keeps = np.ones(batch.shape, bool)
    for why, holds in _checks(requests, table, hourly, limits):
        if not np.any(keeps & holds):
            first = {name: None if column is None else float(column[0]) for name, column in table.items()}
            return Candidate(**known, concurrency=int(batch[0]), figures=first, lost=why(int(np.argmax(keeps))))  # type: ignore[arg-type]
        keeps = keeps & holds
    rate = costs.tokens_per_s if costs.tokens_per_s is not None else 1 / costs.ttft_s
    index = int(np.argmax(np.where(keeps, rate, -np.inf)))
    figures = {name: None if column is None else float(column[index]) for name, column in table.items()}
    figures.setdefault("usd_per_million_tokens", None)
    return Candidate(**known, concurrency=int(batch[index]), figures=figures)  # type: ignore[arg-type]


def _checks(
    requests: Requests, table: dict[str, Any], hourly: float | None, limits: Limits
) -> Iterable[tuple[Callable[[int], str], Any]]:
    """(reason if nothing is left, which numbers of requests hold) of every limit in turn; the reason names the mildest case."""
    usable = requests.usable_bytes
    peak = table["peak_bytes"]
    yield (lambda at: f"does not fit by {format_bytes(int(peak[at] - usable))} per device."), peak <= usable
    cap = limits.memory_bytes
    if cap is not None:
        yield (lambda at: f"{format_bytes(int(peak[at]))} per device > {format_bytes(cap)}."), peak <= cap
    if limits.devices is not None:
        count = requests.parallel.devices
        yield (lambda at: f"{count} devices > {limits.devices}."), np.full(peak.shape, count <= limits.devices)
    if limits.usd_per_h is not None:
        known = hourly is not None
        why = f"{hourly:g} USD/h > {limits.usd_per_h:g}." if known else "no hourly price in the catalogue."
        yield (lambda at: why), np.full(peak.shape, known and hourly <= limits.usd_per_h)  # type: ignore[operator]
    for name in ("ttft_s", "tpot_s"):
        most, column = getattr(limits, name), table[name]
        if most is not None and column is not None:
            label = "TTFT" if name == "ttft_s" else "TPOT"
            yield (
                (
                    lambda at, c=column, m=most, label=label: (
                        f"{label} {format_seconds(float(c[at]))} > {format_seconds(m)}."
                    )
                ),
                column <= most,
            )
    for name, label in (("usd_per_million_tokens", "USD/Mtoken"),):
        most, column = getattr(limits, name), table.get(name)
        if most is not None:
            if column is None:
                yield (lambda at: "no hourly price in the catalogue."), np.zeros(peak.shape, bool)
            else:
                least = float(np.min(column))
                yield (lambda at, v=least, m=most, label=label: f"{v:.3g} {label} at best > {m:g}."), column <= most
    if limits.tokens_per_s is not None and table["tokens_per_s"] is not None:
        most = float(np.max(table["tokens_per_s"]))
        yield (
            (lambda at, v=most: f"{v:.0f} tokens/s at most < {limits.tokens_per_s:g}."),
            table["tokens_per_s"] >= limits.tokens_per_s,
        )


def _pareto(candidates: list[Candidate], evaluated: int) -> Found:
    """Split into those no other candidate beats in every objective, and the rest with who beats them."""
    from dataclasses import replace

    alive = [c for c in candidates if not c.lost]
    lost = [c for c in candidates if c.lost]
    # Without a price, devices of one kind are what is paid.
    points = np.array([[_value(c, name) for name in OBJECTIVES] for c in alive]).reshape(len(alive), len(OBJECTIVES))
    best = []
    for index, candidate in enumerate(alive):
        better = np.all(points <= points[index], axis=1) & np.any(points < points[index], axis=1)
        if not better.any():
            best.append(candidate)
            continue
        winner = alive[int(np.flatnonzero(better)[np.argmin(points[better][:, -1])])]
        lost.append(replace(candidate, lost=f"beaten by {winner.name} in all: {_versus(candidate, winner)}."))
    best.sort(key=lambda c: _value(c, "usd_per_million_tokens"))
    return Found(best=tuple(best), lost=tuple(lost), evaluated=evaluated)


def _value(candidate: Candidate, name: str) -> float:
    value = candidate.figures.get(name)
    return np.inf if value is None else value


def _versus(loser: Candidate, winner: Candidate) -> str:
    parts = []
    for name, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        mine, its = loser.figures.get(name), winner.figures.get(name)
        if mine is not None and its is not None:
            parts.append(f"{label} {format_seconds(mine)} against {format_seconds(its)}")
    mine, its = (c.figures.get("usd_per_million_tokens") for c in (loser, winner))
    if mine is not None and its is not None:
        parts.append(f"USD/Mtoken {mine:.3g} against {its:.3g}")
    return ", ".join(parts)
