"""One stretch of memory for all weights of a program, in huge pages where the system allows them."""

from __future__ import annotations

import numpy as np

from trimtab.errors import CapacityError
from trimtab.runtime.memory import mapped
from trimtab.runtime.weights.packed import NUMPY_DTYPES
from trimtab.spec.formats import WeightFormat
from trimtab.units import format_bytes

_LINE = 64
#: Buffers start at a cache line; kernels prefetch a little beyond the end of a matrix.
_SLACK = 1 << 16


class Arena:
    """Hands out aligned buffers one after the other.

    Args:
        nbytes: sum of the buffers that will be asked for, without alignment.

    Raises:
        CapacityError: the system has not that much memory.
    """

    def __init__(self, nbytes: int) -> None:
        self._size, self._used = nbytes + nbytes // 64 + _SLACK, 0
        try:
            self._whole = mapped(self._size)
        except OSError as error:
            raise CapacityError(
                f"The weights take {format_bytes(nbytes)} and the system refuses them: {error}."
            ) from None

    def buffers(self, format: WeightFormat, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Buffers of one matrix."""
        made = {}
        for buffer in format.buffers(*shape):
            start = -(-self._used // _LINE) * _LINE
            self._used = start + buffer.nbytes
            if self._used > self._size:
                raise CapacityError(f"The arena of {self._size} bytes is full.")
            flat = self._whole[start : self._used].view(NUMPY_DTYPES[buffer.dtype])
            made[buffer.name] = flat.reshape(buffer.shape)
        return made
