"""llm-int8: weights and inputs in int8, one scale a row, the few input columns with outliers multiplied in 16 bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from trimtab.errors import SpecError
from trimtab.spec.formats import GGUF_BLOCKS
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec
from trimtab.spec.product import EXACT, Int8Vector
from trimtab.spec.tree import Edit
from trimtab.spec.vector import RowInt8Format
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials

#: Part of a layer -> its matrices.
_PARTS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMInt8(Technique):
    """Vector-wise int8 products with outlier columns apart.

    Weights are rounded once, a row at a time; inputs in every call, a token at a time, after the columns that hold an outlier in
    any token of the call are taken out. The int8 product is exact in int32. Approximated: weights and inputs, by their rounding.

    With `outlier_source=fp` the outlier columns are multiplied with 16-bit originals. Which these will be is not known before the
    call, so with `outliers=dynamic` all of them stay in memory, 3 bytes a weight in all; `outliers=static` keeps those that held
    an outlier on calibration text, and `outlier_source=dequant` none: 1 byte a weight, as the paper counts and as its code does.

    Unlike the paper: `static`, and `threshold=auto`, the smallest that leaves 1 % of the multiply-adds to 16 bits on calibration
    text. Experts and the routers of experts are left alone.

    Source: Dettmers et al., LLM.int8(), NeurIPS 2022, arXiv 2208.07339.
    """

    name: ClassVar[str] = "llm-int8"
    summary: ClassVar[str] = "weights and inputs of products in int8, input columns with outliers in 16 bits"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    paper: ClassVar[int | None] = 32

    threshold: float | Literal["auto"] = param(
        6.0, "magnitude from which an input column is an outlier", "above 0, inf or auto"
    )
    decompose: bool = param(True, "false: no outlier columns, plain int8", "true, false")
    outlier_source: str = param("fp", "outliers meet 16-bit originals, or what the int8 codes stand for", "fp, dequant")
    outliers: str = param(
        "dynamic", "found in every call, or on calibration text", "dynamic, static, static:FILE of `study outliers`"
    )
    granularity: str = param(
        "vector", "what shares a scale: rows of both, rows of the input, nothing", "vector, row, tensor"
    )
    zeropoint: bool = param(False, "inputs between minimum and maximum: to compare with", "true, false")
    include: str = param("linears", "which matrices of the layers", "linears, attention, mlp")
    lm_head: bool = param(False, "true: lm_head too, where it is not tied to the embedding", "true, false")
    weight_axis: str = param("out", "what a scale of the weights belongs to: an output", "out")

    def __post_init__(self) -> None:
        if self.threshold != "auto" and not self.threshold > 0:
            raise SpecError(
                f"llm-int8: threshold={self.threshold} is not possible. Allowed: above 0 (inf: no outliers), or auto. "
                "Try threshold=6.0."
            )
        for what, asked, allowed in (
            ("include", self.include, ("linears", *_PARTS)),
            ("weight_axis", self.weight_axis, ("out",)),
        ):
            if asked not in allowed:
                raise SpecError(f"llm-int8: {what}={asked} is not possible. Allowed: {', '.join(allowed)}.")
        if self.outliers not in ("dynamic", "static") and not (
            self.outliers.startswith("static:") and self.outliers[7:]
        ):
            raise SpecError(
                f"llm-int8: outliers={self.outliers} is not possible. Allowed: dynamic, static, or static:FILE. Try outliers=dynamic."
            )
        try:
            self._product(8)
        except SpecError as error:
            raise SpecError(f"llm-int8: {error}") from None

    @property
    def unresolved(self) -> bool:
        """Whether the threshold or the columns are still to be calibrated."""
        return self.decompose and (self.threshold == "auto" or self.outliers == "static")

    @property
    def format(self) -> RowInt8Format:
        """The format of every matrix."""
        return RowInt8Format(shared="row" if self.granularity == "vector" else "tensor")

    def check(self, spec: ModelSpec) -> None:
        """Refuse matrices that are no floats, or whose product is another one already, and a model without a matrix for it."""
        if self.lm_head and spec.tie_word_embeddings:
            raise SpecError(
                f"llm-int8: lm_head=true: the head of {spec.name} is its embedding. Allowed: lm_head=false."
            )
        chosen = list(self._linears(spec))
        if not chosen:
            raise SpecError(
                f"llm-int8: {spec.name} has no matrix that include={self.include} names outside of experts."
            )
        for path, node in chosen:
            where = f"llm-int8: {path} of {spec.name}"
            if node.product != EXACT or node.act != "none":
                raise SpecError(
                    f"{where} has a product of its own already ({_named(node)}), which int8 cannot replace. Drop one."
                )
            if not node.format.is_float and node.format.kind not in GGUF_BLOCKS:
                raise SpecError(
                    f"{where} is already quantized (format {node.format}). Start from floats: dtype=float32."
                )
            if node.layout != "row":
                raise SpecError(f"{where} is stored transposed. Drop what stores it so.")

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Find the threshold, then the columns, on calibration text."""
        self.check(model.spec)
        if not self.unresolved:
            return self
        from trimtab.techniques.linear._outliers import calibrate_columns, calibrate_threshold

        chosen = {path: node.n for path, node in self._linears(model.spec) if path != "lm_head"}
        threshold = self.threshold
        if threshold == "auto":
            threshold = calibrate_threshold(model.spec, model.weights, materials, chosen)
        outliers = self.outliers
        if outliers == "static":
            outliers = f"static:{calibrate_columns(model.spec, model.weights, materials, chosen, threshold)}"
        return dataclasses.replace(self, threshold=threshold, outliers=outliers)

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Format, coding of the input and product. Before `resolve`, the threshold counts as 6 and 7 columns as outliers."""
        static: dict[str, tuple[int, ...]] | None = None
        if self.outliers.startswith("static:") and self.decompose:
            from trimtab.techniques.linear._outliers import load

            static = load(self.outliers.removeprefix("static:"), spec)
        for path, node in self._linears(spec):
            product = self._product(node.k, None if static is None else static.get(path, ()))
            for field, value in (("format", self.format), ("act", "int8"), ("product", product)):
                yield Edit(path, field, value)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Keep the 16-bit columns that outliers may ask for."""
        import numpy as np

        from trimtab.runtime.numerics import encode, matrix
        from trimtab.spec.formats import FP16

        kept = {}
        for path, node in self._linears(new):
            product = node.product
            assert isinstance(product, Int8Vector)
            if product.columns_kept(node.k):
                columns = matrix(weights[path]).T
                columns = columns if product.columns is None else columns[np.array(product.columns)]
                kept[f"{path}.outliers"] = encode(np.ascontiguousarray(columns), FP16)
        return weights | kept

    def _product(self, k: int, columns: tuple[int, ...] | None = None) -> Int8Vector:
        """How a matrix of k inputs is multiplied."""
        threshold = 6.0 if self.threshold == "auto" else self.threshold
        if not self.decompose:
            threshold, columns = math.inf, None
        elif self.outliers == "static":
            columns = tuple(range(min(Int8Vector().expected, k)))
        return Int8Vector(
            threshold=threshold,
            source=self.outlier_source,
            columns=columns,
            granularity=self.granularity,
            zeropoint=self.zeropoint,
        )

    def _linears(self, spec: ModelSpec) -> Iterable[tuple[str, LinearSpec]]:
        names = sum(_PARTS.values(), ()) if self.include == "linears" else _PARTS[self.include]
        for index, layer in enumerate(spec.layers):
            for part, block in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
                if not isinstance(block, FFNSpec) and (not isinstance(block, AttentionSpec) or block.gated):
                    continue
                for name in names:
                    node = getattr(block, name, None)
                    if node is not None and not (name == "v_proj" and getattr(block, "tied_values", False)):
                        yield f"layers.{index}.{part}.{name}", node
        if self.lm_head:
            yield "lm_head", spec.lm_head


def _named(node: LinearSpec) -> str:
    return type(node.product).__name__ if node.product != EXACT else f"inputs in {node.act}"
