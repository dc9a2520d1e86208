"""Checks of DuoAttention (arXiv 2410.10819): training, passkeys, controls, bytes, exactness, speed, predictions, bad input."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Line, Outcome

SINK, RECENT, SPARSITY = 16, 128, 0.5
#: Prompt lengths of the passkey, prompts of each that the plain model must answer, and prompts of each length and haystack.
TOKENS, PROMPTS, ASKED = (1000, 2000), 24, 14
#: Samples over which the loss of one step is averaged: passkeys and lengths differ from step to step.
SMOOTH = 10
SHIPPED = "smollm2-135m"


def _gates() -> np.ndarray:
    from trimtab.techniques.cache._gates import shipped

    return shipped(SHIPPED).values


def _calibration() -> str:
    from trimtab.runtime.text.builtin import builtin_text, split

    return split(builtin_text())[0]


@contextmanager
def _applied(bench: Bench, gates: np.ndarray | None = None, sparsity: float = SPARSITY) -> Iterator[Any]:
    """The built-in model with duo, with the gates that ship or with these [L, G]."""
    from trimtab.techniques.apply import applied
    from trimtab.techniques.cache._gates import write_gates
    from trimtab.techniques.cache.duo import Duo

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gates.tsv"
        if gates is not None:
            write_gates(path, gates, [SHIPPED])
        chosen = SHIPPED if gates is None else str(path)
        with applied(bench.model, Duo(sparsity=sparsity, sink=SINK, recent=RECENT, gates=chosen)) as model:
            yield model


# ----------------------------------------------------------------------------------------------------------- training


def _trained(bench: Bench) -> Any:
    """A training with another seed than the gates that ship: about ten minutes on two cores."""
    from trimtab.train.duo_gates import train_gates
    from trimtab.train.gates import GateTraining

    def compute() -> Any:
        model = bench.model
        return train_gates(model.spec, model.weights, model.tokenizer, _calibration(), GateTraining(seed=1))

    return bench.once("duo.trained", compute)


def smoothed_fall(losses: np.ndarray, over: int = SMOOTH) -> tuple[float, float]:
    """(highest, last) of the running mean of the losses over `over` steps."""
    means = np.convolve(losses, np.ones(over) / over, mode="valid")
    return float(means.max()), float(means[-1])


def loss_falls(bench: Bench) -> Outcome:
    """Running mean of the loss of a new training, at its peak and at its end."""
    trained = _trained(bench)
    peak, last = smoothed_fall(trained.losses)
    single = trained.losses
    return Outcome(
        measured=f"{peak:.4f} to {last:.4f}: {peak / last:.2f}x (means of {SMOOTH} steps; single steps {single.max():.4f} to "
        f"{single[-SMOOTH:].min():.4f})",
        met=peak >= 3 * last,
    )


def seeds_agree(bench: Bench) -> Outcome:
    """Rank correlation of new gates with those that ship, and how many heads both keep whole."""
    from trimtab.techniques.cache._gates import streaming_heads

    first, second = _gates(), _trained(bench).gates
    rank = spearman(first.ravel(), second.ravel())
    both = ~streaming_heads(first, SPARSITY) & ~streaming_heads(second, SPARSITY)
    kept = (~streaming_heads(first, SPARSITY)).sum()
    return Outcome(measured=f"Spearman {rank:.3f}; {both.sum()} of {kept} retrieval heads in common", met=rank >= 0.6)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; ties share their mean rank.

    >>> round(spearman(np.array([1.0, 2.0, 3.0, 3.0]), np.array([2.0, 4.0, 9.0, 9.0])), 6)
    1.0
    """
    ranks = []
    for values in (a, b):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[place])
    return float(np.corrcoef(*ranks)[0, 1])


def trains_gates_alone(bench: Bench) -> Outcome:
    """Gradients after one short sample, and the weights before and after."""
    import random

    import torch

    from trimtab.runtime.weights.packed import fingerprint
    from trimtab.spec.cache import Ring
    from trimtab.train.duo_gates import Branches
    from trimtab.train.passkeys import passkey_sample

    model = bench.model
    before = fingerprint(model.weights)
    branches = Branches(model.spec, model.weights, Ring(SINK, RECENT))
    with torch.no_grad():
        branches.gates.fill_(0.5)
    sample = passkey_sample(model.tokenizer, model.tokenizer.encode(_calibration()), 300, 2, 4, random.Random(0))
    branches.distance(sample.ids, sample.tail).backward()
    gradient = branches.gates.grad
    assert gradient is not None
    others = len(list(branches.decoder.parameters()))
    unchanged = fingerprint(model.weights) == before
    count = int((gradient != 0).sum())
    return Outcome(
        measured=f"{count} of {gradient.numel()} gates have a gradient, {others} other parameters, weights "
        + ("unchanged" if unchanged else "changed"),
        met=count == gradient.numel() and others == 0 and unchanged,
    )


