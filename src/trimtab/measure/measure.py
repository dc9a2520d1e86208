"""Measure a plan on this machine: exact counts by meters, times in interleaved rounds, quality through its own cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.graph.ops import StepShape
from trimtab.graph.passes import prompt_held
from trimtab.measure.ledger import Ledger
from trimtab.measure.meters import ActivationMeter, Stopwatch, energy
from trimtab.measure.process import rss_bytes
from trimtab.measure.quality import Quality, TokenScores
from trimtab.model.variant import Model, Variant
from trimtab.predict.predict import predict, step_counts
from trimtab.runtime.engine.generate import Session
from trimtab.runtime.step import IntArray, Recorder
from trimtab.runtime.text.builtin import builtin_text, split
from trimtab.spec.cache import KVBytes
from trimtab.spec.machine import THIS, load_machine, load_stack, this_machine_path
from trimtab.spec.plan import Plan
from trimtab.spec.report import Figure, Report
from trimtab.spec.serial import is_saved
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
#: Least tokens after the prompt that quality is scored on.
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


def ensure_calibrated(progress: Progress = _silent) -> None:
    """Calibrate this machine if that was never done: a prediction to compare with needs it."""
    if not this_machine_path().exists():
        from trimtab.measure.calibrate import calibrate

        calibrate(progress=progress)


def prepare(
    plan: Plan, model: Model | None = None, materials: Materials | None = None, progress: Progress = _silent
) -> tuple[Arm, Arm]:
    """Return (base, variant) arms: weights loaded in the plan's dtypes, techniques resolved and applied.

    Args:
        plan: what to measure.
        model: loaded already, in the plan's dtype; None loads it.
        materials: calibration texts; by default the built-in text.
        progress: shows calibration passes.

    Raises:
        SpecError: prompt plus new tokens exceed the context.
    """
    context, work = plan.base.max_position_embeddings, plan.workload
    if work.tokens > context:
        raise SpecError(
            f"prompt={work.prompt} and gen={work.gen} make {work.tokens} tokens, the context of {plan.base.name} is "
            f"{context}. Try --prompt {max(1, context - work.gen)}."
        )
    if model is None:
        saved = is_saved(Path(plan.source).expanduser()) if plan.source else False
        model = load(plan.source or plan.base.name, dtype="auto" if saved else plan.dtype)
    base = Model(Variant(plan.base, model.weights), lambda: model.tokenizer)
    base_plan = dataclasses.replace(plan, model=plan.base, techniques=(), assumed=())
    materials = (materials or default_materials(base)).for_model(base, progress)
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
    if plan.machine.id != THIS:
        ensure_calibrated(progress)
        plan = dataclasses.replace(plan, machine=load_machine(THIS), stack=load_stack(THIS))
    base, variant = prepare(plan, model, materials, progress)
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
        prompts, continuations = _tokens(arms[0], text)
        for arm in progress("warm-up", arms):
            _timed(arm, [prompt[:64] for prompt in prompts], steps=2)
        times: list[list[tuple[float, float]]] = [[] for _ in arms]
        joules: list[list[tuple[float | None, str]]] = [[] for _ in arms]
        for _, index in progress("timed rounds", [(r, i) for r in range(rounds) for i in range(len(arms))]):
            with energy() as spent:
                times[index].append(_timed(arms[index], prompts))
            joules[index].append((spent.joules, spent.why))
        found, reference = [], None
        for index, arm in enumerate(progress("meters and quality", arms)):
            seen = examine(arm, prompts, continuations)
            reference = reference or seen.logits
            quality = _quality(reference, seen.logits, continuations)
            report = Report(
                source="measured",
                plan=arm.plan.to_dict(),
                counts=seen.counts,
                figures=_figures(arm, times[index], joules[index]) | quality.figures(arm.plan.command("measure")),
                observed=seen.observed,
                notes=seen.notes,
            )
            ledger.finish(rows[index], report)
            found.append(Measured(arm, predictions[index], report))
        return found
    except BaseException as error:
        for row in rows:
            ledger.fail(row, error)
        raise


def _tokens(arm: Arm, text: str | None) -> tuple[list[IntArray], list[IntArray]]:
    """Prompts [batch][prompt] and what follows each in the text [batch][SCORED or gen]; short texts are repeated."""
    work = arm.plan.workload
    ids = np.asarray(arm.model.tokenizer.encode(text or split(builtin_text())[1]), dtype=np.int64)
    follow = min(max(SCORED, work.gen), arm.plan.base.max_position_embeddings - work.prompt)
    ids = np.resize(ids, max(work.batch * work.prompt + follow, len(ids)))
    starts = range(0, work.batch * work.prompt, work.prompt)
    prompts = [ids[start : start + work.prompt] for start in starts]
    return prompts, [ids[start + work.prompt : start + work.prompt + follow] for start in starts]


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


@dataclass(frozen=True)
class Examined:
    """One untimed pass over a plan with every meter on.

    Args:
        counts: under the names of a prediction.
        observed: what data decided in the mean decode step, by name.
        logits: after the prompt and after each token that follows it [steps][batch, V].
        notes: what is wrong, if anything.
    """

    counts: dict[str, int]
    observed: dict[str, float]
    logits: list[np.ndarray]
    notes: tuple[str, ...]


def examine(arm: Arm, prompts: Sequence[IntArray], continuations: Sequence[IntArray]) -> Examined:
    """Run prompts and what follows them, through the arm's own cache, with the meters on.

    The counts of the mean decode step are compared with the graph once what data decided is put in; a difference is a
    fault of Trimtab and becomes a note.
    """
    work = arm.plan.workload
    prefill, middle = Recorder(), Recorder()
    held = KVBytes(0, 0)
    with ActivationMeter() as live:
        session = _open(arm)
        session.record = prefill
        logits = [session.prefill(prompts, reserve=work.gen)]
        for index, tokens in enumerate(zip(*continuations, strict=True)):
            session.record = middle if index == max(work.gen - 2, 0) // 2 else None
            logits.append(session.decode(tokens))
            if index == work.gen - 1:
                held = session.store.nbytes()
    most = max(session.store.peak_bytes, held.reserved)
    session.close()
    counts = {
        "weight_bytes": arm.model.weights.nbytes,
        "kv_bytes": held.held,
        "kv_reserved_bytes": held.reserved,
        "kv_peak_bytes": most,
        "activation_bytes": live.peak,
        "peak_bytes": arm.model.weights.nbytes + most + live.peak,
        "prefill_flops": prefill.total("flops"),
        "decode_flops": middle.total("flops"),
        "weight_read": middle.total("weight_read"),
        "kv_read": middle.total("kv_read"),
        "prefill_weight_read": prefill.total("weight_read"),
        "prefill_kv_read": prefill.total("kv_read"),
    }
    kept = prompt_held(arm.plan.model, work.prompt)
    past = kept + max(work.gen - 2, 0) // 2
    step = StepShape.of([1], [past], logits=work.batch, copies=work.batch, observed=middle.observed, prompt=kept)
    eager = dataclasses.replace(arm.plan, stack=dataclasses.replace(arm.plan.stack, attention="eager"))
    wanted = step_counts(eager, step)
    pairs = (("decode_flops", "flops"), ("weight_read", "weight_read"), ("kv_read", "kv_read"))
    differ = [name for name, count in pairs if counts[name] != wanted.total(count)]
    notes = (f"Metered and counted differ for {', '.join(differ)} with the observed counts put in.",) if differ else ()
    return Examined(counts, {name: float(value) for name, value in middle.observed.items()}, logits, notes)


def _quality(reference: list[np.ndarray], logits: list[np.ndarray], continuations: Sequence[IntArray]) -> Quality:
    """Score every token that follows a prompt, all rows together."""
    scores = TokenScores()
    for base, variant, tokens in zip(reference, logits, zip(*continuations, strict=True), strict=False):
        scores.add(torch.from_numpy(base), torch.from_numpy(variant), torch.tensor(tokens))
    return scores.result()


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
    moved = {name for name in measured.observed if name.endswith(".evict.moved")}
    decided = [
        *(("weight_read", "decode_flops") if set(measured.observed) - moved else ()),
        *(("kv_read",) if moved else ()),
    ]
    data: Mapping[str, bool] = dict.fromkeys(decided, True)
    return [
        Agreement(name, predicted.counts[name], measured.counts[name], name in data)
        for name in EXACT
        if name in predicted.counts and name in measured.counts
    ]
