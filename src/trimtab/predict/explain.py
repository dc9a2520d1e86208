"""Where a number of a report comes from: formula, inputs, sources and the ops that make it up."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.errors import unknown
from trimtab.spec.report import OpRow, Report
from trimtab.units import format_bytes, format_seconds, format_si

_COUNTS = {
    "parameters": "Weights, biases and norms of the unchanged model; tied matrices count once.",
    "weight_bytes": "Sum over matrices and norms of the bytes of their buffers (codes, scales, minima); ties count once.",
    "kv_bytes": (
        "batch x sum over layers and KV heads of tokens held x bytes of one key and value. Tokens held follow from what "
        "the head keeps of prompt + gen tokens (of a filtered prompt, of what is left of it)."
    ),
    "kv_reserved_bytes": "As kv_bytes, in whole pages.",
    "activation_bytes": (
        "Largest sum of activations alive while one kernel runs, over all passes: a value lives from the kernel that "
        "writes it to the last that reads it. Eager attention adds its scores before and after softmax."
    ),
    "reserve_bytes": "What the engine takes for itself; a constant of the stack.",
    "peak_bytes": "weight_bytes + kv_reserved_bytes + activation_bytes + reserve_bytes.",
    "capacity_bytes": "Memory of the machine as its datasheet gives it.",
    "prefill_flops": (
        "Matrix multiplications of the whole prompt, whole batch, 2 per multiply-add; logits for the last token alone. "
        "A tiled attention skips what the causal mask hides, an eager one does not."
    ),
    "decode_flops": "Matrix multiplications of one decode step at mean context, whole batch, 2 per multiply-add.",
    "weight_read": (
        "Bytes of weights one decode step reads: every matrix once per step (the head also when tied), one embedding "
        "row per token."
    ),
    "kv_read": (
        "Bytes of cache one decode step at mean context reads: keys and values in view of each row and KV head, the new "
        "token included."
    ),
    "prefill_weight_read": "Bytes of weights all passes of the prompt read.",
    "prefill_kv_read": "Bytes of cache all passes of the prompt read.",
}

_OF_OPS: dict[str, tuple[str, Callable[[OpRow], float], Callable[[float], str]]] = {
    "ttft_s": ("prefill", lambda row: row.time_s, format_seconds),
    "tpot_s": ("decode", lambda row: row.time_s, format_seconds),
    "tokens_per_s": ("decode", lambda row: row.time_s, format_seconds),
    "prefill_flops": ("prefill", lambda row: row.flops, lambda value: format_si(value, "FLOP")),
}

_SUMS = {"peak_bytes": ("weight_bytes", "kv_reserved_bytes", "activation_bytes", "reserve_bytes")}


def explain(report: Report, name: str) -> str:
    """Explain one count or figure of a report.

    Raises:
        SpecError: the report has no such count or figure.
    """
    lines = []
    if name in report.figures:
        figure = report.figures[name]
        value = "no value" if figure.value is None else f"{figure.value:.6g} {figure.unit}"
        band = (
            f", P10 {figure.p10:.4g}, P90 {figure.p90:.4g}" if figure.p10 is not None and figure.p90 is not None else ""
        )
        lines.append(f"{name} = {value} ({figure.kind}{band})")
        lines.append(figure.why)
        lines.append(f"Check: {figure.check}")
    elif name in report.counts:
        value = report.counts[name]
        lines.append(f"{name} = {value}" + (f" ({format_bytes(value)})" if name.endswith(("bytes", "read")) else ""))
        lines.append(_COUNTS.get(name, ""))
        lines.extend(f"  {part:<20} {format_bytes(report.counts[part])}" for part in _SUMS.get(name, ()))
    else:
        raise unknown("count or figure", name, (*report.counts, *report.figures))
    if name in _OF_OPS:
        phase, key, show = _OF_OPS[name]
        rows = [row for row in report.ops if row.phase == phase or (phase == "prefill" and row.phase == "filter")]
        total = sum(key(row) for row in rows) or 1.0
        lines.append(f"Largest parts ({phase}, all passes together):")
        lines.extend(
            f"  {key(row) / total:5.1%}  {show(key(row)):>12}  {row.name} x {row.count} ({row.bound})"
            for row in sorted(rows, key=key, reverse=True)[:8]
        )
    return "\n".join(line for line in lines if line)
