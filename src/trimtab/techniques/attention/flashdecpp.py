"""flashdecpp: a softmax whose partial sums need no common maximum, and the product kernel that suits the rows of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from trimtab.errors import SpecError
from trimtab.spec.leaves import PRODUCT_KERNELS
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, Unified
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.techniques.materials import Materials

_FLT_MAX = 3.4028234663852886e38
#: Room for the values, which the weights multiply, below the largest float.
_VALUES = 10.0
#: Below this every weight is under 4e-31, and 17 further on they are denormal.
_LOW = -70.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashDecPP(Technique):
    """FlashDecoding++: unified softmax maximum, flat products, kernels chosen by rows.

    Partial sums of ranges of keys are ``exp(score - phi)`` for a phi fixed in advance, so they are added as they are. A query
    whose largest score leaves ``phi + [a, b]`` is computed again, whole, with the running maximum. Every matrix takes the
    product kernel that was fastest on this processor for the rows of the step; the torch decoder has one kernel.

    Exact: attention and products to the rounding of floats. What differs: the paper's kernels are for GPUs and its flat product
    pads rows to 8; here rows are blocks of registers and nothing is padded. ALiBi moves the scores with the distance, so no phi
    fits; such models are refused. Softcapped scores are calibrated as capped.

    Source: Hong et al., FlashDecoding++, arXiv 2311.01282, sections 3 to 5.
    """

    name: ClassVar[str] = "flashdecpp"
    summary: ClassVar[str] = "partial softmax without a common maximum; the product kernel that suits the rows"
    stage: ClassVar[Stage] = Stage.RUN
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    paper: ClassVar[int | None] = 34

    phi: float | tuple[float, ...] | Literal["auto"] = param(
        "auto",
        "what every score is lowered by: of all layers, of each, or auto: calibrated",
        "a number, one a layer as 1.5|2|..., or auto",
    )
    a: float | Literal["auto"] = param(
        "auto", "least (largest score - phi) of a query that is not computed again", "below b, or auto"
    )
    b: float | Literal["auto"] = param("auto", "largest (largest score - phi) of such a query", "above a, or auto")
    split: int = param(256, "keys of one part in decode", "16..4096")
    flat: bool = param(True, "false: leave the flat product kernel out", "1, 0")
    dataflow: Literal["auto", "gemv", "flat", "gemm"] = param(
        "auto", "product kernel; auto: by shape and rows, measured once", "auto, gemv, flat, gemm"
    )
    recompute: bool = param(True, "0: leave out the guard, to see what it is for", "1, 0")

    def __post_init__(self) -> None:
        for name, value in (("phi", self.phi), ("a", self.a), ("b", self.b)):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float | int) and not math.isfinite(number):
                    raise SpecError(
                        f"flashdecpp: {name}={number} is not possible. Allowed: a finite number, or auto. Try {name}=auto."
                    )
        if self.a != "auto" and self.b != "auto" and self.a >= self.b:
            raise SpecError(f"flashdecpp: a={self.a:g} is not below b={self.b:g}. Allowed: a < b. Try a={_LOW:g},b=60.")
        if not 16 <= self.split <= 4096:
            nearest = min(max(self.split, 16), 4096)
            raise SpecError(f"flashdecpp: split={self.split} is not possible. Allowed: 16..4096. Try split={nearest}.")
        if not self.flat and self.dataflow == "flat":
            raise SpecError(
                "flashdecpp: dataflow=flat with flat=0 leaves no kernel. Allowed: flat=1, or dataflow=auto, gemv, gemm."
            )

    @property
    def unresolved(self) -> bool:
        """Whether phi is still to be calibrated."""
        return self.phi == "auto"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Product kernels the program may choose among."""
        if self.dataflow != "auto":
            return (self.dataflow,)
        return tuple(name for name in PRODUCT_KERNELS if self.flat or name != "flat")

    def limits(self, spec: ModelSpec) -> tuple[float, float]:
        """(a, b) of a model: what fp32 sums of as many keys as its context has can hold.

        Raises:
            SpecError: the one that was given leaves no room for the other.
        """
        low = _LOW if self.a == "auto" else self.a
        high = math.log(_FLT_MAX / spec.max_position_embeddings) - _VALUES if self.b == "auto" else self.b
        if low >= high:
            raise SpecError(f"flashdecpp: a={low:g} is not below b={high:g}. Allowed: a < b. Try a={_LOW:g},b=auto.")
        return low, high

    def check(self, spec: ModelSpec) -> None:
        """Refuse layers without plain softmax over keys per head, and a list of phi of another length."""
        for index, layer in enumerate(spec.layers):
            attn = layer.self_attn
            if not isinstance(attn, AttentionSpec):
                raise SpecError(
                    f"flashdecpp: layer {index} of {spec.name} has no keys per head (latent attention or a recurrent state). Not supported."
                )
            if attn.alibi:
                raise SpecError(
                    f"flashdecpp: {spec.name} adds ALiBi to the scores, which lowers them without bound; no phi fits. Not supported."
                )
            if attn.sinks:
                raise SpecError(f"flashdecpp: {spec.name} has sink logits in its softmax. Not supported.")
        if isinstance(self.phi, tuple) and len(self.phi) != spec.num_hidden_layers:
            raise SpecError(
                f"flashdecpp: phi has {len(self.phi)} numbers, {spec.name} has {spec.num_hidden_layers} layers. Allowed: one, "
                "one a layer, or auto."
            )
        self.limits(spec)

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Find phi of every layer on calibration text."""
        self.check(model.spec)
        if self.phi != "auto":
            return self
        from trimtab.techniques.attention._scores import calibrate

        return dataclasses.replace(self, phi=calibrate(model.spec, model.weights, materials, *self.limits(model.spec)))

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Softmax and split of every layer, and the kernels of every matrix. Before `resolve`, phi counts as 0."""
        low, high = self.limits(spec)
        for index in range(spec.num_hidden_layers):
            phi = 0.0 if self.phi == "auto" else self.phi[index] if isinstance(self.phi, tuple) else self.phi
            yield Edit(f"layers.{index}.self_attn", "softmax", Unified(phi, low, high, self.recompute))
            yield Edit(f"layers.{index}.self_attn", "split", self.split)
        for path, _ in spec.linears():
            yield Edit(path, "kernels", self.kernels)
