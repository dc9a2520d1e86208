"""Weight formats: which buffers a matrix is held in, their shapes and bytes.

A format says what the bytes *are*. The codec in `runtime.numerics` fills exactly the buffers named here, the kernels
read exactly these, files store these and `nbytes` is their sum, so a prediction of bytes cannot drift from the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError

#: Bytes of one element by dtype name. `u8` holds packed codes; `bf16` travels as uint16 in numpy.
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "u8": 1, "int64": 8, "int32": 4}

#: HF and torch spellings accepted wherever a dtype is asked for.
DTYPE_ALIASES = {
    "float32": "fp32", "fp32": "fp32", "f32": "fp32", "float": "fp32",
    "float16": "fp16", "fp16": "fp16", "f16": "fp16", "half": "fp16",
    "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip

FLOAT_KINDS = ("fp32", "fp16", "bf16")

#: Small floats with scales of their own. ``fp8``: e4m3 codes and one fp32 scale per stored row. ``mxfp4``: e2m1 codes, two to
#: a byte, low half first, and one power of two (e8m0) per 32. Source: Micikevicius et al., arXiv 2209.05433; OCP Microscaling
#: Formats v1.0.
SCALED_KINDS = ("fp8", "mxfp4")
MX_BLOCK = 32

#: How the input of a product may be coded, so that the product runs at that dtype's peak; ``none`` = as the activations are.
ACT_KINDS = ("none", "fp8", "int8", "fp4")

#: ggml block formats: (elements per block, bytes per block). Source: ggml `ggml-common.h` block layouts.
GGUF_BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip


def dtype_name(asked: str) -> str:
    """Return Trimtab's name of a floating dtype (``fp32``, ``fp16``, ``bf16``).

    Raises:
        SpecError: the name is not a floating dtype.

    >>> dtype_name("bfloat16")
    'bf16'
    """
    name = DTYPE_ALIASES.get(str(asked).removeprefix("torch.").lower())
    if name is None:
        from trimtab.errors import unknown

        raise unknown("dtype", str(asked), ("float32", "float16", "bfloat16"))
    return name


def weights_name(asked: str) -> str:
    """Trimtab's name of what ``--dtype`` may ask for: a floating dtype, ``fp8`` or ``mxfp4``.

    Raises:
        SpecError: another name.

    >>> weights_name("bfloat16"), weights_name("fp8")
    ('bf16', 'fp8')
    """
    name = str(asked).lower()
    if name in SCALED_KINDS:
        return name
    if name not in DTYPE_ALIASES:
        from trimtab.errors import unknown

        raise unknown("dtype", str(asked), ("float32", "float16", "bfloat16", *SCALED_KINDS))
    return dtype_name(name)


@dataclass(frozen=True, slots=True)
class Buffer:
    """One array of a packed matrix: its name, dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How the elements of one matrix are stored.

    Args:
        kind: ``fp32 | fp16 | bf16``, ``fp8``, ``mxfp4``, ``int`` (group-affine integer grid) or a ggml block name such as
            ``q4_1``.
        bits: bits of one code, 2..8; only for ``int``.
        group: elements along a stored row that share one scale; only for ``int``.
        sym: ``int`` only. True: ``w = scale * (code - 2**(bits-1))``. False: ``w = scale * code + minimum``.

    Raises:
        SpecError: unknown kind, bits outside 2..8 or a group below 1.
    """

    kind: str
    bits: int = 0
    group: int = 0
    sym: bool = True

    def __post_init__(self) -> None:
        if self.kind == "int":
            if not 2 <= self.bits <= 8:
                raise SpecError(f"int weights: bits={self.bits} is not possible. Allowed: 2..8. Try bits=4.")
            if self.group < 1:
                raise SpecError(f"int weights: group={self.group} is not possible. Allowed: 1 or more. Try group=32.")
        elif self.kind not in (*FLOAT_KINDS, *SCALED_KINDS, *GGUF_BLOCKS):
            from trimtab.errors import unknown

            raise unknown("weight format", self.kind, (*FLOAT_KINDS, *SCALED_KINDS, "int", *GGUF_BLOCKS))

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage, which needs no scales."""
        return self.kind in FLOAT_KINDS

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """Return the buffers of a stored [rows, cols] matrix.

        Raises:
            SpecError: `cols` does not divide into groups or blocks.
        """
        if self.is_float:
            return (Buffer("data", self.kind, (rows, cols)),)
        if self.kind == "int":
            if cols % self.group:
                raise SpecError(
                    f"group={self.group} does not divide the row length {cols}. "
                    f"Allowed: {_divisors(cols)}. Try group={_nearest_divisor(cols, self.group)}."
                )
            groups = (rows, cols // self.group)
            found = [Buffer("codes", "u8", (rows, (cols * self.bits + 7) // 8)), Buffer("scale", "fp16", groups)]
            if not self.sym:
                found.append(Buffer("minimum", "fp16", groups))
            return tuple(found)
        if self.kind == "fp8":
            return Buffer("data", "u8", (rows, cols)), Buffer("scale", "fp32", (rows, 1))
        if self.kind == "mxfp4":
            if cols % MX_BLOCK:
                raise SpecError(f"mxfp4 stores blocks of {MX_BLOCK}: a row of {cols} does not divide.")
            return Buffer("codes", "u8", (rows, cols // 2)), Buffer("scale", "u8", (rows, cols // MX_BLOCK))
        elements, nbytes = GGUF_BLOCKS[self.kind]
        if cols % elements:
            raise SpecError(f"{self.kind} stores blocks of {elements}: a row of {cols} does not divide.")
        return (Buffer("blocks", "u8", (rows, cols // elements * nbytes)),)

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a stored [rows, cols] matrix: the sum over its buffers."""
        return sum(buffer.nbytes for buffer in self.buffers(rows, cols))

    def __str__(self) -> str:
        if self.kind != "int":
            return self.kind
        return f"int{self.bits}-g{self.group}{'' if self.sym else '-asym'}"


FP32 = WeightFormat(kind="fp32")
FP16 = WeightFormat(kind="fp16")
BF16 = WeightFormat(kind="bf16")


def float_format(dtype: str) -> WeightFormat:
    """The format of a floating dtype, any accepted spelling."""
    return WeightFormat(kind=dtype_name(dtype))


def _divisors(number: int, largest: int = 256) -> str:
    return ", ".join(str(d) for d in range(1, min(number, largest) + 1) if number % d == 0)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))
