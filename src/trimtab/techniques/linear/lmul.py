"""lmul: multiply floats by adding their bit patterns, bit for bit as hardware would, in attention, matrices and products by element."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError, did_you_mean
from trimtab.spec import product, tree
from trimtab.spec.leaves import NormSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions

#: ``attn``: queries with keys, weights with values. ``linear``: the matrices of the layers. ``elementwise``: gate with up, norms,
#: rope. ``all``: these, and the head.
SCOPES = ("attn", "linear", "elementwise", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lmul(Technique):
    """L-Mul: a product of floats is one integer addition of exponent and mantissa fields, plus a constant.

    Exact: counts (FLOPs, bytes), the softmax, additions (rounded to `acc` after each), the arithmetic of the format, to the bit.
    Approximated: every product in `scope`. Saved is the energy of multipliers that hardware for it would not have; on CPUs and
    GPUs there is none, so nothing runs faster: the native program has no kernel, and PyTorch's decoder calls one that is slower
    than a product of floats.

    Unlike the paper, which writes (1 + sum of mantissas) 2^(sum of exponents): the carry out of the mantissas goes into the
    exponent, as its integer addition has it (`carry=formula` follows the text). Of the variants only cut mantissas with that
    carry reach the precision it states.

    Source: Luo and Sun, Addition is All You Need, arXiv 2410.00907.
    """

    name: ClassVar[str] = "lmul"
    summary: ClassVar[str] = "products of floats by integer addition, bit-exact: energy of hardware to come, no time"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 29

    mantissa: int = param(4, "bits of mantissa that operands keep", "2..23")
    exp: int = param(8, "bits of exponent; 4 and 5 stay in the range of e4m3 and e5m2", "4, 5, 8")
    scope: tuple[str, ...] | str = param("attn", "which products: one, or several as a|b", ", ".join(SCOPES))
    acc: str = param("fp32", "what partial sums are rounded to", ", ".join(product.ACCUMULATORS))
    round: str = param("trunc", "how operands lose bits", "trunc, nearest")
    carry: str = param("int", "int: into the exponent; formula: as the paper writes it", "int, formula")
    offset: int | str = param("auto", "the constant 2^-l: auto, none (Mitchell), or l", "auto, none, 1..mantissa")
    ste: bool = param(False, "gradients as of exact products, for fine-tuning", "0, 1")

    def __post_init__(self) -> None:
        for scope in self.scopes:
            if scope == "softmax":
                raise SpecError(
                    f"lmul: scope=softmax is no product: exponentials stay exact. Allowed: {', '.join(SCOPES)}."
                )
            if scope not in SCOPES:
                raise SpecError(
                    f"lmul: scope={scope} is not possible.{did_you_mean(scope, SCOPES)} Allowed: {', '.join(SCOPES)}, several as a|b."
                )
        try:
            self.product  # noqa: B018  (refuses values that are not possible)
        except SpecError as error:
            raise SpecError(f"lmul: {error}") from None

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes asked for."""
        return (self.scope,) if isinstance(self.scope, str) else self.scope

    @property
    def product(self) -> product.Lmul:
        """How a product is computed."""
        return product.Lmul(
            mantissa=self.mantissa, exp=self.exp, acc=self.acc, round=self.round, carry=self.carry, offset=self.offset, ste=self.ste
        )  # fmt: skip

    def has(self, scope: str) -> bool:
        """Whether these products are approximated."""
        return scope in self.scopes or "all" in self.scopes

    def check(self, spec: ModelSpec) -> None:
        """Refuse models without keys per head where attention is asked for; say what of a dtype does not fit."""
        if self.has("attn"):
            attentions("lmul", spec)
        stored = product.MANTISSA_BITS[spec.act_dtype]
        if self.mantissa > stored:
            warnings.warn(
                f"lmul: {spec.act_dtype} stores {stored} bits of mantissa, so mantissa={self.mantissa} is taken as {stored}.",
                stacklevel=2,
            )
        if spec.act_dtype == "fp16" and self.exp == 8:
            warnings.warn(
                "lmul: fp16 has 5 bits of exponent; with exp=8 its numbers are converted to fp32, which is exact, and so added.",
                stacklevel=2,
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The product of every node in scope."""
        kept = min(self.mantissa, product.MANTISSA_BITS[spec.act_dtype])
        offset = min(self.offset, kept) if isinstance(self.offset, int) else self.offset
        wanted = dataclasses.replace(self.product, mantissa=kept, offset=offset)
        if self.has("linear"):
            for path, _ in spec.linears():
                if (path.startswith("layers.") and not path.endswith("router")) or (
                    path == "lm_head" and self.has("all")
                ):
                    yield Edit(path, "product", wanted)
        for path, node in tree.walk(spec):
            if isinstance(node, AttentionSpec) and self.has("attn"):
                yield Edit(path, "product", wanted)
            if isinstance(node, AttentionSpec) and node.rope is not None and self.has("elementwise"):
                yield Edit(path, "rope", dataclasses.replace(node.rope, product=wanted))
            if isinstance(node, NormSpec | FFNSpec) and self.has("elementwise"):
                yield Edit(path, "product", wanted)
