"""Measure a plan on this machine: exact counts by meters, times in interleaved rounds, quality through its own cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.graph.ops import StepShape
from trimtab.graph.passes import prompt_held
from trimtab.measure.ledger import Ledger
from trimtab.measure.meters import ActivationMeter, Stopwatch, energy, rss_bytes
from trimtab.measure.quality import Quality, TokenScores, evaluate_continuation
from trimtab.model.variant import Model, Variant
from trimtab.predict.predict import predict, step_counts
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.step import IntArray, Recorder
from trimtab.runtime.text.builtin import builtin_text, split
from trimtab.spec.plan import Plan
from trimtab.spec.report import Figure, Report
from trimtab.techniques.apply import default_materials, derive, load, resolve_all
from trimtab.techniques.base import compose
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all

#: Counts that must be equal, predicted and metered, when the run decides none of them.
EXACT = (
    "weight_bytes",
    "kv_bytes",
    "kv_reserved_bytes",
    "prefill_flops",
    "decode_flops",
    "weight_read",
    "kv_read",
)
#: Tokens of the continuation that quality is scored on.
SCORED = 64

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


def _silent(label: str, items: Iterable[Any]) -> Iterator[Any]:
    del label
    yield from items


@dataclass(frozen=True)
class Arm:
    """One thing to measure: a plan whose every `auto` is resolved, and the model it describes."""

    label: str
    plan: Plan
    model: Model


@dataclass(frozen=True)
class Measured:
    """An arm with what was predicted of it before and what was measured."""

    arm: Arm
    predicted: Report
    measured: Report


def prepare(plan: Plan, model: Model | None = None, materials: Materials | None = None) -> tuple[Arm, Arm]:
    """Return (base, variant) arms: weights loaded in the plan's dtypes, techniques resolved and applied.

    Args:
        plan: what to measure.
        model: loaded already, in the plan's dtype; None loads it.
        materials: calibration texts; by default the built-in text.

    Raises:
        SpecError: prompt plus new tokens exceed the context.
    """
    context, work = plan.base.max_position_embeddings, plan.workload
    if work.tokens > context:
        raise SpecError(
            f"prompt={work.prompt} and gen={work.gen} make {work.tokens} tokens, the context of {plan.base.name} is "
            f"{context}. Try --prompt {max(1, context - work.gen)}."
        )
    model = model or load(plan.source or plan.base.name, dtype=plan.dtype)
    base = Model(Variant(plan.base, model.weights), lambda: model.tokenizer)
    base_plan = dataclasses.replace(plan, model=plan.base, techniques=(), assumed=())
    materials = (materials or default_materials(base)).for_model(base)
    chosen = resolve_all(base, parse_all(plan.techniques), materials)
    variant = derive(base.variant, chosen, materials)
    resolved = dataclasses.replace(
        plan, model=compose(plan.base, chosen), techniques=tuple(str(each) for each in chosen), assumed=()
    )
    return Arm("baseline", base_plan, base), Arm(
        " + ".join(resolved.techniques), resolved, Model(variant, lambda: model.tokenizer)
    )


def measure(
    plan: Plan,
    model: Model | None = None,
    *,
    rounds: int = 3,
    text: str | None = None,
    materials: Materials | None = None,
    progress: Progress = _silent,
    ledger: Ledger | None = None,
) -> Report:
    """Measure a plan; returns the measured report of the plan with techniques.

    Args:
        plan: what to measure; this machine is where it runs, whatever machine the plan names.
        model: loaded already, in the plan's dtype.
        rounds: interleaved rounds of baseline and variant, after one warm-up.
        text: held-out text for quality; default: the second half of the built-in text.
        materials: calibration texts.
        progress: shows the rounds.
        ledger: where the run is recorded; default: the user's.
    """
    base, variant = prepare(plan, model, materials)
    arms = [base, variant] if plan.techniques else [base]
    return compare(arms, rounds=rounds, text=text, progress=progress, ledger=ledger)[-1].measured


def compare(
    arms: Sequence[Arm],
    *,
    rounds: int = 3,
    text: str | None = None,
    progress: Progress = _silent,
    ledger: Ledger | None = None,
) -> list[Measured]:
    """Measure several arms side by side, the first being the baseline.

    Every arm's prediction is in the ledger before anything runs. Rounds go over all arms in turn, so that a machine that
    slows down slows all of them.
    """
    ledger = ledger or Ledger()
    predictions = [predict(arm.plan) for arm in arms]
    rows = [ledger.start(report) for report in predictions]
    try:
        prompts, continuation = _tokens(arms[0], text)
        for arm in progress("warm-up", arms):
            _timed(arm, prompts, steps=1)
        times: list[list[tuple[float, float]]] = [[] for _ in arms]
        joules: list[list[tuple[float | None, str]]] = [[] for _ in arms]
        for _, index in progress("rounds", [(r, i) for r in range(rounds) for i in range(len(arms))]):
            with energy() as spent:
                times[index].append(_timed(arms[index], prompts))
            joules[index].append((spent.joules, spent.why))
        found = []
        for index, arm in enumerate(progress("meters and quality", arms)):
            counts, observed, exact = meter(arm, prompts)
            quality = _quality(arms[0], arm, prompts[0], continuation)
            figures = _figures(arm, times[index], joules[index]) | quality.figures(arm.plan.command("eval text"))
            report = Report(
                source="measured",
                plan=arm.plan.to_dict(),
                counts=counts,
                figures=figures,
                observed=observed,
                notes=_notes(rounds, exact),
            )
            ledger.finish(rows[index], report)
            found.append(Measured(arm, predictions[index], report))
        return found
    except BaseException as error:
        for row in rows:
            ledger.fail(row, error)
        raise


def _tokens(arm: Arm, text: str | None) -> tuple[list[IntArray], IntArray]:
    """Prompts [batch][prompt] and the continuation of the first, from held-out text; short texts are repeated."""
    work = arm.plan.workload
    ids = np.asarray(arm.model.tokenizer.encode(text or split(builtin_text())[1]), dtype=np.int64)
    wanted = work.batch * work.prompt + SCORED
    ids = np.resize(ids, max(wanted, len(ids)))
    prompts = [ids[row * work.prompt : (row + 1) * work.prompt] for row in range(work.batch)]
    scored = min(SCORED, arm.plan.base.max_position_embeddings - work.prompt)
    return prompts, ids[work.prompt : work.prompt + scored]


def _open(arm: Arm) -> Session:
    chunk = arm.plan.stack.prefill_chunk
    return arm.model.session() if chunk is None else arm.model.session(chunk=chunk)


def _timed(arm: Arm, prompts: Sequence[IntArray], steps: int | None = None) -> tuple[float, float]:
    """Return (seconds to the first token, mean seconds of the other gen - 1 tokens)."""
    steps = arm.plan.workload.gen - 1 if steps is None else steps
    session, watch = _open(arm), Stopwatch()
    tokens = session.prefill(prompts, reserve=steps + 1).argmax(-1)
    first = watch.lap()
    for _ in range(steps):
        tokens = session.decode(tokens).argmax(-1)
    rest = watch.lap()
    session.close()
    return first, rest / steps if steps else float("nan")


def meter(arm: Arm, prompts: Sequence[IntArray]) -> tuple[dict[str, int], dict[str, float], list[str]]:
    """Run the plan once with the meters on.

    Returns:
        Counts under the names of a prediction; what data decided, by name; and the names of counts of the mean decode
        step that differ from the graph's once that is put in (none, or something is wrong).
    """
    work = arm.plan.workload
    session = _open(arm)
    session.record = prefill = Recorder()
    tokens = session.prefill(prompts, reserve=work.gen).argmax(-1)
    middle = Recorder()
    for index in range(work.gen):  # gen - 1 steps, and one that only stores the last token
        session.record = Recorder()
        if index == max(work.gen - 2, 0) // 2:
            session.record = middle
        tokens = session.decode(tokens).argmax(-1)
    held = session.store.nbytes()
    session.close()
    with ActivationMeter() as live:
        session = _open(arm)
        session.prefill(prompts, reserve=1)
        session.decode(tokens)
        session.close()
    counts = {
        "weight_bytes": arm.model.weights.nbytes,
        "kv_bytes": held.held,
        "kv_reserved_bytes": held.reserved,
        "activation_bytes": live.peak,
        "peak_bytes": arm.model.weights.nbytes + held.reserved + live.peak,
        "prefill_flops": prefill.total("flops"),
        "decode_flops": middle.total("flops"),
        "weight_read": middle.total("weight_read"),
        "kv_read": middle.total("kv_read"),
        "prefill_weight_read": prefill.total("weight_read"),
        "prefill_kv_read": prefill.total("kv_read"),
    }
    past = prompt_held(arm.plan.model, work.prompt) + max(work.gen - 2, 0) // 2
    step = StepShape.of([1], [past], logits=work.batch, copies=work.batch, observed=middle.observed)
    wanted = step_counts(
        dataclasses.replace(arm.plan, stack=dataclasses.replace(arm.plan.stack, attention="eager")), step
    )
    pairs = (("decode_flops", "flops"), ("weight_read", "weight_read"), ("kv_read", "kv_read"))
    differ = [name for name, count in pairs if counts[name] != wanted.total(count)]
    return counts, {name: float(value) for name, value in middle.observed.items()}, differ


def _quality(base: Arm, arm: Arm, prompt: IntArray, continuation: IntArray) -> Quality:
    return evaluate_continuation(base.model, arm.model, prompt, continuation, TokenScores())


def _figures(
    arm: Arm, times: Sequence[tuple[float, float]], joules: Sequence[tuple[float | None, str]]
) -> dict[str, Figure]:
    check = arm.plan.command("measure")
    batch = arm.plan.workload.batch
    why = (
        f"median of {len(times)} interleaved rounds, {torch.get_num_threads()} threads; band: fastest and slowest round"
    )

    def figure(values: Sequence[float], unit: str) -> Figure:
        return Figure(
            value=float(np.median(values)),
            p10=min(values),
            p90=max(values),
            unit=unit,
            kind="measured",
            check=check,
            why=why,
        )

    def missing(unit: str, why: str) -> Figure:
        return Figure(value=None, unit=unit, kind="measured", check=check, why=why)

    first, rest = [t for t, _ in times], [t for _, t in times]
    alone = "gen=1 has no step after the first token"
    one = arm.plan.workload.gen == 1
    spent = [value for value, _ in joules if value is not None]
    return {
        "ttft_s": figure(first, "s"),
        "tpot_s": missing("s", alone) if one else figure(rest, "s"),
        "tokens_per_s": missing("tokens/s", alone) if one else figure([batch / t for t in rest], "tokens/s"),
        "energy_j": figure(spent, "J") if spent else missing("J", joules[0][1]),
        "usd_per_million_tokens": missing("USD/Mtoken", "this machine has no price"),
        "rss_bytes": Figure(value=float(rss_bytes()), unit="B", kind="measured", why="this process, all arms loaded"),
    }


def _notes(rounds: int, differ: Sequence[str]) -> tuple[str, ...]:
    if differ:
        return (f"Metered and counted differ for {', '.join(differ)} once the observed counts are put in.",)
    return ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """One count, predicted and metered."""

    name: str
    predicted: int
    measured: int
    observed: bool

    @property
    def equal(self) -> bool:
        """To the unit."""
        return self.predicted == self.measured


def agreement(predicted: Report, measured: Report) -> list[Agreement]:
    """Compare every exact count; those that data decides are marked, their prediction is an expectation."""
    data: Mapping[str, bool] = dict.fromkeys(("weight_read", "decode_flops") if measured.observed else (), True)
    return [
        Agreement(name, predicted.counts[name], measured.counts[name], name in data)
        for name in EXACT
        if name in predicted.counts and name in measured.counts
    ]
