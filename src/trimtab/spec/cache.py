"""The KV cache as described, not as held: one node per KV head of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec.formats import FLOAT_KINDS, ITEM_BYTES
from trimtab.spec.tree import Node


@dataclass(frozen=True, slots=True)
class PageFormat:
    """How the tokens of one page are coded: ``fp32 | bf16 | fp16``."""

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in FLOAT_KINDS:
            from trimtab.errors import unknown

            raise unknown("KV page format", self.kind, FLOAT_KINDS)

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of `tokens` keys (or values) of one head."""
        return tokens * head_dim * ITEM_BYTES[self.kind]

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class All:
    """Keep every token."""

    def held(self, seen: int) -> int:
        """Tokens held after `seen` tokens."""
        return seen

    def visible(self, past: int) -> int:
        """Of `past` earlier tokens, those a new token may still read."""
        return past

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class Ring:
    """Keep the first `sink` tokens and the last `recent` ones: memory is bounded by their sum."""

    sink: int
    recent: int

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1:
            raise SpecError(f"ring: sink={self.sink}, recent={self.recent}. Allowed: sink >= 0, recent >= 1.")

    def held(self, seen: int) -> int:
        """Tokens held after `seen` tokens."""
        return min(seen, self.sink + self.recent)

    def visible(self, past: int) -> int:
        """Of `past` earlier tokens, those a new token may still read: the new one is the last of the recent."""
        return min(past, self.sink + self.recent - 1)

    def __str__(self) -> str:
        return f"sink {self.sink} + recent {self.recent}"


Keep = All | Ring
KEEP_ALL = All()


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Bytes of cached tokens: those that hold a token, and those allocated for whole pages."""

    held: int
    reserved: int

    def __add__(self, other: KVBytes) -> KVBytes:
        return KVBytes(self.held + other.held, self.reserved + other.reserved)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec(Node):
    """The cache of one KV head of one layer."""

    head_dim: int
    v_head_dim: int
    k_format: PageFormat
    v_format: PageFormat
    keep: Keep = KEEP_ALL
    page: int = 64  # tokens per page

    def token_bytes(self) -> int:
        """Bytes of one cached token, key and value."""
        return self.k_format.nbytes(1, self.head_dim) + self.v_format.nbytes(1, self.v_head_dim)

    def nbytes(self, tokens: int) -> KVBytes:
        """Bytes of this head after `tokens` tokens of one sequence."""
        held = self.keep.held(tokens)
        pages = -(-held // self.page)
        return KVBytes(held * self.token_bytes(), pages * self.page * self.token_bytes())

    def read_bytes(self, held_tokens: int) -> int:
        """Bytes one attention pass reads over `held_tokens` cached tokens."""
        return held_tokens * self.token_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec(Node):
    """The cache of one layer: its KV heads."""

    heads: tuple[HeadSpec, ...]

    def nbytes(self, tokens: int) -> KVBytes:
        """Bytes of this layer after `tokens` tokens of one sequence."""
        total = KVBytes(0, 0)
        for head in self.heads:
            total = total + head.nbytes(tokens)
        return total
