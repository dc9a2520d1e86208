"""The points at which a tap may look at a forward pass, or replace what it sees. No tap costs nothing.

| point | path | value |
|---|---|---|
| ``resid`` | ``layers.i`` | hidden state after the layer [T, D] |
| ``linear`` | of the weight, one expert from another | input of the product [T, K] |
| ``self_attn.qk`` | ``layers.i.self_attn`` | (q [T, N, H], k [T, G, H]) after RoPE |
| ``mlp.gate_pre`` | ``layers.i.mlp`` | gate before the activation [T, F] |
| ``mlp.gate`` | ``layers.i.mlp`` | gate after the activation [T, F] |
"""

from __future__ import annotations

from typing import Any

from trimtab.runtime.step import Step

POINTS = ("resid", "linear", "self_attn.qk", "mlp.gate_pre", "mlp.gate")


def tapped(step: Step, point: str, path: str, value: Any) -> Any:
    """Show `value` to the tap of `point`, if there is one, and return its replacement or the value itself."""
    tap = step.taps.get(point) if step.taps else None
    if tap is None:
        return value
    replaced = tap(path, value)
    return value if replaced is None else replaced
