"""Which prefixes of token sequences are kept, and which of them goes when bytes are wanted.

A prefix is found by the hash of its last block, which covers all blocks before it and a salt. The index knows marks by number
only: the executor makes them, and releases them when told.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from trimtab.sched.kv import KVBudget

_DIGEST_BYTES = 16


def block_hashes(tokens: Sequence[int], block_tokens: int, salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
    """Return the chained hash of every whole block: blake2b of the hash before it and its tokens, the first after `salt`.

    Args:
        tokens: ids, below 2**63.
        block_tokens: of each hash.
        salt: sequences with different salts have no hash in common.
        known: hashes of the first blocks, which are not computed again.
    """
    hashes = list(known)
    last = hashes[-1] if hashes else blake2b(salt, digest_size=_DIGEST_BYTES).digest()
    for first in range(len(hashes) * block_tokens, len(tokens) - block_tokens + 1, block_tokens):
        # Eight bytes a token: no two lists of tokens give the same bytes.
        block = array("q", tokens[first : first + block_tokens]).tobytes()
        last = blake2b(last + block, digest_size=_DIGEST_BYTES).digest()
        hashes.append(last)
    return hashes


@dataclass(slots=True, eq=False)
class Span:
    """A kept prefix: what was added to the one it continues.

    Args:
        mark: its name.
        tokens: from the start of the sequence.
        base: the prefix it continues, whose bytes it shares and which therefore stays as long as it does.
        bytes: that go when it goes.
        hashes: under which it is found.
        pins: running requests that use it or one that continues it.
        children: prefixes that continue it.
        used: when it was last used, in ticks.
    """

    mark: int
    tokens: int
    base: Span | None
    bytes: int
    hashes: tuple[bytes, ...] = ()
    pins: int = 0
    children: int = 0
    used: int = 0


class PrefixIndex:
    """Kept prefixes, the least recently used of those nobody needs going first.

    Args:
        kv: their bytes are promised here.
        block_tokens: of each hash.
        rewindable: whether part of a kept prefix can be used.

    Attributes:
        bytes: of all.
        pinned_bytes: of those in use.
    """

    def __init__(self, kv: KVBudget, block_tokens: int, rewindable: bool) -> None:
        self.kv, self.block_tokens, self.rewindable = kv, block_tokens, rewindable
        self.bytes = self.pinned_bytes = 0
        self._by_hash: dict[bytes, tuple[Span, int]] = {}
        self._spans: dict[int, Span] = {}
        self._idle: list[tuple[int, int]] = []  # (used, mark); an entry that no longer holds is skipped
        self._tick = self._marks = 0

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def marks(self) -> frozenset[int]:
        """Names of the kept prefixes."""
        return frozenset(self._spans)

    def find(self, hashes: Sequence[bytes], most: int) -> tuple[Span, int] | None:
        """Return the longest kept prefix of at most `most` tokens, and its tokens."""
        for block in range(min(len(hashes), most // self.block_tokens), 0, -1):
            found = self._by_hash.get(hashes[block - 1])
            if found is not None:
                return found
        return None

    def holds(self, digest: bytes) -> bool:
        """Whether the prefix that ends with this hash is kept."""
        return digest in self._by_hash

    def add(self, hashes: Sequence[bytes], tokens: int, base: Span | None, size: int) -> Span:
        """Keep a prefix of `tokens` tokens; its `size` bytes, beyond those of `base`, must have been promised already."""
        self._marks += 1
        span = Span(self._marks, tokens, base, size)
        if self.rewindable:
            ends = [(digest, (i + 1) * self.block_tokens) for i, digest in enumerate(hashes)]
        else:
            ends = [(hashes[-1], tokens)]
        # What another prefix is found under already stays with it: its bytes are there anyway.
        mine = [(digest, end) for digest, end in ends if end <= tokens and digest not in self._by_hash]
        self._by_hash.update((digest, (span, end)) for digest, end in mine)
        span.hashes = tuple(digest for digest, _ in mine)
        self._spans[span.mark] = span
        self.bytes += size
        if base is not None:
            base.children += 1
        self._touch(span)
        self._rest(span)
        return span

    def pin(self, span: Span) -> None:
        """Keep a prefix, and those it continues, until `unpin`."""
        self._tick += 1
        link: Span | None = span
        while link is not None:
            link.used = self._tick
            link.pins += 1
            if link.pins == 1:
                self.pinned_bytes += link.bytes
            link = link.base

    def unpin(self, span: Span) -> None:
        """Allow a prefix to go, once nobody else needs it."""
        self._tick += 1
        link: Span | None = span
        while link is not None:
            link.used = self._tick
            link.pins -= 1
            if link.pins == 0:
                self.pinned_bytes -= link.bytes
            self._rest(link)
            link = link.base

    def has_room(self, size: int) -> bool:
        """Whether so many bytes are free, or would be without the prefixes nobody needs."""
        return self.kv.free + self.bytes - self.pinned_bytes >= size

    def make_room(self, size: int, release: list[int]) -> bool:
        """Let prefixes go until `size` bytes are free, and name their marks; nothing goes where that is not enough."""
        if self.kv.free >= size:
            return True
        if not self.has_room(size):
            return False
        while self.kv.free < size:
            release.append(self._drop_oldest())
        return True

    def clear(self) -> list[int]:
        """Let all go that nobody needs and return their marks."""
        return [self._drop_oldest() for _ in range(sum(not span.pins for span in self._spans.values()))]

    def _drop_oldest(self) -> int:
        while True:
            used, mark = heapq.heappop(self._idle)
            span = self._spans.get(mark)
            if span is not None and span.used == used and not span.pins and not span.children:
                break
        del self._spans[mark]
        for digest in span.hashes:
            del self._by_hash[digest]
        self.bytes -= span.bytes
        self.kv.used -= span.bytes
        if span.base is not None:
            span.base.children -= 1
            self._rest(span.base)
        return mark

    def _touch(self, span: Span) -> None:
        self._tick += 1
        span.used = self._tick

    def _rest(self, span: Span) -> None:
        """Note that a prefix may go, if it may."""
        if span.pins or span.children:
            return
        heapq.heappush(self._idle, (span.used, span.mark))
        if len(self._idle) > 64 + 4 * len(self._spans):
            idle = (span for span in self._spans.values() if not span.pins and not span.children)
            self._idle = sorted((span.used, span.mark) for span in idle)
