"""The header of a GGUF file: metadata and the list of tensors, without touching a weight.

Big arrays (vocabulary, merges, scores) are stepped over and decoded only when asked for. Numpy and the weights themselves
come in `runtime.weights.gguf`, which adds views of the mapped file.

Source: ggml `docs/gguf.md`, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError
from trimtab.spec.formats import FILE_BLOCKS, FLOAT_KINDS, ITEM_BYTES

#: ggml type ids. Those that `WeightFormat` does not know are named, so that they can be refused by name at use.
TYPE_NAMES = {
    0: "fp32", 1: "fp16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_k", 11: "q3_k", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 15: "q8_k", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s",
    22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 29: "iq1_m", 30: "bf16", 34: "tq1_0",
    35: "tq2_0", 39: "mxfp4",
}  # fmt: skip

#: GGUF value types with a fixed size: id -> struct code.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
#: Arrays inside arrays; files hold one or two.
_MOST_NESTED = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file.

    Args:
        shape: (rows, columns) as stored; a vector is (1, n), a stack of experts [e, n, k] is (e * n, k).
        dims: the extents, outermost first.
        kind: format name (``fp32 ... q6_k``), or another ggml type's name, which is refused when the tensor is read.
        offset: first byte, from the start of the file.
    """

    name: str
    shape: tuple[int, int]
    dims: tuple[int, ...]
    kind: str
    offset: int

    @property
    def nbytes(self) -> int | None:
        """Bytes in the file; None for a type Trimtab does not read."""
        rows, cols = self.shape
        if self.kind in FLOAT_KINDS:
            return rows * cols * ITEM_BYTES[self.kind]
        if self.kind not in FILE_BLOCKS:
            return None
        elements, size = FILE_BLOCKS[self.kind]
        return rows * (cols // elements) * size


class Metadata(Mapping[str, Any]):
    """Keys and values of the file; a long array is decoded when it is asked for, every time."""

    def __init__(self, header: GgufHeader, positions: dict[str, tuple[int, int]]) -> None:
        self._header = header
        self._positions = positions

    def __getitem__(self, key: str) -> Any:
        kind, position = self._positions[key]
        return self._header._value(kind, position)[0]

    def __contains__(self, key: object) -> bool:
        return key in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)


