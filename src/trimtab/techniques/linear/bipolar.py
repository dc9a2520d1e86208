"""bipolar: weights and activations of 1 to 8 bits whose planes are matrices of -1 and 1, multiplied by counting bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import SpecError
from trimtab.spec.bipolar import BipolarPlanes, check_word_group
from trimtab.spec.formats import WeightFormat
from trimtab.spec.grids import GridFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.product import BitSerial
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.blocks import check_floats, matrices, weight_paths
from trimtab.techniques.sweeping import sweep_blocks

if TYPE_CHECKING:
    import numpy as np

    from trimtab.runtime.weights.packed import Packed, Weights
    from trimtab.techniques.materials import Materials

#: Shares of ``max|w| / (2**bits - 1)`` that are tried as scales of a group.
SHARES = tuple(1 - step / 20 for step in range(13))
#: Calibration tokens, and tokens of a text of them.
SAMPLES, WINDOW = 12288, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Bipolar(Technique):
    """Weights and activations on the odd integers ``-(2**n - 1) ... 2**n - 1``, multiplied plane by plane of bits.

    Every plane is a matrix of -1 and 1 that is worth 2**i, so a product of n by a bits is n * a counts of bits, added up in
    registers. Exact: bytes, codes, and the integer every product of codes gives. Approximated: weights and, unless `abits` is 16,
    activations. There is no zero: a weight or activation of 0 becomes one of -s and s. More tokens than a few are multiplied
    as bytes where that is faster; the integers are the same.

    Unlike the paper: kernels are of the CPU; `wscale=gptq` makes up for the missing zero on calibration text, block by block, with
    every token weighing the same.

    Source: Ma et al., Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores, arXiv 2409.17870.
    """

    name: ClassVar[str] = "bipolar"
    summary: ClassVar[str] = "weights and activations of 1 to 8 bits without a zero, multiplied by counting bits"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    paper: ClassVar[int | None] = 13

    wbits: int = param(2, "bits of a weight", "1..8")
    abits: int = param(2, "bits of an activation; 16 = as it is", "1..8, 16")
    group: int = param(
        0, "weights along the input that share a scale; 0 = a row", "0, multiples of 32 that divide the row"
    )
    wscale: str = param(
        "mse", "absmax: the range; mse: least squared error; gptq: errors made up for on text", "absmax, mse, gptq"
    )
    ascale: str = param(
        "absmax", "largest value of a token; percentile: cut where it is best for normal inputs", "absmax, percentile"
    )
    backend: str = param(
        "auto", "kernel of the product; auto takes what was faster when timed", "auto, cpu-popcnt, cpu-vnni, ref"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.wbits <= 8:
            raise SpecError(
                f"bipolar: wbits={self.wbits} is out of range. Allowed: 1..8. Try wbits={min(max(self.wbits, 1), 8)}."
            )
        if self.abits != 16 and not 1 <= self.abits <= 8:
            raise SpecError(
                f"bipolar: abits={self.abits} is out of range. Allowed: 1..8, or 16 to leave activations as they are. "
                f"Try abits={min(max(self.abits, 1), 8)}."
            )
        if self.wscale not in ("absmax", "mse", "gptq"):
            raise SpecError(f"bipolar: wscale={self.wscale} is not possible. Allowed: absmax, mse, gptq.")
        if self.group and (self.group < 32 or self.group % 32):
            near = max(32, round(self.group / 32) * 32)
            raise SpecError(
                f"bipolar: group={self.group} is not possible. Allowed: 0 (a row), multiples of 32. Try group={near}."
            )
        try:
            BitSerial(abits=min(self.abits, 8), ascale=self.ascale, backend=self.backend)
        except SpecError as error:
            raise SpecError(f"bipolar: {error}") from None
        if self.abits == 16 and self.backend != "auto":
            raise SpecError(
                f"bipolar: backend={self.backend} multiplies codes: activations must be quantized. "
                "Allowed: abits=1..8 with it, or backend=auto with abits=16."
            )

    @property
    def unresolved(self) -> bool:
        """Whether calibration text is needed."""
        return self.wscale == "gptq"

    def grid(self, node: LinearSpec) -> GridFormat:
        """Codes and scales of a matrix, by rows."""
        return GridFormat(grid="bipolar", bits=self.wbits, group=self.group or node.k)

    def format(self, node: LinearSpec) -> WeightFormat:
        """How a matrix is held: in planes where its activations are coded."""
        if self.abits == 16:
            return self.grid(node)
        return BipolarPlanes(bits=self.wbits, group=self.group or node.k)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a group that does not fit a row, naming those that do, and matrices that are rounded or transposed."""
        for path, node in matrices(spec):
            check_floats(self.name, spec, path, node)
            if node.act != "none":
                raise SpecError(
                    f"bipolar: {path} of {spec.name} codes its input as {node.act}. Allowed: inputs in floats. "
                    "Load the model in another dtype."
                )
            try:
                check_word_group(self.group or node.k, node.k)
            except SpecError as error:
                raise SpecError(f"bipolar: {path} of {spec.name}: {error}") from None

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Format and product of every linear inside the layers."""
        for path, node in matrices(spec):
            yield Edit(path, "format", self.format(node))
            if self.abits != 16:
                product = BitSerial(abits=self.abits, ascale=self.ascale, backend=self.backend)
                yield Edit(path, "product", product)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Choose scales; those of the range follow from the format alone."""
        if self.wscale == "gptq":
            return self._swept(weights, old, new, materials)
        if self.wscale == "absmax":
            return weights
        from trimtab.runtime.numerics import decode
        from trimtab.runtime.numerics.grids import encode_grid_with, grid_scales

        replaced = {}
        for path, node in weight_paths(new):
            w_NK, grid = decode(weights[path]), self.grid(node)
            replaced[path] = self._held(
                node, w_NK.shape, encode_grid_with(w_NK, grid, *grid_scales(w_NK, grid, None, SHARES))
            )
        return weights | replaced

    def _held(self, node: LinearSpec, shape: tuple[int, ...], buffers: dict[str, np.ndarray]) -> Packed:
        from trimtab.runtime.numerics.bipolar import planes_of
        from trimtab.runtime.weights.packed import Packed

        packed, format = Packed(self.grid(node), (shape[0], shape[1]), buffers), self.format(node)
        return planes_of(packed, format) if isinstance(format, BipolarPlanes) else packed

    def _swept(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        from trimtab.model.grid_rule import GridRule

        nodes = dict(weight_paths(new))
        return sweep_blocks(
            f"bipolar:wbits={self.wbits},group={self.group},planes={self.abits != 16}", weights, old, new, materials,
            group_of=lambda path: self.grid(nodes[path]).group,
            rule_of=lambda path, shape, order: GridRule(self.grid(nodes[path]), shape, order, SHARES),
            stored=lambda path, rule: self._held(nodes[path], rule.codes.shape, rule.buffers()),
            samples=SAMPLES, window=WINDOW,
        )  # fmt: skip
