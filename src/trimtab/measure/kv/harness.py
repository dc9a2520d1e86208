"""Methods x tasks x lengths x modes: quality, bytes and time of each cell in one row, the full cache beside it.

Everything is paired: all methods answer the same dialogues, one dialogue after the other, so that a machine that slows
down slows all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimtab.errors import SpecError
from trimtab.measure.kv import through_cache
from trimtab.measure.kv.data import read_dialogues
from trimtab.measure.kv.dialogue import Dialogue
from trimtab.measure.kv.engines import Engine, engine_of
from trimtab.measure.kv.modes import Run, run
from trimtab.measure.kv.prompts import ChatFormat, Prompt
from trimtab.measure.kv.request import FULL, Request, check, techniques_of
from trimtab.measure.kv.stats import Interval, bootstrap, paired
from trimtab.measure.kv.tasks import dialogues, find_task
from trimtab.measure.kv.taxonomy import life_cycle
from trimtab.techniques.apply import derive, resolve_all

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.engine.generate import Runner
    from trimtab.runtime.text.tokenizer import Tokenizer
    from trimtab.spec.model import ModelSpec
    from trimtab.techniques.materials import Materials

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


def _silent(label: str, items: Iterable[Any]) -> Iterator[Any]:
    del label
    yield from items


#: A task the full cache scores less than this on says nothing about a method.
ABLE = 0.4

Status = Literal["ok", "beyond-model", "needs-data"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method on one task at one length in one mode.

    Args:
        method, task, tokens, mode: what ran; `tokens` is the length asked for.
        status: ``ok``; ``beyond-model``: the full cache scores below 0.4; ``needs-data``: nothing ran.
        stage: where in a cache's life the method acts.
        sessions, turns: dialogues and questions of each.
        accuracy, nll_nats: means over all turns with intervals; nll is of the right answer, summed over its tokens.
        accuracy_by_turn, nll_by_turn: means of each turn.
        full_accuracy, full_nll_nats: of the full cache on the same prompts.
        accuracy_difference, nll_difference: method - full, paired by question.
        held_bytes: of the cache after the context, mean over dialogues; `full_held_bytes` of the full one.
        peak_bytes: most bytes of pages while the context went in.
        prefill_s, decode_s: medians of a prefill and of a decode step.
        prefill_tokens, query_tokens, recompute_tokens: tokens prefilled and appended, and those that starting anew at each
            turn would have prefilled; sums over dialogues.
        note: what the reader should know.
    """

    method: str
    task: str
    tokens: int
    mode: str
    status: Status = "ok"
    stage: str = ""
    sessions: int = 0
    turns: int = 0
    accuracy: Interval | None = None
    nll_nats: Interval | None = None
    accuracy_by_turn: tuple[float, ...] = ()
    nll_by_turn: tuple[float, ...] = ()
    full_accuracy: float | None = None
    full_nll_nats: float | None = None
    accuracy_difference: Interval | None = None
    nll_difference: Interval | None = None
    held_bytes: int = 0
    full_held_bytes: int = 0
    peak_bytes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tokens: int = 0
    query_tokens: int = 0
    recompute_tokens: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRow:
    """One method on held-out text, through its cache.

    Args:
        method: what ran.
        tokens, steps: tokens scored for perplexity, and decode steps compared.
        ppl, full_ppl: of the second half of every window.
        nll_difference: mean difference to the full cache in nats per token, paired.
        kl_nats: mean KL(full || method) of a decode step.
        top1_agreement: share of steps at which both would choose the same token.
    """

    method: str
    tokens: int
    steps: int
    ppl: float
    full_ppl: float
    nll_difference: Interval
    kl_nats: Interval
    top1_agreement: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All rows of a request."""

    rows: list[Row] = field(default_factory=list)
    text: list[TextRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "text": [dataclasses.asdict(row) for row in self.text],
        }


def open_methods(
    model: Model, methods: Sequence[str], materials: Materials, engine: Engine = "torch"
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Return (the model under each method, the life-cycle stage of each).

    Args:
        model: as loaded.
        methods: spec strings, ``full`` for none.
        materials: what methods calibrate on.
        engine: see `engine_of`. The torch decoders of several methods share every weight a method does not replace; times of
            methods are comparable within one engine alone.

    Raises:
        SpecError, Conflict: a method does not fit the model.
        UnsupportedModelError: native was asked for and a method has no native kernels.
    """
    from trimtab.model.variant import Model as Stack

    runners: dict[str, Runner] = {}
    stages: dict[str, str] = {}
    for method in methods:
        techniques = resolve_all(model, techniques_of(method), materials)
        derived = Stack(derive(model.variant, techniques, materials), lambda: model.tokenizer)
        runners[method] = engine_of(derived, engine)[0].runner()
        stages[method] = life_cycle(techniques, model.variant.spec).stage
    return runners, stages


