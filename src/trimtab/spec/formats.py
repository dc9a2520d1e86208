"""Weight formats: which buffers a matrix is held in, their shapes and bytes.

A format says what the bytes *are*. The codec in `runtime.numerics` fills exactly the buffers named here, the kernels
read exactly these, files store these and `nbytes` is their sum, so a prediction of bytes cannot drift from the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError

#: Bytes of one element by dtype name. `u8` holds packed codes; `bf16` travels as uint16 in numpy.
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "u8": 1, "i8": 1, "int64": 8, "int32": 4}

#: The layout the native program multiplies: 16 rows side by side, columns in units of 32; see `runtime/kernels/cpp/native/tiles.h`.
TILE_ROWS, UNIT_COLS = 16, 32

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

#: What products by table lookup read, in tiles only. ``bitplane`` and ``bitlane`` hold one nibble for every 4 columns and bit
#: of the code and differ in the order of nibbles alone: the first is for 16-byte shuffles, the second for 64-byte permutations.
#: ``ternary`` holds -1, 0 or 1 as 5 bits for every 3 columns. See `runtime/kernels/cpp/native/tiles.h`.
PLANE_KINDS = ("bitplane", "bitlane")
LOOKUP_KINDS = (*PLANE_KINDS, "ternary")
#: Columns and bytes (16 rows) of a unit of a ternary tile, and how many units share a piece of signs as large as one of them.
TERNARY_COLS, TERNARY_BYTES, TERNARY_SHARED = 12, 32, 4

#: How the input of a product may be coded, so that the product runs at that dtype's peak; ``none`` = as the activations are.
ACT_KINDS = ("none", "fp8", "int8", "fp4")

#: ggml block formats: (elements per block, bytes per block). Source: ggml `ggml-common.h` block layouts.
GGUF_BLOCKS = {
    "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip


#: Block formats whose scales are themselves coded: (bits of a code, elements that share a scale, scales coded with a minimum).
SUPER_BLOCKS = {"q4_k": (4, 32, True), "q5_k": (5, 32, True), "q6_k": (6, 16, False)}


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
    """How the elements of one matrix are stored. Formats with fields of their own are subclasses: `spec.grids`.

    Args:
        kind: ``fp32 | fp16 | bf16``, ``fp8``, ``mxfp4``, ``int`` (group-affine integer grid), ``bitplane`` or ``bitlane``
            (the same grid as planes of bits), ``ternary`` (-1, 0 or 1 times a scale), or a ggml block name such as ``q4_1``.
        bits: bits of one code, 1..8, and 1..4 in planes; only for ``int`` and planes.
        group: elements along a stored row that share one scale; the last group of a row may be shorter in planes and ternary.
        sym: ``int`` and planes. True: ``w = scale * (code - 2**(bits-1))``. False: ``w = scale * code + minimum``.
        tiled: True for the layout of the native program: rows and columns are padded to whole tiles, and a group is a
            multiple of 16 (planes: of 4) or the whole row. Floats, ``int``, ``q4_k``, ``q5_k`` and ``q6_k`` have one; planes
            and ``ternary`` have no other.

    Raises:
        SpecError: unknown kind, bits outside 1..8, a group below 1, or a kind or group that has no tiles.
    """

    kind: str
    bits: int = 0
    group: int = 0
    sym: bool = True
    tiled: bool = False

    def __post_init__(self) -> None:
        if self.kind in LOOKUP_KINDS:
            self._check_lookup()
        elif self.tiled and not self.is_float and self.kind not in ("int", *SUPER_BLOCKS):
            raise SpecError(
                f"{self.kind} weights have no tiled layout. Those with one: floats, int, {', '.join(SUPER_BLOCKS)}."
            )
        if self.kind == "int":
            if not 1 <= self.bits <= 8:
                raise SpecError(f"int weights: bits={self.bits} is not possible. Allowed: 1..8. Try bits=4.")
            if self.group < 1:
                raise SpecError(f"int weights: group={self.group} is not possible. Allowed: 1 or more. Try group=32.")
        elif self.kind not in (*FLOAT_KINDS, *SCALED_KINDS, *LOOKUP_KINDS, *GGUF_BLOCKS):
            from trimtab.errors import unknown

            raise unknown("weight format", self.kind, (*FLOAT_KINDS, *SCALED_KINDS, "int", *LOOKUP_KINDS, *GGUF_BLOCKS))

    def _check_lookup(self) -> None:
        if not self.tiled:
            raise SpecError(f"{self.kind} weights have a tiled layout only.")
        if self.kind != "ternary" and not 1 <= self.bits <= 4:
            raise SpecError(f"{self.kind} weights: bits={self.bits} is not possible. Allowed: 1..4. Try bits=4.")
        if self.group < 1:
            raise SpecError(
                f"{self.kind} weights: group={self.group} is not possible. Allowed: 1 or more. Try group=64."
            )

    @property
    def is_float(self) -> bool:
        """True for plain floating-point storage, which needs no scales."""
        return self.kind in FLOAT_KINDS

    @property
    def is_rounded(self) -> bool:
        """True for codes that a quantizer chose: rounding them to another grid would round twice."""
        return self.kind == "int" or self.kind in LOOKUP_KINDS

    def input_flops(self, cols: int) -> int:
        """FLOPs that prepare one input [cols] before the product, beside what its product does."""
        del cols
        return 0

    def buffers(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        """Return the buffers of a stored [rows, cols] matrix.

        Raises:
            SpecError: `cols` does not divide into groups or blocks.
        """
        if self.tiled:
            return self._tiles(rows, cols)
        if self.is_float:
            return (Buffer("data", self.kind, (rows, cols)),)
        if self.kind == "int":
            check_group(self.group, cols)
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

    def _tiles(self, rows: int, cols: int) -> tuple[Buffer, ...]:
        tiles = -(-rows // TILE_ROWS)
        if self.kind == "bf16":
            return (Buffer("data", "bf16", (tiles, -(-cols // 2), TILE_ROWS, 2)),)
        if self.is_float:
            return (Buffer("data", self.kind, (tiles, cols, TILE_ROWS)),)
        units = -(-cols // UNIT_COLS)
        if self.kind in LOOKUP_KINDS:
            return self._lookups(tiles, cols)
        if self.kind == "int":
            # A last group that is shorter is possible where groups are whole units.
            if self.group != cols and (self.group % 16 or (cols % self.group and self.group % UNIT_COLS)):
                raise SpecError(
                    f"{self} on rows of {cols}: tiles need groups of 16, 32, 48, ... that divide the row, or one group."
                )
            groups = (tiles, -(-cols // self.group), TILE_ROWS)
            found = [Buffer("codes", "u8", (tiles, units, 64 * self.bits)), Buffer("scale", "fp16", groups)]
            return (*found, *(() if self.sym else (Buffer("minimum", "fp16", groups),)))
        bits, group, minimum = SUPER_BLOCKS[self.kind]
        if cols % 256:
            raise SpecError(f"{self.kind} stores blocks of 256: a row of {cols} does not divide.")
        blocks, kinds = cols // 256, 2 if minimum else 1
        return (
            Buffer("codes", "u8", (tiles, units, 64 * bits)),
            Buffer("scale", "fp16", (tiles, blocks, kinds, TILE_ROWS)),
            Buffer("sub", "u8", (tiles, blocks, kinds, 256 // group, TILE_ROWS)),
        )

    def _lookups(self, tiles: int, cols: int) -> tuple[Buffer, ...]:
        scales = (tiles, -(-cols // self.group), TILE_ROWS)
        if self.kind == "ternary":
            whole, rest = divmod(cols, self.group)
            units = whole * -(-self.group // TERNARY_COLS) + -(-rest // TERNARY_COLS)
            pieces = units + -(-units // TERNARY_SHARED)
            return Buffer("codes", "u8", (tiles, pieces * TERNARY_BYTES)), Buffer("scale", "fp16", scales)
        if self.group % 4 and self.group != cols:
            raise SpecError(f"{self} on rows of {cols}: group={self.group} is not a multiple of 4, or the whole row.")
        found = (Buffer("codes", "u8", (tiles, -(-cols // UNIT_COLS), self.bits, 64)), Buffer("scale", "fp16", scales))
        return found if self.sym else (*found, Buffer("minimum", "fp16", scales))

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a stored [rows, cols] matrix: the sum over its buffers."""
        return sum(buffer.nbytes for buffer in self.buffers(rows, cols))

    def row_nbytes(self, cols: int) -> int:
        """Bytes that one row of many takes: what a lookup reads."""
        return self.nbytes(TILE_ROWS, cols) // TILE_ROWS if self.tiled else self.nbytes(1, cols)

    def __str__(self) -> str:
        name = self.kind
        if self.kind == "int" or self.kind in LOOKUP_KINDS:
            name = f"{self.kind}{self.bits or ''}-g{self.group}{'' if self.sym else '-asym'}"
        return f"{name}-tiled" if self.tiled and self.kind not in LOOKUP_KINDS else name


