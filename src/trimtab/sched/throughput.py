"""How fast tokens go, and therefore how long those that wait will take; and how far the cost function is off."""

from __future__ import annotations

from trimtab.sched.queue import WaitingQueue
from trimtab.sched.work import Load

#: Share of what is known that remains after another step, or another finished request.
_KEEP = 0.98
#: How far the seconds of a step are believed to differ from the cost function, and the weight of the newest step.
_LOW, _HIGH, _NEWEST = 0.5, 8.0, 0.25


class Throughput:
    """Tokens per second of recent steps, and the share of `max_tokens` that recent answers used.

    Args:
        tokens_per_s: predicted, until steps have been measured; None = not known.
    """

    __slots__ = ("_requests", "_seconds", "_share", "_tokens")

    def __init__(self, tokens_per_s: float | None) -> None:
        # A prediction weighs as much as one second of steps.
        self._tokens, self._seconds = (tokens_per_s, 1.0) if tokens_per_s else (0.0, 0.0)
        self._share, self._requests = 1.0, 1.0

    def ran(self, tokens: int, seconds: float) -> None:
        """A step has been measured."""
        if seconds > 0:
            self._tokens = _KEEP * self._tokens + tokens
            self._seconds = _KEEP * self._seconds + seconds

    def answered(self, tokens: int, most: int) -> None:
        """A request has used so many of its tokens."""
        self._share = _KEEP * self._share + tokens / most
        self._requests = _KEEP * self._requests + 1

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float | None:
        """Estimated seconds for these tokens, of which answers use a share; None before anything is known."""
        if not self._tokens:
            return None
        return (prompt_tokens + output_tokens * self._share / self._requests) * self._seconds / self._tokens

    def wait(self, queue: WaitingQueue) -> float | None:
        """Estimated seconds until all that wait have been served."""
        return self.seconds(queue.prompt_tokens, queue.output_tokens)


class Pace:
    """Measured over predicted seconds of late steps: the cost function was fitted once, and a machine may get busier.

    Attributes:
        prompts: of steps with prompts.
        answers: of steps without.
    """

    __slots__ = ("answers", "prompts")

    def __init__(self) -> None:
        self.prompts = self.answers = 1.0

    def ran(self, load: Load, seconds: float, predicted_s: float) -> None:
        """A step has been measured."""
        if seconds <= 0 or predicted_s <= 0:
            return
        ratio = min(max(seconds / predicted_s, _LOW), _HIGH)
        if load.n_prefill:
            self.prompts += _NEWEST * (ratio - self.prompts)
        else:
            self.answers += _NEWEST * (ratio - self.answers)
