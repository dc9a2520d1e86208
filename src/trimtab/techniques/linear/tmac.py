"""tmac: few-bit weights as planes of bits, multiplied by looking up sums of activations instead of unpacking."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import SpecError
from trimtab.spec.formats import GGUF_BLOCKS, WeightFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.product import LookupTable
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


@dataclass(frozen=True, slots=True, kw_only=True)
class Tmac(Technique):
    """Products by table lookup for weights of 1 to 4 bits or ternary ones.

    Matrices already on an integer grid of `bits` (from a file, or from a quantizer named before) keep their codes and scales;
    others are rounded to nearest. Exact: bytes. Approximated: the weights, where they are rounded, and every table entry, by
    its rounding to `table`; with `fast_agg` also the sums. Ternary products by lookup equal those of integers with activations in
    int8. Where multiplying codes is faster, ternary weights are held in 2 bits instead of 1.67.
    More than 8 tokens at a time are multiplied with the decoded matrix.

    Unlike the paper: rows that 4 columns (ternary: 3) do not divide are padded with zeros; ternary weights need no second
    format for the rest of a row; on processors where multiplying int8 codes is faster, `kernel=auto` does that.
    """

    name: ClassVar[str] = "tmac"
    summary: ClassVar[str] = "weights of 1 to 4 bits or ternary, multiplied by table lookup on CPUs"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    paper: ClassVar[int | None] = 39

    bits: int | str = param(4, "bits of a weight", "1, 2, 3, 4, ternary")
    group: int | str = param(
        128, "weights that share a scale", "32..K, a multiple of 4 (ternary: 32..K); -1 = a row; tensor = one scale"
    )
    g: int = param(4, "activations of one table", "4; 3 with ternary")
    zp: bool = param(False, "a zero point for every group", "0, 1")
    table: str = param("i8", "what a table keeps of a sum", "i8, i16, f32")
    act_group: int | str = param(32, "activations that share a table scale", "32, 64, K")
    fast_agg: bool = param(False, "rounding averages in place of sums: lossy", "0, 1")
    isa: str = param("auto", "instruction set", "auto, scalar, avx2, avx512")
    threads: int = param(0, "workers; 0 = as many as the engine has", "0..1024")
    kernel: str = param("auto", "lut looks up, vnni multiplies codes, auto times both", "auto, lut, vnni")
    head: bool = param(False, "lm_head too, where it is not tied to the embedding", "0, 1")

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, "ternary"):
            raise SpecError(
                f"tmac: bits={self.bits} is not possible: T-MAC handles 1-4 bits or ternary. "
                "Allowed: 1, 2, 3, 4, ternary. Try bits=4."
            )
        if self.act_group not in (32, 64, "K"):
            raise SpecError(f"tmac: act_group={self.act_group} is not possible. Allowed: 32, 64, K. Try act_group=32.")
        if self.g not in ((3, 4) if self.ternary else (4,)):
            raise SpecError(
                f"tmac: g={self.g} is not possible with bits={self.bits}. Allowed: 4, and 3 with bits=ternary."
            )
        self._check_group()
        if self.ternary and (self.zp or self.fast_agg):
            raise SpecError(
                "tmac: ternary weights have no zero point and no averages. Allowed with bits=ternary: zp=0, fast_agg=0."
            )
        if self.group == "tensor" and not self.ternary:
            raise SpecError(
                "tmac: group=tensor is for bits=ternary. Allowed: 32 or more, -1. Try group=-1, one scale a row."
            )
        try:
            product = self.product
        except SpecError as error:
            raise SpecError(f"tmac: {error}") from None
        if product.fast_agg and product.kernel == "vnni":
            raise SpecError("tmac: fast_agg=1 averages table entries; kernel=vnni has none. Allowed: auto, lut.")

    def _check_group(self) -> None:
        if isinstance(self.group, str):
            if self.group != "tensor":
                raise SpecError(
                    f"tmac: group={self.group} is not possible. Allowed: 32 or more, -1 or tensor. Try group=128."
                )
            return
        if self.group == -1:
            return
        if self.group % 4 and not self.ternary:
            near = max(32, round(self.group / 4) * 4)
            raise SpecError(
                f"tmac: group={self.group} is not a multiple of g={self.g}, the activations of a table. "
                f"Allowed: multiples of {self.g} from 32 on, -1. Try group={near}."
            )
        if self.group < 32:
            raise SpecError(
                f"tmac: group={self.group} is not possible. Allowed: 32 or more, -1 or tensor. Try group=32."
            )

    @property
    def ternary(self) -> bool:
        """True for -1, 0, 1."""
        return self.bits == "ternary"

    @property
    def product(self) -> LookupTable:
        """How every linear of the layers is multiplied."""
        columns = 0 if isinstance(self.act_group, str) else self.act_group
        return LookupTable(
            table=self.table,
            act_group=columns,
            fast_agg=self.fast_agg,
            kernel=self.kernel,
            isa=self.isa,
            threads=self.threads,
        )

    def format(self, node: LinearSpec) -> WeightFormat:
        """The format of one linear: its own where it holds codes of these bits already."""
        from trimtab.runtime.numerics.lookup import grid_format

        stored = node.format
        grid = grid_format(stored, "bitplane")
        if grid is not None and grid.bits == self.bits:
            return stored
        group = node.k if isinstance(self.group, str) or self.group == -1 else self.group
        if self.ternary:
            return stored if stored.kind == "ternary" else WeightFormat(kind="ternary", group=group, tiled=True)
        assert isinstance(self.bits, int)
        return WeightFormat(kind="bitplane", bits=self.bits, group=group, sym=not self.zp, tiled=True)

    def check(self, spec: ModelSpec) -> None:
        """Refuse groups longer than a row, codes of other bits, and matrices stored transposed."""
        if self.head and spec.tie_word_embeddings:
            raise SpecError(f"tmac: head=1: the head of {spec.name} is its embedding. Try head=0.")
        for path, node in self._linears(spec):
            where = f"tmac: {path} of {spec.name}"
            wanted = self.format(node)
            if wanted != node.format and not node.format.is_float and node.format.kind not in GGUF_BLOCKS:
                raise SpecError(
                    f"{where} is rounded to {node.format} already; bits={self.bits} would round it twice. "
                    f"Use bits={node.format.bits or 'ternary'}, or start from floats."
                )
            if node.layout != "row":
                raise SpecError(
                    f"{where} is stored transposed, which table lookup cannot read. Drop what stores it so."
                )
            if node.act != "none":
                raise SpecError(f"{where} codes its input as {node.act}. Load the model in another dtype.")
            if wanted != node.format and isinstance(self.group, int) and self.group > node.k:
                raise SpecError(
                    f"{where}: group={self.group} is longer than its rows of {node.k}. Allowed: 32..{node.k}. Try group=-1."
                )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Format and product of every linear inside the layers."""
        for path, node in self._linears(spec):
            wanted = self.format(node)
            if wanted != node.format:
                yield Edit(path, "format", wanted)
            yield Edit(path, "product", self.product)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """One scale for a whole matrix is more than a format says; all else is re-encoding."""
        if self.group != "tensor":
            return weights
        from trimtab.runtime.numerics import decode
        from trimtab.runtime.numerics.lookup import encode_ternary
        from trimtab.techniques.apply import linear_weights

        replaced = {}
        for path, node in linear_weights(new):
            if node.product == self.product and node.format.kind == "ternary" and weights[path].format != node.format:
                replaced[path] = encode_ternary(decode(weights[path]), node.format, one_scale=True)
        return weights | replaced

    def _linears(self, spec: ModelSpec) -> Iterable[tuple[str, LinearSpec]]:
        return (
            (path, node)
            for path, node in spec.linears()
            if (path.startswith("layers.") and not path.endswith("router")) or (self.head and path == "lm_head")
        )