FP32 = WeightFormat(kind="fp32")
FP16 = WeightFormat(kind="fp16")
BF16 = WeightFormat(kind="bf16")


#: ggml types that other formats hold as they are: what a matrix in them becomes when it is read.
FILE_FORMATS = {
    "mxfp4": WeightFormat(kind="mxfp4"),
    "tq1_0": WeightFormat(kind="ternary", group=256, tiled=True),
    "tq2_0": WeightFormat(kind="ternary", group=256, tiled=True),
}
#: Every ggml type that is read, but for floats: (elements per block, bytes per block).
FILE_BLOCKS = {**GGUF_BLOCKS, "mxfp4": (32, 17), "tq1_0": (256, 54), "tq2_0": (256, 66)}


def float_format(dtype: str) -> WeightFormat:
    """The format of a floating dtype, any accepted spelling."""
    return WeightFormat(kind=dtype_name(dtype))


def check_group(group: int, cols: int) -> None:
    """Refuse a group that does not divide a row.

    Raises:
        SpecError: names the groups that do.
    """
    if cols % group:
        raise SpecError(
            f"group={group} does not divide the row length {cols}. "
            f"Allowed: {_divisors(cols)}. Try group={_nearest_divisor(cols, group)}."
        )


def _divisors(number: int, largest: int = 256) -> str:
    return ", ".join(str(d) for d in range(1, min(number, largest) + 1) if number % d == 0)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), -d))
