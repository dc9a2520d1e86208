"""Memory straight from the operating system, in huge pages where it allows them: one address look-up serves 2 MiB."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

_HUGE = 2 << 20


def mapped(nbytes: int) -> np.ndarray:
    """Return zeros, uint8 [nbytes], that go back to the system as soon as nobody holds the array or a view of it.

    Raises:
        OSError: the system refuses them.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: ordinary ones do
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