# ----------------------------------------------------------------------------------------------------------- passkeys


def _prompts(bench: Bench, tokens: int) -> list[Any]:
    """Prompts that the plain model answers, digit for digit: half of those asked in plain sentences, half in held-out prose,
    where it finds nearly all. What it cannot find itself says nothing about gates.
    """
    from trimtab.measure.needles import grade
    from trimtab.runtime.text.needles import needle_prompts

    def compute() -> list[Any]:
        asked = []
        for haystack in (None, bench.text("cfi_public")):
            asked += needle_prompts(bench.model.tokenizer, tokens=tokens, count=ASKED, seed=tokens, haystack=haystack)
        model = _engine(bench.model)
        return [prompt for prompt in asked if grade(model, [prompt]).exact == 1]

    return bench.once(f"duo.prompts.{tokens}", compute)


def _engine(model: Any) -> Any:
    from trimtab.measure.kv.engines import engine_of

    return engine_of(model)[0]


def _controls() -> dict[str, np.ndarray]:
    gates = _gates()
    random = {f"random {seed}": np.random.default_rng(seed).random(gates.shape) for seed in range(3)}
    return random | {"inverted": 1 - gates}


def _graded(bench: Bench, name: str) -> dict[int, Any]:
    """Retrieval by prompt length: with the gates that ship, or with a control's."""
    from trimtab.measure.needles import grade

    def compute() -> dict[int, Any]:
        prompts = {tokens: _prompts(bench, tokens) for tokens in TOKENS}
        with _applied(bench, None if name == "learned" else _controls()[name]) as model:
            engine = _engine(model)
            return {tokens: grade(engine, found) for tokens, found in prompts.items()}

    return bench.once(f"duo.passkeys.{name}", compute)


def _shown(graded: dict[int, Any]) -> str:
    return ", ".join(f"{tokens}: {r.exact:.1%} ({r.answer_nll_nats:.2f} nats)" for tokens, r in graded.items())


def passkeys_are_kept(bench: Bench) -> Outcome:
    """Four digits in 1000 and 2000 tokens that the plain model answers, half of the heads streaming."""
    learned = _graded(bench, "learned")
    asked = ", ".join(f"{r.prompts} of {2 * ASKED}" for r in learned.values())
    return Outcome(
        measured=f"{_shown(learned)}; the plain model answers {asked}: those are asked",
        met=min(r.exact for r in learned.values()) >= 0.85 and min(r.prompts for r in learned.values()) >= PROMPTS,
    )


def controls_fail(bench: Bench) -> Outcome:
    """The same prompts with gates drawn at random (three times) and with the gates turned round."""
    learned = _graded(bench, "learned")
    found = {name: _graded(bench, name) for name in _controls()}
    losses = []
    shown = []
    for tokens in TOKENS:
        chance = float(np.mean([r[tokens].exact for name, r in found.items() if name.startswith("random")]))
        inverted = found["inverted"][tokens].exact
        losses += [learned[tokens].exact - chance, learned[tokens].exact - inverted]
        each = " ".join(f"{r[tokens].exact:.0%}" for name, r in found.items() if name.startswith("random"))
        shown.append(
            f"{tokens}: learned {learned[tokens].exact:.1%}, random {chance:.1%} ({each}), inverted {inverted:.1%}"
        )
    return Outcome(measured="; ".join(shown), met=min(losses) >= 0.30)


# --------------------------------------------------------------------------------------------------- bytes, exactness


