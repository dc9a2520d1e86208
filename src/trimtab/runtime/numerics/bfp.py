"""Block floating point: the elements of a block share one power of two, so their dot products are integer sums.

Format BFP(p, n): codes of p bits, sign included, and one exponent per n elements that lie side by side. For a block x::

    e     = floor(log2(max|x|)), cut to what the exponent field holds
    step  = 2 ** (e - (p - 2))
    code  = x / step, rounded to nearest, ties to even, cut to +-(2 ** (p - 1) - 1)
    value = code * step

A magnitude that rounds up to ``2 ** (p - 1)`` is cut, not renormalised. The asymmetric variant allows ``-2 ** (p - 1)`` as
well, where it is at least as near.

The exponent is held in a field of `exp` bits as ``e + bias``, ``bias = 2 ** (exp - 1) - 1``, as that of an IEEE float, without
reserved values. A block of zeros has field 0. Below the least exponent steps stay those of field 0, so small blocks round
towards zero gradually; above the largest (with fewer than 8 bits only) codes are cut. With 8 bits the field reaches every
float32 from 2 ** -127 on; blocks of smaller ones share the exponent -127.

Stored, a row of H elements is H codes of p bits in two's complement, the low bit first, without gaps between them, and one
byte per block: p / 8 + 1 / n bytes per element where H * p is a multiple of 8. Fields of fewer than 8 bits take a byte too.

All results are exact or rounded once; nothing depends on the order in which a processor adds.

Source: Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers, arXiv 2403.20137; shorthand of
github.com/d-matrix-ai/dmx-compressor, `numerical/format.py`, commit 69a2245. That code adds 6 * 2 ** e in float32 before it
rounds, so it may differ by one code within 2 ** (e - 21) of a tie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError

#: The largest exponent of a float32.
_LAST = 127
_SHORTHAND = re.compile(r"BFP\[(\d+)\|(\d+)\]\{(\d+)\}\(([S_])([NUDS])\)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFloat:
    """A block floating-point format.

    Args:
        bits: of a code, sign included; 2..16.
        block: elements that share an exponent.
        exp: bits of the exponent field, 4..8.
        symmetric: codes reach as far down as up.

    Raises:
        SpecError: a number out of range.
    """

    bits: int
    block: int
    exp: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        for name, value, low, high in (("man", self.bits, 2, 16), ("exp", self.exp, 4, 8)):
            if not low <= value <= high:
                nearest = low if value < low else high
                raise SpecError(f"bfp: {name}={value} is not possible. Allowed: {low}..{high}. Try {name}={nearest}.")
        if self.block < 1:
            raise SpecError(f"bfp: block={self.block} is not possible. Allowed: 1 or more. Try block=32.")

    @property
    def bias(self) -> int:
        """What is added to an exponent in its field."""
        return (1 << (self.exp - 1)) - 1

    @property
    def exponents(self) -> tuple[int, int]:
        """Least and largest exponent of a block."""
        return -self.bias, (1 << self.exp) - 1 - self.bias

    @property
    def top(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def blocks(self, size: int) -> int:
        """Blocks of a row of `size` elements.

        Raises:
            SpecError: the block does not divide it.
        """
        if size % self.block:
            allowed = [n for n in range(1, size + 1) if size % n == 0]
            nearest = min(allowed, key=lambda n: (abs(n - self.block), n))
            raise SpecError(
                f"bfp: block={self.block} does not divide a row of {size}. Allowed: {', '.join(map(str, allowed))}. "
                f"Try block={nearest}."
            )
        return size // self.block

    def code_nbytes(self, size: int) -> int:
        """Bytes of the packed codes of a row."""
        return -(-size * self.bits // 8)

    def row_nbytes(self, size: int) -> int:
        """Bytes of a row of `size` elements: codes and one byte per block.

        >>> BlockFloat(bits=4, block=32).row_nbytes(64)
        34
        """
        return self.code_nbytes(size) + self.blocks(size)

    def __str__(self) -> str:
        """The shorthand `parse_shorthand` reads."""
        return f"BFP[{self.bits}|{self.exp}]{{{self.block}}}({'S' if self.symmetric else '_'}N)"


def parse_shorthand(text: str) -> BlockFloat:
    """Read dmx-compressor's shorthand ``BFP[p|e]{n}(SN)``.

    p is the bits of a code, sign included (so ``BFP[4|8]`` is "BFP12"), e those of the exponent, n the block; ``S`` is
    symmetric, ``_`` not; ``N`` rounds to nearest.

    Raises:
        SpecError: not such a string, or another rounding.

    >>> parse_shorthand("BFP[4|8]{32}(SN)")
    BlockFloat(bits=4, block=32, exp=8, symmetric=True)
    """
    found = _SHORTHAND.match(text.strip())
    if found is None:
        raise SpecError(f"'{text}' is not a shorthand of block floating point. Write for example BFP[4|8]{{32}}(SN).")
    bits, exp, block, symmetric, rounding = found.groups()
    if rounding != "N":
        raise SpecError(f"'{text}': rounding {rounding} is not built. Allowed: N (to nearest).")
    return BlockFloat(bits=int(bits), block=int(block), exp=int(exp), symmetric=symmetric == "S")


def encode_bfp(values: np.ndarray, form: BlockFloat) -> tuple[np.ndarray, np.ndarray]:
    """Code rows of floats.

    Args:
        values: float16 or float32 [..., H].
        form: of the result.

    Returns:
        Codes int16 [..., H] and exponent fields uint8 [..., H / block].

    Raises:
        SpecError: the block does not divide H, or a value is not finite.
    """
    blocks = form.blocks(values.shape[-1])
    x = values.astype(np.float32).reshape(*values.shape[:-1], blocks, form.block)
    peak = np.abs(x).max(axis=-1)
    if not np.isfinite(peak).all():
        raise SpecError("bfp: a value is not finite, so its block has no exponent.")
    low, high = form.exponents
    exponent = np.where(peak > 0, np.frexp(peak)[1].astype(np.int64) - 1, low).clip(low, high)
    # A float32 times a power of two is exact in float64, so `rint` is the only rounding.
    scaled = np.ldexp(x.astype(np.float64), (form.bits - 2 - exponent)[..., None])
    lowest = np.full(exponent.shape, -form.top)
    if not form.symmetric:  # at the last exponent the value of that code is no float32
        lowest[exponent < _LAST] -= 1
    codes = np.clip(np.rint(scaled), lowest[..., None], form.top).astype(np.int16)
    return codes.reshape(values.shape), (exponent + form.bias).astype(np.uint8)


def decode_bfp(codes: np.ndarray, fields: np.ndarray, form: BlockFloat) -> np.ndarray:
    """Values float32 [..., H] of codes [..., H] and exponent fields [..., H / block]; exact."""
    step = np.ldexp(1.0, fields.astype(np.int64) - (form.bias + form.bits - 2))
    shape = (*codes.shape[:-1], form.blocks(codes.shape[-1]), form.block)
    return (codes.reshape(shape) * step[..., None]).astype(np.float32).reshape(codes.shape)


def pack_bfp(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes int16 [..., H] into uint8 [..., ceil(H * bits / 8)], low bits first; the last byte is filled with zeros."""
    if bits % 8 == 0:
        return np.ascontiguousarray(codes.astype(f"<i{bits // 8}")).view(np.uint8)
    if bits == 4 and codes.shape[-1] % 2 == 0:
        nibbles = codes.astype(np.uint8) & 15
        return nibbles[..., ::2] | nibbles[..., 1::2] << 4
    single = codes.astype(np.uint16)[..., None] >> np.arange(bits, dtype=np.uint16) & 1
    return np.packbits(single.astype(np.uint8).reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bfp(packed: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Codes int16 [..., size] of what `pack_bfp` made."""
    if bits % 8 == 0:
        return np.ascontiguousarray(packed).view(f"<i{bits // 8}").astype(np.int16)
    if bits == 4 and size % 2 == 0:
        codes = np.empty((*packed.shape[:-1], size), np.int16)
        codes[..., ::2], codes[..., 1::2] = packed & 15, packed >> 4
    else:
        single = np.unpackbits(packed, axis=-1, count=size * bits, bitorder="little")
        single = single.reshape(*packed.shape[:-1], size, bits)
        codes = (single.astype(np.int32) << np.arange(bits)).sum(-1)
    sign = 1 << (bits - 1)
    return ((codes ^ sign) - sign).astype(np.int16)


def bfp_dot(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], a_form: BlockFloat, b_form: BlockFloat
) -> np.ndarray:
    """The dot product as hardware computes it: integers inside a block, float32 from block to block, in their order.

    Args:
        a, b: codes [..., H] and fields [..., H / block]; leading axes broadcast.
        a_form, b_form: their formats; blocks are alike, bits may differ (queries in 8, keys in 4).

    Returns:
        float32 [...]: each block's sum is exact and rounded once to float32; so is every addition of two blocks.

    Raises:
        SpecError: the blocks differ.
    """
    if a_form.block != b_form.block:
        raise SpecError(
            f"bfp: a product of blocks of {a_form.block} and of {b_form.block} is no sum of integers. "
            "Code both in one block."
        )
    size = a[0].shape[-1]
    products = a[0].astype(np.int64) * b[0].astype(np.int64)
    sums = products.reshape(*products.shape[:-1], a_form.blocks(size), a_form.block).sum(axis=-1)
    exponents = a[1].astype(np.int64) + b[1] - (a_form.bias + b_form.bias + a_form.bits + b_form.bits - 4)
    with np.errstate(over="ignore", under="ignore"):
        parts = np.ldexp(sums.astype(np.float64), exponents).astype(np.float32)
        total = np.zeros(parts.shape[:-1], np.float32)
        for index in range(parts.shape[-1]):
            total += parts[..., index]
    return total
