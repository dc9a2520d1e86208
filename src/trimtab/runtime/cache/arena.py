"""Pages of one size: a stretch of address space that the system backs as pages are taken, and takes back as they are freed."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np

from trimtab.errors import CapacityError
from trimtab.runtime.step import IntArray
from trimtab.units import format_bytes

#: mmap's flag on Linux: address space without a promise of memory. Python names it from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_HUGE = 2 << 20
#: Freed bytes that are kept for the next sequence; above, and above a quarter of what is in use, all are given back to the system. A
#: page that was given back is cleared when it is written again: 5 % of the time of a prompt of 512 tokens.
_KEPT = 64 << 20
#: Tries at ever smaller address spaces, for processes whose address space is limited.
_TRIES = 8


class Arena:
    """Pages [n, page_bytes], counted by owners.

    Args:
        page_bytes: of one page.
        most_bytes: of all of them.

    Attributes:
        data: uint8 [most, page_bytes].
        base: address of page 0.
        owners: int32 [pages ever taken], how many rows hold each; 0 = free.
        live: pages with an owner.

    Raises:
        CapacityError: the system gives no address space.
    """

    def __init__(self, page_bytes: int, most_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._memory = _reserved(max(most_bytes, _HUGE), page_bytes)
        pages = len(self._memory) // page_bytes
        whole = np.frombuffer(self._memory, np.uint8)
        self.data = whole[: pages * page_bytes].reshape(pages, page_bytes)
        self.base = self.data.ctypes.data
        self.owners = np.zeros(256, np.int32)
        self.live = 0
        self._top = 0  # pages below have been taken at some time
        self._free = np.zeros(0, np.int64)  # ascending
        self._freed: list[IntArray] = []  # since then, in no order
        self._unreturned = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that have an owner."""
        return self.live * self.page_bytes

    def take(self, count: int) -> IntArray:
        """Indices of `count` pages with one owner, as near to each other as there are. Their content is undefined.

        Raises:
            CapacityError: the address space is full.
        """
        if self._freed:
            self._free = np.sort(np.concatenate((self._free, *self._freed)))
            self._freed = []
        old, self._free = self._free[:count], self._free[count:]
        fresh = count - len(old)
        if self._top + fresh > len(self.data):
            self._free = np.concatenate((old, self._free))
            raise CapacityError(
                f"The cache has no room for {count} more pages: {format_bytes(self.nbytes)} of "
                f"{format_bytes(self.data.nbytes)} are taken."
            )
        ids = np.concatenate((old, np.arange(self._top, self._top + fresh)))
        self._top += fresh
        if self._top > len(self.owners):
            self.owners = np.concatenate((self.owners, np.zeros(max(len(self.owners), fresh), np.int32)))
        self.owners[ids] = 1
        self.live += count
        return ids

    def share(self, ids: IntArray) -> None:
        """One more owner for each page."""
        self.owners[ids] += 1

    def drop(self, ids: IntArray) -> None:
        """One owner less; pages without any are free."""
        self.owners[ids] -= 1
        free = ids[self.owners[ids] == 0]
        if len(free) == 0:
            return
        self._freed.append(free)
        self.live -= len(free)
        self._unreturned += len(free) * self.page_bytes
        if self._unreturned > max(_KEPT, self.nbytes // 4):
            self._give_back()

    def addresses(self, ids: IntArray) -> IntArray:
        """Addresses of pages; 0 where the index is negative."""
        return np.where(ids < 0, 0, self.base + ids * self.page_bytes)

    def _give_back(self) -> None:
        """Return the memory of all free pages; the address space stays."""
        self._free, self._freed = np.sort(np.concatenate((self._free, *self._freed))), []
        self._unreturned = 0
        breaks = np.flatnonzero(np.diff(self._free) != 1) + 1
        for run in np.split(self._free, breaks):
            if len(run) == 0:
                continue
            start = -(-int(run[0]) * self.page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (int(run[-1]) + 1) * self.page_bytes // mmap.PAGESIZE * mmap.PAGESIZE
            if run[-1] + 1 == self._top:  # nothing beyond is in use
                end = min(-(-end // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE, len(self._memory))
                self._top = int(run[0])
                self._free = self._free[: len(self._free) - len(run)]
            if end > start:
                self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


def _reserved(most_bytes: int, page_bytes: int) -> mmap.mmap:
    size = -(-most_bytes // page_bytes) * page_bytes
    for _ in range(_TRIES):
        with contextlib.suppress(OSError, ValueError):
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones do
                    memory.madvise(mmap.MADV_HUGEPAGE)
            return memory
        size = -(-size // 4 // page_bytes) * page_bytes
    raise CapacityError(f"The system gives no address space for a cache of {format_bytes(most_bytes)}.")


def machine_bytes() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
