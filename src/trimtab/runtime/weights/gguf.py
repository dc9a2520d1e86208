"""Weights of a GGUF file, as views of the mapped file."""

from __future__ import annotations

import mmap

import numpy as np

from trimtab.errors import UnsupportedModelError
from trimtab.runtime.weights.packed import NUMPY_DTYPES, Packed
from trimtab.spec.formats import FILE_FORMATS, FLOAT_KINDS, GGUF_BLOCKS, WeightFormat
from trimtab.spec.gguf_header import GgufHeader, Metadata, TensorInfo

__all__ = ["GgufFile", "Metadata", "TensorInfo"]


class GgufFile(GgufHeader):
    """A GGUF file: its header (`metadata`, `tensors`) and its weights.

    Opening reads the header only; 19 ms for the built-in model, whose vocabulary is stepped over.

    Raises:
        SpecError: not a GGUF file, an unknown version, big-endian, truncated or corrupt.
    """

    def packed(self, name: str) -> Packed:
        """Return a tensor as a view of the file; a stack of matrices [e, n, k] has e * n rows.

        Ternary and mxfp4 blocks, which Trimtab holds in another order, are copied: see `numerics.blocks.from_blocks`.

        Raises:
            KeyError: no tensor of that name.
            UnsupportedModelError: a type Trimtab does not read.
        """
        info = self.tensors[name]
        if info.kind in FILE_FORMATS:
            from trimtab.runtime.numerics.blocks import from_blocks

            assert info.nbytes is not None
            flat = np.frombuffer(self.buffer, np.uint8, info.nbytes, info.offset)
            return from_blocks(info.kind, flat.reshape(info.shape[0], -1), info.shape[1])
        if info.kind not in FLOAT_KINDS and info.kind not in GGUF_BLOCKS:
            known = ", ".join((*FLOAT_KINDS, *GGUF_BLOCKS, *FILE_FORMATS))
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} is stored as {info.kind}, which is not read. Known: {known}."
            )
        format = WeightFormat(kind=info.kind)
        (buffer,) = format.buffers(*info.shape)
        dtype = NUMPY_DTYPES[buffer.dtype]
        flat = np.frombuffer(self.buffer, dtype, buffer.nbytes // dtype.itemsize, info.offset)
        return Packed(format, info.shape, {buffer.name: flat.reshape(buffer.shape)})

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that was read; views stay valid and read them again."""
        info = self.tensors[name]
        drop_pages(self.buffer, info.offset, info.nbytes or 0)


def drop_pages(buffer: mmap.mmap | bytes, offset: int, nbytes: int) -> None:
    """Advise the system that whole pages inside a mapped range are not needed; does nothing where that is not possible."""
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or not isinstance(buffer, mmap.mmap):
        return
    start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        buffer.madvise(advice, start, length)