def evaluate(
    runners: Mapping[str, Runner],
    tokenizer: Tokenizer,
    request: Request,
    *,
    text: str = "",
    stages: Mapping[str, str] | None = None,
    progress: Progress = _silent,
) -> Evaluation:
    """Run a request.

    Args:
        runners: the model under each method of the request, ``full`` among them.
        tokenizer: of the model.
        request: what to run.
        text: held-out text for perplexity, KL and agreement.
        stages: of the methods, for the rows.
        progress: shows the dialogues.

    Raises:
        SpecError: see `check`; more turns than a task has facts; a dialogue beyond the context.
    """
    check(request, runners[FULL].spec)
    form, found, cells = ChatFormat(tokenizer), Evaluation(), []
    for name in request.tasks:
        if find_task(name).build is None:
            if request.data is None:
                note = "Text of this kind does not come with Trimtab; give SCBench's file with --data."
                found.rows.extend(
                    Row(method=method, task=name, tokens=0, mode=mode, status="needs-data", note=note)
                    for mode in request.modes
                    for method in request.methods
                )
            continue
        for tokens in request.lengths:
            built = dialogues(
                name, tokenizer, tokens=tokens, turns=request.turns, count=request.sessions, seed=request.seed
            )
            cells.append((name, tokens, _encode(form, built, runners[FULL].spec)))
    if request.data is not None:
        built = read_dialogues(request.data, turns=request.turns, count=request.sessions)
        prompts = _encode(form, built, runners[FULL].spec)
        cells.append((built[0].task, max(len(prompt.context) for prompt in prompts), prompts))
    for mode in request.modes:
        for name, tokens, prompts in cells:
            runs: dict[str, list[Run]] = {method: [] for method in request.methods}
            for prompt in progress(f"{name} {tokens} {mode}", prompts):
                for method in request.methods:
                    runs[method].append(run(runners[method], prompt, tokenizer, mode=mode, history=request.history))
            for method in request.methods:
                row = summarise(runs[method], runs[FULL], request.seed)
                found.rows.append(
                    dataclasses.replace(
                        row, method=method, task=name, tokens=tokens, mode=mode, stage=(stages or {}).get(method, "")
                    )
                )
    if text and request.windows:
        found.text.extend(through_text(runners, tokenizer, request, text, progress))
    return found


def _encode(form: ChatFormat, built: Iterable[Dialogue], spec: ModelSpec) -> list[Prompt]:
    prompts = [form.prompt(dialogue) for dialogue in built]
    for prompt in prompts:
        if prompt.most_tokens > spec.max_position_embeddings:
            raise SpecError(
                f"{prompt.dialogue.task}: a context of {len(prompt.context)} tokens and {len(prompt.turns)} questions with their "
                f"answers come to {prompt.most_tokens}; the context of {spec.name} is {spec.max_position_embeddings}. "
                "Give a shorter --len or fewer --turns."
            )
    return prompts


def summarise(ours: Sequence[Run], full: Sequence[Run], seed: int = 0) -> Row:
    """Means, intervals, bytes and times of the runs of one cell, without its names."""

    def values(runs: Sequence[Run], name: str) -> list[list[float]]:
        return [[getattr(answer, name) for answer in one.answers] for one in runs]

    scores, nlls, full_scores, full_nlls = (
        values(runs, name) for runs in (ours, full) for name in ("score", "nll_nats")
    )
    able = bootstrap(full_scores, seed).mean
    return Row(
        method="",
        task="",
        tokens=0,
        mode="",
        status="ok" if able >= ABLE else "beyond-model",
        sessions=len(ours),
        turns=max(len(one.answers) for one in ours),
        accuracy=bootstrap(scores, seed),
        nll_nats=bootstrap(nlls, seed),
        accuracy_by_turn=_by_turn(scores),
        nll_by_turn=_by_turn(nlls),
        full_accuracy=able,
        full_nll_nats=bootstrap(full_nlls, seed).mean,
        accuracy_difference=paired(scores, full_scores, seed),
        nll_difference=paired(nlls, full_nlls, seed),
        held_bytes=round(np.mean([one.held_bytes for one in ours])),
        full_held_bytes=round(np.mean([one.held_bytes for one in full])),
        peak_bytes=max(one.peak_bytes for one in ours),
        prefill_s=float(np.median([one.prefill_s for one in ours])),
        decode_s=float(np.median([one.decode_s for one in ours])),
        prefill_tokens=sum(one.prefill_tokens for one in ours),
        query_tokens=sum(one.query_tokens for one in ours),
        recompute_tokens=sum(one.recompute_tokens for one in ours),
        note=""
        if able >= ABLE
        else "The full cache cannot do this task well enough to compare methods on it; see the nll.",
    )


def _by_turn(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    turns = max(len(own) for own in values)
    return tuple(float(np.mean([own[turn] for own in values if turn < len(own)])) for turn in range(turns))


def through_text(
    runners: Mapping[str, Runner], tokenizer: Tokenizer, request: Request, text: str, progress: Progress = _silent
) -> list[TextRow]:
    """Perplexity, KL and agreement of every method on windows spread over a text.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    from trimtab.measure.quality import windows

    pieces = windows(tokenizer.encode(text), request.window, request.windows)
    nll: dict[str, list[list[float]]] = {method: [] for method in request.methods}
    logits: dict[str, list[np.ndarray]] = {method: [] for method in request.methods}
    rows, kl, agree = [], {method: [] for method in request.methods}, {method: [] for method in request.methods}
    for piece in progress("text through the cache", pieces):
        for method in request.methods:
            nll[method].append(through_cache.nll_through_cache(runners[method], piece.tolist()))
            logits[method] = [through_cache.decode_logits(runners[method], piece.tolist(), steps=request.steps)]
            compared = through_cache.compare(logits[FULL], logits[method])
            kl[method].append(compared.kl_nats[0])
            agree[method].append(compared.agree[0])
    for method in request.methods:
        rows.append(
            TextRow(
                method=method,
                tokens=sum(len(values) for values in nll[method]),
                steps=sum(len(values) for values in kl[method]),
                ppl=through_cache.perplexity([value for values in nll[method] for value in values]),
                full_ppl=through_cache.perplexity([value for values in nll[FULL] for value in values]),
                nll_difference=paired(nll[method], nll[FULL], request.seed),
                kl_nats=bootstrap(kl[method], request.seed),
                top1_agreement=bootstrap(agree[method], request.seed),
            )
        )
    return rows
