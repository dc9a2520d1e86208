"""Meters of this process: resident memory, live activation tensors, energy."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class ActivationMeter(TorchDispatchMode):
    """Counts the bytes of tensors that ops create while it is on, and their peak. Views share a storage and count once.

    Weights and pages are numpy arrays that tensors only wrap, so they never count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id_of(tensor) for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            key = id_of(tensor)
            if key in before or key in self._seen or key == 0:
                continue
            storage = tensor.untyped_storage()
            self._seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


def id_of(tensor: torch.Tensor) -> int:
    """Address of a tensor's storage."""
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Energy:
    """Joules between start and stop, where the machine lets itself be asked."""

    joules: float | None = None
    why = "the processor's energy counter cannot be read here"


@contextmanager
def energy() -> Iterator[Energy]:
    """Measure the package energy of a block (RAPL); `joules` stays None where it cannot be read."""
    found = Energy()
    start = _joules()
    yield found
    end = _joules()
    if start is not None and end is not None and end >= start:
        found.joules, found.why = end - start, "RAPL package counter, whole machine"


def _joules() -> float | None:
    try:
        return int(_RAPL.read_text()) / 1e6
    except (OSError, ValueError):
        return None


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed
