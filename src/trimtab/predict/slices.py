"""What one model on one stack is cut into: graphs and footprints by parallelism, each made once however often it is priced."""

from __future__ import annotations

import functools

from trimtab.graph.passes import Graphs
from trimtab.graph.shard import shard, tp_choices
from trimtab.predict.memory import Footprint
from trimtab.spec.machine import Stack
from trimtab.spec.model import ModelSpec
from trimtab.spec.parallel import Parallel


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
