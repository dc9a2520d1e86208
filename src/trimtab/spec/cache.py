"""The cache as described, not as held: one node per KV head of one layer, one per recurrent state."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec.formats import DTYPE_ALIASES, FLOAT_KINDS, ITEM_BYTES, WeightFormat, dtype_name
from trimtab.spec.tree import Node

#: Elements along the head size that share the scale and minimum of an integer page, unless said otherwise.
PAGE_GROUP = 64

_INT_BITS = {"int8": 8, "int4": 4}
_PAGE_KINDS = (*FLOAT_KINDS, "fp8", *_INT_BITS)


@dataclass(frozen=True, slots=True)
class PageFormat:
    """How the tokens of one page are coded.

    Args:
        kind: ``fp32 | bf16 | fp16``; ``fp8`` (e4m3, one byte per element, its one scale per tensor is not counted); ``int8 |
            int4`` (codes, an fp16 scale and an fp16 minimum per group of every token).
        group: elements along the head size that share a scale; only for ``int8`` and ``int4``. The last group of a head may
            be shorter.

    Raises:
        SpecError: another kind, or a group that is not possible.
    """

    kind: str
    group: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _PAGE_KINDS:
            from trimtab.errors import unknown

            raise unknown("KV page format", self.kind, _PAGE_KINDS)
        if (self.group > 0) != (self.kind in _INT_BITS):
            raise SpecError(
                f"{self.kind} pages with group={self.group}: not possible. Allowed: 1 or more for int8 and int4, 0 else."
            )

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage."""
        return self.kind in FLOAT_KINDS

    def nbytes(self, tokens: int, head_dim: int) -> int:
        """Bytes of `tokens` keys (or values) of one head."""
        if self.kind in _INT_BITS:
            scales = 2 * ITEM_BYTES["fp16"] * -(-head_dim // self.group)
            return tokens * (-(-head_dim * _INT_BITS[self.kind] // 8) + scales)
        return tokens * head_dim * (1 if self.kind == "fp8" else ITEM_BYTES[self.kind])

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group}" if self.group else self.kind


def page_format(asked: str) -> PageFormat:
    """The page format of a name: a floating dtype in any spelling, ``fp8``, ``int8``, ``int4``, or these with ``-gN``.

    Raises:
        SpecError: another name.

    >>> str(page_format("bfloat16")), str(page_format("int4")), str(page_format("int8-g32"))
    ('bf16', 'int4-g64', 'int8-g32')
    """
    name, grouped, group = str(asked).removeprefix("torch.").lower().partition("-g")
    if name in _INT_BITS and (group.isdecimal() or not grouped):
        return PageFormat(name, int(group) if grouped else PAGE_GROUP)
    if grouped or name not in (*DTYPE_ALIASES, "fp8"):
        from trimtab.errors import unknown

        raise unknown("KV dtype", str(asked), ("float32", "bfloat16", "float16", "fp8", "int8", "int4", "int4-g32"))
    return PageFormat(name if name == "fp8" else dtype_name(name))


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
class StateSpec(Node):
    """What a recurrent layer carries from token to token: `elements` numbers of a sequence, however long it is.

    Args:
        elements: numbers held.
        format: of the activations.
        dtype: fixes another dtype whatever the activations are in; empty = the format's.
    """

    elements: int
    format: WeightFormat
    dtype: str = ""

    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return self.elements * ITEM_BYTES[self.dtype or self.format.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec(Node):
    """The cache of one layer: its KV heads, or the states of a recurrent one."""

    heads: tuple[HeadSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence whatever its tokens."""
        return sum(state.nbytes() for state in self.states)

    def nbytes(self, tokens: int) -> KVBytes:
        """Bytes of this layer after `tokens` tokens of one sequence, states included."""
        total = KVBytes(self.state_bytes, self.state_bytes)
        for head in self.heads:
            total = total + head.nbytes(tokens)
        return total
