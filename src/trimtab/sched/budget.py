"""How many tokens of a prompt fit into what is left of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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

    def shares(self, first: int, left: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Prompts in the order they get tokens of the step, and how many each may ask for.

        Shorter ones together may take half of what the oldest could; the rest goes to all in the order they started.

        Args:
            first: tokens of the oldest that have been run.
            left: tokens that each has left, oldest first.
        """
        ahead: set[int] = set()
        if len(left) > 1:
            half = self.take_prompt(first, left[0]) // 2
            for index in sorted(range(1, len(left)), key=left.__getitem__):
                if left[index] >= left[0] or not half:
                    break
                most = min(left[index], half)
                half -= most
                ahead.add(index)
                yield index, most
        for index, tokens in enumerate(left):
            if index not in ahead:
                yield index, tokens

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
