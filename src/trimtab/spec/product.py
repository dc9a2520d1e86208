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


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product with the values of the matrix; its kernel is the one of the format."""

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
