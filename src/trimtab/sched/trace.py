"""What happened to a scheduler, as a list of (now, event) that another one can be taken through."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.errors import SpecError
from trimtab.sched.modelled import ModelledExecutor
from trimtab.sched.request import Admitted, Ended, Refusal, Request
from trimtab.sched.work import Executor, Fork, Load, MarkPrefix, Outcome, Row, Start, StepWork

if TYPE_CHECKING:
    from trimtab.sched.scheduler import Scheduler


class Submitted(NamedTuple):
    """A call of `submit`."""

    request: Request


class Cancelled(NamedTuple):
    """A call of `cancel`."""

    request: str
    reason: str


class Paused(NamedTuple):
    """A call of `pause`."""

    request: str
    on: bool


class Drained(NamedTuple):
    """A call of `drain`."""

    drop_waiting: bool


class Cleared(NamedTuple):
    """A call of `clear_prefixes`."""


class Stepped(NamedTuple):
    """A call of `step` and what came of it."""

    work: StepWork


class Committed(NamedTuple):
    """A call of `commit`."""

    outcome: Outcome


Event = Submitted | Cancelled | Paused | Drained | Cleared | Stepped | Committed
_EVENTS = {kind.__name__: kind for kind in (Submitted, Cancelled, Paused, Drained, Cleared, Stepped, Committed)}
_LISTS = {
    "marks": MarkPrefix, "forks": Fork, "starts": Start, "ended": Ended,
}  # fmt: skip


class Trace:
    """Events of a scheduler; it holds the prompts, so keep it as private as those.

    Attributes:
        events: (now, event) in order. A `Committed` has the time of its step.
    """

    def __init__(self, events: list[tuple[float, Event]] | None = None) -> None:
        self.events: list[tuple[float, Event]] = [] if events is None else events

    def add(self, now: float, event: Event) -> None:
        """Append an event."""
        self.events.append((now, event))

    @property
    def work(self) -> list[StepWork]:
        """Of every step."""
        return [event.work for _, event in self.events if isinstance(event, Stepped)]

    def executor(self) -> ModelledExecutor:
        """Return an executor that samples what was sampled, ends what ended and takes the seconds it took.

        It knows no row that failed: `replay` without an executor does.
        """
        outcomes = [event.outcome for _, event in self.events if isinstance(event, Committed)]
        who: dict[int, tuple[str, int]] = {}
        drawn: dict[tuple[str, int], list[tuple[int, str]]] = {}
        for work, outcome in zip(self.work, outcomes, strict=False):
            who |= {each.seq: (each.request, each.sample) for each in (*work.starts, *work.forks)}
            for row, tokens in zip(work.rows, outcome.tokens, strict=True):
                for place, (seq, token) in enumerate(zip(row.sample, tokens, strict=False)):
                    key = (who[row.seq][0], place) if len(row.sample) > 1 else who[seq]
                    drawn.setdefault(key, []).append((token, outcome.finished.get(seq, "")))
        # Steps without rows cost nothing and the modelled executor does not ask for them.
        spent = iter([o.seconds for w, o in zip(self.work, outcomes, strict=False) if w.rows])
        return ModelledExecutor(lambda *_: next(spent), lambda request, sample, at: drawn[request, sample][at])

    def to_json(self) -> str:
        """Write the events, one a line."""
        return "\n".join(json.dumps([now, type(event).__name__, _plain(event)]) for now, event in self.events)

    @staticmethod
    def from_json(text: str) -> Trace:
        """Read what `to_json` wrote.

        Raises:
            SpecError: a line is no event.
        """
        events: list[tuple[float, Event]] = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                now, name, values = json.loads(line)
                events.append((now, _event(name, values)))
            except (ValueError, KeyError, TypeError) as error:
                raise SpecError(
                    f"Line {number} of the trace is no event: {error}. Allowed: lines that Trace.to_json wrote. "
                    "Record the trace again."
                ) from error
        return Trace(events)


class Driven(NamedTuple):
    """What came of a replay: the work of its steps, and the answers to `submit`."""

    work: list[StepWork]
    answers: list[Admitted | Refusal]


def replay(trace: Trace, scheduler: Scheduler, executor: Executor | None = None) -> Driven:
    """Take a fresh `Scheduler` through a trace.

    Args:
        trace: of another scheduler.
        scheduler: with the same limits and functions, if the same work is expected.
        executor: such as `trace.executor()`; None = the recorded outcomes, failed rows included.

    Raises:
        SpecError: the trace commits before its first step.
    """
    work: StepWork | None = None
    done: list[StepWork] = []
    answers: list[Admitted | Refusal] = []
    for now, event in trace.events:
        match event:
            case Submitted(request):
                answers.append(scheduler.submit(request, now))
            case Cancelled(request, reason):
                scheduler.cancel(request, now, reason)
            case Paused(request, on):
                scheduler.pause(request, now, on)
            case Drained(drop):
                scheduler.drain(now, drop_waiting=drop)
            case Cleared():
                scheduler.clear_prefixes(now)
            case Stepped():
                work = scheduler.step(now)
                done.append(work)
            case Committed(outcome) if work is not None:
                scheduler.commit(work, outcome if executor is None else executor.run(work))
            case _:
                raise SpecError("A trace commits before its first step. Record it from the start of a scheduler.")
    return Driven(done, answers)


def _plain(event: Event) -> list[Any]:
    if isinstance(event, Submitted):
        request = {f.name: getattr(event.request, f.name) for f in dataclasses.fields(Request)}
        return [request | {"prompt": [int(token) for token in event.request.prompt]}]
    if isinstance(event, Committed):
        o = event.outcome
        tokens = [[int(token) for token in row] for row in o.tokens]
        return [[tokens, list(o.finished.items()), o.seconds, o.held_bytes]]
    return list(event)


def _event(name: str, values: list[Any]) -> Event:
    if name == "Submitted":
        return Submitted(Request(**values[0]))
    if name == "Committed":
        tokens, finished, seconds, held = values[0]
        return Committed(Outcome(tokens, dict(finished), seconds, held))
    if name == "Stepped":
        fields = dict(zip(StepWork._fields, values[0], strict=True))
        for field, kind in _LISTS.items():
            fields[field] = tuple(kind(*_tuples(item)) for item in fields[field])
        fields["rows"] = tuple(Row(seq, first, count, tuple(sample)) for seq, first, count, sample in fields["rows"])
        fields["load"] = Load(*fields["load"])
        fields |= {field: tuple(fields[field]) for field in ("free", "preempt", "release")}
        return Stepped(StepWork(**fields))
    return _EVENTS[name](*values)


def _tuples(item: list[Any]) -> list[Any]:
    return [tuple(value) if isinstance(value, list) else value for value in item]
