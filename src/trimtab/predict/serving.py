"""A serving point: what requests that come and go one after the other cost each other.

A closed loop of c requests, each of the same lengths: whenever one ends, the next begins. Between two of its tokens a
request waits for the decode step of all, and for the prefill of whichever request has just begun: c prefills are spread over
the gen steps of a cycle, and one in c of them is its own.
"""

from __future__ import annotations

import numpy as np

from trimtab.graph.ops import IntArray
from trimtab.predict.price import FloatArray
from trimtab.spec.machine import Stack


def continuous(
    prefill_s: FloatArray,
    step_s: FloatArray | None,
    concurrency: IntArray,
    running: IntArray,
    gen: int,
    stack: Stack,
) -> tuple[FloatArray, FloatArray | None]:
    """Return (mean TTFT, mean TPOT) of one of `concurrency` requests.

    Args:
        prefill_s: [...] of one prompt alone.
        step_s: [...] a decode step of all that run; None where one token is all.
        concurrency: [...] requests at any time.
        running: [...] of them, those that have a place in memory; the others wait for one.
        gen: tokens of each.
        stack: its `serving` constants, and the host time of a request before its first pass.
    """
    others = np.asarray(running - 1, np.float64)
    ttft = (prefill_s + stack.overhead_per_prefill_s) * (1 + stack.serving.queue * others)
    if step_s is None:
        return ttft * concurrency / running, None
    ttft = ttft + step_s / 2
    tpot = step_s + stack.serving.interference * prefill_s * others / gen
    waiting = (concurrency / running - 1) * (ttft + (gen - 1) * tpot)
    return ttft + waiting, tpot
