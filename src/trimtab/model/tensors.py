"""Torch views of stored buffers: no copy on the way from a mapped file to a matrix multiplication."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.packed import Packed
from trimtab.spec.formats import FP32

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def as_tensor(array: np.ndarray, kind: str) -> torch.Tensor:
    """View a numpy array as a tensor of dtype `kind`; bf16 travels as uint16."""
    with warnings.catch_warnings():
        # Buffers of a mapped file are read-only, and nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if kind == "bf16" else tensor


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as numpy; bf16 as its bits (uint16)."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy()
    return tensor.contiguous().numpy()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Learned(Packed):
    """A float matrix or vector that a trainer changes: its buffer is the memory of a tensor that gradients reach.

    Args:
        tensor: float32 [rows, cols], a leaf that requires gradients.
    """

    tensor: torch.Tensor


def learned(packed: Packed) -> Learned:
    """A private float32 copy of a matrix or vector to train, whatever its format."""
    array = np.array(decode(packed), dtype=np.float32)
    tensor = torch.from_numpy(array).requires_grad_()
    return Learned(FP32, packed.shape, {"data": array}, packed.layout, tensor=tensor)


def float_tensor(packed: Packed) -> torch.Tensor:
    """View a float matrix or vector [rows, cols] as stored; of one that is trained, the tensor itself."""
    if isinstance(packed, Learned):
        return packed.tensor
    return as_tensor(packed.buffers["data"], packed.format.kind)


def float_matrix(packed: Packed) -> torch.Tensor:
    """W as float32 [N, K], whatever it is stored as; not to be written to."""
    from trimtab.runtime.numerics import matrix

    return as_tensor(matrix(packed), "fp32")


#: Rows up to which torch multiplies 16-bit matrices at the speed of memory on any processor.
_FEW_ROWS = 4


@functools.cache
def _multiplies_16_bit() -> bool:
    """True if the processor has fast 16-bit products; without AVX-512 torch's are ten times slower than in float32."""
    capability = torch.backends.cpu.get_cpu_capability()
    return not capability.startswith(("AVX2", "DEFAULT", "NO AVX"))


def widened(rows: int, dtype: torch.dtype) -> bool:
    """True if a product of `rows` rows in `dtype` is better done in float32 and rounded once."""
    return dtype != torch.float32 and rows > _FEW_ROWS and not _multiplies_16_bit()


def linear(x_TK: torch.Tensor, w_NK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ w.T + bias``; many rows of 16-bit numbers go through float32 where the processor has no 16-bit products."""
    if widened(len(x_TK), x_TK.dtype):
        return F.linear(x_TK.float(), w_NK.float(), None if bias is None else bias.float()).to(x_TK.dtype)
    return F.linear(x_TK, w_NK, bias)
