"""olive: 4-bit weights and activations in pairs, where an outlier takes the place of its neighbour."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from trimtab.errors import SpecError, unknown
from trimtab.spec.grids import PairFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.product import ExponentInteger
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.blocks import check_floats, matrices, weight_paths

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.linear._pair_search import PairSearch
    from trimtab.techniques.materials import Materials

#: Normal types by the letter that stands for them where every matrix has one of its own.
LETTERS = {"i": "int", "f": "flint"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Olive(Technique):
    """Outlier-victim pairs: of two neighbours along the input one may be an outlier on a wider grid, the other is then zero.

    Weights have one scale a row, activations one a matrix, both searched for by squared error; activations on the first calibration
    window, which begins with the first token of a text and so holds the massive activations. Exact: bytes; products of integers
    shifted by exponents, summed in int32. Approximated: weights and activations. `abits=16` leaves activations floats.
    `normal=auto` takes, for the weights and the inputs of every matrix, the normal type of less squared error: it resolves to a
    letter a matrix (i int, f flint), weights first, then inputs.

    Unlike the paper: activation outliers are cut where sums of a row could leave int32; of two outliers in a pair the larger is
    kept (`both=left` is what the authors' code does).

    Source: Guo et al., OliVe, ISCA 2023, arXiv 2304.07493.
    """

    name: ClassVar[str] = "olive"
    summary: ClassVar[str] = "weights and activations of 4 or 8 bits, outliers in the place of their neighbours"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    paper: ClassVar[int | None] = 76

    wbits: int = param(4, "bits of a weight", "4, 8")
    abits: int = param(4, "bits of an activation; 16 = as they are", "4, 8, 16")
    normal: str = param("auto", "normal values at 4 bits; auto = the better for each matrix", "int, flint, auto")
    sigma: float = param(3.0, "standard deviations of the range that is searched", "above 0")
    search: str = param("75:250:2", "percentages of that range tried as threshold", "first:end:step")
    kv: bool = param(False, "keys and values too", "0")
    both: str = param("larger", "which of two outliers in a pair is kept", "larger, left")

    def __post_init__(self) -> None:
        if self.wbits not in (4, 8):
            raise SpecError(
                f"olive: wbits={self.wbits} is not possible: OliVe pairs need 4 or 8 bits. Allowed: 4, 8. Try wbits=4."
            )
        if self.abits not in (4, 8, 16):
            raise SpecError(
                f"olive: abits={self.abits} is not possible: OliVe pairs need 4 or 8 bits. Allowed: 4, 8, or 16 for floats."
            )
        if self.normal not in ("auto", *LETTERS.values()) and set(self.normal) - {*LETTERS}:
            raise SpecError(f"olive: {unknown('normal type', self.normal, ('int', 'flint', 'auto'))} Allowed: those.")
        if self.normal == "flint" and 8 in (self.wbits, self.abits):
            raise SpecError("olive: flint has 4 bits. Allowed with 8 bits: normal=int, auto. Try normal=auto.")
        if not 0 < self.sigma < 100:
            raise SpecError(f"olive: sigma={self.sigma} is not possible. Allowed: above 0. Try sigma=3.")
        if self.kv:
            raise SpecError("olive: kv=1 is not built. Allowed: kv=0; add kivi or load with an int4 cache for it.")
        if self.both not in ("larger", "left"):
            raise SpecError(f"olive: both={self.both} is not possible. Allowed: larger, left.")
        _ = self.percentages

    @property
    def percentages(self) -> tuple[int, int, int]:
        """First, end and step of the search.

        Raises:
            SpecError: not three numbers that make a range.
        """
        try:
            first, end, step = (int(part) for part in self.search.split(":"))
        except ValueError:
            first = end = step = 0
        if not (0 < first < end and step > 0):
            raise SpecError(
                f"olive: search={self.search} is not possible. Allowed: first:end:step. Try search=75:250:2."
            )
        return first, end, step

    @property
    def unresolved(self) -> bool:
        """Whether text or a search over the weights is needed."""
        return self.normal == "auto" or self.abits != 16

    def check(self, spec: ModelSpec) -> None:
        """Refuse rows with an odd number of weights, matrices that are rounded or transposed, and another model's letters."""
        found = [*matrices(spec)]
        letters = len(found) * (1 if self.abits == 16 else 2)
        if self.normal not in ("auto", *LETTERS.values()) and len(self.normal) != letters:
            raise SpecError(
                f"olive: normal holds {len(self.normal)} letters and {spec.name} needs {letters}. Allowed: one for every matrix, "
                "weights first. Try normal=auto."
            )
        for path, node in found:
            check_floats(self.name, spec, path, node)
            if node.act != "none":
                raise SpecError(
                    f"olive: {path} codes its input as {node.act}. Allowed: none. Load it in another dtype."
                )
            if node.k % 2:
                raise SpecError(
                    f"olive: {path} of {spec.name} has rows of {node.k}: pairs need an even number. Allowed: even rows."
                )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Format and product of every linear inside the layers."""
        found = [*matrices(spec)]
        for index, (path, node) in enumerate(found):
            yield Edit(path, "format", self.format(node, self._letter(index, self.wbits)))
            if self.abits != 16:
                normal = self._letter(len(found) + index, self.abits)
                yield Edit(path, "product", ExponentInteger(bits=self.abits, normal=normal, both=self.both))

    def format(self, node: LinearSpec, normal: str = "int") -> PairFormat:
        """Pairs with one scale a row."""
        return PairFormat(bits=self.wbits, normal=normal, group=node.k)

    def _letter(self, index: int, bits: int) -> str:
        """Normal type of a matrix or its input; before `resolve`, which finds it, int: it has the same bytes."""
        if bits == 8 or self.normal == "auto":
            return "int"
        return self.normal if self.normal in LETTERS.values() else LETTERS[self.normal[index]]

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Settle the normal type of every matrix and of its inputs."""
        if self.normal != "auto":
            return self
        if self.wbits == 8 and self.abits != 4:
            return dataclasses.replace(self, normal="int")
        self.check(model.spec)
        search = self._search(model.weights, model.spec, materials)
        paths = [path for path, _ in matrices(model.spec)]
        inputs = search.input_normals() if self.abits != 16 else {}
        found = search.weight_normals()
        chosen = [found[path] for path in paths] + [inputs[path] for path in paths if inputs]
        return dataclasses.replace(self, normal="".join(normal[0] for normal in chosen))

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Search the scales, code the weights, and store the scale of every matrix's inputs."""
        import numpy as np

        from trimtab.runtime.numerics import decode
        from trimtab.runtime.numerics.pairs import encode_pairs_with
        from trimtab.runtime.weights.packed import Packed, packed_float

        search = self._search(weights, old, materials)
        replaced = {}
        for path, node in weight_paths(new):
            if isinstance(node.product, ExponentInteger):
                scale = search.input_scale(path, node.product.normal)
                replaced[f"{path}.act_scale"] = packed_float(np.array([scale], np.float32), "fp32")
            format = node.format
            if isinstance(format, PairFormat) and weights[path].format != format:
                w_NK = decode(weights[path])
                buffers = encode_pairs_with(w_NK, format, search.scales(path, format.normal), self.both)
                replaced[path] = Packed(format, (node.n, node.k), buffers)
        return weights | replaced

    def _search(self, weights: Weights, spec: ModelSpec, materials: Materials) -> PairSearch:
        from trimtab.techniques.linear._pair_search import PairSearch

        return PairSearch(
            weights=weights, spec=spec, materials=materials, wbits=self.wbits, abits=self.abits,
            search=self.percentages, sigma=self.sigma, both=self.both,
        )  # fmt: skip
