"""Time one greedy generation, whatever engine runs it, as a Report. No torch unless the engine is torch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from trimtab.errors import SpecError
from trimtab.measure.process import rss_bytes
from trimtab.runtime.engine.generate import check_context
from trimtab.runtime.engine.generator import Generator
from trimtab.runtime.step import Recorder
from trimtab.spec.report import Figure, Report


def synthetic_prompt(vocab_size: int, tokens: int) -> np.ndarray:
    """`tokens` token ids, the same ones every time; drawn from the middle of the vocabulary, away from special tokens."""
    return np.random.default_rng(0).integers(vocab_size // 4, vocab_size // 2 + 1, tokens)


def timed_report(model: Generator, prompt_tokens: int, gen: int, techniques: Sequence[str] = ()) -> Report:
    """Run a synthetic prompt and `gen` greedy tokens once to warm up and once timed.

    Args:
        model: native or torch.
        prompt_tokens: of the synthetic prompt.
        gen: new tokens, end tokens ignored.
        techniques: spec strings on the model, for the report.

    Raises:
        SpecError: more tokens than the context, or fewer than one.
    """
    if prompt_tokens < 1 or gen < 1:
        raise SpecError(
            f"A timing of {prompt_tokens} prompt tokens and {gen} new ones is not possible: 1 or more of each."
        )
    spec = model.spec
    check_context(spec, prompt_tokens, gen)
    prompt = synthetic_prompt(spec.vocab_size, prompt_tokens)
    _generate(model, prompt, min(gen, 4), None)
    record = Recorder()
    prefill_s, steps, kv_bytes = _generate(model, prompt, gen, record)
    engine = getattr(model, "program", None)
    where = f"{'native program' if engine else 'PyTorch'}, one run after a warm-up; band: P10 and P90 over steps"
    low, median, high = np.quantile(steps, (0.1, 0.5, 0.9)) if steps else (None, None, None)

    def figure(
        value: float | None, unit: str, p10: float | None = None, p90: float | None = None, why: str = ""
    ) -> Figure:
        reason = "gen=1 has no step after the first token" if value is None else why or where
        return Figure(value=value, p10=p10, p90=p90, unit=unit, kind="measured", why=reason)

    figures = {
        "ttft_s": figure(prefill_s, "s"),
        "tpot_s": figure(median, "s", low, high),
        "tokens_per_s": figure(None if median is None else 1 / median, "tokens/s", high and 1 / high, low and 1 / low),
        "prefill_tokens_per_s": figure(prompt_tokens / prefill_s, "tokens/s"),
        "rss_bytes": figure(float(rss_bytes()), "B", why="this process, now"),
        "peak_rss_bytes": figure(float(rss_bytes(peak=True)), "B", why="this process, at its highest"),
    }
    counts = {
        "weight_bytes": engine.weight_bytes if engine else spec.weight_nbytes(),
        "kv_bytes": kv_bytes,
        **{name: record.total(name) for name in ("weight_read", "kv_read", "kv_written")},
        "decode_flops": record.total("flops"),
    }
    plan = {
        "model": spec.name, "techniques": list(techniques), "engine": "native" if engine else "torch",
        "threads": engine.threads if engine else None, "isa": engine.isa if engine else None,
        "workload": {"batch": 1, "prompt": prompt_tokens, "gen": gen},
    }  # fmt: skip
    notes = ("Reads and FLOPs are those of the last step.",) if steps else ()
    return Report(source="measured", plan=plan, counts=counts, figures=figures, notes=notes)


def _generate(
    model: Generator, prompt: np.ndarray, gen: int, record: Recorder | None
) -> tuple[float, list[float], int]:
    """(seconds of the prompt, seconds of every later step, bytes of the cache at the end); the last step is metered."""
    session = model.session()
    try:
        start = time.perf_counter()
        logits = session.prefill([prompt], reserve=gen + (record is not None))
        prefill_s, steps = time.perf_counter() - start, []
        for _ in range(gen - 1):
            token = int(np.argmax(logits[0]))
            start = time.perf_counter()
            logits = session.decode([token])
            steps.append(time.perf_counter() - start)
        kv_bytes = session.store.nbytes().held
        if record is not None and steps:
            session.record = record  # a step of its own: the meter costs time
            session.decode([int(np.argmax(logits[0]))])
        return prefill_s, steps, kv_bytes
    finally:
        session.close()