class GgufHeader:
    """Reads the header of `path` and keeps the file mapped.

    Attributes:
        metadata: lazy mapping of keys to values.
        tensors: name -> TensorInfo, in the order of the file.

    Raises:
        SpecError: not a GGUF file, an unknown version, big-endian, truncated or corrupt.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except FileNotFoundError:
            raise SpecError(f"{self.path} does not exist. Give the path of a .gguf file.") from None
        except OSError as error:
            raise SpecError(f"{self.path} cannot be read: {error.strerror}. Give the path of a .gguf file.") from None
        if bytes(self.buffer[:4]) != b"GGUF":
            raise SpecError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'.")
        try:
            self._read()
        except (struct.error, IndexError, OverflowError) as error:
            raise SpecError(
                f"{self.path} is truncated or corrupt: its header ends early or makes no sense ({error}). Fetch it again."
            ) from None

    def _read(self) -> None:
        (version,) = struct.unpack_from("<I", self.buffer, 4)
        if version & 0xFFFF == 0 and version:
            raise SpecError(f"{self.path} is a big-endian GGUF file. Only little-endian files are read; convert it.")
        if version not in (2, 3):
            raise SpecError(f"{self.path}: GGUF version {version} is not known. Allowed: 2, 3. Convert the file.")
        tensors, keys = struct.unpack_from("<QQ", self.buffer, 8)
        if max(tensors, keys) > self.size:
            raise self._corrupt(f"it announces {tensors} tensors and {keys} keys")
        position, positions = 24, {}
        for _ in range(keys):
            key, position = self._string(position)
            (kind,) = struct.unpack_from("<I", self.buffer, position)
            positions[key] = (kind, position + 4)
            position = self._skip(kind, position + 4)
        self.metadata = Metadata(self, positions)
        found = []
        for _ in range(tensors):
            name, position = self._string(position)
            if not name.isprintable():
                raise self._corrupt(f"the name {name!r} of a tensor is not text")
            (axes,) = struct.unpack_from("<I", self.buffer, position)
            if not 1 <= axes <= 4:
                raise self._corrupt(f"tensor {name} has {axes} axes")
            extents = struct.unpack_from(f"<{axes}Q", self.buffer, position + 4)
            if 0 in extents:
                raise self._corrupt(f"tensor {name} has an extent of 0")
            kind, offset = struct.unpack_from("<IQ", self.buffer, position + 4 + 8 * axes)
            position += 4 + 8 * axes + 12
            found.append((name, tuple(reversed(extents)), TYPE_NAMES.get(kind, f"type {kind}"), offset))
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise self._corrupt(f"its alignment is {align!r}")
        start = -(-position // align) * align
        self.tensors: dict[str, TensorInfo] = {}
        for name, dims, kind, offset in found:
            rows = 1
            for extent in dims[:-1]:
                rows *= extent
            info = TensorInfo(name, (rows, dims[-1]), dims, kind, start + offset)
            if info.kind in FILE_BLOCKS and dims[-1] % FILE_BLOCKS[info.kind][0]:
                raise self._corrupt(f"the rows of tensor {name} do not divide into {info.kind} blocks")
            end = info.offset + (info.nbytes or 0)
            if end > self.size:
                raise SpecError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, the file has {self.size}. Fetch it again."
                )
            self.tensors[name] = info

    def raw(self, key: str) -> tuple[int, bytes]:
        """Type and bytes of a value, for a copy of it.

        Raises:
            KeyError: no such key.
        """
        kind, position = self.metadata._positions[key]
        return kind, bytes(self.buffer[position : self._skip(kind, position)])

    def _corrupt(self, why: str) -> SpecError:
        return SpecError(f"{self.path} is truncated or corrupt: {why}. Fetch it again.")

    def _string(self, position: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self.buffer, position)
        end = position + 8 + length
        if end > self.size:
            raise self._corrupt(f"a text of {length} bytes at byte {position} runs past its end")
        try:
            return self.buffer[position + 8 : end].decode(), end
        except UnicodeDecodeError:
            raise self._corrupt(f"the text at byte {position} is not UTF-8") from None

    def _array(self, position: int) -> tuple[int, int, int]:
        """(element type, count, position of the first element)."""
        kind, count = struct.unpack_from("<IQ", self.buffer, position)
        if count > self.size - position:
            raise self._corrupt(f"an array of {count} elements at byte {position} runs past its end")
        return kind, count, position + 12

    def _skip(self, kind: int, position: int, depth: int = 0) -> int:
        """Position behind a value; `depth` counts the arrays around it."""
        if depth > _MOST_NESTED:
            raise self._corrupt(f"arrays are nested more than {_MOST_NESTED} deep at byte {position}")
        if kind in _SCALARS:
            position += struct.calcsize("<" + _SCALARS[kind])
        elif kind == _STRING:
            position += 8 + struct.unpack_from("<Q", self.buffer, position)[0]
        elif kind == _ARRAY:
            kind, count, position = self._array(position)
            if kind in _SCALARS:
                position += count * struct.calcsize("<" + _SCALARS[kind])
            elif kind == _STRING:
                buffer, length = self.buffer, struct.Struct("<Q").unpack_from
                for _ in range(count):
                    position += 8 + length(buffer, position)[0]
            else:
                for _ in range(count):
                    position = self._skip(kind, position, depth + 1)
        else:
            raise self._corrupt(f"value type {kind} at byte {position} is not known")
        if position > self.size:
            raise self._corrupt(f"a value runs past its end at byte {position}")
        return position

    def _value(self, kind: int, position: int) -> tuple[Any, int]:
        """(value, position behind it)."""
        if kind in _SCALARS:
            code = "<" + _SCALARS[kind]
            (value,) = struct.unpack_from(code, self.buffer, position)
            return (shortest_float32(value) if kind == _FLOAT32 else value), position + struct.calcsize(code)
        if kind == _STRING:
            return self._string(position)
        kind, count, position = self._array(position)
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack_from(code, self.buffer, position)), position + struct.calcsize(code)
        values = []
        for _ in range(count):
            value, position = self._value(kind, position)
            values.append(value)
        return values, position


def shortest_float32(value: float) -> float:
    """The shortest decimal that rounds to the same float32: files hold 1e-5 as 9.99999974e-06.

    >>> shortest_float32(9.999999747378752e-06)
    1e-05
    """
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value
