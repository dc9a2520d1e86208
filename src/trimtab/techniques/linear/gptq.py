"""gptq: round weights column by column, each column's error made up for by the columns after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.weights.packed import fingerprint
from trimtab.spec.formats import WeightFormat
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

#: What `bits=auto` chooses from.
CHOICES = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Technique):
    """Post-training quantization with second-order error compensation.

    Exact: bytes, as `rtn` at the same bits. Approximated: the weights; the outputs on calibration text are what is kept close.
    Unlike the paper: every calibration token weighs the same whatever its length (`tokens=unitnorm`), because the first token
    of a text is hundreds of times longer than the rest in Llama-like models and would be all that is fitted; scales are searched
    for; groups are worked off in the order of their inputs' weight; a block is calibrated on the already rounded ones before it,
    matrix by matrix.

    Source: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "weights on a group-wise integer grid, errors compensated on calibration text"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    bits: int | tuple[int, ...] | str = param(
        4,
        "bits of one code; auto: what `budget` allows each group of matrices",
        "2..8, one for each group of matrices (a|b|c), auto",
    )
    budget: str = param(
        "3.5", "with bits=auto: average bits, bytes, or time or energy of a token", "3.5, 60MB, 9ms, 0.05J"
    )
    on: str = param("", "machine of a budget of time or energy; empty: this one", "a machine id")
    group: int = param(
        64, "weights along the input that share a scale; must divide every row", "a divisor of the row length"
    )
    sym: bool = param(True, "true: scale only; false: scale and minimum", "true, false")
    damp: float = param(0.01, "share of the mean diagonal added to the Hessian", "above 0, up to 1")
    tokens: str = param("unitnorm", "weight of a token in the Hessian", "unitnorm, cap, plain")
    order: str = param("act", "act: groups with the largest inputs first; none: as they come", "act, none")
    search: bool = param(True, "search for scales; false: the range of the group", "true, false")
    samples: int = param(12288, "calibration tokens", "1 or more; 12288 is good for rows of up to 2048")
    window: int = param(256, "tokens of a calibration text", "2..context")

    def __post_init__(self) -> None:
        if self.bits != "auto":
            for bits in self.bits if isinstance(self.bits, tuple) else (self.bits,):
                if not isinstance(bits, int) or not 2 <= bits <= 8:
                    raise SpecError(
                        f"gptq: bits={bits} is not possible. Allowed: 2..8, one for each group of matrices (a|b|c), auto."
                    )
        try:
            Budget.of(self.budget)
        except SpecError as error:
            raise SpecError(f"gptq: {error}") from None
        if self.group < 1:
            raise SpecError(f"gptq: group={self.group} is not possible. Allowed: 1 or more. Try group=64.")
        if not 0 < self.damp <= 1:
            raise SpecError(f"gptq: damp={self.damp} is not possible. Allowed: above 0, up to 1. Try damp=0.01.")
        for what, asked, allowed in (
            ("tokens", self.tokens, ("unitnorm", "cap", "plain")),
            ("order", self.order, ("act", "none")),
        ):
            if asked not in allowed:
                raise SpecError(f"gptq: {what}={asked} is not possible. Allowed: {', '.join(allowed)}.")
        if self.samples < 1 or self.window < 2:
            raise SpecError(
                f"gptq: samples={self.samples}, window={self.window} is not possible. Try samples=12288, window=256."
            )

    def form(self, node: LinearSpec, bits: int) -> WeightFormat:
        """The format of a matrix of `bits` bits."""
        del node
        return WeightFormat(kind="int", bits=bits, group=self.group, sym=self.sym)

    @property
    def unresolved(self) -> bool:
        return self.bits == "auto"

    def check(self, spec: ModelSpec) -> None:
        """Refuse a group that divides no row, and matrices that are rounded or stored transposed."""
        for path, node in matrices(spec):
            check_floats(self.name, spec, path, node)
            try:
                self.form(node, 4).buffers(*node.stored_shape)
            except SpecError as error:
                raise SpecError(f"gptq: {path} of {spec.name}: {error}") from None

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every linear inside the layers. `bits=auto` stands for the average asked for, rounded down, until it is resolved."""
        bits = self.bits
        if isinstance(bits, str):
            budget = Budget.of(self.budget)
            bits = min(max(int(budget.value), 2), 8) if budget.kind == "bits" else 4
        return allocation.edits(spec, bits if isinstance(bits, tuple) else (bits,) * len(groups(spec)), self.form)

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Allot the bits of `bits=auto` by measured sensitivities."""
        if not self.unresolved:
            return self
        from trimtab.model.rounding import rounded
        from trimtab.model.tensors import float_matrix

        spec, weights = model.spec, model.weights
        nodes = dict(matrices(spec))
        self.check(spec)

        def harm() -> list[list[float]]:
            def probe(path: str, bits: int) -> Packed:
                return rounded(float_matrix(weights[path]), self.form(nodes[path], bits))

            return allocation.sensitivities(model.variant, CHOICES, probe, materials).tolist()

        key = [fingerprint(weights), spec.hash, self.group, self.sym, CHOICES]
        found = np.array(materials.cached("sensitivity", key, harm))
        costs, limit = allocation.costs(spec, CHOICES, self.form, Budget.of(self.budget), self.on)
        chosen = allocation.allot(found, costs, limit)
        return dataclasses.replace(self, bits=tuple(CHOICES[index] for index in chosen))

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Sweep every matrix on the calibration text, block by block."""
        from trimtab.model.rounding import SHARES, IntRule

        forms = {path: node.format for path, node in weight_paths(new)}
        shares = SHARES if self.search else (1.0,)
        return sweep_blocks(
            str(self), weights, old, new, materials,
            group_of=lambda path: self.group,
            rule_of=lambda path, shape, order: IntRule(forms[path], shape, order, shares),
            stored=lambda path, rule: rule.packed(),
            samples=self.samples, window=self.window, tokens=self.tokens, damp=self.damp, act_order=self.order == "act",
        )  # fmt: skip
