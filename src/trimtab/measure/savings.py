"""Does a technique save anything? Metered counts of a model with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.errors import SpecError
from trimtab.runtime.step import Recorder

if TYPE_CHECKING:
    from trimtab.model.variant import Model

#: Counts a technique may lower.
SAVABLE = ("weight_bytes", "kv_bytes", "kv_reserved_bytes", "weight_read", "kv_read", "decode_flops", "prefill_flops")


def metered(model: Model, prompts: Sequence[Sequence[int]], steps: int = 2) -> dict[str, int]:
    """Run prompts and a few decode steps with the meters on; nothing here calls a formula.

    Args:
        model: as it is now, techniques included.
        prompts: [B] token ids; lengths may differ.
        steps: decode steps; the counts of reads and FLOPs are those of the last one.

    Returns:
        `weight_bytes` (live buffers), `kv_bytes`, `kv_reserved_bytes` (pages of the store), `weight_read`, `kv_read`,
        `decode_flops` (one step, all rows) and `prefill_flops`.
    """
    session = model.session()
    session.record = prefill = Recorder()
    logits = session.prefill([list(prompt) for prompt in prompts])
    decode = Recorder()
    for _ in range(steps):
        session.record = decode = Recorder()
        logits = session.decode(logits.argmax(axis=-1).tolist())
    held = session.store.nbytes()
    return {
        "weight_bytes": model.weights.nbytes,
        "kv_bytes": held.held,
        "kv_reserved_bytes": held.reserved,
        "weight_read": decode.total("weight_read"),
        "kv_read": decode.total("kv_read"),
        "decode_flops": decode.total("flops"),
        "prefill_flops": prefill.total("flops"),
    }


def savings(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Counts that fell, as the share that is left."""
    return {name: after[name] / before[name] for name in SAVABLE if before[name] and after[name] < before[name]}


def require_saving(name: str, before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, float]:
    """Return the savings.

    Raises:
        SpecError: no metered count fell: the technique renames, masks or does nothing.
    """
    found = savings(before, after)
    if not found:
        listed = ", ".join(SAVABLE)
        raise SpecError(
            f"{name} saves nothing that is metered ({listed}). A technique frees bytes, reads fewer or computes less."
        )
    return found
