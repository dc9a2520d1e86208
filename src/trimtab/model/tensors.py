"""Torch views of stored buffers: no copy on the way from a mapped file to a matrix multiplication."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from trimtab.runtime.weights.packed import Packed

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


def float_tensor(packed: Packed) -> torch.Tensor:
    """View a float matrix or vector [rows, cols] as stored."""
    return as_tensor(packed.buffers["data"], packed.format.kind)
