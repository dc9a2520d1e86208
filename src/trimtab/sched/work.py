"""What passes between the scheduler and an executor. Named tuples: quick to build, compared by value, never changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from trimtab.sched.request import Ended


class Row(NamedTuple):
    """Tokens of one sequence to run.

    Args:
        seq: the sequence.
        first: tokens of it that are cached; the row begins with this one.
        count: tokens to run, 1 or more.
        sample: sequences that each get a token drawn from the logits after the last token: empty (no logits wanted), the
            sequence itself, or, at the end of a prompt with n > 1, all n of its request in order.
    """

    seq: int
    first: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody counts values in a row
    sample: tuple[int, ...]

    @property
    def logits(self) -> bool:
        """Whether the logits after the last token are wanted."""
        return bool(self.sample)


class Start(NamedTuple):
    """A sequence to open, or to open again after it was preempted.

    Args:
        seq: the sequence.
        request: whose it is.
        sample: which of its n.
        mark: prefix to continue from; None = empty.
        tokens: of that prefix; fewer than were marked only where the scheduler was told that sequences are rewindable.
        reach: tokens whose bytes are reserved.
    """

    seq: int
    request: str
    sample: int
    mark: int | None
    tokens: int
    reach: int


class Fork(NamedTuple):
    """A sequence that begins as a copy of another, all `tokens` of it."""

    seq: int
    parent: int
    request: str
    sample: int
    tokens: int
    reach: int


class MarkPrefix(NamedTuple):
    """The first `tokens` tokens of a sequence are to be kept under a name until it is released.

    Fewer than the sequence has only where the scheduler was told that sequences are rewindable.
    """

    mark: int
    seq: int
    tokens: int


class Load(NamedTuple):
    """What a step costs is a function of these.

    Args:
        n_prefill: prompt tokens run, recomputed ones included.
        prefill_context: tokens these attend to, themselves included, summed over them.
        n_decode: rows of one token that continue an answer.
        context_sum: tokens those attend to, themselves included, summed over them.
    """

    n_prefill: int
    prefill_context: int
    n_decode: int
    context_sum: int


class StepWork(NamedTuple):
    """One step. The executor carries it out in this order: marks, forks, free, preempt, release, starts, rows.

    Args:
        number: of the step, from 0.
        marks: prefixes to keep.
        forks: sequences to copy.
        free: sequences that have ended; one that was never started or is preempted has no pages left, only what the
            executor keeps beside them.
        preempt: sequences whose pages go; what was sampled stays and is run again later, so samplers keep their state.
        release: marks that are no longer needed.
        starts: sequences to open.
        rows: to run; those that continue an answer first.
        load: what the rows cost.
        ended: requests that have ended since the last step otherwise than by finishing.
    """

    number: int
    marks: tuple[MarkPrefix, ...]
    forks: tuple[Fork, ...]
    free: tuple[int, ...]
    preempt: tuple[int, ...]
    release: tuple[int, ...]
    starts: tuple[Start, ...]
    rows: tuple[Row, ...]
    load: Load
    ended: tuple[Ended, ...]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do for an executor."""
        return not (self.rows or self.marks or self.forks or self.free or self.preempt or self.release or self.starts)

    @property
    def tokens(self) -> int:
        """Tokens run."""
        return self.load.n_prefill + self.load.n_decode


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step.

    Args:
        tokens: of each row one token for each sequence of its `sample`, in order.
        finished: sequences that end with this step, and why (``stop``, ``eos``, ...; after ``error`` no prefix is kept).
            `max_tokens` is counted by the scheduler. A row whose sequence is named here may lack its tokens; all samples
            of its request end with it if their prompt has not been run.
        seconds: the step took.
        held_bytes: of keys and values now, marks included; None = not known.
    """

    tokens: Sequence[Sequence[int]]
    finished: Mapping[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    held_bytes: int | None = None


class Executor(Protocol):
    """Runs steps: on a model, or on paper."""

    def run(self, work: StepWork) -> Outcome:
        """Carry out a step."""
        ...
