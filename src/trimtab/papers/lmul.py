"""Checks of L-Mul (arXiv 2410.00907): error of a product, every pair of fp8 numbers, quality, fine-tuning, energy, bad input."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Line, Outcome
from trimtab.spec.product import EXACT, Lmul, Product, Rounded

#: Pairs of numbers of the error table, and what it must come to within 0.0010: (uniform mantissas, N(0, 1) operands).
PAIRS = 1_000_000
ERRORS: dict[str, tuple[Product, float]] = {
    "e4m3": (Rounded(mantissa=3), 0.0294),
    "e5m2": (Rounded(mantissa=2), 0.0586),
    "m=4": (Lmul(mantissa=4), 0.0296),
    "m=3": (Lmul(mantissa=3), 0.0482),
    "m=4 nearest": (Lmul(mantissa=4, round="nearest"), 0.0527),
    "m=4 formula": (Lmul(mantissa=4, carry="formula"), 0.0775),
    "m=23": (Lmul(mantissa=23), 0.0265),
    "m=23 formula": (Lmul(mantissa=23, carry="formula"), 0.0757),
    "m=23 no offset": (Lmul(mantissa=23, offset="none"), 0.0385),
}
#: Windows of held-out prose that quality is scored on.
WINDOW, WINDOWS = 512, 6
#: Updates of the comparison of accumulators, and of the model before it.
STEPS, BEFORE = 200, 400


def errors_of_products(bench: Bench) -> Outcome:
    """Mean relative error of the kernel's products over uniform mantissas; a kernel that multiplied would show 0."""
    from trimtab.runtime.kernels.lmul import multiply

    rng = np.random.default_rng(29)
    found, normal = {}, {}
    uniform = [rng.uniform(1, 2, PAIRS).astype(np.float32) for _ in range(2)]
    gauss = [rng.standard_normal(PAIRS, dtype=np.float32) for _ in range(2)]
    for name, (product, _) in ERRORS.items():
        for (a, b), into in ((uniform, found), (gauss, normal)):
            exact = a.astype(np.float64) * b
            into[name] = float(np.abs(multiply(a, b, product) / exact - 1).mean())  # type: ignore[arg-type]
    stub = float(np.abs(uniform[0] * uniform[1] / (uniform[0].astype(np.float64) * uniform[1]) - 1).mean())
    return Outcome(
        predicted=", ".join(f"{name} {wanted:.4f}" for name, (_, wanted) in ERRORS.items()),
        measured="uniform: "
        + ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        + "; normal: "
        + ", ".join(f"{name} {value:.4f}" for name, value in normal.items())
        + f"; product of floats {stub:.4f}",
        met=all(abs(found[name] - wanted) <= 0.001 for name, (_, wanted) in ERRORS.items()) and stub < 1e-6,
    )


def every_pair_of_fp8(bench: Bench) -> Outcome:
    """All 2^16 pairs of bytes laid out as e4m3 on every instruction set, against additions of the bytes."""
    from trimtab.runtime.kernels import _core, use_isa
    from trimtab.runtime.kernels.lmul import multiply
    from trimtab.runtime.numerics import lmul as definition
    from trimtab.runtime.numerics.scaled import E4M3_VALUES

    x, y = (np.ascontiguousarray(code) for code in np.broadcast_arrays(np.arange(256)[:, None], np.arange(256)))
    left, right = x & 0x7F, y & 0x7F
    byte = np.clip(left + right - (7 << 3) + 1, 0, 0x7E)
    byte = np.where((left < 8) | (right < 8) | (byte < 8), 0, byte) | (x ^ y) & 0x80
    wanted = E4M3_VALUES[np.where((left == 0x7F) | (right == 0x7F), 0x7F, byte)]
    rule = Lmul(mantissa=3, exp=4)
    differ = _different(definition.multiply(E4M3_VALUES[x], E4M3_VALUES[y], rule), wanted)
    try:
        for isa in _core.isas():
            use_isa("scalar" if isa == "baseline" else isa)
            differ += _different(multiply(E4M3_VALUES[x], E4M3_VALUES[y], rule), wanted)
    finally:
        use_isa("auto")
    return Outcome(measured=f"{differ} of {x.size} pairs differ; numpy, {', '.join(_core.isas())}", met=differ == 0)


