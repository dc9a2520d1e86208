"""Checks of KIVI (arXiv 2402.02750): quality through the cache, passkeys, bytes, codes, predictions, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Line, Outcome

#: Windows of text and their tokens; prompts of a passkey and their tokens.
WINDOWS, WINDOW = 3, 1024
PROMPTS, TOKENS = 40, 1000
#: Keys coded like values, by token: what the paper's axis is held against.
BY_TOKEN = "by token"


@contextmanager
def _with(bench: Bench, how: str) -> Iterator[Any]:
    """The built-in model in fp32 with a cache of its own: plain, a spec string, or both coded by token."""
    from trimtab.model.variant import Variant
    from trimtab.spec.cache import PageFormat
    from trimtab.spec.tree import Edit
    from trimtab.techniques.apply import applied

    model = bench.model
    if how == "plain":
        yield model
    elif how == BY_TOKEN:
        at, form = "layers.*.self_attn.cache.heads.*", PageFormat("int2", 32)
        fields = {"tail": PageFormat("fp32"), "residual": 128, "k_format": form, "v_format": form}
        spec = model.spec.edit([Edit(at, field, value) for field, value in fields.items()], by="check")
        model.push(Variant(spec, model.weights))
        try:
            yield model
        finally:
            model.pop()
    else:
        with applied(model, how) as coded:
            yield coded


def _perplexity(bench: Bench, how: str) -> float:
    """Of the second halves of windows of held-out prose, every token appended to the cache by the way."""
    from trimtab.measure.kv.through_cache import nll_through_cache, perplexity

    def compute() -> float:
        ids = bench.model.tokenizer.encode(bench.text("cfi_public"))
        starts = np.linspace(0, len(ids) - WINDOW, WINDOWS).astype(int)
        with _with(bench, how) as model:
            found = [nll_through_cache(model.runner(), ids[start : start + WINDOW]) for start in starts]
        return perplexity([nll for window in found for nll in window])

    return bench.once(f"kivi.perplexity.{how}", compute)


def keys_by_channel(bench: Bench) -> Outcome:
    """Perplexity with keys by channel against keys by token, at 2 bits with the same residual; 4 bits against floats."""
    plain, two, four, other = (_perplexity(bench, how) for how in ("plain", "kivi", "kivi:bits=4", BY_TOKEN))
    return Outcome(
        measured=f"fp32 {plain:.2f}, kivi-2 {two:.2f}, both by token {other:.2f} ({two / other:.3f}x), kivi-4 {four:.2f} "
        f"({four / plain:.4f}x of fp32); {WINDOWS} windows of {WINDOW} tokens",
        met=two <= 0.85 * other and four <= 1.03 * plain,
    )


def _passkeys(bench: Bench, how: str) -> Any:
    """A prompt is one pass, as in the paper: it is attended to in floats, and what follows reads codes."""
    from trimtab.measure.kv.engines import engine_of
    from trimtab.measure.needles import grade
    from trimtab.runtime.text.needles import needle_prompts

    def compute() -> Any:
        prose = bench.text("cfi_public")
        prompts = needle_prompts(bench.model.tokenizer, tokens=TOKENS, count=PROMPTS, seed=5, haystack=prose)
        with _with(bench, how) as model:
            return grade(engine_of(model)[0], prompts, chunk=TOKENS)

    return bench.once(f"kivi.passkeys.{how}", compute)


def passkeys_survive(bench: Bench) -> Outcome:
    """Four digits in 1000 tokens of prose, 40 prompts of one pass: exact answers, and nats of the right one."""
    found = {how: _passkeys(bench, how) for how in ("plain", "kivi:bits=4", "kivi", BY_TOKEN)}
    plain, four, two, other = (r.exact for r in found.values())
    return Outcome(
        measured=", ".join(f"{how} {r.exact:.1%} ({r.answer_nll_nats:.2f} nats)" for how, r in found.items()),
        met=plain == four == 1.0 and two >= plain - 0.10 and other < two,
    )


def bytes_are_allocated(bench: Bench, tokens: int = 4096) -> Outcome:
    """Pages of one sequence of 4096 tokens, against 16-bit ones."""
    from trimtab.runtime.cache.store import KVStore
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    base = bench.model.spec.with_dtype("float32", "bfloat16")
    spec = compose(base, parse_all(["kivi"]))
    held, reserved = _filled(KVStore(spec), 1, tokens)
    full = base.kv_nbytes(tokens)
    return Outcome(
        predicted=f"{spec.kv_nbytes(tokens):,} B",
        measured=f"{held:,} B, pages {reserved:,} B: {reserved / full:.4f} of bf16",
        met=held == spec.kv_nbytes(tokens) and reserved <= 0.21 * full,
    )


def memory_falls(bench: Bench, sequences: int = 64, tokens: int = 4096) -> Outcome:
    """What the process grows by with 64 sequences in the store, bf16 and 2 bits, one after the other."""
    from trimtab.measure.process import rss_bytes
    from trimtab.runtime.cache.store import KVStore
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    base = bench.model.spec.with_dtype("float32", "bfloat16")
    grown, wanted = [], []
    for spec in (compose(base, parse_all(["kivi"])), base):
        store, before = KVStore(spec), rss_bytes()
        _filled(store, sequences, tokens)
        grown.append(rss_bytes() - before)
        wanted.append(sequences * spec.kv_nbytes(tokens))
        del store
    saved, predicted = grown[1] - grown[0], wanted[1] - wanted[0]
    return Outcome(
        predicted=f"saves {predicted:,} B",
        measured=f"RSS grows by {grown[1]:,} B in bf16 and {grown[0]:,} B: saves {saved / predicted:.3f} of that",
        met=saved >= 0.75 * predicted,
    )


def _filled(store: Any, sequences: int, tokens: int, chunk: int = 512) -> tuple[int, int]:
    """(held, reserved) bytes of a store with this many sequences of random keys and values."""
    from trimtab.runtime.step import Step

    heads = store.spec.layers[0].cache.heads
    kv = np.random.default_rng(0).standard_normal((chunk, len(heads), heads[0].head_dim), dtype=np.float32)
    for _ in range(sequences):
        seq = store.open(reserve_tokens=tokens)
        for past in range(0, tokens, chunk):
            step = Step.of([chunk], [past], [seq])
            for layer in range(store.spec.num_hidden_layers):
                store.append(layer, kv, kv, step)
    found = store.nbytes()
    return found.held, found.reserved


def _bf16(bench: Bench, *techniques: str) -> Any:
    """The built-in model with its cache in bf16 and techniques on it."""
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    return compose(bench.model.spec.with_dtype("float32", "bfloat16"), parse_all(techniques))


def fused_kernel(bench: Bench, tokens: int = 8192) -> Outcome:
    """Attention of one decode step, one thread, 90 KV heads: over codes against decoding them first, and against float pages."""
    import dataclasses

    from trimtab.measure.kv.kernels import DecodeAttention, median_seconds

    apart = {}
    for bits in (2, 4, 8):
        spec = _bf16(bench, f"kivi:bits={bits}")
        arm = DecodeAttention(dataclasses.replace(spec, layers=spec.layers[:1]), tokens // 4 + 50)
        wanted = arm.reference()
        apart[bits] = float(np.abs(arm.run()[0] - wanted).max() / np.abs(wanted).max())
        arm.close()
    specs = {
        "fp32": bench.model.spec,
        "bf16": _bf16(bench),
        "kivi-2": _bf16(bench, "kivi"),
        "kivi-4": _bf16(bench, "kivi:bits=4"),
    }
    arms = {name: DecodeAttention(spec, tokens) for name, spec in specs.items()}
    held = {name: arm.store.nbytes(arm.seq).held for name, arm in arms.items()}
    times = median_seconds(arms)
    for arm in arms.values():
        arm.close()
    ratios = [times[name] / times["kivi-2"] for name in ("fp32", "bf16")]
    return Outcome(
        predicted=f"{held['fp32'] / held['kivi-2']:.1f}x and {held['bf16'] / held['kivi-2']:.1f}x of the bytes",
        measured=", ".join(f"{bits} bits {error:.1e}" for bits, error in apart.items())
        + f" of the largest output; {tokens} tokens: "
        + ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in times.items())
        + f": {ratios[0]:.2f}x of fp32, {ratios[1]:.2f}x of bf16",
        met=max(apart.values()) <= 1e-3 and ratios[0] >= 2 and ratios[1] >= 1,
    )


def codes_do_not_depend_on_chunks(bench: Bench, tokens: int = 700) -> Outcome:
    """Codes after chunks of 1, 7, 64 and 300 tokens of the same keys and values."""
    from trimtab.runtime.cache.store import KVStore
    from trimtab.runtime.step import Step
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    spec = compose(bench.model.spec.with_dtype("float32", "bfloat16"), parse_all(["kivi"]))
    k, v = np.random.default_rng(1).standard_normal((2, tokens, 3, 64), np.float32)
    reads = []
    for chunk in (1, 7, 64, 300):
        store = KVStore(spec)
        seq = store.open()
        for past in range(0, tokens, chunk):
            part = slice(past, min(past + chunk, tokens))
            store.append(0, k[part], v[part], Step.of([part.stop - past], [past], [seq]))
        # Read behind the last token: everything that is coded by now, as it decodes.
        view = store.append(0, k[:1], v[:1], Step.of([1], [tokens], [seq]))[0][0]
        reads.append((view.k, view.v))
    same = all(np.array_equal(a, b) for other in reads[1:] for a, b in zip(reads[0], other, strict=True))
    return Outcome(measured="chunks of 1, 7, 64, 300: " + ("bit-identical" if same else "differ"), met=same)


# -------------------------------------------------------------------------------------------------------- predictions

_PROMPT, _GEN, _SHORT = 160, 338, "kivi:bits=2,group=32,residual=32"


def largest_batch(techniques: tuple[str, ...]) -> int:
    """Most sequences of the paper's length on one A100-80GB."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        report = published_workload(techniques, middle)
        if report.counts["peak_bytes"] <= report.counts.get("capacity_bytes", 80 * 10**9):
            low = middle
        else:
            high = middle - 1
    return low


