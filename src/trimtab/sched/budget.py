"""How many tokens of a prompt fit into what is left of a step."""

from __future__ import annotations

from collections.abc import Callable

#: seconds(n_prefill, prefill_context, n_decode, context_sum): what a `Load` takes; never falls with any of the four.
Seconds = Callable[[int, int, int, int], float]


class StepBudget:
    """One step, being filled: answers first, then prompts in line.

    Args:
        tokens: of the step at most.
        target_s: seconds prompts may fill it up to; None = tokens alone count.
        seconds: cost function, needed with a target.
        least: tokens of prompts that are run whatever they take.
    """

    __slots__ = ("context", "decode", "least", "prefill", "prefill_context", "seconds", "target_s", "tokens")

    def __init__(self, tokens: int, target_s: float | None, seconds: Seconds | None, least: int) -> None:
        self.tokens, self.least = tokens, least
        self.target_s, self.seconds = target_s, seconds
        self.prefill = self.prefill_context = self.decode = self.context = 0

    def take_prompt(self, first: int, left: int) -> int:
        """Return how many of the `left` tokens of a prompt fit after `first` earlier ones; `spend` takes them."""
        most = min(left, self.tokens - self.prefill - self.decode)
        if most <= 0 or self.target_s is None or self.seconds is None:
            return max(most, 0)
        low, high = min(most, max(self.least - self.prefill, 0)), most
        while low < high:
            middle = (low + high + 1) // 2
            if self._seconds_with(first, middle) <= self.target_s:
                low = middle
            else:
                high = middle - 1
        return low

    def spend(self, first: int, count: int) -> None:
        """Take so many tokens of a prompt."""
        self.prefill += count
        self.prefill_context += attended(first, count)

    def _seconds_with(self, first: int, count: int) -> float:
        assert self.seconds is not None
        context = self.prefill_context + attended(first, count)
        return self.seconds(self.prefill + count, context, self.decode, self.context)


def attended(first: int, count: int) -> int:
    """Tokens that `count` tokens after `first` earlier ones attend to, summed: the first to itself and all before it."""
    return count * first + count * (count + 1) // 2