def _different(found: np.ndarray, wanted: np.ndarray) -> int:
    nan = np.isnan(wanted)
    return int((np.isnan(found) != nan).sum() + (found.view(np.uint32) != wanted.view(np.uint32))[~nan].sum())


# ---------------------------------------------------------------------------------------------------------- quality


def _variant(bench: Bench, how: str | Product) -> Any:
    """The built-in model with a spec string on it, or with a product in attention."""
    from trimtab.model.variant import Variant
    from trimtab.spec.tree import Edit
    from trimtab.techniques.apply import derive
    from trimtab.techniques.materials import Materials
    from trimtab.techniques.registry import parse_all

    model = bench.model
    if isinstance(how, str):
        return derive(model.variant, parse_all([how]), Materials())
    spec = model.spec.edit([Edit("layers.*.self_attn", "product", how)], by="check")
    return Variant(spec, model.weights)


def _quality(bench: Bench, how: str | Product, count: int = WINDOWS) -> Any:
    """Against the unmodified model, whose logits are computed once."""
    import torch

    from trimtab.measure.quality import TokenScores, windows
    from trimtab.runtime.step import Step

    pieces = windows(bench.model.tokenizer.encode(bench.text("cfi_public")), WINDOW, WINDOWS)[:count]

    def logits(variant: Any, piece: Any) -> Any:
        wanted = np.arange(len(piece) - 1, dtype=np.int64)
        return variant.decoder(torch.from_numpy(piece), Step.of([len(piece)], [0]), None, wanted)

    def compute() -> Any:
        variant, scores = _variant(bench, how), TokenScores()
        for index, piece in enumerate(pieces):
            plain = bench.once(f"lmul.base.{index}", functools.partial(logits, bench.model.variant, piece))
            scores.add(plain, logits(variant, piece), torch.from_numpy(piece[1:]))
        return scores.result()

    return bench.once(f"lmul.quality.{how}.{count}", compute)


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {q.ppl:.2f} (KL {q.kl_nats:.4f} +- {q.kl_se:.4f})" for name, q in found.items())


def attention_quality(bench: Bench) -> Outcome:
    """Queries with keys and weights with values by L-Mul, softmax exact, against operands rounded to fp8 mantissas."""
    asked: dict[str, str | Product] = {
        "m=4": "lmul", "m=3": "lmul:mantissa=3", "m=2": "lmul:mantissa=2",
        "e4m3": Rounded(mantissa=3), "e5m2": Rounded(mantissa=2),
    }  # fmt: skip
    found = {name: _quality(bench, how) for name, how in asked.items()}
    base = found["m=4"].ppl_base
    ppl, kl = ({name: getattr(q, of) for name, q in found.items()} for of in ("ppl", "kl_nats"))
    return Outcome(
        measured=f"exact {base:.2f}, {_shown(found)}; {found['m=4'].tokens} tokens",
        met=found["m=4"].ppl <= 1.02 * base
        and all(of["m=3"] < of["e5m2"] and of["m=2"] > max(of["m=3"], of["m=4"]) for of in (ppl, kl)),
    )


def other_scopes(bench: Bench) -> Outcome:
    """The matrices, the products by element, and everything, on fewer windows: reported."""
    found = {scope: _quality(bench, f"lmul:scope={scope}", 2) for scope in ("linear", "elementwise", "all")}
    first = found["linear"]
    return Outcome(measured=f"exact {first.ppl_base:.2f}, {_shown(found)}; {first.tokens} tokens", met=True)


