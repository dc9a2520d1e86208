"""The leaves of a model: matrices, tables, norms, convolutions and rotations. Each knows its parameters and its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import ACT_KINDS, BF16, WeightFormat
from trimtab.spec.product import EXACT, Product
from trimtab.spec.tree import Node

#: One token after the other (gemv), blocks of tokens that share what is read (flat), the matrix decoded to floats first (gemm).
PRODUCT_KERNELS = ("gemv", "flat", "gemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec(Node):
    """``y[T, n] = x[T, k] @ W.T (+ bias)``.

    Args:
        n: output features.
        k: input features.
        bias: True if a bias of n elements is added; it is stored in `bias_format`.
        format: how the matrix is stored.
        layout: ``row`` stores W [n, k]; ``transposed`` stores W.T [k, n] (groups then run along n), so that one input
            feature is one contiguous row that can be skipped.
        act: how the input is coded for the product: ``none`` (as the activations are: a packed matrix is then decoded for it),
            ``fp8``, ``int8`` or ``fp4``.
        kernels: which of `PRODUCT_KERNELS` may multiply; of several, the native program takes the one that is fastest for the
            tokens at hand. Results agree to the rounding of floats.
        product: how the product is computed where that is not by the values of the matrix; each kind has formats it needs.
    """

    n: int
    k: int
    bias: bool = False
    format: WeightFormat = BF16
    bias_format: WeightFormat = BF16
    layout: str = "row"
    act: str = "none"
    kernels: tuple[str, ...] = ("flat",)
    product: Product = EXACT

    def __post_init__(self) -> None:
        for name in self.kernels or ("none",):
            if name not in PRODUCT_KERNELS:
                raise unknown("product kernel", name, PRODUCT_KERNELS)
        if self.layout not in ("row", "transposed"):
            raise SpecError(f"layout '{self.layout}' is not known. Allowed: row, transposed.")
        if self.act not in ACT_KINDS:
            raise unknown("input format", self.act, ACT_KINDS)
        if self.product != EXACT and self.layout != "row":
            raise SpecError(
                "A matrix stored transposed is multiplied by its values alone: other products read it by rows."
            )

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(rows, columns) as stored: [n, k], or [k, n] when transposed."""
        return (self.n, self.k) if self.layout == "row" else (self.k, self.n)

    def num_parameters(self) -> int:
        """Weights plus bias."""
        return self.n * self.k + (self.n if self.bias else 0)

    def nbytes(self) -> int:
        """Resident bytes: every buffer of the format, what the product keeps beside it, and the bias."""
        bias = self.bias_format.nbytes(1, self.n) if self.bias else 0
        return self.format.nbytes(*self.stored_shape) + self.product.side_nbytes(self.n, self.k) + bias


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec(Node):
    """A table of n rows of k; `scale` multiplies the looked-up rows, `offset` is added to the ids (OPT positions)."""

    n: int
    k: int
    format: WeightFormat = BF16
    scale: float = 1.0
    offset: int = 0

    def num_parameters(self) -> int:
        """Elements of the table."""
        return self.n * self.k

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(self.n, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec(Node):
    """RMSNorm (``kind="rms"``) or LayerNorm (``kind="layer"``) over `size` elements; `unit_offset`: scale by 1 + w.

    `weight`: False for a norm without parameters. `product`: how the input is scaled, by its own norm and by the weights.
    """

    size: int
    kind: str = "rms"
    eps: float = 1e-5
    bias: bool = False
    unit_offset: bool = False
    format: WeightFormat = BF16
    weight: bool = True
    product: Product = EXACT

    def num_parameters(self) -> int:
        """Scale plus bias."""
        return self.size * (self.weight + self.bias)

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(1, self.size) * (self.weight + self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvSpec(Node):
    """Causal convolution over the last `kernel` tokens, every channel by itself."""

    channels: int
    kernel: int
    bias: bool = False
    format: WeightFormat = BF16

    def num_parameters(self) -> int:
        """Weights plus bias."""
        return self.channels * (self.kernel + self.bias)

    def nbytes(self) -> int:
        """Resident bytes."""
        return self.format.nbytes(self.channels, self.kernel + self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding over the first `dim` elements of a head.

    Args:
        dim: rotated elements (may be fewer than head_dim).
        theta: base.
        scaling: ``(("rope_type", "llama3"), ("factor", 8.0), ...)`` as in the HF config; empty = none.
        product: how elements meet cosine and sine.
    """

    dim: int
    theta: float = 10000.0
    scaling: tuple[tuple[str, object], ...] = ()
    product: Product = EXACT
