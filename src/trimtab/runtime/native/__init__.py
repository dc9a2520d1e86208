"""The native program: a model lowered to fused C++ kernels over tiled weights. No torch."""

from __future__ import annotations

from trimtab.runtime.native.lower import lower, lowered_spec
from trimtab.runtime.native.model import NativeModel, Timed
from trimtab.runtime.native.program import NativeProgram

__all__ = ["NativeModel", "NativeProgram", "Timed", "lower", "lowered_spec"]
