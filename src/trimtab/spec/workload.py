"""What is asked of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`batch` sequences of `prompt` tokens, each continued by `gen` tokens.

    `continuous`: whenever a sequence ends the next request begins, so that `batch` are always under way; else all start
    together and nothing follows. `skew`: how unevenly tokens choose experts; the chance of the r-th most popular one falls as
    r^-skew, so 0 is evenly.

    Raises:
        SpecError: a number below 1.
    """

    batch: int = 1
    prompt: int = 512
    gen: int = 128
    continuous: bool = False
    skew: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "gen"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}={value!r} is not possible. Allowed: a whole number of 1 or more.")
        if not 0 <= self.skew <= 4:
            raise SpecError(f"skew={self.skew!r} is not possible. Allowed: 0 (every expert alike) to 4.")

    @property
    def tokens(self) -> int:
        """Prompt plus generated tokens of one sequence."""
        return self.prompt + self.gen

    @property
    def mean_past(self) -> int:
        """Tokens before the mean decode step: decode step i of gen-1 sees prompt + i - 1 earlier ones."""
        return self.prompt + max(self.gen - 2, 0) // 2

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "batch": self.batch,
            "prompt": self.prompt,
            "gen": self.gen,
            "continuous": self.continuous,
            "skew": self.skew,
        }
