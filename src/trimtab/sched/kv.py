"""Bytes of keys and values: how many are promised, and what would fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from trimtab.errors import SpecError
from trimtab.sched.checks import whole
from trimtab.sched.request import Request
from trimtab.units import format_bytes

if TYPE_CHECKING:
    from trimtab.spec.model import ModelSpec

#: Lengths whose bytes are remembered; a cache description takes far longer to add up than to look up.
_REMEMBERED = 1 << 16

NBytes = Callable[[int], int]


def cache_bytes(spec: ModelSpec) -> NBytes:
    """Make the function tokens -> bytes of one sequence's whole pages, states included; heads that are alike are added up once.

    Exact where tokens stay as they are written. A cache that codes or gives up tokens when a prompt ends takes more while the
    prompt runs: hand the scheduler a bound of your own there.
    """
    heads = Counter(head for layer in spec.layers for head in layer.cache.heads)
    states = sum(layer.cache.state_bytes for layer in spec.layers)

    def nbytes(tokens: int) -> int:
        return states + sum(count * head.nbytes(tokens).reserved for head, count in heads.items())

    return nbytes


class KVBudget:
    """Promises bytes and takes them back; never promises more than there are.

    Args:
        capacity_bytes: for sequences and kept prefixes together.
        nbytes: bytes of one sequence of so many tokens, exact or an upper bound; never falls with its tokens.
        shared_bytes: of the bytes of a prefix of so many tokens (a whole number of blocks), those a sequence that continues
            it shares for good; None = all, which holds where a block is a whole number of pages that are not written again.

    Attributes:
        used: bytes promised.

    Raises:
        SpecError: a capacity below 1.
    """

    __slots__ = ("_memo", "_raw", "_shared", "_shared_memo", "capacity", "used")

    def __init__(self, capacity_bytes: int, nbytes: NBytes, shared_bytes: NBytes | None = None) -> None:
        if not whole(capacity_bytes, 1):
            raise SpecError(
                f"capacity_bytes={capacity_bytes!r} is not possible. Allowed: a whole number, 1 or more. "
                "Try what the machine has left after the weights, such as 1 << 30."
            )
        self.capacity, self.used = capacity_bytes, 0
        self._raw, self._shared = nbytes, shared_bytes or nbytes
        self._memo: dict[int, int] = {}
        self._shared_memo: dict[int, int] = {
            0: 0
        }  # a sequence may have bytes before its first token; nothing shares them

    @property
    def free(self) -> int:
        """Bytes not promised."""
        return self.capacity - self.used

    def nbytes(self, tokens: int) -> int:
        """Bytes of one sequence."""
        return _recall(self._memo, self._raw, tokens)

    def shared(self, tokens: int) -> int:
        """Bytes of a prefix that sequences which continue it do not hold again."""
        return _recall(self._shared_memo, self._shared, tokens)

    def samples(self, common: int, reaches: list[int]) -> int:
        """Bytes of sequences that share `common` bytes of their prompt."""
        return common + sum(self.nbytes(reach) - common for reach in reaches)

    def refuse(self, request: Request, common: int) -> str:
        """Return why a request can never run, and what could; empty where it can, alone at least."""
        prompt, n = len(request.prompt), request.n

        def need(new: int) -> int:
            return self.samples(common, [prompt + new] * n)

        if need(request.max_tokens) <= self.capacity:
            return ""
        each = f"{n} answers of up to {request.max_tokens} tokens" if n > 1 else f"up to {request.max_tokens} new ones"
        said = (
            f"A prompt of {prompt} tokens and {each} need {format_bytes(need(request.max_tokens))} of KV cache; "
            f"it has {format_bytes(self.capacity)}."
        )
        new = _largest(request.max_tokens, lambda tokens: need(tokens) <= self.capacity)
        if new:
            return f"{said} With this prompt max_tokens={new} fits."
        most = _largest(prompt + request.max_tokens, lambda tokens: self._raw(tokens) <= self.capacity)
        if most < 2:
            return f"{said} Not even one token fits: give the cache more bytes."
        return (
            f"{said} Prompt and answer together may have {most} tokens: shorten the prompt{', or lower n' * (n > 1)}."
        )


def _recall(memo: dict[int, int], function: NBytes, tokens: int) -> int:
    found = memo.get(tokens)
    if found is None:
        if len(memo) >= _REMEMBERED:
            memo.clear()
        found = memo[tokens] = int(function(tokens))
    return found


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest whole number up to `most` that fits, 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
