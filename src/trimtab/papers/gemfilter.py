"""Checks of GemFilter (arXiv 2409.17422): the layer, the passkey, its controls, time, memory, predictions, bad input."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Line, Needs, Outcome

TOPK, TOKENS, PROMPTS = 192, 2048, 40
TEXTS = ("cfi_public", "handbook_public")


def _layer(bench: Bench) -> int:
    from trimtab.techniques.apply import default_materials
    from trimtab.techniques.tokens._needle_recall import find_layer

    return bench.once(
        "gemfilter.layer", lambda: find_layer(bench.model, default_materials(bench.model), topk=128, pool=5)
    )


def finds_layer(bench: Bench) -> Outcome:
    """Recall of the needle by layer over 16 prompts, and the layer chosen from it (measured before: 14 of 30)."""
    from trimtab.techniques.apply import default_materials
    from trimtab.techniques.tokens._needle_recall import recall_by_layer

    recall = bench.once(
        "gemfilter.recall", lambda: recall_by_layer(bench.model, default_materials(bench.model), topk=128, pool=5)
    )
    layer = _layer(bench)
    shown = ", ".join(f"{index}: {recall[index]:.2f}" for index in sorted({0, 8, 13, 14, 17, 20, layer, 24, 29}))
    return Outcome(measured=f"layer {layer}; recall {shown}", met=layer == 14 or recall[layer] >= 0.7)


def _prompts(bench: Bench) -> list[Any]:
    from trimtab.runtime.text.needles import needle_prompts

    def compute() -> list[Any]:
        share = PROMPTS // len(TEXTS)
        found = []
        for seed, text in enumerate(TEXTS):
            found += needle_prompts(
                bench.model.tokenizer, tokens=TOKENS, count=share, seed=seed, haystack=bench.text(text)
            )
        return found

    return bench.once("gemfilter.prompts", compute)


def _answers(bench: Bench, model: Any, prompt: Any, kept: np.ndarray | None = None) -> str:
    """Greedy continuation of the prompt, or of the tokens kept of it."""
    ids = list(prompt.ids) if kept is None else [prompt.ids[index] for index in kept]
    return model.generate(ids, max_new_tokens=6, temperature=0.0).text


def _share_right(bench: Bench, name: str, answer: Callable[[int, Any], str]) -> float:
    def compute() -> float:
        right = [prompt.answer in answer(index, prompt) for index, prompt in enumerate(_prompts(bench))]
        return float(np.mean(right))

    return bench.once(f"gemfilter.right.{name}", compute)


def _filtered(bench: Bench, layer: int) -> Callable[[int, Any], str]:
    from trimtab.techniques.apply import applied

    def answer(index: int, prompt: Any) -> str:
        with applied(bench.model, f"gemfilter:layer={layer},topk={TOPK}") as model:
            return _answers(bench, model, prompt)

    return answer


def passkey_survives(bench: Bench) -> Outcome:
    """Passkey in 2048 tokens with 192 kept, 40 prompts over two held-out texts."""
    share = _share_right(bench, "ours", _filtered(bench, _layer(bench)))
    return Outcome(measured=f"{share:.1%} of {PROMPTS} at layer {_layer(bench)}", met=share >= 0.85)


def controls_fail(bench: Bench) -> Outcome:
    """Random tokens, the last tokens, and layer 0 as the filter, all of the same size."""
    rng = np.random.default_rng(0)
    found = {
        "random": _share_right(
            bench,
            "random",
            lambda _, p: _answers(bench, bench.model, p, np.sort(rng.choice(len(p.ids), TOPK, replace=False))),
        ),
        "last": _share_right(
            bench, "last", lambda _, p: _answers(bench, bench.model, p, np.arange(len(p.ids) - TOPK, len(p.ids)))
        ),
        "layer 0": _share_right(bench, "layer0", _filtered(bench, 0)),
    }
    return Outcome(
        measured=", ".join(f"{name} {share:.1%}" for name, share in found.items()), met=max(found.values()) <= 0.40
    )


def prefill_is_faster(bench: Bench) -> Outcome:
    """Wall time of the prompt, filtered over plain, interleaved; median of five."""
    from trimtab.techniques.apply import applied

    prompt = list(_needle(bench).ids)
    layer = _layer(bench)

    def seconds(model: Any) -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=1, temperature=0.0)
        return time.perf_counter() - start

    ratios = []
    seconds(bench.model)
    for _ in range(5):
        plain = seconds(bench.model)
        with applied(bench.model, f"gemfilter:layer={layer},topk={TOPK}") as model:
            ratios.append(seconds(model) / plain)
    bar = (layer + 1) / bench.model.spec.num_hidden_layers + TOPK / len(prompt) + 0.1
    ratio = float(np.median(ratios))
    return Outcome(
        predicted=f"{bar - 0.1:.3f}", measured=f"{ratio:.3f} ({min(ratios):.3f}-{max(ratios):.3f})", met=ratio <= bar
    )


def _needle(bench: Bench) -> Any:
    from trimtab.runtime.text.needles import needle_prompts

    return bench.once(
        "gemfilter.needle", lambda: needle_prompts(bench.model.tokenizer, tokens=TOKENS, count=3, seed=7)[1]
    )


def store_holds_kept(bench: Bench) -> Outcome:
    """Bytes in the cache after the prompt against those of the kept tokens."""
    from trimtab.techniques.apply import applied

    with applied(bench.model, f"gemfilter:layer={_layer(bench)},topk={TOPK}") as model:
        session = model.session()
        session.prefill([list(_needle(bench).ids)])
        held = session.store.nbytes().held
        wanted = model.spec.kv_nbytes(TOPK)
    return Outcome(predicted=f"{wanted:,} B", measured=f"{held:,} B", met=held == wanted)


def shows_answer(bench: Bench) -> Outcome:
    """The kept text and the greedy answer."""
    from trimtab.techniques.apply import applied

    prompt = _needle(bench)
    with applied(bench.model, f"gemfilter:layer={_layer(bench)},topk={TOPK}") as model:
        kept = model.reduce_prompt(list(prompt.ids))
        answer = _answers(bench, model, prompt)
    first, end = prompt.needle
    around = [prompt.ids[index] for index in kept if first - 8 <= index < end + 8]
    text = " ".join(bench.model.tokenizer.decode(around).split())
    return Outcome(
        measured=f"kept near the needle: '{text}'; answer '{answer.strip()}' (is {prompt.answer})",
        met=prompt.answer in answer,
    )


def _llama(techniques: tuple[str, ...], prompt: int) -> Any:
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    return predict(make_plan("llama-3.1-8b", "a100", Workload(prompt=prompt, gen=50), techniques, stack="datasheet"))


def predicts_speed(bench: Bench) -> Outcome:
    """Prompt speed-up at 120K for layer 13 of 32."""
    plain, filtered = (_llama(techniques, 120_000) for techniques in ((), ("gemfilter:layer=13,topk=1024",)))
    ratio = plain.figures["ttft_s"].value / filtered.figures["ttft_s"].value
    return Outcome(predicted=f"{ratio:.2f}x", met=2.3 * 0.9 <= ratio <= 2.4 * 1.1)


def predicts_memory(bench: Bench) -> Outcome:
    """Cache bytes of 1024 kept tokens against 120K."""
    plain, filtered = (_llama(techniques, 120_000) for techniques in ((), ("gemfilter:layer=13,topk=1024",)))
    ratio = filtered.counts["kv_bytes"] / plain.counts["kv_bytes"]
    wanted = (1024 + 50) / (120_000 + 50)
    return Outcome(predicted=f"{ratio:.5f}", measured="", met=abs(ratio - wanted) < 1e-9)


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad parameter gets one sentence."""
    from trimtab.techniques.plan import make_plan

    cases = ("gemfilter:layer=30", "gemfilter:topk=0", "gemfilter:pool=4", "gemfilter:layer=-1")
    accepted = []
    for case in cases:
        try:
            make_plan(bench.model, "a100", techniques=[case])
            accepted.append(case)
        except TrimtabError:
            continue
    return Outcome(measured=f"{len(cases) - len(accepted)} of {len(cases)} refused", met=not accepted)


