"""What a scheduler has done, for metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Gauges are of now, the rest are sums since the start.

    Args:
        running: requests that hold keys and values (gauge).
        running_sequences: counted against `max_running`: their samples (gauge).
        waiting: requests in the queue, preempted ones included (gauge).
        waiting_tokens: their tokens to run before an answer goes on (gauge).
        kv_bytes: reserved by running sequences and kept prefixes (gauge).
        kv_capacity_bytes: what these never exceed.
        kv_held_bytes: as the executor last said (gauge); None before.
        prefix_bytes: of kept prefixes (gauge).
        admitted, finished: requests.
        preemptions: requests sent back to the queue.
        prefix_query_tokens: prompt tokens looked up; those preempted are looked up again.
        prefix_hit_tokens: of these, found.
        prefill_tokens, decode_tokens: run.
        overruns: steps after which the executor held more than was reserved: `nbytes` is no upper bound then.
        rejected: refused requests by reason.
        aborted: admitted requests that ended otherwise than by finishing, by reason.
    """

    running: int = 0
    running_sequences: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_bytes: int = 0
    kv_capacity_bytes: int = 0
    kv_held_bytes: int | None = None
    prefix_bytes: int = 0
    admitted: int = 0
    finished: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    overruns: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    aborted: Counter[str] = field(default_factory=Counter)