def bytes_are_freed(bench: Bench, tokens: int = 4096) -> Outcome:
    """Bytes the store holds after 4096 tokens of random keys, and what the process grew by."""
    full = _filled(bench.model, tokens)
    with _applied(bench) as model:
        held, grown = _filled(model, tokens)
        predicted = model.spec.kv_nbytes(tokens)
        heads = [head for layer in model.spec.layers for head in layer.cache.heads]
    streaming = sum(str(head.keep) != "all" for head in heads) / len(heads)
    wanted = full[0] * ((1 - streaming) + streaming * (SINK + RECENT) / tokens)
    page = len(heads) * heads[0].page * heads[0].token_bytes()
    growth = grown / full[1]
    return Outcome(
        predicted=f"{predicted:,} B",
        measured=f"{held:,} B of {full[0]:,} B ({held / full[0]:.4f}), f = {streaming:.3f}; RSS {grown:,} B of {full[1]:,} B",
        met=held == predicted and abs(held - wanted) <= page and abs(growth - held / full[0]) <= 0.1,
    )


def _filled(model: Any, tokens: int) -> tuple[int, int]:
    """(bytes held, bytes of RSS grown by) after `tokens` tokens in chunks of 512."""
    from trimtab.measure.process import rss_bytes
    from trimtab.runtime.step import Step

    store = model.runner().open_store()
    before = rss_bytes()
    seq = store.open(reserve_tokens=tokens)
    attention = model.spec.layers[0].self_attn
    k, v = np.random.default_rng(0).standard_normal(
        (2, 512, attention.num_key_value_heads, attention.head_dim), np.float32
    )
    for first in range(0, tokens, 512):
        step = Step.of([512], [first], [seq])
        for layer in range(model.spec.num_hidden_layers):
            store.append(layer, k, v, step)
    found = store.nbytes().held, rss_bytes() - before
    store.free(seq)
    return found


def is_exact_without_streaming(bench: Bench) -> Outcome:
    """Logits at sparsity 0, and with the retrieval heads moved to the front."""
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.text.builtin import builtin_text
    from trimtab.techniques.cache._gates import streaming_heads
    from trimtab.techniques.cache._permute import permute_heads

    model = bench.model
    ids = model.tokenizer.encode(builtin_text()[:2000])
    plain = model.logits(ids).numpy()
    with _applied(bench, sparsity=0.0) as same:
        equal = bool(np.array_equal(same.logits(ids).numpy(), plain))
    orders = np.argsort(streaming_heads(_gates(), SPARSITY), axis=1, kind="stable").tolist()
    moved = Model(Variant(model.spec, permute_heads(model.spec, model.weights, orders)))
    # Logits of this model reach 30 in size: relative to that.
    change = float(np.abs(moved.logits(ids).numpy() - plain).max())
    scale = float(np.abs(plain).max())
    return Outcome(
        measured=f"sparsity 0 {'equal to the bit' if equal else 'differs'}; order of heads changes logits by {change:.1e} "
        f"(largest logit {scale:.0f}: {change / scale:.1e} of it)",
        met=equal and change / scale < 1e-5,
    )


# -------------------------------------------------------------------------------------------------------------- speed


def decode_attention_is_faster(bench: Bench, tokens: int = 8192) -> Outcome:
    """One decode step's attention over all layers by the native kernel, one thread, interleaved; medians of nine."""
    from trimtab.measure.kv.kernels import DecodeAttention, median_seconds

    arms = {"full": DecodeAttention(bench.model.spec, tokens)}
    with _applied(bench) as model:
        arms["duo"] = DecodeAttention(model.spec, tokens)
    times = median_seconds(arms)
    for arm in arms.values():
        arm.close()
    ratio = times["full"] / times["duo"]
    bound = 1 / (1 - SPARSITY + SPARSITY * (SINK + RECENT) / tokens)
    return Outcome(
        predicted=f"{bound:.2f}x of the bytes",
        measured=f"{ratio:.2f}x ({times['full'] * 1e3:.1f} ms to {times['duo'] * 1e3:.1f} ms)",
        met=ratio >= 1.7,
    )


# -------------------------------------------------------------------------------------------------------- predictions


def _ratios(model: str, context: int, sparsity: float) -> tuple[float, float]:
    """(memory, decode) of the plain model over the model with duo, on one A100 from its datasheet."""
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    reports = [
        predict(make_plan(model, "a100", Workload(prompt=context, gen=50), techniques, stack="datasheet"))
        for techniques in ((), (f"duo:sparsity={sparsity}",))
    ]
    memory, tpot = ([r.counts["peak_bytes"] for r in reports], [r.figures["tpot_s"].value or 0.0 for r in reports])
    return memory[0] / memory[1], tpot[0] / tpot[1]


