"""The cache as described, not as held: one node per KV head of one layer, one per recurrent state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec.formats import DTYPE_ALIASES, FLOAT_KINDS, ITEM_BYTES, WeightFormat, dtype_name
from trimtab.spec.tree import Node

#: A number of tokens, or a numpy array of such numbers: the formulas below hold for both.
Tokens = Any
#: Elements along the head size that share the scale and minimum of an integer page, unless said otherwise.
PAGE_GROUP = 64

_INT_BITS = {"int8": 8, "int4": 4, "int2": 2}
_PAGE_KINDS = (*FLOAT_KINDS, "fp8", *_INT_BITS, "bfp")


@dataclass(frozen=True, slots=True)
class PageFormat:
    """How the tokens of one page are coded.

    Args:
        kind: ``fp32 | bf16 | fp16``; ``fp8`` (e4m3, one byte per element, no scale); ``int8 | int4 | int2`` (codes, an fp16 scale
            and an fp16 minimum per group); ``bfp`` (codes of `bits` bits and a power of two, one byte, per group of a token).
        group: elements that share a scale; of ``int8``, ``int4``, ``int2`` and ``bfp``. The last group of a head may be
            shorter, but for ``bfp``.
        bits: of a code, 2..16; given for ``bfp``, found for the others.
        by_channel: integer groups are `group` consecutive tokens of one channel, not channels of one token.

    Raises:
        SpecError: another kind, or a group or width that is not possible.
    """

    kind: str
    group: int = 0
    bits: int = 0
    by_channel: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _PAGE_KINDS:
            from trimtab.errors import unknown

            raise unknown("KV page format", self.kind, _PAGE_KINDS)
        if (self.group > 0) != (self.kind in (*_INT_BITS, "bfp")):
            raise SpecError(
                f"{self.kind} pages with group={self.group}: not possible. Allowed: 1 or more for int8, int4, int2 and bfp, 0 else."
            )
        if self.kind == "bfp" and not 2 <= self.bits <= 16:
            raise SpecError(f"bfp pages with bits={self.bits}: not possible. Allowed: 2..16.")
        if self.by_channel and self.kind not in _INT_BITS:
            raise SpecError(f"{self.kind} pages by channel: not possible. Allowed: int8, int4 and int2.")
        if self.kind != "bfp":
            object.__setattr__(self, "bits", _INT_BITS.get(self.kind, 0))

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage."""
        return self.kind in FLOAT_KINDS

    def nbytes(self, tokens: Tokens, head_dim: int) -> Any:
        """Bytes of `tokens` keys (or values) of one head; by channel, of whole groups of tokens."""
        if self.kind == "bfp":
            return tokens * (-(-head_dim * self.bits // 8) + head_dim // self.group)
        if self.kind in _INT_BITS:
            codes, scale = tokens * -(-head_dim * self.bits // 8), 2 * ITEM_BYTES["fp16"]
            if self.by_channel:
                return codes + scale * head_dim * (tokens // self.group)
            return codes + tokens * scale * -(-head_dim // self.group)
        return tokens * head_dim * (1 if self.kind == "fp8" else ITEM_BYTES[self.kind])

    def __str__(self) -> str:
        kind = f"bfp{self.bits}" if self.kind == "bfp" else self.kind
        return f"{kind}-{'t' if self.by_channel else 'g'}{self.group}" if self.group else kind


def page_format(asked: str) -> PageFormat:
    """The page format of a name: a floating dtype in any spelling, ``fp8``, ``int8``, ``int4``, ``int2``, or these with ``-gN``.

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

        raise unknown(
            "KV dtype", str(asked), ("float32", "bfloat16", "float16", "fp8", "int8", "int4", "int2", "int4-g32")
        )
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
    """The cache of one KV head of one layer.

    Args:
        head_dim, v_head_dim: elements of a key and of a value.
        k_format, v_format: how they are kept.
        keep: which tokens are kept.
        page: tokens of a page.
        tail: floating format in which the newest tokens stay at first; None = tokens are coded as they come.
        residual: with a tail, how many: keys are coded `residual` at a time, as soon as that many stand in the tail; values one
            by one, so that the last `residual` ones stay. A ring is kept in the tail's format altogether.
    """

    head_dim: int
    v_head_dim: int
    k_format: PageFormat
    v_format: PageFormat
    keep: Keep = KEEP_ALL
    page: int = 64
    tail: PageFormat | None = None
    residual: int = 0

    @property
    def landing(self) -> tuple[PageFormat, PageFormat]:
        """The formats in which new keys and values are written."""
        return (self.k_format, self.v_format) if self.tail is None else (self.tail, self.tail)

    @property
    def seals(self) -> bool:
        """Whether tokens move from the tail into pages of another format."""
        return self.tail is not None and isinstance(self.keep, All)

    def sealed(self, seen: Tokens) -> tuple[Any, Any]:
        """Keys and values that have left the tail after `seen` tokens."""
        if not self.seals:
            return 0 * seen, 0 * seen
        return seen // self.residual * self.residual, _positive(seen - self.residual)

    def landing_bytes(self) -> int:
        """Bytes written for one new token, key and value."""
        k, v = self.landing
        return k.nbytes(1, self.head_dim) + v.nbytes(1, self.v_head_dim)

    def token_bytes(self) -> int | float:
        """Bytes of one cached token, key and value, once it has left the tail."""
        if self.tail is not None and not self.seals:
            return self.landing_bytes()
        tokens = self.k_format.group if self.k_format.by_channel else 1
        total = self.k_format.nbytes(tokens, self.head_dim) + self.v_format.nbytes(tokens, self.v_head_dim)
        return total // tokens if total % tokens == 0 else total / tokens

    def nbytes(self, tokens: int) -> KVBytes:
        """Bytes of this head after `tokens` tokens of one sequence."""
        held = self.keep.held(tokens)
        k_sealed, v_sealed = self.sealed(tokens)
        reserved = (
            -(-_bounded(held, self.residual + 1 if self.seals else None) // self.page)
            * self.page
            * self.landing_bytes()
        )
        if self.seals:
            room = -(-max(k_sealed, v_sealed) // self.page) * self.page
            reserved += self.k_format.nbytes(room, self.head_dim) + self.v_format.nbytes(room, self.v_head_dim)
        return KVBytes(self._held(held, k_sealed, v_sealed), reserved)

    def read_bytes(self, past: Tokens, new: Tokens) -> Any:
        """Bytes one attention pass reads over `past` tokens in view and `new` ones."""
        return self._held(past + new, *self.sealed(past))

    def hidden_bytes(self, past: Tokens, hidden: Tokens) -> Any:
        """Bytes of the oldest `hidden` of `past` tokens, which a window leaves out."""
        k_sealed, v_sealed = self.sealed(past)
        # A group of tokens that share a scale is read as long as one of them is in view.
        every = self.k_format.group if self.k_format.by_channel else 1
        k, v = _lesser(hidden, k_sealed), _lesser(hidden, v_sealed)
        return self._held(hidden, k // every * every, v)

    def sealed_bytes(self, past: Tokens, new: Tokens) -> Any:
        """Bytes written when tokens leave the tail in the pass that brings `new` ones."""
        (k, v), (k_after, v_after) = self.sealed(past), self.sealed(past + new)
        return self.k_format.nbytes(k_after - k, self.head_dim) + self.v_format.nbytes(v_after - v, self.v_head_dim)

    def _held(self, tokens: Tokens, k_sealed: Tokens, v_sealed: Tokens) -> Any:
        (k, v), h, w = self.landing, self.head_dim, self.v_head_dim
        coded = self.k_format.nbytes(k_sealed, h) + self.v_format.nbytes(v_sealed, w)
        return coded + k.nbytes(tokens - k_sealed, h) + v.nbytes(tokens - v_sealed, w)


def _positive(count: Tokens) -> Any:
    """The larger of a count and 0."""
    return count * (count > 0)


def _lesser(a: Tokens, b: Tokens) -> Any:
    """The smaller of two counts."""
    return a * (a < b) + b * (a >= b)


def _bounded(count: int, most: int | None) -> int:
    return count if most is None else min(count, most)


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
