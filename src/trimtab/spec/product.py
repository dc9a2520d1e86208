"""How the product with a matrix is computed: what a result depends on beyond the bytes of the matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import SpecError

#: Which values share a scale: those of a row of the input and of a row of the matrix; of a row of the input, and the whole
#: matrix; the whole input, and the whole matrix.
GRANULARITIES = ("vector", "row", "tensor")
#: What outlier columns are multiplied by: 16-bit originals, or what the int8 codes stand for.
OUTLIER_SOURCES = ("fp", "dequant")
#: What a table keeps of each partial sum: one byte, two, or the float itself (an exact reference, not a fast path).
TABLES = ("i8", "i16", "f32")
#: ``lut`` looks partial sums up, ``vnni`` multiplies int8 codes; ``auto`` takes whichever was faster when timed.
KERNELS = ("auto", "lut", "vnni")
ISAS = ("auto", "scalar", "avx2", "avx512")
#: Of bit-serial products.
ACT_SCALES = ("absmax", "percentile")
BACKENDS = ("auto", "cpu-popcnt", "cpu-vnni", "ref")
#: Share of a normal distribution beyond the largest value of the evenly spaced grid without zero that codes it with the least squared
#: error, by bits 1..8 (computed; for the grids see Max, Quantizing for minimum distortion, 1960).
CLIPPED = (0.42494, 0.13530, 0.04026, 0.01194, 0.00354, 0.00105, 0.00030, 0.00009)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product with the values of the matrix; its kernel is the one of the format."""

    @property
    def codes_input(self) -> bool:
        """Whether activations are coded before they are multiplied, so that codes go into the product."""
        return False

    def side_nbytes(self, n: int, k: int) -> int:
        """Bytes of the weights that stand beside a matrix [n, k] for this product."""
        del n, k
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupTable(Product):
    """A product with few tokens by tables of partial sums; more tokens are multiplied with the decoded matrix.

    Args:
        table: what is kept of a partial sum, of `TABLES`. Ternary weights have exact integer tables for ``i8`` and ``i16`` alike.
        act_group: activations that share the scale of their tables, a multiple of 4; 0 = a whole row.
        fast_agg: rounding averages of bytes in place of sums: lossy. Needs ``table="i8"``.
        kernel: of `KERNELS`.
        isa: instruction set, of `ISAS`.
        threads: workers; 0 = as many as the engine has.

    Raises:
        SpecError: a value outside of these.
    """

    table: str = "i8"
    act_group: int = 32
    fast_agg: bool = False
    kernel: str = "auto"
    isa: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        for what, asked, allowed in (
            ("table", self.table, TABLES),
            ("kernel", self.kernel, KERNELS),
            ("isa", self.isa, ISAS),
        ):
            if asked not in allowed:
                raise SpecError(f"{what}={asked} is not possible. Allowed: {', '.join(allowed)}.")
        if self.act_group < 0 or self.act_group % 4:
            raise SpecError(
                f"act_group={self.act_group} is not a multiple of 4. Allowed: 32, 64, or 0 for a whole row."
            )
        if self.fast_agg and (self.table != "i8" or self.act_group not in (32, 64)):
            raise SpecError(
                f"fast_agg averages bytes in trees of 8 or 16: table={self.table}, act_group={self.act_group} do not allow it. "
                "Allowed: table=i8 with act_group=32 or 64."
            )
        if not 0 <= self.threads <= 1024:
            raise SpecError(
                f"threads={self.threads} is not possible. Allowed: 1..1024, or 0 for all this process may use."
            )


