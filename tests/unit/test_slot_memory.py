"""Memory under slots against a plain account of it: any order of opening, growing, forking, cutting and closing."""

from __future__ import annotations

import ctypes
import itertools
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.runtime.kernels import _core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are mapped to fixed addresses on Linux alone")

PAGE, SLOTS, TOKENS = 4096, 3, 64
ACTS = st.tuples(
    st.sampled_from(["open", "step", "step", "step", "fork", "cut", "close"]),
    st.integers(0, 7),
    st.integers(0, TOKENS),
)


@dataclass
class Told:
    """What a sequence should be: its bytes [tokens, bytes of a token] in each tensor, and the pages it has, numbered as they were taken."""

    data: list[np.ndarray]
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    mapped: bool = True  # nothing has changed behind its addresses since its last step

    @property
    def tokens(self) -> int:
        return len(self.data[0])


class Account:
    """A `SlotMemory` and what is expected of it.

    Args:
        token_bytes: of each tensor.
        pool_groups: most groups.
        options: of the memory.
    """

    def __init__(self, token_bytes: list[int], pool_groups: int, **options: bool) -> None:
        self.memory = _core.SlotMemory(token_bytes, SLOTS, TOKENS, PAGE, pool_groups, **options)
        self.token_bytes, self.pool_groups, self.options = token_bytes, pool_groups, options
        self.most = -(-TOKENS * max(token_bytes) // PAGE)
        self.seqs: dict[int, Told] = {}
        self.numbers, self.fill = itertools.count(), itertools.count(1)

    def act(self, kind: str, which: int, amount: int) -> None:
        if kind == "open" or not self.seqs:
            self.seqs[self.memory.open()] = Told([np.zeros((0, size), np.uint8) for size in self.token_bytes])
            return
        ids = sorted(self.seqs)
        id = ids[which % len(ids)]
        told = self.seqs[id]
        if kind == "step":
            self.step(id, min(told.tokens + amount, TOKENS))
        elif kind == "fork":
            tokens = min(amount, told.tokens)
            data, pages = [part[:tokens].copy() for part in told.data], told.pages[: self.groups(tokens)]
            self.seqs[self.memory.fork(id, tokens)] = Told(data, pages, mapped=False)
        elif kind == "cut":
            tokens = min(amount, told.tokens)
            self.memory.cut(id, tokens)
            told.data, told.pages = [part[:tokens] for part in told.data], told.pages[: self.groups(tokens)]
        else:
            self.memory.close(id)
            del self.seqs[id]

    def groups(self, tokens: int) -> int:
        return -(-tokens * max(self.token_bytes) // PAGE)

    def step(self, id: int, end: int) -> None:
        """Grow a sequence; refused only where there is no slot, or no group even if everything idle is taken back."""
        told, first, found = self.seqs[id], self.seqs[id].tokens, np.empty((1, 2), np.int64)
        had, need = len(told.pages), self.most if self.options["whole"] else self.groups(end)
        written = range(first * min(self.token_bytes) // PAGE, min(had, self.groups(end)))
        owned = self.owners()
        copied = [page for page in written if owned[told.pages[page]] > 1]
        try:
            self.memory.step(*(np.array([x], np.int64) for x in (id, first, end)), found)
        except MemoryError as error:
            no_slot = told.slot < 0 and sum(other.slot >= 0 for other in self.seqs.values()) == SLOTS
            no_group = len(owned) + len(copied) + max(need - had, 0) > self.pool_groups
            assert no_slot or no_group, error
            self.check(but=id)
            self.memory.close(id)  # what a refused step has taken is given back with the rest
            del self.seqs[id]
            return
        slot, room = found[0].tolist()
        assert told.slot in (-1, slot), "a sequence moved"
        told.slot, told.mapped = slot, True
        for page in copied:
            told.pages[page] = next(self.numbers)
        told.pages += [next(self.numbers) for _ in range(had, need)]
        assert end - first <= room <= TOKENS - first
        if self.options["secure"]:
            for tensor in range(len(self.token_bytes)):
                assert not self.at(tensor, slot)[had * PAGE : len(told.pages) * PAGE].any()
        self.check()
        for tensor, size in enumerate(self.token_bytes):
            fresh = np.full((end - first, size), next(self.fill) % 251 + 1, np.uint8)
            self.at(tensor, slot)[first * size : end * size] = fresh.ravel()
            told.data[tensor] = np.concatenate((told.data[tensor], fresh))

    def owners(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for page in itertools.chain.from_iterable(told.pages for told in self.seqs.values()):
            found[page] = found.get(page, 0) + 1
        return found

    def at(self, tensor: int, slot: int) -> np.ndarray:
        """Bytes of a slot, mapped or not."""
        size = self.memory.slot_bytes
        return np.frombuffer((ctypes.c_uint8 * size).from_address(self.memory.address(tensor) + slot * size), np.uint8)

    def check(self, but: int = -1) -> None:
        """Every sequence reads what was written to it; groups and blocks are those of the account."""
        slots = [told.slot for told in self.seqs.values() if told.slot >= 0]
        assert len(slots) == len(set(slots)), "two sequences in one slot"
        for id, told in self.seqs.items():
            if told.slot < 0 or not told.mapped or id == but:
                continue
            for tensor, size in enumerate(self.token_bytes):
                seen = self.at(tensor, told.slot)[: told.tokens * size].reshape(-1, size)
                assert np.array_equal(seen, told.data[tensor]), f"sequence {id}, tensor {tensor}"
        counts: dict[str, Any] = self.memory.counts()
        if but < 0:
            assert counts["used_groups"] == len(self.owners())
        taken = counts["used_groups"] + counts["kept_groups"]
        assert taken <= self.pool_groups
        assert counts["file_bytes"] == taken * len(self.token_bytes) * PAGE


@given(
    acts=st.lists(ACTS, max_size=40),
    token_bytes=st.sampled_from([[384, 384], [1000, 384]]),
    spare=st.integers(0, 30),
    background=st.booleans(),
    deferred=st.booleans(),
    whole=st.booleans(),
    secure=st.booleans(),
)
def test_is_what_a_plain_account_says(
    acts: list[tuple[str, int, int]], token_bytes: list[int], spare: int, **options: bool
) -> None:
    account = Account(token_bytes, -(-TOKENS * max(token_bytes) // PAGE) + spare, **options)
    for act in acts:
        account.act(*act)
        account.check()
    for id in account.seqs:
        account.memory.close(id)
    account.seqs.clear()
    account.check()
