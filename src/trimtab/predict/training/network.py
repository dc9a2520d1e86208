"""Seconds of collectives over nodes with fast links inside and slow ones between: alpha-beta, rings.

A group of n devices, g of them in each node, sends over its node's adapters at most its share g / (devices per node) of them,
because the node's other groups run the same collective at the same time.

Source: Thakur et al., Optimization of Collective Communication Operations in MPICH, IJHPCA 2005 (ring costs).
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.spec.training import Network


@dataclass(frozen=True, slots=True)
class Ring:
    """A group of devices: how many, what its slowest link moves per second, and the latency of all its hops once round."""

    size: int
    bytes_per_s: float
    round_s: float

    def pass_s(self, nbytes: float, times: int = 1) -> float:
        """Seconds of reduce-scatter or all-gather of `nbytes` in all, `times` of them."""
        if self.size == 1:
            return 0.0
        return times * ((self.size - 1) / self.size * nbytes / self.bytes_per_s + self.round_s)

    def all_reduce_s(self, nbytes: float) -> float:
        """Seconds of an all-reduce of `nbytes`: a reduce-scatter and an all-gather."""
        return self.pass_s(nbytes, 2)


def ring(network: Network, size: int, stride: int = 1) -> Ring:
    """Return a ring over devices `stride` apart.

    Args:
        network: nodes and links.
        size: devices of the group.
        stride: 1 for neighbours; tp for replicas, tp * dp for pipeline stages.
    """
    inside = min(size, max(1, network.gpus_per_node // stride))
    nodes = -(-size // inside)
    rate, hops_s = network.intra_bytes_per_s, (size - nodes) * network.intra_latency_s
    if nodes > 1:
        rate = min(rate, network.inter_bytes_per_s * inside / network.gpus_per_node)
        hops_s += (nodes - 1) * network.inter_latency_s
    return Ring(size, rate, hops_s)


def ring_bytes(nbytes: int, size: int) -> int:
    """Bytes one device of a ring sends for a reduce-scatter or an all-gather of `nbytes` in all."""
    return nbytes * (size - 1) // size