#: What partial sums are rounded to after every addition; ``lmul-m``: to as many bits of mantissa as the operands keep.
ACCUMULATORS = ("fp32", "bf16", "e4m3", "lmul-m")
#: Bits of the stored mantissa of a float, and of its exponent.
MANTISSA_BITS = {"fp32": 23, "bf16": 7, "fp16": 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded(Product):
    """Products of floats whose operands keep few bits of mantissa (ties to even) and any exponent; L-Mul is held against it.

    Args:
        mantissa: 3 is that of e4m3, 2 that of e5m2, 23 rounds nothing.
        acc: of `ACCUMULATORS`; sums go in the order of the terms.
        ste: gradients are those of exact products.

    Raises:
        SpecError: a value outside of these.
    """

    mantissa: int = 23
    acc: str = "fp32"
    ste: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.mantissa <= 23:
            raise SpecError(f"mantissa={self.mantissa} is not possible. Allowed: 1..23.")
        _check_acc(self.acc)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lmul(Product):
    """A product of floats as one integer addition of their exponent and mantissa fields, plus 2^-l of a mantissa.

    Args:
        mantissa: bits of mantissa that operands keep.
        exp: bits of the exponent: 8 as fp32 has them; 4 or 5: operands and products stay in the range of e4m3 or e5m2.
        acc: of `ACCUMULATORS`; sums go in the order of the terms.
        round: ``trunc`` cuts the mantissas of operands, ``nearest`` rounds them.
        carry: ``int``: what the sum of the mantissas carries goes into the exponent, as an adder has it; ``formula``: (1 + sum
            of the mantissas) times the power of two.
        offset: ``auto`` for the l of the paper, ``none`` for no offset (Mitchell's product), or l itself.
        ste: gradients are those of exact products; without it there are none.

    Raises:
        SpecError: a value outside of these.

    Source: Luo and Sun, Addition is All You Need, arXiv 2410.00907, equation 1.
    """

    mantissa: int = 4
    exp: int = 8
    acc: str = "fp32"
    round: str = "trunc"
    carry: str = "int"
    offset: str | int = "auto"
    ste: bool = False

    def __post_init__(self) -> None:
        if self.mantissa < 2:
            raise SpecError(
                f"mantissa={self.mantissa} is not possible: l(m) is undefined below 2. Allowed: 2..23. Try mantissa=2."
            )
        if self.mantissa > 23:
            raise SpecError(f"mantissa={self.mantissa} is not possible. Allowed: 2..23. Try mantissa=23.")
        if self.exp not in (4, 5, 8):
            raise SpecError(f"exp={self.exp} is not possible. Allowed: 4, 5, 8. Try exp=8.")
        _check_acc(self.acc)
        for what, asked, allowed in (
            ("round", self.round, ("trunc", "nearest")),
            ("carry", self.carry, ("int", "formula")),
        ):
            if asked not in allowed:
                raise SpecError(f"{what}={asked} is not possible. Allowed: {', '.join(allowed)}.")
        if self.offset not in ("auto", "none") and not (
            isinstance(self.offset, int) and 1 <= self.offset <= self.mantissa
        ):
            raise SpecError(
                f"offset={self.offset} is not possible. Allowed: auto, none, or l = 1..{self.mantissa} for an offset of 2^-l."
            )

    @property
    def shift(self) -> int | None:
        """The l of the offset 2^-l; None = no offset.

        >>> [Lmul(mantissa=m).shift for m in (2, 3, 4, 5, 23)]
        [2, 3, 3, 4, 4]
        """
        if self.offset == "none":
            return None
        if isinstance(self.offset, int):
            return self.offset
        return self.mantissa if self.mantissa <= 3 else 3 if self.mantissa == 4 else 4


def _check_acc(acc: str) -> None:
    if acc not in ACCUMULATORS:
        raise SpecError(f"acc={acc} is not possible. Allowed: {', '.join(ACCUMULATORS)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BitSerial(Product):
    """Bipolar codes times bipolar codes, plane by plane of bits: exact integers, scaled once at the end.

    Every token is coded with one scale; the matrix must be in bipolar planes.

    Args:
        abits: bits of an activation, 1..8.
        ascale: largest value of a token: ``absmax``, or ``percentile``, which cuts off the share `CLIPPED` of its magnitudes.
        backend: ``cpu-popcnt`` counts bits, ``cpu-vnni`` multiplies the codes as bytes, ``ref`` decodes them and multiplies int64;
            all give the same integers. ``auto`` takes the faster of the first two for the tokens at hand, timed once.

    Raises:
        SpecError: a value outside of these.

    Source: Ma et al., arXiv 2409.17870, section 3.
    """

    abits: int = 8
    ascale: str = "absmax"
    backend: str = "auto"

    def __post_init__(self) -> None:
        if not 1 <= self.abits <= 8:
            raise SpecError(
                f"abits={self.abits} is not possible. Allowed: 1..8. Try abits={min(max(self.abits, 1), 8)}."
            )
        if self.ascale not in ACT_SCALES:
            raise SpecError(f"ascale={self.ascale} is not possible. Allowed: {', '.join(ACT_SCALES)}.")
        if self.backend == "triton":
            raise SpecError(f"backend=triton needs a GPU kernel, and there is none. Allowed: {', '.join(BACKENDS)}.")
        if self.backend not in BACKENDS:
            raise SpecError(f"backend={self.backend} is not possible. Allowed: {', '.join(BACKENDS)}.")

    @property
    def codes_input(self) -> bool:
        return True

    @property
    def clipped(self) -> float:
        """Share of the magnitudes of a token above its largest value."""
        return CLIPPED[self.abits - 1] if self.ascale == "percentile" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExponentInteger(Product):
    """Outlier-victim pairs times outlier-victim pairs: integers shifted by exponents, summed in int32.

    Activations are coded as pairs along the row with one scale for the matrix, the weight ``PATH.act_scale``, found on text.

    Args:
        bits: of an activation, 4 or 8.
        normal: its normal values, as those of `spec.grids.PairFormat`.
        both: which of two outliers in a pair is kept, ``larger`` or ``left``.

    Raises:
        SpecError: a value outside of these.

    Source: Guo et al., OliVe, arXiv 2304.07493, section 4.
    """

    bits: int = 4
    normal: str = "int"
    both: str = "larger"

    def __post_init__(self) -> None:
        from trimtab.spec.grids import PairFormat

        PairFormat(bits=self.bits, normal=self.normal, group=2)
        if self.both not in ("larger", "left"):
            raise SpecError(f"both={self.both} is not possible. Allowed: larger, left.")

    @property
    def codes_input(self) -> bool:
        return True

    def side_nbytes(self, n: int, k: int) -> int:
        return 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Vector(Product):
    """A product of int8 codes with int8 rows, exact in int32; columns of the input that hold outliers are multiplied in floats.

    A column is an outlier if some row of the call has a magnitude of at least `threshold` there.

    Args:
        threshold: above 0; infinity = no column is one.
        source: of `OUTLIER_SOURCES`. ``fp`` keeps originals as a side weight ``<path>.outliers``, fp16 [columns, n]: all of
            them, since any may be asked for, or those of `columns`.
        columns: these are the outliers of every call, whatever their values; None = found anew in each.
        granularity: of `GRANULARITIES`.
        zeropoint: inputs are coded between their minimum and maximum, not symmetrically.
        expected: outlier columns of a call before it was seen.

    Raises:
        SpecError: a value outside of these.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339; models of 6.7B to 13B parameters have at most 7 outlier columns.
    """

    threshold: float = 6.0
    source: str = "fp"
    columns: tuple[int, ...] | None = None
    granularity: str = "vector"
    zeropoint: bool = False
    expected: int = 7

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise SpecError(
                f"threshold={self.threshold} is not possible. Allowed: numbers above 0, or inf for none. Try 6.0."
            )
        for what, asked, allowed in (
            ("outlier_source", self.source, OUTLIER_SOURCES),
            ("granularity", self.granularity, GRANULARITIES),
        ):
            if asked not in allowed:
                raise SpecError(f"{what}={asked} is not possible. Allowed: {', '.join(allowed)}.")

    @property
    def decomposes(self) -> bool:
        """Whether any column can be multiplied apart."""
        return bool(self.columns) if self.columns is not None else math.isfinite(self.threshold)

    def columns_kept(self, k: int) -> int:
        """Columns of the side weight."""
        if self.source != "fp" or not self.decomposes:
            return 0
        return k if self.columns is None else len(self.columns)

    def outliers_expected(self, k: int) -> int:
        """Outlier columns of an input of k, before it was seen."""
        if not self.decomposes:
            return 0
        return min(self.expected, k) if self.columns is None else len(self.columns)

    def side_nbytes(self, n: int, k: int) -> int:
        """Bytes of the 16-bit columns."""
        return 2 * n * self.columns_kept(k)


EXACT = Product()
