"""shiftadd: weights as signs times powers of two, multiplied by table look-up, addition and shifts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.weights.packed import fingerprint
from trimtab.spec.bcq import CHUNK, BcqFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques import allocation
from trimtab.techniques.allocation import Budget, groups
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.blocks import check_floats, matrices, weight_paths
from trimtab.techniques.sweeping import sweep_blocks

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.weights.packed import Packed, Weights
    from trimtab.techniques.materials import Materials

#: Bits of a matrix.
CHOICES = (1, 2, 3, 4)


def near(average: float) -> tuple[int, ...]:
    """What an average is allotted from: the bits next to it.

    Harms are measured one group of matrices at a time, and at these errors they do not add up: with a free choice of 1 to 4 bits the
    sums promise what the whole does not keep (2.5 bits of SmolLM2: 0.85 nats, 0.73 with 2 and 3 alone).
    """
    return tuple(sorted({math.floor(average), math.ceil(average)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shiftadd(Technique):
    """Post-training reparameterization without multiplications.

    Exact: bytes (signs in planes of bits, scales as powers of two). Approximated: the weights, coded inside a sweep that makes up
    for every column's error in later ones. Unlike the paper: every calibration token weighs the same (`tokens=unitnorm`); coding
    starts from even levels too, which saves a sixth of the error at 3 bits; an average of bits is allotted by an integer program over
    measured sensitivities, from the bits next to it; ``acc`` turns the columns alone and is stored in planes as well, so that inputs
    are turned at run time and no bytes are lost.

    Source: You et al., ShiftAddLLM, NeurIPS 2024, arXiv 2406.05981.
    """

    name: ClassVar[str] = "shiftadd"
    summary: ClassVar[str] = "weights of 1 to 4 bits as signs and powers of two: look-ups, additions and shifts"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    paper: ClassVar[int | None] = 51

    bits: int | float | tuple[int, ...] = param(
        3,
        "bits of a weight, or their average with alloc=auto",
        "1..4, one for each group of matrices (a|b|c); 1.0..4.0 with alloc=auto",
    )
    mode: str = param("lat", "lat: 8 columns share scales; acc: one column does, in a rotated basis", "lat, acc")
    group: int = param(
        128, "weights that share scales; -1: an eighth of the rows (lat) or all (acc)", "multiples of 8, -1"
    )
    apot: int = param(3, "powers of two of a scale", "1..4")
    rounds: int = param(50, "of refitting scales", "0..100")
    bst: bool = param(True, "true: signs of the nearest level; false: one after the other", "true, false")
    act_order: bool = param(True, "columns with the largest inputs first", "true, false")
    damp: float = param(0.01, "share of the mean diagonal added to the Hessian", "above 0, up to 1")
    alloc: str = param("none", "auto: bits by sensitivity", "none, auto")
    mix: str = param("", "shares of the weights by bits, for alloc=auto", "2:0.8|3:0.2")
    tokens: str = param("unitnorm", "weight of a token in the Hessian", "unitnorm, cap, plain")
    samples: int = param(12288, "calibration tokens", "1 or more")
    window: int = param(256, "tokens of a calibration text", "2..context")

    def __post_init__(self) -> None:
        for bits in self.bits if isinstance(self.bits, tuple) else (self.bits,):
            whole = isinstance(bits, int)
            if not 1 <= bits <= 4 or not (whole or self.alloc == "auto"):
                raise SpecError(
                    f"shiftadd: bits={bits} is not possible. Allowed: 1..4, one for each group of matrices (a|b|c); averages such as 2.2 "
                    "with alloc=auto."
                )
        for what, asked, allowed in (
            ("mode", self.mode, ("lat", "acc")),
            ("alloc", self.alloc, ("none", "auto")),
            ("tokens", self.tokens, ("unitnorm", "cap", "plain")),
        ):
            if asked not in allowed:
                raise SpecError(f"shiftadd: {what}={asked} is not possible. Allowed: {', '.join(allowed)}.")
        if self.group == 0 or self.group < -1:
            raise SpecError(
                f"shiftadd: group={self.group} is not possible. Allowed: multiples of 8, -1. Try group=128."
            )
        if not 0 <= self.rounds <= 100:
            raise SpecError(f"shiftadd: rounds={self.rounds} is not possible. Allowed: 0..100. Try rounds=50.")
        if not 0 < self.damp <= 1:
            raise SpecError(f"shiftadd: damp={self.damp} is not possible. Allowed: above 0, up to 1. Try damp=0.01.")
        if self.samples < 1 or self.window < 2:
            raise SpecError(
                f"shiftadd: samples={self.samples}, window={self.window} is not possible. Allowed: 1 or more, 2 or more. "
                "Try samples=12288, window=256."
            )
        if self.mix:
            self._mixed()
        try:
            BcqFormat(bits=1, group=max(self.group, 0), apot=self.apot, mode=self.mode)
        except SpecError as error:
            raise SpecError(f"shiftadd: {error}") from None

    def _mixed(self) -> dict[int, float]:
        """Shares of the weights by bits, of `mix`."""
        try:
            shares = {
                int(bits): float(share) for bits, _, share in (part.partition(":") for part in self.mix.split("|"))
            }
        except ValueError:
            shares = {}
        if (
            not shares
            or not set(shares) <= set(CHOICES)
            or abs(sum(shares.values()) - 1) > 1e-6
            or min(shares.values()) < 0
        ):
            raise SpecError(
                f"shiftadd: mix={self.mix} is not possible. Allowed: shares of 1..4 bits that sum to 1, such as 2:0.8|3:0.2."
            )
        return shares

    @property
    def average(self) -> float:
        """Bits of a weight on average, as asked for."""
        if self.mix:
            return sum(bits * share for bits, share in self._mixed().items())
        return float(np.mean(self.bits)) if isinstance(self.bits, tuple) else float(self.bits)

    def form(self, node: LinearSpec, bits: int) -> BcqFormat:
        """The format of a matrix of `bits` bits."""
        del node
        acc = self.mode == "acc"
        return BcqFormat(bits=bits, group=max(self.group, 0), apot=self.apot, mode=self.mode, rotated=acc)

    @property
    def unresolved(self) -> bool:
        return self.alloc == "auto" and not isinstance(self.bits, tuple)

    def check(self, spec: ModelSpec) -> None:
        """Refuse rows that are no multiple of 8, and matrices that are rounded or stored transposed."""
        for path, node in matrices(spec):
            check_floats(self.name, spec, path, node)
            if node.k % CHUNK:
                raise SpecError(
                    f"shiftadd: {path} of {spec.name} has rows of {node.k}. Allowed: multiples of {CHUNK}. Use gptq or rtn."
                )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every linear inside the layers. An average stands for its whole bits until it is resolved."""
        bits = self.bits if isinstance(self.bits, tuple) else (int(self.average),) * len(groups(spec))
        return allocation.edits(spec, bits, self.form)

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Allot an average of bits by measured sensitivities."""
        if not self.unresolved:
            return self
        from trimtab.runtime.numerics import encode, matrix

        choices = tuple(sorted(self._mixed())) if self.mix else near(self.average)
        spec, weights, nodes = model.spec, model.weights, dict(matrices(model.spec))
        self.check(spec)

        def harm() -> list[list[float]]:
            def probe(path: str, bits: int) -> Packed:
                return encode(matrix(weights[path]), self.form(nodes[path], bits))

            return allocation.sensitivities(model.variant, choices, probe, materials).tolist()

        key = [fingerprint(weights), spec.hash, self.mode, self.group, self.apot, choices]
        found = np.array(materials.cached("sensitivity-bcq", key, harm))
        costs, limit = allocation.costs(spec, choices, self.form, Budget("bits", self.average), "")
        chosen = allocation.allot(found, costs, limit)
        return dataclasses.replace(self, bits=tuple(choices[index] for index in chosen), mix="")

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Sweep every matrix on the calibration text, block by block."""
        from trimtab.model.binary import BinaryRule

        forms = {path: node.format for path, node in weight_paths(new)}

        def form_of(path: str) -> BcqFormat:
            form = forms[path]
            assert isinstance(form, BcqFormat)
            return form

        return sweep_blocks(
            str(self), weights, old, new, materials,
            group_of=lambda path: form_of(path).scale_cols,
            rule_of=lambda path, shape, order: BinaryRule(form_of(path), shape, order, self.rounds, self.bst),
            stored=lambda path, rule: rule.packed(),
            rotated=lambda path: form_of(path).rotated,
            samples=self.samples, window=self.window, tokens=self.tokens, damp=self.damp, act_order=self.act_order,
        )  # fmt: skip