def published_workload(techniques: tuple[str, ...], batch: int) -> Any:
    """Prediction of Llama-2-7B on one A100-80GB in fp16, 160 tokens in and 338 out."""
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    workload = Workload(batch=batch, prompt=_PROMPT, gen=_GEN)
    return predict(
        make_plan("llama-2-7b", "a100", workload, techniques, dtype="float16", kv_dtype="float16", stack="datasheet")
    )


def predicts_memory_and_batch(bench: Bench) -> Outcome:
    """Llama-2-7B, 160 tokens in and 338 out: peak memory at the batch that fills the card in fp16, and the batch that fits."""
    plain, coded = largest_batch(()), largest_batch((_SHORT,))
    memory = [published_workload(techniques, plain).counts["peak_bytes"] for techniques in ((), (_SHORT,))]
    found = memory[0] / memory[1], coded / plain
    return Outcome(
        predicted=f"memory {found[0]:.2f}x at batch {plain}, batch {found[1]:.2f}x ({coded}), residual 32",
        met=abs(found[0] / 2.6 - 1) <= 0.10 and abs(found[1] / 4 - 1) <= 0.10,
    )


def predicts_throughput(bench: Bench) -> Outcome:
    """Tokens per second of decode at the largest batch of each."""
    rates = []
    for techniques in ((), (_SHORT,)):
        batch = largest_batch(techniques)
        rates.append(batch / (published_workload(techniques, batch).figures["tpot_s"].value or 1.0))
    ratio = rates[1] / rates[0]
    return Outcome(predicted=f"{ratio:.2f}x", met=2.35 * 0.8 <= ratio <= 3.47 * 1.2)


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad parameter gets a sentence that names it and what is allowed."""
    from trimtab.techniques.plan import make_plan

    cases = {
        "kivi:bits=3": ("bits=3", "2, 4, 8"),
        "kivi:group=0": ("group=0", "multiple of 8"),
        "kivi:residual=100": ("residual=100", "multiple of group=32"),
        "kivi:group=48,residual=48": ("group=48", "8, 16, 32, 64"),
    }
    accepted = []
    for case, words in cases.items():
        try:
            make_plan(bench.model, "a100", techniques=[case])
            accepted.append(case)
        except TrimtabError as error:
            if not all(word in str(error) for word in words):
                accepted.append(f"{case} ({error})")
    return Outcome(measured=f"{len(cases) - len(accepted)} of {len(cases)} refused", met=not accepted)


LINES = (
    Line(
        id="a1", text="perplexity: keys by channel against by token, 4 bits against floats",
        needed="<= 0.85x; <= 1.03x", check=keys_by_channel,
    ),
    Line(
        id="a2", text="passkey in 1K tokens of prose, 40 prompts", needed="fp, 4 bits 100 %; 2 bits within 10 points, by token below",
        check=passkeys_survive,
    ),
    Line(id="a3", text="pages of 4096 tokens at 2 bits", needed="<= 0.21x of 16 bits", check=bytes_are_allocated),
    Line(id="a4", text="RSS with 64 sequences of 4096 tokens", needed=">= 0.75x of the predicted saving", check=memory_falls),
    Line(
        id="a5", text="fused kernel: against decoding first, and its speed", needed="1e-3; 2x fp32, 1x bf16", check=fused_kernel
    ),
    Line(id="a6", text="chunks of 1, 7, 64, 300 tokens", needed="bit-identical codes", check=codes_do_not_depend_on_chunks),
    Line(id="b1", text="Llama-2-7B on A100: memory 2.6x, batch 4x", needed="within 10 %", check=predicts_memory_and_batch),
    Line(id="b2", text="throughput 2.35-3.47x", needed="in the range, 20 %", check=predicts_throughput),
    Line(id="c1", text="bits=3, group=0, residual=100, group=48", needed="named, with what is allowed", check=refuses_bad_input),
)  # fmt: skip
