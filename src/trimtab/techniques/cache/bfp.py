"""bfp: keys or values in block floating point; the channels of keys sorted by size, so that outliers share blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics.bfp import BlockFloat
from trimtab.spec.cache import PageFormat
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, LatentAttentionSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

if TYPE_CHECKING:
    from trimtab.runtime.weights.packed import Packed, Weights
    from trimtab.techniques.materials import Materials


@dataclass(frozen=True, slots=True, kw_only=True)
class Bfp(Technique):
    """Block floating point for the cache: `man` bits per element and one exponent per `block` elements of a head.

    One outlier sets the exponent of its block and wipes out its neighbours, and keys have outliers in fixed channels. K-sort
    (`sort=row`) orders the channels of every KV head by the norm of their rows in k_proj, and the rows of q_proj of its
    query heads alike, when the model is loaded: large channels share blocks with large ones.

    Exact: bytes, ``man / 8 + 1 / block`` per element; scores before rounding are the same in any order, so with one block per
    head sorting changes nothing. Rotary tables are permuted with the channels. Nothing is added per token, but a norm of
    keys that the heads share is applied through the order. Approximated: keys or values, once each, as they are written;
    queries stay floats. Values are never sorted. The paper's hardware multiplies integers within a block; `bfp_dot` is that
    product. ``sort=rms`` (by the keys of calibration text) and ``sort=random`` are there to be compared with.

    Source: Trukhanov and Soloveychik, Accurate Block Quantization in LLMs with Outliers, arXiv 2403.20137.
    """

    name: ClassVar[str] = "bfp"
    summary: ClassVar[str] = "cache in block floating point, key channels sorted so that outliers share exponents"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 83

    man: int = param(4, "bits of an element, sign included: 4 is the paper's BFP12, 8 its BFP16", "2..16")
    exp: int = param(8, "bits of the shared exponent; fewer than 8 are stored in a byte too", "4..8")
    block: int = param(32, "elements along the head that share an exponent", "a divisor of the head size")
    sort: Literal["row", "none", "rms", "random"] = param(
        "row", "order of the key channels: by the norm of their weights, the model's, by calibration, at random",
        "row, none, rms, random",
    )  # fmt: skip
    on: Literal["k", "v", "kv"] = param("k", "what is coded; only keys are sorted", "k, v, kv")

    def __post_init__(self) -> None:
        BlockFloat(bits=self.man, block=self.block, exp=self.exp)  # refuses numbers out of range
        if self.exp != 8:
            raise SpecError(
                f"bfp: exp={self.exp}: pages hold exponents of 8 bits; fewer bits are built as a format of numbers alone and "
                "would not save a byte. Allowed: 8. Try exp=8."
            )

    @property
    def format(self) -> PageFormat:
        """Of the pages."""
        return PageFormat(kind="bfp", bits=self.man, group=self.block)

    @property
    def sorts(self) -> bool:
        """Whether key channels are reordered."""
        return self.sort != "none" and "k" in self.on

    def check(self, spec: ModelSpec) -> None:
        """Refuse models without keys per head, blocks that do not divide heads, and attention whose keys cannot be sorted."""
        for layer in spec.layers:
            if isinstance(layer.self_attn, LatentAttentionSpec):
                raise SpecError(
                    f"bfp: {spec.name} caches one latent for all heads; only keys and values are supported."
                )
        if not any(True for _ in self._attentions(spec)):
            raise SpecError(f"bfp: {spec.name} has no layer that caches keys and values.")
        for path, node in self._attentions(spec):
            form = BlockFloat(bits=self.man, block=self.block)
            for head in node.cache.heads:
                for which, size in (("k", head.head_dim), ("v", head.v_head_dim)):
                    if which in self.on:
                        form.blocks(size)
            if not self.sorts:
                continue
            if node.tied_values or node.gated:
                why = "reads its values from the keys" if node.tied_values else "has gates among its queries"
                raise SpecError(
                    f"bfp: sort={self.sort}: {path} of {spec.name} {why}, so rows cannot be put in another order. "
                    "Allowed: sort=none."
                )
            if node.head_dim > 256:
                raise SpecError(
                    f"bfp: sort={self.sort}: {path} of {spec.name} has heads of {node.head_dim}. "
                    "Allowed: heads of up to 256, or sort=none."
                )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The format of every KV head; the order of the keys of every layer."""
        for path, node in self._attentions(spec):
            for head in range(len(node.cache.heads)):
                for which in self.on:
                    yield Edit(f"{path}.cache.heads.{head}", f"{which}_format", self.format)
            if self.sorts:
                yield Edit(path, "key_order", self.sort)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Put the rows of k_proj and q_proj in order; layers that are in it already stay as they are."""
        from trimtab.techniques.cache._key_order import descending, key_rms, ordered, row_norms

        if not self.sorts:
            return weights
        todo = {path: node for path, node in self._attentions(old) if node.key_order == "model"}
        sizes = key_rms(old, weights, materials) if self.sort == "rms" and todo else {}
        rng = np.random.default_rng(materials.seed)
        changed: dict[str, Packed] = {}
        for path, node in todo.items():
            if self.sort == "row":
                sizes[path] = row_norms(path, node, weights)
            elif self.sort == "random":
                sizes[path] = rng.random((node.num_key_value_heads, node.head_dim))
            changed |= ordered(path, node, weights, descending(sizes[path]))
        return weights | changed

    @staticmethod
    def _attentions(spec: ModelSpec) -> Iterator[tuple[str, AttentionSpec]]:
        for index, layer in enumerate(spec.layers):
            if isinstance(layer.self_attn, AttentionSpec):
                yield f"layers.{index}.self_attn", layer.self_attn
