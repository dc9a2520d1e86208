"""cats: small gate activations are cut, so the matching rows of up and down are never read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trimtab.errors import SpecError
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import FFNSpec, GateFirst
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


@dataclass(frozen=True, slots=True, kw_only=True)
class Cats(Technique):
    """Contextually-aware thresholding of the gate.

    A neuron whose |act(gate)| is below its layer's threshold is set to zero; its rows of up and (transposed) down are
    skipped while at most four tokens are decoded together. Thresholds are the `sparsity` quantile of calibration text,
    per layer. `sparsity=0` is exact. Weight memory does not shrink; what is read per token does.

    Source: Lee et al., CATS, COLM 2024, arXiv 2404.08763.
    """

    name: ClassVar[str] = "cats"
    summary: ClassVar[str] = "skip the FFN rows whose gate is small: fewer bytes read per decoded token"
    stage: ClassVar[Stage] = Stage.RUN
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    paper: ClassVar[int | None] = 60

    sparsity: float | tuple[float, ...] = param(
        0.5, "share of gate activations cut: one number or one per layer (a|b|c)", "0 <= sparsity < 1"
    )
    thresholds: str = param(
        "", "JSON file of thresholds to load instead of calibrating", "a path written by `trimtab prepare`"
    )
    prefill_sparse: bool = param(True, "threshold every token (true) or only decoded ones (false)", "true, false")

    def __post_init__(self) -> None:
        for value in self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,):
            if not 0 <= value < 1:
                nearest = 0 if value < 0 else 0.9
                raise SpecError(
                    f"cats: sparsity={value} is not possible. Allowed: 0 <= sparsity < 1. Try sparsity={nearest}."
                )

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model without gated FFNs, and a sparsity list of the wrong length."""
        if not self._paths(spec):
            raise SpecError(f"cats: {spec.name} has no gated FFN outside experts, so there is no gate to threshold.")
        if isinstance(self.sparsity, tuple) and len(self.sparsity) != spec.num_hidden_layers:
            raise SpecError(
                f"cats: {len(self.sparsity)} sparsities for the {spec.num_hidden_layers} layers of {spec.name}. Give one, or one per layer."
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The FFN runs gate first, and down is stored transposed so that a neuron is one contiguous row."""
        for index, path in self._paths(spec).items():
            yield Edit(path, "executor", GateFirst(1 - self.sparsity_of(index), threshold_prefill=self.prefill_sparse))
            yield Edit(f"{path}.down_proj", "layout", "transposed")

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Add the threshold of every layer."""
        from trimtab.techniques.ffn._thresholds import calibrate, load, packed

        paths = self._paths(new)
        if self.thresholds:
            found = load(Path(self.thresholds), new, paths)
        else:
            found = calibrate(
                old, weights, paths, {path: self.sparsity_of(index) for index, path in paths.items()}, materials
            )
        return weights | {f"{path}.threshold": packed(value) for path, value in found.items()}

    def sparsity_of(self, layer: int) -> float:
        """Share of gate activations cut in one layer."""
        return self.sparsity[layer] if isinstance(self.sparsity, tuple) else self.sparsity

    @staticmethod
    def _paths(spec: ModelSpec) -> dict[int, str]:
        return {
            index: f"layers.{index}.mlp"
            for index, layer in enumerate(spec.layers)
            if isinstance(layer.mlp, FFNSpec) and layer.mlp.gate_proj is not None
        }