def offset_helps(bench: Bench) -> Outcome:
    """Mitchell's product, without the offset, at 7 and 23 bits of mantissa."""
    asked = {f"m={m}{also}": f"lmul:mantissa={m}{also}" for m in (7, 23) for also in ("", ",offset=none")}
    found = {name: _quality(bench, how, 3) for name, how in asked.items()}
    return Outcome(
        measured=_shown(found),
        met=all(found[f"m={m},offset=none"].kl_nats > found[f"m={m}"].kl_nats for m in (7, 23)),
    )


# ------------------------------------------------------------------------------------------------------ fine-tuning


def fine_tuning(bench: Bench) -> Outcome:
    """A tiny Llama trained in floats goes on with 3-bit L-Mul, or exact products of 3-bit operands; both add up in e4m3."""
    from trimtab.spec import tree
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all
    from trimtab.train.fit import Fit, fit
    from trimtab.train.tiny import TinyConfig, train_tiny

    config = TinyConfig(layers=2, hidden=64, ffn=176, heads=2, kv_heads=1, vocab=384, context=64, batch=8)
    text = bench.text("emma_train")[:200_000]
    trained = train_tiny(config, [text], BEFORE)
    ids = np.array(trained.backend.encode(text).ids)
    added = compose(trained.spec, parse_all(["lmul:scope=all,mantissa=3,acc=e4m3,ste=1"]))
    rounded = Rounded(mantissa=3, acc="e4m3", ste=True)

    def exact(node: tree.Node) -> dict[str, object]:
        found: dict[str, object] = {}
        if isinstance(getattr(node, "product", None), Lmul):
            found["product"] = rounded
        rope = getattr(node, "rope", None)
        if rope is not None:
            found["rope"] = dataclasses.replace(rope, product=EXACT if rope.product == EXACT else rounded)
        return found

    how = Fit(steps=STEPS, batch=config.batch, window=config.context, lr=1e-3, seed=1)
    runs = {"plain": trained.spec, "exact products": tree.mapped(added, exact), "L-Mul": added}
    losses = {name: fit(spec, trained.weights, ids, how).losses for name, spec in runs.items()}
    last = {name: float(found[-STEPS // 10 :].mean()) for name, found in losses.items()}
    return Outcome(
        measured=", ".join(f"{name} {found[0]:.3f} -> {last[name]:.3f}" for name, found in losses.items())
        + f" nats ({last['L-Mul'] / last['exact products'] - 1:+.1%}); {STEPS} updates, mean of the last tenth",
        met=last["L-Mul"] <= 1.02 * last["exact products"],
    )


# ----------------------------------------------------------------------------------------------------------- energy


def energy_of_operations(bench: Bench) -> Outcome:
    """Energy of a product and of a term of a dot product, fp16 and fp32, from the table; gates of both circuits."""
    from trimtab.predict.energy import gates, multiply_add_pj, product_pj, technology

    table = technology()
    saved = {
        (dtype, what): 1 - price(Lmul(), dtype, table) / price(EXACT, dtype, table)
        for dtype in ("fp16", "fp32")
        for what, price in (("product", product_pj), ("term", multiply_add_pj))
    }
    circuits = {f"e{e}m{m}": gates(e, m) for e, m in ((5, 2), (4, 3), (8, 7))}
    return Outcome(
        predicted=", ".join(f"{dtype} {what} -{value:.1%}" for (dtype, what), value in saved.items())
        + "; gates, multiplier / L-Mul: "
        + ", ".join(f"{name} {a} / {b}" for name, (a, b) in circuits.items()),
        met=round(saved["fp16", "product"], 2) == 0.95 and 0.78 <= round(saved["fp32", "term"], 2) <= 0.80,
    )


def whole_model(bench: Bench) -> Outcome:
    """Llama-2-7B in bf16, everything by L-Mul: a decode step at 512 tokens and a prompt of 512, with and without DRAM."""
    from trimtab.graph.build import Phase
    from trimtab.graph.ops import StepShape
    from trimtab.predict.energy import operation_energy, technology
    from trimtab.techniques.plan import make_plan

    plan = make_plan("llama-2-7b", "a100", techniques=["lmul:scope=all"], dtype="bfloat16")
    steps: dict[Phase, StepShape] = {"decode": StepShape.of([1], [512], 1), "prefill": StepShape.of([512], [0], 1)}
    met, shown = True, []
    for phase, step in steps.items():
        plain, added = (operation_energy(spec, phase, step) for spec in (plan.base, plan.model))
        saved = 1 - added.total_j / plain.total_j
        shown.append(
            f"{phase}: DRAM {plain.dram_j:.3g} J, arithmetic {plain.arithmetic_j:.3g} -> {added.arithmetic_j:.3g} J, "
            f"saves {saved:.2%} in all"
        )
        if phase == "decode":
            cheapest = technology().dram_pj_per_bit[0]
            low = [operation_energy(s, phase, step, dram_pj_per_bit=cheapest).total_j for s in (plan.base, plan.model)]
            met = saved < 0.02 and 1 - low[1] / low[0] < 0.02 and added.arithmetic_j < plain.arithmetic_j / 2
    return Outcome(predicted="; ".join(shown), met=met)


# -------------------------------------------------------------------------------------------------------- bad input


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets its sentence; what is converted or clamped is said."""
    import torch

    from trimtab.model.lmul import matmul, multiply
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    model, ones = bench.model, torch.ones(2, 2)
    cases: dict[str, tuple[Callable[[], Any], str]] = {
        "mantissa=1": (lambda: parse_all(["lmul:mantissa=1"]), "l(m) is undefined below 2"),
        "scope=softmax": (lambda: parse_all(["lmul:scope=attn|softmax"]), "no product"),
        "integers": (lambda: multiply(ones.long(), ones, Lmul()), "floating-point"),
        "complex": (lambda: matmul(ones, ones.to(torch.complex64), Lmul()), "floating-point"),
    }
    missed = []
    for name, (case, text) in cases.items():
        try:
            case()
            missed.append(name)
        except TrimtabError as error:
            missed += [] if text in str(error) else [name]
    said = {}
    for dtype, setting in (("bfloat16", "lmul:mantissa=10"), ("float16", "lmul")):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            spec = compose(model.spec.with_dtype(dtype), parse_all([setting]))
        said[dtype] = (" ".join(str(w.message) for w in heard), spec.layers[0].self_attn.product.mantissa)  # type: ignore[union-attr]
    clamped = "taken as 7" in said["bfloat16"][0] and said["bfloat16"][1] == 7
    converted = "converted to fp32" in said["float16"][0]
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused; bf16 mantissa=10 -> {said['bfloat16'][1]}, "
        f"{'said' if clamped else 'not said'}; fp16 with exp=8 converted, {'said' if converted else 'not said'}"
        + (f"; wrong: {missed}" if missed else ""),
        met=not missed and clamped and converted,
    )


LINES = (
    Line(
        id="a1",
        text="mean relative error of a product, 10^6 pairs",
        needed="the table to 0.0010",
        check=errors_of_products,
    ),
    Line(id="a2", text="2^16 pairs of e4m3 bytes, kernel and definition", needed="equal bits", check=every_pair_of_fp8),
    Line(
        id="a3",
        text="attention by L-Mul, SmolLM2-135M",
        needed="m=4 <= 1.02 x exact; m=3 below e5m2, m=2 worst",
        check=attention_quality,
    ),
    Line(id="a3.b", text="matrices, elements, everything by L-Mul", needed="reported", check=other_scopes),
    Line(id="a4", text="without the offset (Mitchell)", needed="KL higher at m=7 and 23", check=offset_helps),
    Line(
        id="a5",
        text="200 updates, 3-bit L-Mul against exact products, both in e4m3",
        needed="final loss <= 1.02 x",
        check=fine_tuning,
    ),
    Line(id="b1", text="energy from the table", needed="95 % and 78-80 %", check=energy_of_operations),
    Line(id="b2", text="whole model, DRAM included", needed="decode saves < 2 %", check=whole_model),
    Line(id="c", text="bad input", needed="a sentence each", check=refuses_bad_input),
)
