"""What one model on one stack is cut into: graphs and footprints by parallelism, each made once however often it is priced."""

from __future__ import annotations

import functools
from dataclasses import replace

from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard, tp_choices
from trimtab.predict.memory import Footprint
from trimtab.predict.price import product_dtypes
from trimtab.spec import tree
from trimtab.spec.machine import Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.parallel import Parallel
from trimtab.spec.product import EXACT, Lmul


class Slices:
    """Graphs and footprints of a model on a stack; no workload, so they serve every one.

    Args:
        model: whole, techniques composed in.
        stack: its fusions, attention, chunk and reserve.
    """

    def __init__(self, model: ModelSpec, stack: Stack) -> None:
        self.model, self.stack = model, stack
        self._graphs: dict[tuple[int, int], Graphs] = {}
        self._footprints: dict[Parallel, Footprint] = {}

    def graphs(self, parallel: Parallel) -> Graphs:
        """Of one device's slice."""
        key = (parallel.tp, parallel.ep)
        if key not in self._graphs:
            self._graphs[key] = Graphs(shard(self.model, parallel))
        return self._graphs[key]

    def footprint(self, parallel: Parallel) -> Footprint:
        """Memory of one device."""
        if parallel not in self._footprints:
            self._footprints[parallel] = Footprint(self.graphs(parallel), self.stack, parallel)
        return self._footprints[parallel]

    @functools.cached_property
    def tp_degrees(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that divide the model."""
        return tuple(tp_choices(self.model))

    @functools.cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes whose peaks the products ask for."""
        return product_dtypes(self.model)

    @functools.cached_property
    def with_plain_products(self) -> ModelSpec:
        """The model with plain products in place of L-Mul; itself where it has none."""
        plain = tree.mapped(self.model, _multiplied)
        return self.model if plain == self.model else plain


def _multiplied(node: tree.Node) -> dict[str, object]:
    """A node with plain products in place of L-Mul."""
    found: dict[str, object] = {}
    if isinstance(getattr(node, "product", None), Lmul):
        found["product"] = EXACT
    if isinstance(node, AttentionSpec) and node.rope is not None and isinstance(node.rope.product, Lmul):
        found["rope"] = replace(node.rope, product=EXACT)
    return found
