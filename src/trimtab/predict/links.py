"""Seconds of a collective between devices of one node: ring or one-shot, whichever is faster.

    all-reduce   ring 2 (P-1) steps of bytes / P;  one-shot: every rank sends the whole value to P - 1 others
    all-gather, reduce-scatter, all-to-all   P - 1 steps of bytes / P, in one shot where the links allow

with bytes the size of the whole value. Source: Yuan et al., arXiv 2402.16363; Thakur et al., 2005 (ring algorithms).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.predict import forms
from trimtab.predict.kernels import constants_of
from trimtab.spec.machine import Efficiency, Machine

#: Kind of op -> messages a ring sends, as a multiple of P - 1.
_ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


def collective_s(kind: str, nbytes: Any, ranks: int, link_bytes_per_s: float, found: Efficiency) -> Any:
    """Seconds of one collective.

    Args:
        kind: ``all_reduce | all_gather | reduce_scatter | all_to_all``, or ``send`` to one neighbour.
        nbytes: [...] of the whole value.
        ranks: devices that take part.
        link_bytes_per_s: of one device to the others, each way.
        found: `bandwidth_efficiency` of the link and `launch_s`, the latency of one message.
    """
    if found.form == "collective":
        return forms.collective_s(kind, nbytes, ranks, link_bytes_per_s, constants_of(found))
    rate = link_bytes_per_s * found.bandwidth_efficiency
    nbytes = np.asarray(nbytes, np.float64)
    if kind == "send":
        return nbytes / rate + found.launch_s
    others, rounds = ranks - 1, _ROUNDS[kind]
    ring = rounds * others * (nbytes / ranks / rate + found.launch_s)
    at_once = nbytes * others / (rate if kind == "all_reduce" else rate * ranks) + found.launch_s
    return np.minimum(ring, at_once)


def link_of(machine: Machine, ranks: int) -> float:
    """Bytes per second between `ranks` devices of a node, each way.

    Raises:
        SpecError: the catalogue knows no link, or so many devices do not share a node.
    """
    if machine.link_bytes_per_s_per_dir is None:
        raise SpecError(
            f"{machine.id} has no link between devices in the catalogue, so a model cannot be cut over {ranks} of them. "
            "Name a machine with one (`trimtab machines`), or tp=1."
        )
    if ranks > machine.node_devices:
        raise SpecError(
            f"{ranks} devices do not share a node of {machine.id}. Allowed: up to {machine.node_devices}; use pp or dp beyond."
        )
    return machine.link_bytes_per_s_per_dir
