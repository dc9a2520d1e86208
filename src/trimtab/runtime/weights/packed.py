"""Weights as values: a path, a format and the buffers that hold it. Buffers are never written after construction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError
from trimtab.spec.formats import ITEM_BYTES, WeightFormat

#: numpy dtype that carries each buffer dtype; bf16 travels as its bits.
NUMPY_DTYPES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "u8": np.dtype(np.uint8),
    "i8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One matrix or vector in its stored form.

    Args:
        format: how elements are coded.
        shape: (rows, columns) as stored; a vector is (1, n).
        layout: ``row`` or ``transposed`` (then the stored matrix is W.T).
        buffers: arrays by the names of ``format.buffers(*shape)``; views of a mapped file or owned arrays.
    """

    format: WeightFormat
    shape: tuple[int, int]
    buffers: Mapping[str, np.ndarray]
    layout: str = "row"

    def __post_init__(self) -> None:
        for wanted in self.format.buffers(*self.shape):
            found = self.buffers.get(wanted.name)
            if found is None or found.shape != wanted.shape or found.dtype != NUMPY_DTYPES[wanted.dtype]:
                shown = "nothing" if found is None else f"{found.dtype}{list(found.shape)}"
                raise SpecError(
                    f"{self.format}: buffer '{wanted.name}' must be {wanted.dtype}{list(wanted.shape)}, got {shown}."
                )

    @property
    def nbytes(self) -> int:
        """Bytes of the live buffers, as the arrays report them."""
        return sum(buffer.nbytes for buffer in self.buffers.values())


def packed_float(array: np.ndarray, kind: str, layout: str = "row") -> Packed:
    """Wrap a float array ([rows, cols] or [n]) without a copy; a bf16 array holds its bits as uint16."""
    matrix = array.reshape(1, -1) if array.ndim == 1 else array
    return Packed(WeightFormat(kind=kind), (matrix.shape[0], matrix.shape[1]), {"data": matrix}, layout)


class Weights(Mapping[str, Packed]):
    """Immutable mapping of paths to packed matrices. ``weights | {...}`` returns a new one that shares the rest."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Packed]) -> None:
        self._items = dict(items)

    def __getitem__(self, path: str) -> Packed:
        try:
            return self._items[path]
        except KeyError:
            raise SpecError(f"The weights hold no '{path}'.") from None

    def __contains__(self, path: object) -> bool:
        return path in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __or__(self, other: Mapping[str, Packed]) -> Weights:
        return Weights({**self._items, **other})

    def without(self, paths: set[str]) -> Weights:
        """Return the weights less some paths."""
        return Weights({path: packed for path, packed in self._items.items() if path not in paths})

    @property
    def nbytes(self) -> int:
        """Bytes of all live buffers, each array once however many paths share it."""
        seen: dict[int, int] = {}
        for packed in self._items.values():
            for buffer in packed.buffers.values():
                seen[buffer.__array_interface__["data"][0]] = buffer.nbytes
        return sum(seen.values())


def fingerprint(weights: Weights) -> str:
    """Digest of paths, formats, shapes and a sample of every buffer: tells models apart without reading them whole."""
    digest = hashlib.sha256()
    for path, packed in weights.items():
        digest.update(f"{path} {packed.format} {packed.shape} {packed.layout}".encode())
        for buffer in packed.buffers.values():
            flat = buffer.reshape(-1)
            digest.update(flat[:: max(1, flat.size // 64)][:64].tobytes())
    return digest.hexdigest()


assert set(NUMPY_DTYPES) == set(ITEM_BYTES), "every buffer dtype has a numpy carrier"
