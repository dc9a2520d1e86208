"""Where the memory of the engine goes: weights, cache, workspace."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import CapacityError
from trimtab.runtime.cache.arena import machine_bytes
from trimtab.runtime.engine.bounds import bound_bytes, longest
from trimtab.serve.engine.models import Served
from trimtab.serve.messages import MemoryPlan, Start
from trimtab.units import format_bytes

#: Rows of a step, where the user names no number and the cache has room for more.
MAX_SEQUENCES = 64
#: Tokens of a step, where the user names no number; `step_ms` cuts earlier.
STEP_TOKENS = 512
#: Share of the free memory that the cache takes at most where the user names no number: others use the machine, too.
_SHARE = 0.5


def available_bytes() -> int:
    """Bytes that processes may still take: of the machine, or of this control group where that has fewer."""
    free = machine_bytes()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    except OSError:
        pass
    try:
        most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
        if (limit := most.read_text().strip()) != "max":
            free = min(free, max(int(limit) - int(used.read_text()), 0))
    except (OSError, ValueError):
        pass
    return free


def workspace_bytes(served: list[Served], tokens: int, rows: int) -> int:
    """Activations of a pass and its logits; the largest of all models, since one runs at a time."""
    most = 0
    for one in served:
        spec = one.runner.spec
        widths = 4 * spec.hidden_size + max(
            (getattr(layer.mlp, "intermediate_size", 0) for layer in spec.layers), default=0
        )
        most = max(most, 4 * (tokens * widths + rows * spec.vocab_size))
    return most


def plan_memory(start: Start, served: list[Served], available: int) -> MemoryPlan:
    """Divide what is free.

    Where the user names no number, the cache has what `rows` sequences of full context of every id need, or half of what is free,
    whichever is less. Every id gets an equal part of ``kv_bytes`` for its sequences and prefixes, for as long as it is loaded.

    Args:
        start: settings.
        served: the loaded ids; the first is the one described.
        available: bytes free now, weights loaded.

    Raises:
        CapacityError: not even one short sequence fits.
    """
    tokens = start.step_tokens or STEP_TOKENS
    rows = start.max_sequences or MAX_SEQUENCES
    workspace = workspace_bytes(served, tokens, rows)
    whole = sum(bound_bytes(spec)(longest(spec)) for spec in (one.runner.spec for one in served))
    kv = start.kv_bytes or min(rows * whole, int((available - workspace) * _SHARE))
    share = kv // len(served)
    first = served[0].runner.spec
    nbytes, context = bound_bytes(first), longest(first)
    for one in served:
        if share < bound_bytes(one.runner.spec)(2):
            raise CapacityError(
                f"The cache of {one.info.id} would have {format_bytes(max(share, 0))}; not even one token fits. "
                f"{format_bytes(available)} are free. Serve fewer ids, or set --kv-bytes."
            )
    per_token = nbytes(context) / context
    return MemoryPlan(
        weight_bytes=sum(one.info.weight_bytes for one in served),
        kv_bytes=kv,
        kv_bytes_per_token=int(per_token),
        kv_tokens=int(kv / per_token),
        workspace_bytes=workspace,
        available_bytes=available,
        max_sequences=rows,
        full_contexts=round(kv / nbytes(context), 2),
    )
