"""How the product with a matrix is computed: what a result depends on beyond the bytes of the matrix."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError

#: What a table keeps of each partial sum: one byte, two, or the float itself (an exact reference, not a fast path).
TABLES = ("i8", "i16", "f32")
#: ``lut`` looks partial sums up, ``vnni`` multiplies int8 codes; ``auto`` takes whichever was faster when timed.
KERNELS = ("auto", "lut", "vnni")
ISAS = ("auto", "scalar", "avx2", "avx512")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product with the values of the matrix; its kernel is the one of the format."""

    @property
    def codes_input(self) -> bool:
        """Whether activations are coded before they are multiplied, so that codes go into the product."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored beside each matrix for the product."""
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

    @property
    def nbytes(self) -> int:
        return 4


EXACT = Product()
