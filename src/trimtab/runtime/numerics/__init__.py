"""Codecs: from stored buffers to float32 and back, for every weight format."""

from __future__ import annotations

from trimtab.runtime.numerics.codec import decode, encode, matrix, transcode
from trimtab.runtime.numerics.floats import bfloat16_bits, bfloat16_to_float32

__all__ = ["bfloat16_bits", "bfloat16_to_float32", "decode", "encode", "matrix", "transcode"]
