"""Weights of a Hugging Face folder, as views of the mapped safetensors files.

Source: the safetensors format, an 8-byte length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.weights.gguf import drop_pages
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import FLOAT_KINDS, ITEM_BYTES, WeightFormat

_KINDS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
#: Types of codes, which are no weights by themselves.
_CODES = {"U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
_INDEX = "model.safetensors.index.json"
#: A header above this is no header; the format itself allows no more.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: its file, format name (or the file's name of a type that is not read), extents and bytes."""

    file: Path
    kind: str
    dims: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): a vector is (1, n), a stack [e, n, k] is (e * n, k)."""
        if not self.dims:
            return (1, 1)
        rows = 1
        for extent in self.dims[:-1]:
            rows *= extent
        return (rows, self.dims[-1])


class SafetensorsFolder:
    """The tensors of a folder: one ``model.safetensors``, or the files its index names.

    Attributes:
        tensors: name -> StoredTensor.

    Raises:
        SpecError: no weights, a missing or broken file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in self._files():
            self._read(file)

    def _files(self) -> list[Path]:
        index = self.path / _INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise SpecError(f"{index} is not an index of safetensors files ({error}). Fetch it again.") from None
            missing = [name for name in names if not (self.path / name).is_file()]
            if missing:
                raise SpecError(f"{self.path} lacks {', '.join(missing)}, named by {_INDEX}. Fetch the missing files.")
            return [self.path / name for name in names]
        single = self.path / "model.safetensors"
        files = [single] if single.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            pickled = (
                " Its .bin files are pickles, which are not read: save it as safetensors."
                if any(self.path.glob("*.bin"))
                else ""
            )
            raise SpecError(f"{self.path} has no weights: no model.safetensors and no {_INDEX}.{pickled}")
        return files

    def _read(self, file: Path) -> None:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise SpecError(
                    f"{file} is truncated or no safetensors file: its header would take {length} of {size} bytes. Fetch it again."
                )
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise SpecError(f"{file} is corrupt: its header is not JSON ({error}). Fetch it again.") from None
            self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensor = StoredTensor(
                file,
                _KINDS.get(dtype := str(entry["dtype"]), dtype),
                tuple(entry["shape"]),
                8 + length + start,
                end - start,
            )
            if 8 + length + end > size:
                raise SpecError(
                    f"{file} is truncated: tensor {name} ends at byte {8 + length + end}, the file has {size}. Fetch it again."
                )
            rows, cols = tensor.shape
            if tensor.kind in ITEM_BYTES and rows * cols * ITEM_BYTES[tensor.kind] != tensor.nbytes:
                raise SpecError(
                    f"{file} is corrupt: tensor {name} of {list(tensor.dims)} takes {tensor.nbytes} bytes. Fetch it again."
                )
            self.tensors[name] = tensor

    def packed(self, name: str) -> Packed:
        """Return a tensor as a view of its file; bfloat16 as its bits.

        Raises:
            KeyError: no tensor of that name.
            UnsupportedModelError: a type Trimtab does not read.
        """
        tensor = self.tensors[name]
        if tensor.kind not in FLOAT_KINDS:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {name} is stored as {tensor.kind}, which is not read. Known: {', '.join(_KINDS)}. "
                f"Save the model in one of these."
            )
        return Packed(WeightFormat(kind=tensor.kind), tensor.shape, {"data": self.array(name).reshape(tensor.shape)})

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as an array, floats or codes, in the extents of the file; bfloat16 as its bits.

        Raises:
            KeyError: no tensor of that name.
            UnsupportedModelError: a type without an array.
        """
        tensor = self.tensors[name]
        dtype = NUMPY_DTYPES.get(tensor.kind) or _CODES.get(tensor.kind)
        if dtype is None:
            raise UnsupportedModelError(f"{tensor.file}: tensor {name} is stored as {tensor.kind}, which is not read.")
        if tensor.offset % dtype.itemsize:  # a header of odd length: torch wants aligned arrays, so this one is copied
            raw = np.frombuffer(self._maps[tensor.file], np.uint8, tensor.nbytes, tensor.offset)
            flat = np.frombuffer(raw.tobytes(), dtype)
        else:
            flat = np.frombuffer(self._maps[tensor.file], dtype, tensor.nbytes // dtype.itemsize, tensor.offset)
        return flat.reshape(tensor.dims)

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that was read; views stay valid and read them again."""
        tensor = self.tensors[name]
        drop_pages(self._maps[tensor.file], tensor.offset, tensor.nbytes)
