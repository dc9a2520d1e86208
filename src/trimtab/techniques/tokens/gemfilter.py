"""gemfilter: let an early layer choose the prompt tokens that matter, then run the model on those alone."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from trimtab.errors import SpecError
from trimtab.spec.machine import data_root
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, TokenFilter
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.techniques.materials import Materials

#: Filter layer over layers in the paper (13 of 32, Llama-3.1-8B); assumed before `resolve` on models nothing ships for.
_DEFAULT_DEPTH = 13 / 32


@dataclass(frozen=True, slots=True, kw_only=True)
class GemFilter(Technique):
    """Prompt compression by the model itself.

    Layers 0..layer read the whole prompt without a cache; the raw inner products of the last query with every key at
    that layer, summed over heads and pooled, choose `topk` tokens; the whole model then starts afresh on these, with new
    positions. A prompt of at most `topk` tokens is run as it is.

    Exact: cache bytes (topk + generated tokens). Approximated: the prompt. One question at the end of the prompt is
    served; several questions in one prompt are not (the score comes from the last token alone).

    Source: Shi et al., Discovering the Gems in Early Layers, arXiv 2409.17422, Algorithm 1.
    """

    name: ClassVar[str] = "gemfilter"
    summary: ClassVar[str] = "an early layer keeps the prompt tokens that matter; the model runs on those"
    stage: ClassVar[Stage] = Stage.RUN
    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "prompt_ids"})
    paper: ClassVar[int | None] = 52

    layer: int | Literal["auto"] = param(
        "auto", "index of the filter layer, or auto: found with needles", "0..layers-1 or auto"
    )
    topk: int = param(1024, "prompt tokens kept", "1 or more")
    pool: int = param(5, "tokens the scores are averaged over", "an odd number, 1 or more")

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise SpecError(f"gemfilter: topk={self.topk} is not possible. Allowed: 1 or more. Try topk=1024.")
        if self.pool < 1 or self.pool % 2 == 0:
            raise SpecError(
                f"gemfilter: pool={self.pool} is not possible. Allowed: an odd number, 1 or more. Try pool={max(self.pool, 0) + 1}."
            )
        if self.layer != "auto" and self.layer < 0:
            raise SpecError(f"gemfilter: layer={self.layer} is not possible. Allowed: 0 or more, or auto.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse a layer the model lacks, and layers without keys per head."""
        if self.layer != "auto" and self.layer >= spec.num_hidden_layers:
            last = spec.num_hidden_layers - 1
            raise SpecError(
                f"gemfilter: layer={self.layer} does not exist in {spec.name}. Allowed: 0..{last} or auto. Try layer={self._depth(spec)}."
            )
        if not all(isinstance(layer.self_attn, AttentionSpec) for layer in spec.layers):
            raise SpecError(
                f"gemfilter: {spec.name} has layers without keys per head (latent attention or a recurrent state). "
                "Not supported."
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The flow of the prompt, nothing else."""
        yield Edit("flow", "filter", TokenFilter(self._depth(spec), self.topk, self.pool))

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Find the filter layer: the earliest at which the recall of known needles saturates."""
        if self.layer != "auto":
            return self
        found = _shipped(model.spec.name) if materials.use_shipped else None
        if found is None:
            from trimtab.techniques.tokens._needle_recall import find_layer

            found = find_layer(model, materials, topk=self.topk, pool=self.pool)
        return dataclasses.replace(self, layer=found)

    def _depth(self, spec: ModelSpec) -> int:
        if self.layer != "auto":
            return self.layer
        found = _shipped(spec.name)
        return round(_DEFAULT_DEPTH * spec.num_hidden_layers) if found is None else found


@functools.cache
def _shipped(model: str) -> int | None:
    """The layer that `trimtab prepare` found on a well-known model, or None."""
    table = tomllib.loads((data_root() / "resolved.toml").read_text("utf-8"))
    return table.get(model, {}).get("gemfilter", {}).get("layer")
