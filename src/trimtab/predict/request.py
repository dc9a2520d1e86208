"""What requests cost: seconds and bytes of one request shape for any number of sequences at once.

`predict` asks for one number of sequences, the search for a plan for hundreds; both get the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.graph.ops import IntArray
from trimtab.graph.passes import Graphs, Pass, request_passes
from trimtab.predict.links import collective_s, link_of
from trimtab.predict.memory import Footprint, Memory
from trimtab.predict.price import FloatArray, Times, num_layers, price_groups
from trimtab.predict.serving import continuous
from trimtab.spec.machine import Machine, Stack
from trimtab.spec.nodes import MoESpec
from trimtab.spec.parallel import ALONE, Parallel


@dataclass(frozen=True, slots=True)
class Costs:
    """Figures of a request shape, [...] one per number of sequences.

    Args:
        ttft_s: seconds to the first token: of the whole batch (static), or the mean of a request (continuous).
        tpot_s: mean seconds of every further token of a sequence; None where only one token is generated.
        tokens_per_s: decoded tokens per second of all devices; None likewise.
        request_s: seconds from arrival to the last token.
        band: (P10, P90) factors on `ttft_s` and on `tpot_s`.
        memory: bytes on the device that holds most.
        passes: the passes of one replica and their times.
    """

    ttft_s: FloatArray
    tpot_s: FloatArray | None
    tokens_per_s: FloatArray | None
    request_s: FloatArray
    ttft_band: tuple[Any, Any]
    tpot_band: tuple[Any, Any]
    memory: Memory
    passes: tuple[tuple[Pass, Times], ...]


class Requests:
    """Requests of one shape on one model, machine and stack.

    Args:
        graphs: of one device's slice (`graph.shard`).
        machine, stack: the stack with the machine's own constants put in (`Stack.on`).
        parallel: stages and replicas; the slice knows its own ranks.
        prompt, gen: tokens of each request.
        concurrent: True: a request that ends is followed by another at once (continuous batching); False: all start together.
        skew: how unevenly tokens choose experts.
        footprint: of the same model, stack and parallelism, where it is known already.
    """

    def __init__(
        self,
        graphs: Graphs,
        machine: Machine,
        stack: Stack,
        parallel: Parallel = ALONE,
        *,
        prompt: int,
        gen: int,
        concurrent: bool = False,
        skew: float = 0.0,
        footprint: Footprint | None = None,
    ) -> None:
        self.graphs, self.machine, self.stack, self.parallel = graphs, machine, stack, parallel
        self.prompt, self.gen, self.concurrent, self.skew = prompt, gen, concurrent, skew
        self.footprint = footprint or Footprint(graphs, stack, parallel)
        self.usable_bytes = int(machine.memory_bytes * stack.memory_share)

    def costs(self, batch: IntArray) -> Costs:
        """Price [...] numbers of sequences (or of concurrent requests), shared by the replicas."""
        pp = self.parallel.pp
        share = -(-batch // self.parallel.dp)
        memory = self.footprint.at_batches(batch, self.prompt, self.gen)
        running = self.running(share, memory) if self.concurrent else share
        # A stage works on one part of the sequences while the other stages work on the others.
        part = -(-running // pp)
        done = self.timed(np.asarray(1) if self.concurrent else share, part)
        prefill = self._prefill(done)
        decode = _total(done, "decode")
        step = None if decode is None else decode / (self.gen - 1) + self._hand_over(part)
        ttft, tpot = prefill + self.stack.overhead_per_prefill_s, step
        if self.concurrent:
            ttft, tpot = continuous(prefill, step, share, running, self.gen, self.stack)
        request = ttft if tpot is None else ttft + (self.gen - 1) * tpot
        rate = None
        if tpot is not None:
            rate = batch * self.gen / request if self.concurrent else batch / tpot
        return Costs(
            ttft, tpot, rate, request, self._band(done, "ttft_s"), self._band(done, "tpot_s"), memory, done
        )  # fmt: skip

    def running(self, share: IntArray, memory: Memory) -> IntArray:
        """Requests of a replica whose cache fits at once; the others wait for a place."""
        fixed = memory.weights + memory.activations + memory.reserve
        tokens = max(round(self.stack.serving.held * self.gen), 1)
        each = np.maximum(self.footprint.at_batches(np.asarray(self.parallel.dp), self.prompt, tokens).kv_reserved, 1)
        return np.clip((self.usable_bytes - fixed) // each, 1, share)

    def prefill_s(self) -> FloatArray:
        """Seconds of the prompt passes of one request alone."""
        return self._prefill(self.timed(np.asarray(1), None))

    def timed(self, prefilled: IntArray | None, decoded: IntArray | None) -> tuple[tuple[Pass, Times], ...]:
        """Passes and their times: `prefilled` sequences side by side in the prompt passes, `decoded` in the decode
        steps; None: none of these.
        """
        found = []
        for batch, decode in ((prefilled, False), (decoded, True)):
            if batch is None:
                continue
            for each in request_passes(self.graphs, self.stack, batch, self.prompt, self.gen, self.skew):
                if (each.phase == "decode") == decode:
                    groups = self.graphs.groups(each.graph, self.stack)
                    layers = len(self.graphs.spec.layers) if each.phase != "filter" else num_layers(groups)
                    times = price_groups(groups, layers, each.step, self.machine, self.stack)
                    found.append((each, times))
        return tuple(found)

    def _prefill(self, done: tuple[tuple[Pass, Times], ...]) -> FloatArray:
        """Seconds of the passes of the prompt, pipelined over the stages."""
        pp = self.parallel.pp
        total, count = _total(done, "filter", "prefill"), _count(done)
        assert total is not None
        if pp == 1:
            return total
        return total / pp * (count + pp - 1) / count

    def _hand_over(self, rows: IntArray) -> FloatArray | float:
        """Seconds a decode step spends between stages."""
        pp = self.parallel.pp
        if pp == 1:
            return 0.0
        nbytes = rows * self.graphs.spec.hidden_size * self.graphs.spec.act_bytes
        constants = self.stack.efficiency("send")
        return pp * np.asarray(collective_s("send", nbytes, 2, link_of(self.machine, 2), constants))

    def _band(self, done: tuple[tuple[Pass, Times], ...], figure: str) -> tuple[Any, Any]:
        """P10 and P90 factors of a figure: those of whole servers, else the kernels' together, else the stack's."""
        bands = self.stack.bands
        experts = any(isinstance(layer.mlp, MoESpec) for layer in self.graphs.spec.layers)
        known = (experts and bands.get(f"{figure}.experts")) or bands.get(figure)
        if known:
            return known
        if not self.stack.measured:
            return self.stack.band
        phases = ("decode",) if figure == "tpot_s" else ("filter", "prefill")
        parts = [(p, each.weight) for each, times in done if each.phase in phases for p in times.kernels]
        total = sum(p.times * (p.time_s * weight).sum(-1) for p, weight in parts)
        if not parts or not np.all(np.asarray(total) > 0):
            return self.stack.band
        low, high = (
            sum(p.times * (p.time_s * weight).sum(-1) * (p.band or self.stack.band)[end] for p, weight in parts) / total
            for end in (0, 1)
        )
        return low, high


def _total(done: tuple[tuple[Pass, Times], ...], *phases: str) -> FloatArray | None:
    """Seconds of all passes of these phases; None if there are none."""
    found = [(times.time_s * each.weight).sum(-1) for each, times in done if each.phase in phases]
    return np.sum(found, axis=0) if found else None


def _count(done: tuple[tuple[Pass, Times], ...]) -> Any:
    return sum(each.weight.sum(-1) for each, _ in done if each.phase != "decode")
