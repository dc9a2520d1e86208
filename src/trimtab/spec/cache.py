"""The cache as described, not as held: one node per KV head of one layer, one per recurrent state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec.formats import DTYPE_ALIASES, FLOAT_KINDS, ITEM_BYTES, WeightFormat, dtype_name
from trimtab.spec.slots import Slots
from trimtab.spec.tree import Node

#: A number of tokens, or a numpy array of such numbers: the formulas below hold for both.
Tokens = Any
#: Elements along the head size that share the scale and minimum of an integer page, unless said otherwise.
PAGE_GROUP = 64
#: Tokens of a tile of a page whose tokens share scales.
_TILE = 16
#: Bytes of a cache line.
_LINE = 64

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

    def held(self, seen: Tokens, prompt: Tokens = None) -> Any:
        """Tokens held after `seen` tokens, of which the first `prompt` came before the first answer."""
        return seen

    def visible(self, past: Tokens, prompt: Tokens = None) -> Any:
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

    def held(self, seen: Tokens, prompt: Tokens = None) -> Any:
        """Tokens held after `seen` tokens."""
        return _lesser(seen, self.sink + self.recent)

    def visible(self, past: Tokens, prompt: Tokens = None) -> Any:
        """Of `past` earlier tokens, those a new token may still read: the new one is the last of the recent."""
        return _lesser(past, self.sink + self.recent - 1)

    def __str__(self) -> str:
        return f"sink {self.sink} + recent {self.recent}"


@dataclass(frozen=True, slots=True)
class Budget:
    """Keep the `tokens` tokens that a policy chooses.

    Args:
        tokens: most tokens kept.
        when: ``prompt``: once, when the prompt has ended; what follows is kept. ``pass``: after every pass.
    """

    tokens: int
    when: str = "prompt"

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.when not in ("prompt", "pass"):
            raise SpecError(
                f"budget: tokens={self.tokens}, when={self.when}. Allowed: tokens >= 1, when prompt or pass."
            )

    def held(self, seen: Tokens, prompt: Tokens = None) -> Any:
        """Tokens held after `seen` tokens; without `prompt`, all of them were the prompt."""
        if self.when == "pass" or prompt is None:
            return _lesser(seen, self.tokens)
        ended = seen >= prompt
        return ended * (_lesser(prompt, self.tokens) + _positive(seen - prompt)) + (1 - ended) * seen

    def visible(self, past: Tokens, prompt: Tokens = None) -> Any:
        """Of `past` earlier tokens, those a new token may still read."""
        return self.held(past, prompt)

    def __str__(self) -> str:
        return f"{self.tokens} tokens, chosen {'after the prompt' if self.when == 'prompt' else 'after every pass'}"


Keep = All | Ring | Budget
KEEP_ALL = All()


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """Who decides which tokens or channels stay.

    Args:
        name: ``module:Class``, imported when a store opens; see `runtime.cache.policy.Policy`.
        params: its keyword arguments.
        queries: newest queries it looks at: 0 none, -1 all of a pass.
        products: whether it multiplies them with the keys that are held.
        score: whether it keeps one float32 for every token that is held.
    """

    name: str
    params: tuple[tuple[str, int | float | str], ...] = ()
    queries: int = 0
    products: bool = False
    score: bool = False


@dataclass(frozen=True, slots=True)
class Thin:
    """When the prompt has ended, keys lose all channels but some; the index of those is kept as one byte each.

    Args:
        channels: kept, of every head its own.
        recent: newest keys of the prompt that stay whole, where no `residual` says so.
        policy: chooses the channels.
    """

    channels: int
    recent: int
    policy: PolicySpec


@dataclass(frozen=True, slots=True)
class Pieces:
    """A pass of one token reads only some pieces of what is held: the newest, and those that promise most by bounds of their keys.

    Bounds are the least and the largest of each channel of a piece, in bf16. Source: Tang et al., Quest, arXiv 2406.10774.

    Args:
        tokens: most that are read, a multiple of `piece`.
        piece: neighbouring tokens with bounds of their own.
    """

    tokens: int
    piece: int = 16

    def __post_init__(self) -> None:
        if self.piece < 1 or self.tokens < self.piece or self.tokens % self.piece:
            raise SpecError(
                f"pieces of {self.piece} tokens, {self.tokens} read: not possible. Allowed: a multiple of the piece from one on."
            )

    def read(self, held: Tokens) -> Any:
        """Tokens read of `held`."""
        return _lesser(held, self.tokens - self.piece + (held - 1) % self.piece + 1)

    def bounds_bytes(self, tokens: Tokens, head_dim: int) -> Any:
        """Bytes of the bounds of so many tokens."""
        return -(-tokens // self.piece) * 2 * head_dim * ITEM_BYTES["bf16"]


@dataclass(frozen=True, slots=True)
class KVBytes:
    """Bytes of cached tokens: those that hold a token, and those allocated for whole pages."""

    held: int
    reserved: int

    def __add__(self, other: KVBytes) -> KVBytes:
        return KVBytes(self.held + other.held, self.reserved + other.reserved)


@dataclass(frozen=True, slots=True)
class PassPages:
    """Bytes of the pages of one head, or of several, around a pass over a prompt.

    Args:
        before: as it starts.
        whole: of every sequence, when all its tokens are written and nothing has been given up.
        moving: what comes on top of one sequence while tokens move to the pages they are coded in.
        after: as it ends.
    """

    before: int
    whole: int
    moving: int
    after: int

    def __add__(self, other: PassPages) -> PassPages:
        return PassPages(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


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
        policy: of a `Budget`.
        thin: fewer channels for keys that have left the tail.
        select: which of the tokens held a pass of one token reads; None = all.
        slots: where its tokens lie, if not in pages of their own.
    """

    head_dim: int
    v_head_dim: int
    k_format: PageFormat
    v_format: PageFormat
    keep: Keep = KEEP_ALL
    page: int = 64
    tail: PageFormat | None = None
    residual: int = 0
    policy: PolicySpec | None = None
    thin: Thin | None = None
    select: Pieces | None = None
    slots: Slots | None = None

    def __post_init__(self) -> None:
        if self.slots is not None:
            self._check_slots(self.slots)
        if self.select is not None and (self.seals or self.k_format.by_channel or not isinstance(self.keep, All)):
            how = (
                f"keeps {self.keep}"
                if not isinstance(self.keep, All)
                else "codes or thins keys after they were written"
            )
            raise SpecError(
                f"Reading some pieces of a cache that {how}: not possible, since bounds of its pieces would not hold. "
                "Allowed: a cache that keeps every token as it was written. Use one of the two, or name rings first."
            )
        if self.seals and isinstance(self.keep, Budget) and self.keep.when == "pass":
            raise SpecError(
                f"A cache of {self.keep} whose keys are coded or thinned later: not possible, since groups of tokens that share a "
                "scale cannot be moved. Allowed: tokens chosen after the prompt, or a cache written in its last format at once."
            )
        if self.thin is not None and isinstance(self.keep, Ring):
            raise SpecError(
                f"Keys of fewer channels in a ring ({self.keep}): not possible, since nothing in a ring grows old. "
                "Allowed: a head that keeps its tokens. Name what makes rings first, then the heads left are thinned."
            )
        if self.thin is not None and self.tail is None and not self.k_format.is_float:
            raise SpecError(
                f"Keys of fewer channels in {self.k_format} without a tail in floats: not possible, since keys are written whole "
                "before they are thinned. Allowed: keys in float32, bfloat16 or float16, or a tail."
            )

    def _check_slots(self, slots: Slots) -> None:
        """Slots hold whole prefixes, in floats: a coded token would need its scales beside it, and one given up leaves a hole."""
        floats = all(form.is_float or form.kind == "fp8" for form in (self.k_format, self.v_format))
        if (
            self.seals
            or self.policy is not None
            or self.select is not None
            or not isinstance(self.keep, All)
            or not floats
        ):
            how = f"keeps {self.keep}" if not isinstance(self.keep, All) else "codes, thins or chooses among its tokens"
            raise SpecError(
                f"A cache in {slots.kind} slots that {how}: not possible, since a slot holds every token of a sequence as it was "
                "written. Allowed: float32, bfloat16, float16 or fp8, and every token kept. Use one of the two."
            )
        if self.k_format != self.v_format or self.head_dim != self.v_head_dim:
            raise SpecError(
                f"A cache in {slots.kind} slots with keys of {self.head_dim} in {self.k_format} and values of {self.v_head_dim} in "
                f"{self.v_format}: not possible. Allowed: keys and values of one size and format."
            )

    @property
    def landing(self) -> tuple[PageFormat, PageFormat]:
        """The formats in which new keys and values are written."""
        return (self.k_format, self.v_format) if self.tail is None else (self.tail, self.tail)

    @property
    def seals(self) -> bool:
        """Whether tokens move from the pages they land in to others."""
        return (self.tail is not None or self.thin is not None) and not isinstance(self.keep, Ring)

    @property
    def waits(self) -> bool:
        """Whether nothing leaves the tail before the prompt has ended: tokens or channels are chosen then."""
        return self.thin is not None or (isinstance(self.keep, Budget) and self.keep.when == "prompt")

    @property
    def k_width(self) -> int:
        """Elements of a key that has left the tail."""
        return self.head_dim if self.thin is None else self.thin.channels

    def sealed(self, seen: Tokens, prompt: Tokens = None) -> tuple[Any, Any]:
        """Keys and values that have left the tail after `seen` tokens; without `prompt`, all of them were the prompt."""
        if not self.seals:
            return 0 * seen, 0 * seen
        held = self.keep.held(seen, prompt)
        if self.tail is not None:
            k, v = held // self.residual * self.residual, _positive(held - self.residual)
        else:
            assert self.thin is not None
            k, v = _positive(self.keep.held(seen if prompt is None else prompt) - self.thin.recent), 0 * held
        if self.waits and prompt is not None:
            ended = seen >= prompt
            k, v = k * ended, v * ended
        return k, v

    def landing_bytes(self) -> int:
        """Bytes written for one new token, key and value."""
        k, v = self.landing
        return k.nbytes(1, self.head_dim) + v.nbytes(1, self.v_head_dim)

    def token_bytes(self) -> int | float:
        """Bytes of one cached token, key and value, once it has left the tail."""
        if not self.seals:
            return self.landing_bytes()
        tokens = self.k_format.group if self.k_format.by_channel else 1
        v_format = self.landing[1] if self.tail is None else self.v_format
        total = self.k_format.nbytes(tokens, self.k_width) + v_format.nbytes(tokens, self.v_head_dim)
        return total // tokens if total % tokens == 0 else total / tokens

    @property
    def landing_page(self) -> int:
        """Tokens of a page that new tokens are written to: few where they soon leave it."""
        return min(self.page, _TILE) if self.seals and self.tail is not None else self.page

    def block_tokens(self, format: PageFormat) -> int:
        """Tokens of the smallest block that is whole pages, of those a head has for itself or of those it shares."""
        if self.slots is not None:
            return self.slots.block(format.nbytes(1, self.head_dim))
        return self.page_tokens(format)

    def page_tokens(self, format: PageFormat) -> int:
        """Tokens of a page of coded keys or values: whole groups and tiles where tokens share a scale."""
        return math.lcm(self.page, format.group, _TILE) if format.by_channel else self.page

    def nbytes(self, tokens: int, prompt: int | None = None) -> KVBytes:
        """Bytes of this head after `tokens` tokens of one sequence, the first `prompt` of which came before the first answer."""
        held, sealed = self.keep.held(tokens, prompt), self.sealed(tokens, prompt)
        side, room = self._sides(held), self._sides(-(-held // self.page) * self.page)
        if self.thin is not None and sealed[0]:
            side, room = side + self.thin.channels, room + self.thin.channels
        return KVBytes(self._held(held, *sealed) + side, self._pages(held, sealed, sealed) + room)

    def pass_pages(self, past: int, new: int, prompt: int, tokens: int) -> PassPages:
        """Bytes of pages around a pass of `new` tokens of a prompt, after `past` earlier ones, on the way to `tokens` tokens.

        Where nothing is coded, pages for all that stays are taken when a sequence is opened.
        """
        before, after = (self.keep.held(seen, prompt) for seen in (past, past + new))
        if not self.seals and isinstance(self.keep, All | Ring):
            opened = self._pages(self.keep.held(tokens), (0, 0), (0, 0))
            return PassPages(opened, max(opened, self._pages(before + new, (0, 0), (0, 0))), 0, opened)
        first, then = self.sealed(past, prompt), self.sealed(past + new, prompt)
        whole, moving = self._pages(before + new, first, first), self._pages(after, first, then)
        if not self.waits:  # coded as they come, all sequences together
            whole, moving = max(whole, moving), 0
        return PassPages(
            self._pages(before, first, first), whole, max(moving - whole, 0), self._pages(after, then, then)
        )

    def _pages(self, held: int, left: tuple[int, int], coded: tuple[int, int]) -> int:
        """Bytes of the pages of `held` tokens; keys and values that have left the pages they landed in, and those that are coded."""
        if self.slots is not None:
            return 2 * self.slots.mapped(held, self.k_format.nbytes(1, self.head_dim))
        reserved = 0
        sides = zip(
            self.landing,
            (self.k_format, self.v_format),
            self._widths,
            (self.head_dim, self.v_head_dim),
            left,
            coded,
            strict=True,
        )
        for landing, code, width, whole, gone, count in sides:
            pages = -(-held // self.landing_page) - gone // self.landing_page
            reserved += pages * page_nbytes(landing, whole, self.landing_page)
            if count:
                tokens_each = self.page_tokens(code)
                reserved += -(-count // tokens_each) * page_nbytes(code, width, tokens_each)
        return reserved

    def read_bytes(self, past: Tokens, new: Tokens, prompt: Tokens = None) -> Any:
        """Bytes one attention pass of `new` tokens reads after `past` earlier ones, bounds of pieces included."""
        in_view = self.keep.visible(past, prompt) + new
        whole = self._held(in_view, *self.sealed(past, prompt))
        if self.select is None:
            return whole
        single, bounds = new == 1, self.select.bounds_bytes(in_view, self.head_dim)
        some = self.select.read(in_view) * self.landing_bytes() + bounds
        return single * some + (1 - single) * whole

    def hidden_bytes(self, past: Tokens, hidden: Tokens, prompt: Tokens = None, first: Tokens = 0) -> Any:
        """Bytes of `hidden` tokens in view from slot `first` on, which a mask leaves out; scales are hidden by whole groups."""
        (k_sealed, v_sealed), end = self.sealed(past, prompt), first + hidden
        k_from, k_to = _lesser(first, k_sealed), _lesser(end, k_sealed)
        v_coded = _lesser(end, v_sealed) - _lesser(first, v_sealed)
        k_coded, (k, v) = k_to - k_from, self.landing
        coded = self.k_format.nbytes(k_coded, self.k_width) + self.v_format.nbytes(v_coded, self.v_head_dim)
        if self.k_format.by_channel:
            group = self.k_format.group
            scales = self.k_format.nbytes(group, self.k_width) - group * self.k_format.nbytes(1, self.k_width)
            coded = coded + scales * (_positive(k_to // group + -k_from // group) - k_coded // group)
        return coded + k.nbytes(hidden - k_coded, self.head_dim) + v.nbytes(hidden - v_coded, self.v_head_dim)

    def sealed_bytes(self, past: Tokens, new: Tokens, prompt: Tokens = None) -> Any:
        """Bytes written when tokens leave the tail after the pass that brings `new` ones."""
        (k, v), (k_after, v_after) = self.sealed(past, prompt), self.sealed(past + new, prompt)
        return self.k_format.nbytes(k_after - k, self.k_width) + self.v_format.nbytes(v_after - v, self.v_head_dim)

    @property
    def _widths(self) -> tuple[int, int]:
        return self.k_width, self.v_head_dim

    def _sides(self, tokens: int) -> int:
        """Bytes kept beside so many tokens: positions and scores of chosen ones, bounds of pieces."""
        each = 4 * (isinstance(self.keep, Budget) + (self.policy is not None and self.policy.score))
        return tokens * each + (0 if self.select is None else self.select.bounds_bytes(tokens, self.head_dim))

    def _held(self, tokens: Tokens, k_sealed: Tokens, v_sealed: Tokens) -> Any:
        (k, v), h, w = self.landing, self.head_dim, self.v_head_dim
        coded = self.k_format.nbytes(k_sealed, self.k_width) + self.v_format.nbytes(v_sealed, w)
        return coded + k.nbytes(tokens - k_sealed, h) + v.nbytes(tokens - v_sealed, w)


def page_nbytes(format: PageFormat, width: int, tokens: int) -> int:
    """Bytes of a page of so many tokens; pages start at a cache line."""
    return -(-format.nbytes(tokens, width) // _LINE) * _LINE


def _positive(count: Tokens) -> Any:
    """The larger of a count and 0."""
    return count * (count > 0)


def _lesser(a: Tokens, b: Tokens) -> Any:
    """The smaller of two counts."""
    return a * (a < b) + b * (a >= b)


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

    def nbytes(self, tokens: int, prompt: int | None = None) -> KVBytes:
        """Bytes of this layer after `tokens` tokens of one sequence, states included."""
        total = KVBytes(self.state_bytes, self.state_bytes)
        for head in self.heads:
            total = total + head.nbytes(tokens, prompt)
        return total
