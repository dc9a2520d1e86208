"""An executor without a model: seconds from a cost function, tokens from an oracle."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.sched.budget import Seconds
from trimtab.sched.work import Outcome, StepWork

#: (request, sample, position) -> (token, why the sequence ends with it, or an empty text).
Oracle = Callable[[str, int, int], tuple[int, str]]


def lengths(tokens: Callable[[str, int], int]) -> Oracle:
    """Make an oracle of answer lengths: token ids are positions, and the last one ends with ``stop``.

    Args:
        tokens: (request, sample) -> tokens of the answer, 1 or more.
    """

    def oracle(request: str, sample: int, position: int) -> tuple[int, str]:
        return position, "stop" if position + 1 >= tokens(request, sample) else ""

    return oracle


class ModelledExecutor:
    """Carries out steps on paper.

    Args:
        seconds: cost function of a `Load`.
        oracle: what is sampled.

    Attributes:
        clock_s: sum of the seconds of all steps.
    """

    def __init__(self, seconds: Seconds, oracle: Oracle) -> None:
        self.seconds, self.oracle, self.clock_s = seconds, oracle, 0.0
        self._who: dict[int, tuple[str, int]] = {}
        self._made: dict[int, int] = {}

    @property
    def known(self) -> frozenset[int]:
        """Sequences that have not been freed."""
        return frozenset(self._who)

    def run(self, work: StepWork) -> Outcome:
        """Carry out a step."""
        for fork in work.forks:
            self._who[fork.seq] = fork.request, fork.sample
        for seq in work.free:
            self._who.pop(seq, None)
            self._made.pop(seq, None)
        for start in work.starts:
            self._who[start.seq] = start.request, start.sample
        tokens: list[tuple[int, ...]] = []
        finished: dict[int, str] = {}
        for row in work.rows:
            drawn: list[int] = []
            for place, seq in enumerate(row.sample):
                if len(row.sample) > 1:  # samples beside the first are forked in the next step
                    self._who[seq] = self._who[row.seq][0], place
                request, sample = self._who[seq]
                position = self._made.get(seq, 0)
                self._made[seq] = position + 1
                token, end = self.oracle(request, sample, position)
                drawn.append(token)
                if end:
                    finished[seq] = end
            tokens.append(tuple(drawn))
        seconds = self.seconds(*work.load) if work.rows else 0.0
        self.clock_s += seconds
        return Outcome(tokens, finished, seconds)