def _predicts(model: str, context: int, sparsity: float, memory: float, decode: float) -> Outcome:
    found = _ratios(model, context, sparsity)
    met = all(abs(got / paper - 1) <= 0.15 for got, paper in zip(found, (memory, decode), strict=True))
    return Outcome(predicted=f"memory {found[0]:.2f}x, decode {found[1]:.2f}x at {context:,} tokens", met=met)


def predicts_gqa(bench: Bench) -> Outcome:
    """Llama-3-8B-1048K, half of the heads streaming, at the context of the paper's prefill figure."""
    return _predicts("llama-3-8b-1048k", 320_000, 0.5, 1.67, 1.50)


def predicts_mha(bench: Bench) -> Outcome:
    """Llama-2-7B-32K, three quarters of the heads streaming, at the context of the paper's prefill figure."""
    return _predicts("llama-2-7b-32k", 100_000, 0.75, 2.55, 2.18)


def predicts_fit(bench: Bench) -> Outcome:
    """Largest context on one A100-80GB with 8-bit weights and 4-bit keys and values."""
    from trimtab.predict.fit import fit
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    contexts, per_token = [], []
    for techniques in ((), ("duo:sparsity=0.5",)):
        plan = make_plan(
            "llama-3-8b-1048k", "a100", Workload(prompt=1000, gen=1), techniques, dtype="fp8", kv_dtype="int4-g128",
            stack="datasheet",
        )  # fmt: skip
        contexts.append(fit(plan).rows[0].context)
        per_token.append(plan.model.kv_nbytes(1_000_001) - plan.model.kv_nbytes(1_000_000))
    return Outcome(
        predicted=f"{contexts[1]:,} tokens at {per_token[1]:,} B each; without {contexts[0]:,} at {per_token[0]:,} B",
        met=contexts[0] < 3_300_000 <= contexts[1] and per_token == [34_816, 17_408],
    )


def refuses_bad_input(bench: Bench) -> Outcome:
    """Gates of another shape, parameters out of range, a model nobody trained gates for."""
    from trimtab.techniques.plan import make_plan

    cases = {
        "duo:gates=llama-3.1-8b": (SHIPPED, "32 layers x 8 KV heads"),
        "duo:sparsity=1.2": (SHIPPED, "0..1"),
        "duo:recent=0": (SHIPPED, "recent >= 1"),
        "duo": ("llama-3-8b", "trimtab train duo"),
    }
    accepted = []
    for case, (model, words) in cases.items():
        try:
            make_plan(model, "a100", techniques=[case])
            accepted.append(case)
        except TrimtabError as error:
            if words not in str(error):
                accepted.append(f"{case} ({error})")
    return Outcome(
        measured=f"{len(cases) - len(accepted)} of {len(cases)} refused with what is expected", met=not accepted
    )


LINES = (
    Line(id="a1", text="loss of 150 steps, from its peak to its end", needed="falls >= 3x", check=loss_falls),
    Line(id="a2", text="gates of two seeds", needed="Spearman >= 0.6", check=seeds_agree),
    Line(id="a3", text="gradients", needed="on gates alone", check=trains_gates_alone),
    Line(
        id="a4", text="passkeys in 1K and 2K tokens, f = 0.5, sink 16, recent 128", needed=">= 85 %", check=passkeys_are_kept
    ),
    Line(id="a5", text="random gates (mean of 3), inverted gates", needed=">= 30 points less", check=controls_fail),
    Line(
        id="a6", text="bytes of the store at 4096 tokens", needed="(1-f) + f*144/4096 of full; RSS follows",
        check=bytes_are_freed,
    ),
    Line(
        id="a7", text="f = 0; order of heads", needed="equal bits; < 1e-5 of the largest logit",
        check=is_exact_without_streaming,
    ),
    Line(id="a8", text="decode attention at 8K, f = 0.5", needed=">= 1.7x", check=decode_attention_is_faster),
    Line(id="b1", text="GQA on A100: memory 1.67x, decode 1.50x", needed="within 15 %", check=predicts_gqa),
    Line(id="b2", text="MHA on A100: memory 2.55x, decode 2.18x", needed="within 15 %", check=predicts_mha),
    Line(id="b3", text="3.3 M tokens on an A100-80GB", needed="fit with duo, not without", check=predicts_fit),
    Line(
        id="c1", text="gates of another shape or missing, sparsity=1.2, recent=0", needed="refused with a sentence",
        check=refuses_bad_input,
    ),
)  # fmt: skip
