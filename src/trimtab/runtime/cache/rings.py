"""Which token of a ring stands in which slot."""

from __future__ import annotations

import numpy as np

from trimtab.runtime.step import IntArray
from trimtab.spec.cache import Ring


def ring_slot(keep: Ring, index: int | IntArray) -> int | IntArray:
    """Slot of the token that came as number `index`."""
    turned = keep.sink + (index - keep.sink) % keep.recent
    return (
        np.where(index < keep.sink, index, turned)
        if isinstance(index, np.ndarray)
        else index
        if index < keep.sink
        else turned
    )


def ring_positions(keep: Ring, seen: int, held: int) -> IntArray:
    """Positions of the tokens in the slots of a ring after `seen` tokens."""
    slots = np.arange(held)
    last = seen - 1
    behind = (last - keep.sink - (slots - keep.sink)) % keep.recent
    return np.where(slots < keep.sink, slots, last - behind)
