"""Where a number of a report comes from: formula, inputs, sources and the ops that make it up."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.errors import unknown
from trimtab.predict.figures import constants
from trimtab.spec.plan import Plan
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
    "kv_peak_bytes": (
        "Most bytes of pages at any time. A prompt runs through one layer after the other: heads that give tokens up, code or "
        "thin them do so before the next layer has its turn, so that only one layer holds its prompt whole, or a pass of it."
    ),
    "state_bytes": (
        "Part of kv_bytes: recurrent states (Mamba, linear attention) of all sequences, as many bytes whatever the context."
    ),
    "activation_bytes": (
        "Largest sum of activations alive while one kernel runs, over all passes: a value lives from the kernel that "
        "writes it to the last that reads it. Eager attention adds its scores before and after softmax."
    ),
    "reserve_bytes": "What the engine takes for itself; a constant of the stack.",
    "peak_bytes": "weight_bytes + kv_peak_bytes + activation_bytes + reserve_bytes.",
    "capacity_bytes": "Memory of one device as its datasheet gives it, times the share the stack uses (memory_share).",
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
    "comm_bytes": (
        "Bytes of the values one decode step sums or exchanges over ranks: two all-reduces of rows x hidden size per layer, "
        "one of the embeddings, one gather of the logits; what an algorithm sends of them depends on the ranks."
    ),
    "prefill_comm_bytes": "As comm_bytes, over all passes of the prompt.",
}

_TRAINING = {
    "weight_bytes": "Weights held by one device of the {end} stage: parameters / (tp x pp), with zero=3 / dp, 2 bytes each.",
    "gradient_bytes": "Gradients held by one device of the {end} stage, with zero>=2 / dp.",
    "optimizer_bytes": "Master weights and moments of one device of the {end} stage (12 bytes per parameter), with zero>=1 / dp.",
    "activation_bytes": "Activations kept for the backward pass on the {end} stage, of every micro-batch in flight there.",
    "working_bytes": "The largest temporary of one kernel on the {end} stage: logits, scores, gathered weights.",
    "reserve_bytes": "What the framework takes for itself; a constant of the stack.",
    "peak_bytes": "Sum of weights, gradients, optimizer states, activations, temporaries and reserve of the {end} stage.",
    "model_flops": "Forward and backward matrix multiplications of a step, attention over the full square, no recomputation.",
    "hardware_flops": "As model_flops, with what is recomputed.",
}


def _of_training(name: str) -> str:
    """Text of a training count; collectives are ``comm_<kind>_bytes``, memory ends in the stage."""
    if name.startswith("comm_"):
        return f"Bytes the busiest device sends in a step by {name.removeprefix('comm_').removesuffix('_bytes')}."
    stem, _, end = name.rpartition("_")
    if end in ("first", "last"):
        return _TRAINING.get(stem, "").format(end=end)
    return _TRAINING.get(name, "").format(end="fullest")


_OF_OPS: dict[str, tuple[str, Callable[[OpRow], float], Callable[[float], str]]] = {
    "ttft_s": ("prefill", lambda row: row.time_s, format_seconds),
    "tpot_s": ("decode", lambda row: row.time_s, format_seconds),
    "tokens_per_s": ("decode", lambda row: row.time_s, format_seconds),
    "prefill_flops": ("prefill", lambda row: row.flops, lambda value: format_si(value, "FLOP")),
}

_SUMS = {"peak_bytes": ("weight_bytes", "kv_peak_bytes", "activation_bytes", "reserve_bytes")}


def explain(report: Report, name: str, plan: Plan | None = None) -> str:
    """Explain one count or figure of a report; with its plan, the constants of the stack too.

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
        if plan is not None and name in _OF_OPS:
            lines.append(f"Constants of stack {plan.stack.name}:")
            lines.extend(f"  {line}" for line in constants(plan.stack))
        lines.append(f"Check: {figure.check}")
    elif name in report.counts:
        value = report.counts[name]
        lines.append(f"{name} = {value}" + (f" ({format_bytes(value)})" if name.endswith(("bytes", "read")) else ""))
        lines.append(_COUNTS.get(name) or _of_training(name))
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
