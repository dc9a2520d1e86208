"""Weights of a Hugging Face folder that compressed-tensors wrote: codes stay codes.

Its packed words hold the same bits in the same order as our integer rows, so they are views; one byte a code (``int8``) is
offset by 128. Where a scale is no fp16 number, the matrix is read as floats.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UnsupportedModelError
from trimtab.runtime.numerics import encode
from trimtab.runtime.numerics.floats import bfloat16_to_float32
from trimtab.runtime.numerics.grid import decode_grid
from trimtab.runtime.weights.packed import Packed
from trimtab.runtime.weights.safetensors import SafetensorsFolder, StoredTensor
from trimtab.spec.formats import FP32, WeightFormat

METHOD = "compressed-tensors"
#: How it may store a matrix that is read here; in ``mixed-precision`` every group says for itself.
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A matrix in codes.

    Args:
        kind: its format here; fp32 where its scales are no fp16 numbers.
        stored: the format of its codes.
        shape: rows and columns.
    """

    kind: WeightFormat
    stored: WeightFormat
    shape: tuple[int, int]

    @property
    def dims(self) -> tuple[int, int]:
        """Extents, as other tensors have them."""
        return self.shape


class CompressedFolder:
    """A folder of tensors, in which ``X.weight`` may be a matrix in codes.

    Attributes:
        tensors: name -> StoredTensor or CodedTensor.

    Raises:
        UnsupportedModelError: codes of another form than `FORMATS`, with zero points, or in another order of columns.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = SafetensorsFolder(folder)
        schemes = tuple(dict.fromkeys(_schemes(config, folder)))
        modules = [name.removesuffix("_scale") for name in self.folder.tensors if name.endswith(".weight_scale")]
        coded = {name: self._coded(name, schemes) for name in modules}
        self.tensors: dict[str, StoredTensor | CodedTensor] = {**self.folder.tensors, **coded}

    def packed(self, name: str) -> Packed:
        """Return a tensor as a view of its file, codes as they are."""
        found = self.tensors[name]
        if isinstance(found, StoredTensor):
            return self.folder.packed(name)
        scale = self._scale(name)
        buffers = {"codes": self._codes(name, found), "scale": scale}
        if found.kind == found.stored:
            return Packed(found.stored, found.shape, {**buffers, "scale": scale.astype(np.float16, copy=False)})
        values = np.empty(found.shape, np.float32)
        decode_grid(buffers, found.stored, found.shape[1], values)
        return encode(values, found.kind)

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that was read."""
        for part in (name, f"{name}_packed", f"{name}_scale"):
            if part in self.folder.tensors:
                self.folder.release(part)

    def _coded(self, name: str, schemes: tuple[tuple[int, int], ...]) -> CodedTensor:
        tensors, where = self.folder.tensors, f"{self.folder.path}: {name}"
        for part, why in (("zero_point", "zero points"), ("g_idx", "columns in another order")):
            if f"{name}_{part}" in tensors:
                raise UnsupportedModelError(
                    f"{where} is coded with {why}, which is not read. Allowed: symmetric codes in the order of the columns. "
                    "Have it quantized so, or start from the model it was made of."
                )
        words, scales = tensors.get(f"{name}_packed") or tensors[name], tensors[f"{name}_scale"].dims
        plain = words.kind == "I8"
        if plain or f"{name}_shape" not in tensors:
            shape = words.dims
        else:
            shape = tuple(int(extent) for extent in self.folder.array(f"{name}_shape"))
        if len(shape) == 2 and len(scales) == 2 and words.kind in ("I8", "I32"):
            rows, cols = shape
            for bits, group in schemes:
                group = group or cols
                width = cols if plain and bits == 8 else -(-cols * bits // 32)
                if words.dims == (rows, width) and scales == (rows, cols // group) and cols % group == 0:
                    stored = WeightFormat(kind="int", bits=bits, group=group)
                    return CodedTensor(stored if self._exact(name) else FP32, stored, (rows, cols))
        raise UnsupportedModelError(
            f"{where} is stored as {words.kind}{list(words.dims)} with scales {list(scales)}, which is not read. "
            f"Allowed: {', '.join(FORMATS)} of symmetric integers of 2 to 8 bits, with a scale for each row or group."
        )

    def _codes(self, name: str, found: CodedTensor) -> np.ndarray:
        """Rows of codes as `pack_codes` lays them out."""
        if name in self.folder.tensors:
            return self.folder.array(name).view(np.uint8) ^ np.uint8(0x80)
        words = self.folder.array(f"{name}_packed")
        return words.view(np.uint8)[:, : (found.shape[1] * found.stored.bits + 7) // 8]

    def _scale(self, name: str) -> np.ndarray:
        """Scales [N, G] as fp16 where they are stored so, else as float32."""
        scale, kind = self.folder.array(f"{name}_scale"), self.folder.tensors[f"{name}_scale"].kind
        return bfloat16_to_float32(scale) if kind == "bf16" else scale

    def _exact(self, name: str) -> bool:
        scale = self._scale(name)
        with np.errstate(over="ignore"):
            return scale.dtype == np.float16 or np.array_equal(scale.astype(np.float16).astype(np.float32), scale)


def compression_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a Hugging Face config that says how compressed-tensors stored the weights; None if it did not."""
    found = config.get("quantization_config") or config.get("compression_config")
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def _schemes(config: Mapping[str, Any], folder: str | Path) -> Iterator[tuple[int, int]]:
    """(bits, group) of every group of the config; group 0 is a whole row."""
    stored = config.get("format", "dense")
    if stored not in FORMATS:
        raise UnsupportedModelError(
            f"{folder} is stored as {stored} ({METHOD}), which is not read. Allowed: {', '.join(FORMATS)}."
        )
    for group in (config.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("type", "int") == "int" and 2 <= int(weights.get("num_bits", 8)) <= 8:
            by_group = weights.get("strategy") == "group"
            yield int(weights.get("num_bits", 8)), int(weights["group_size"]) if by_group else 0