def refuses_prefix_sharing(bench: Bench) -> Outcome:
    """Prefix sharing comes with the server."""
    raise Needs("server")


LINES = (
    Line(
        id="a1", text="auto finds the filter layer with 16 prompts", needed="14 of 30, or explained", check=finds_layer
    ),
    Line(
        id="a2", text="passkey in 2K tokens, 192 kept, 40 prompts, two texts", needed=">= 85 %", check=passkey_survives
    ),
    Line(id="a3", text="random, last 192, layer 0 instead", needed="<= 40 % each", check=controls_fail),
    Line(id="a4", text="prompt time over plain", needed="<= (r+1)/L + k/n + 0.1", check=prefill_is_faster),
    Line(id="a5", text="no first-pass cache: store bytes", needed="== kept tokens", check=store_holds_kept),
    Line(id="a6", text="kept tokens and greedy answer shown", needed="right answer", check=shows_answer),
    Line(id="b1", text="prompt speed-up at 120K, layer 13 of 32", needed="2.3-2.4x within 10 %", check=predicts_speed),
    Line(id="b2", text="cache, 1024 kept of 120K", needed="ratio of tokens", check=predicts_memory),
    Line(id="c1", text="layer >= L, topk = 0, even pool", needed="refused with a sentence", check=refuses_bad_input),
    Line(id="c2", text="together with prefix sharing", needed="refused with a sentence", check=refuses_prefix_sharing),
)
