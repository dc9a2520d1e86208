"""Where the tokens of a sequence lie, if not in pages of each head: slots of fixed address."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab.errors import SpecError


@dataclass(frozen=True, slots=True)
class Slots:
    """Tokens of a sequence lie side by side in a slot of fixed address, whose memory comes as the sequence grows.

    A tensor [slots, tokens, heads, head size] for keys, another for values, of every layer or of all. Source: Prabhu et al.,
    vAttention, arXiv 2405.04437.

    Args:
        kind: ``vattn``: memory is mapped page by page; ``static``: a slot is mapped whole as it is taken.
        page: bytes of a page, a multiple of 4096.
        batch: slots: sequences that run at a time.
        tokens: of the longest sequence.
        heads: KV heads that share a tensor: those of one layer, or of all layers.
        background: a thread maps what the next steps need.
        eager_steps, eager_groups: how many steps ahead, and after how many groups of pages it stops.
        deferred: pages of a sequence that ended stay mapped for the next one.
        secure: such pages are zeroed first.
    """

    kind: str
    page: int
    batch: int
    tokens: int
    heads: int
    background: bool = True
    eager_steps: int = 10
    eager_groups: int = 2
    deferred: bool = True
    secure: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("vattn", "static"):
            raise SpecError(f"slots of kind {self.kind}: not possible. Allowed: vattn, static.")

    def token_bytes(self, own: int) -> int:
        """Bytes from one token of a tensor to the next, `own` of them one head's."""
        return self.heads * own

    def mapped(self, tokens: Any, own: int) -> Any:
        """One head's part of the bytes that are mapped of a tensor, rounded up."""
        used = tokens if self.kind == "vattn" else self.tokens * (tokens > 0)
        return -(-(-(-used * self.token_bytes(own) // self.page) * self.page) // self.heads)

    def block(self, own: int) -> int:
        """Tokens of the smallest block that is whole pages."""
        return math.lcm(self.page, self.token_bytes(own)) // self.token_bytes(own)

    def __str__(self) -> str:
        return f"{self.kind}, {self.batch} slots of {self.tokens} tokens"
