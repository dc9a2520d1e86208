"""What a technique is, and how several become one model.

A technique says *what changes* once, as edits of the ModelSpec. Graph, decoder and native program follow from the edited
spec, so cost and computation cannot disagree. A subclass is a frozen dataclass whose fields are its parameters.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


class Stage(enum.IntEnum):
    """When a technique is applied; the user's order holds inside a stage."""

    SHAPE = 0
    WEIGHTS = 1
    RUN = 2
    PLACE = 3


def param(default: Any, help: str, allowed: str = "") -> Any:
    """A technique parameter: its default, its help text and the allowed values, for help, docs, forms and errors."""
    return field(default=default, metadata={"help": help, "allowed": allowed})


@dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """One published change with typed parameters.

    Class variables:
        name: spec name, the same word as the file and the class.
        summary: one line for lists.
        stage: see `Stage`.
        needs: of ``calibration training prompt_ids rewind``.
        paper: number in the catalogue, or None for a baseline.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[int | None] = None

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model this technique cannot be applied to.

        Raises:
            SpecError: asked, allowed, nearest, fix.
        """

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Replace every ``auto`` by a value found on the model at hand."""
        return self

    @property
    def unresolved(self) -> bool:
        """Whether `resolve` has a value to find that the computation depends on."""
        return False

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """What changes; pure, without torch."""
        return ()

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Fill weights the edits ask for beyond re-encoding a matrix, which the machinery does itself."""
        return weights

    def __str__(self) -> str:
        from trimtab.techniques.registry import spec_string

        return spec_string(self)


def compose(spec: ModelSpec, techniques: Sequence[Technique]) -> ModelSpec:
    """Return the spec with every technique's edits made, by stage, in the user's order inside a stage.

    Raises:
        SpecError: a technique refuses the model.
        Conflict: two techniques write different values to one field.
    """
    for technique in sorted(techniques, key=lambda t: t.stage):
        technique.check(spec)
        spec = spec.edit(technique.edits(spec), by=str(technique))
    return spec
