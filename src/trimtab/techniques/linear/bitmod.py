"""bitmod: every group of weights takes the best of four small floats that differ in one special value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import SpecError, unknown
from trimtab.spec.formats import MX_BLOCK, WeightFormat
from trimtab.spec.grids import GridFormat
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.blocks import check_floats, matrices, weight_paths
from trimtab.techniques.linear.awq import Awq

if TYPE_CHECKING:
    import torch

    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials

#: Bits of a code by type: the mixtures have 3 and 4 bits, and fall back to integers above.
TYPES = {
    "bitmod": (3, 4, 5, 6, 8), "er": (3, 4), "ea": (3, 4), "ant": (3, 4), "fp": (3, 4, 6), "int": (3, 4, 5, 6, 8),
    "intasym": (3, 4, 5, 6, 8), "mx": (3, 4, 6),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _AwqOnGrid(Awq):
    """AWQ with the choice of a type in the place of its integer grid."""

    grid: GridFormat

    @property
    def format(self) -> WeightFormat:
        return self.grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmod(Technique):
    """Weights of 3 or 4 bits on mixed grids: 0, 1, 2, 4 (3 bits) or e2m1 (4 bits), plus one value in place of minus zero.

    Every group tries the special values +-3 and +-6 (+-10 and +-16 of 12 at 4 bits), each with a scale of its own, and keeps the
    one of least squared error. Exact: bytes, codes, the type of every group. Approximated: the weights; activations stay floats.
    With 5, 6 or 8 bits weights are symmetric integers. `types` holds the rivals of the paper on the same groups.

    `base=awq` scales columns and searches for ranges as `awq` does, with the choice of a type inside of that search; `metric=awq`
    weighs errors alone. Unlike the paper: intasym keeps its scale and minimum in fp16 whatever `scale_bits`; mx has powers of
    two as scales.

    Source: Chen et al., BitMoD, HPCA 2025, arXiv 2411.11745.
    """

    name: ClassVar[str] = "bitmod"
    summary: ClassVar[str] = "weights of 3 or 4 bits; every group takes the best of four small floats"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    paper: ClassVar[int | None] = 43

    bits: int = param(3, "bits of a code", "3, 4, 5, 6, 8")
    group: int = param(128, "weights along the input that share scale and type", "multiples of 16 that divide the row")
    types: str = param("bitmod", "grids a group may choose from", ", ".join(TYPES))
    scale_bits: int = param(8, "bits of a scale: 8 = multiples of an fp16 step per row, 16 = fp16", "8, 16")
    metric: str = param("mse", "error a type is chosen by; awq: weighted by mean squares of the inputs", "mse, awq")
    base: str = param("rtn", "rtn: weights as they are; awq: columns scaled and ranges searched first", "rtn, awq")

    def __post_init__(self) -> None:
        if self.types not in TYPES:
            raise SpecError(f"bitmod: {unknown('type', self.types, TYPES)} Allowed: {', '.join(TYPES)}.")
        allowed = TYPES[self.types]
        if self.bits not in allowed:
            raise SpecError(
                f"bitmod: bits={self.bits} is not possible with types={self.types}. Allowed: {', '.join(map(str, allowed))}. "
                f"Try bits={min(allowed, key=lambda b: abs(b - self.bits))}."
            )
        for what, asked, choices in (
            ("scale_bits", self.scale_bits, (8, 16)),
            ("metric", self.metric, ("mse", "awq")),
            ("base", self.base, ("rtn", "awq")),
        ):
            if asked not in choices:
                raise SpecError(
                    f"bitmod: {what}={asked} is not possible. Allowed: {', '.join(map(str, choices))}. Try {what}={choices[0]}."
                )
        if self.group < 16 or self.group % 16:
            raise SpecError(
                f"bitmod: group={self.group} is not possible. Allowed: multiples of 16. Try group={max(16, round(self.group / 16) * 16)}."
            )
        if self.types == "mx" and self.group != MX_BLOCK:
            raise SpecError(
                f"bitmod: types=mx shares a power of two per {MX_BLOCK}: group={self.group} is not possible. "
                f"Allowed: group={MX_BLOCK}."
            )
        if self.calibrates and self.types == "intasym":
            raise SpecError("bitmod: types=intasym has no search. Allowed: metric=mse, base=rtn.")

    @property
    def calibrates(self) -> bool:
        """Whether the inputs of the matrices are looked at."""
        return "awq" in (self.metric, self.base)

    @property
    def unresolved(self) -> bool:
        """Whether calibration text is needed."""
        return self.calibrates

    @property
    def format(self) -> WeightFormat:
        """The format of every matrix."""
        if self.types == "intasym":
            return WeightFormat(kind="int", bits=self.bits, group=self.group, sym=False)
        grid = {"mx": "fp", "bitmod": "bitmod" if self.bits < 5 else "int"}.get(self.types, self.types)
        scale = "e8m0" if self.types == "mx" else "int8" if self.scale_bits == 8 else "fp16"
        return GridFormat(grid=grid, bits=self.bits, group=self.group, scale=scale)

    def check(self, spec: ModelSpec) -> None:
        """Refuse a group that does not divide every row, naming those that do, and matrices that are rounded or transposed."""
        rows = [node.k for _, node in matrices(spec)]
        fit = [group for group in range(16, min(rows) + 1, 16) if math.gcd(*rows) % group == 0]
        for path, node in matrices(spec):
            check_floats(self.name, spec, path, node)
            if node.k % self.group:
                why = "is longer than" if self.group > node.k else "does not divide"
                shown = (
                    f"Allowed: {', '.join(map(str, fit))}. Try group={min(fit, key=lambda g: abs(g - self.group))}."
                    if fit
                    else "Allowed: none; no multiple of 16 divides all rows."
                )
                raise SpecError(
                    f"bitmod: group={self.group} {why} the rows of {node.k} of {path} ({spec.name}). {shown}"
                )
        if self.base == "awq" and isinstance(self.format, GridFormat):
            _AwqOnGrid(grid=self.format).check(spec)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every linear inside the layers; without calibration re-encoding follows from the format alone."""
        for path, _ in matrices(spec):
            yield Edit(path, "format", self.format)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Choose types (and scales) by the error that the inputs of a matrix weigh."""
        if not self.calibrates:
            return weights
        format = self.format
        assert isinstance(format, GridFormat)
        if self.base == "awq":
            window = min(256, materials.window)
            samples = min(12288, materials.window * materials.windows)
            return _AwqOnGrid(grid=format, samples=samples, window=window).convert(weights, old, new, materials)
        from trimtab.model.rounding import rounded
        from trimtab.model.tensors import float_matrix

        squares = self._mean_squares(weights, old, materials)
        replaced = {}
        for path, node in weight_paths(new):
            if node.format == format and weights[path].format != format:
                replaced[path] = rounded(float_matrix(weights[path]), format, squares.get(path), (1.0,))
        return weights | replaced

    def _mean_squares(self, weights: Weights, old: ModelSpec, materials: Materials) -> dict[str, torch.Tensor]:
        """Mean square of every input column [K] of a matrix, by path."""
        from trimtab.model.calibration import Inputs, observed

        windows = materials.token_windows()
        found = observed(old, weights, windows, lambda path: Inputs(moments=False), materials.progress)
        return {path: inputs.mean_square.float() for path, inputs in found.items() if isinstance(inputs, Inputs)}
