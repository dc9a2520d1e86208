"""Checks of BFP K-sort (arXiv 2403.20137): the numbers, the order of keys, what it is worth, bytes, predictions, bad input.

Keys are rounded where they enter the attention, which is what a cache in pages of that format holds; `allocated_bytes` asks the
cache itself.

Legend: T tokens, N query heads, G KV heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from trimtab.errors import SpecError, TrimtabError
from trimtab.papers.claims import Bench, Line, Outcome
from trimtab.runtime.numerics.bfp import BlockFloat, decode_bfp, encode_bfp, parse_shorthand

TEXTS = ("cfi_public", "handbook_public", "persuasion_valid")
TOKENS, MAN = 512, 4
SORTS = ("none", "random", "row", "rms")
#: Windows of `TOKENS` of the first text that perplexity is over.
WINDOWS = 4
#: Injected outliers: rows of every KV head, and their factor.
OUTLIERS, FACTOR = 8, 16.0

# ---------------------------------------------------------------------------------------------------------- the numbers


def _exact(block: list[float], form: BlockFloat) -> tuple[list[int], int]:
    """Codes and exponent of a block in fractions alone."""
    values = [Fraction(x) for x in block]
    peak, low = max(map(abs, values)), 1 - (1 << (form.exp - 1))
    exponent = low
    while exponent < low + (1 << form.exp) - 1 and Fraction(2) ** (exponent + 1) <= peak:
        exponent += 1
    step = Fraction(2) ** (exponent - (form.bits - 2))
    top = (1 << (form.bits - 1)) - 1
    return [max(-top, min(top, round(x / step))) for x in values], exponent


def _blocks(form: BlockFloat, count: int) -> np.ndarray:
    """Random blocks, powers of two, ties, edges of the cut, subnormals and zeros, `count` of each."""
    rng = np.random.default_rng([form.bits, form.block])
    shape, top = (count, form.block), (1 << (form.bits - 1)) - 1
    scale = np.exp2(rng.integers(-20, 20, (count, 1)))
    found = [
        rng.standard_normal(shape) * scale,
        np.exp2(rng.integers(-149, 128, shape)) * rng.choice([-1, 1], shape),
        (rng.integers(-top - 1, top + 1, shape) + 0.5) * scale,
        (top + rng.choice([-0.5, 0, 0.25, 0.5, 0.75], shape)) * scale,
        np.ldexp(rng.integers(-(2**23), 2**23, shape).astype(np.float64), -149),
        rng.standard_normal(shape) * (rng.random(shape) < 0.1),
        np.zeros(shape),
    ]
    return np.concatenate(found).astype(np.float32)


def bit_exact(bench: Bench) -> Outcome:
    """Codes and exponents of random and adversarial blocks against fractions; the shorthand against its meaning."""
    forms = [BlockFloat(bits=bits, block=block) for bits, block in ((4, 32), (4, 16), (8, 32), (16, 8), (2, 8))]
    forms.append(BlockFloat(bits=4, block=16, exp=5))
    tested = wrong = 0
    for form in forms:
        values = _blocks(form, 240)
        codes, fields = encode_bfp(values, form)
        for row, block in enumerate(values.tolist()):
            tested += 1
            wrong += (codes[row].tolist(), int(fields[row, 0]) - form.bias) != _exact(block, form)
    strings = {f"BFP[{p}|8]{{{n}}}(SN)": BlockFloat(bits=p, block=n) for p in (4, 6, 8, 16) for n in (16, 32, 64, 128)}
    misread = [text for text, form in strings.items() if parse_shorthand(text) != form]
    return Outcome(
        measured=f"{wrong} of {tested:,} blocks differ; {len(misread)} of {len(strings)} strings misread",
        met=not wrong and not misread and tested >= 10_000,
    )


# -------------------------------------------------------------------------------------------------------- order of keys


def _ids(bench: Bench, text: str, windows: int = 1) -> list[np.ndarray]:
    ids = np.asarray(bench.model.tokenizer.encode(bench.text(text)), dtype=np.int64)
    return list(ids[: windows * TOKENS].reshape(windows, TOKENS))


def _calibration(bench: Bench) -> Any:
    from trimtab.techniques.materials import Materials

    texts = {name: bench.text(name) for name in ("cfi_calib", "handbook_calib")}
    return Materials(texts=texts, tokenizer=bench.model.tokenizer)


def _sorted(bench: Bench, variant: Any, sort: str) -> Any:
    """The variant with its key channels in another order, and nothing rounded."""
    from trimtab.model.variant import Variant
    from trimtab.spec.tree import Edit
    from trimtab.techniques.cache.bfp import Bfp

    if sort == "none":
        return variant
    technique = Bfp(man=MAN, sort=sort)  # type: ignore[arg-type]
    paths = [f"layers.{index}.self_attn" for index in range(variant.spec.num_hidden_layers)]
    spec = variant.spec.edit([Edit(path, "key_order", sort) for path in paths], by=str(technique))
    return Variant(spec, technique.convert(variant.weights, variant.spec, spec, _calibration(bench)))


def _cached_logits(variant: Any, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Logits after a prompt in chunks and after each of four decoded tokens."""
    from trimtab.model.variant import Model

    session = Model(variant).session(chunk=chunk)
    found = [session.prefill([ids[:-4].tolist()])]
    return np.concatenate(found + [session.decode([int(token)]) for token in ids[-4:]])


def same_function(bench: Bench) -> Outcome:
    """Logits with sorted keys against those in the model's order: whole, through the cache, and in chunks."""
    base = bench.model.variant
    ids = _ids(bench, TEXTS[0])[0][:200]
    found = bench.once("bfp.row", lambda: _sorted(bench, base, "row"))
    wanted = _cached_logits(base, ids, 512)
    worst = max(float(np.abs(_cached_logits(found, ids, chunk) - wanted).max()) for chunk in (512, 37))
    worst /= float(np.abs(wanted).max())
    return Outcome(measured=f"largest difference {worst:.1e} of the largest logit", met=worst <= 1e-5)


# ----------------------------------------------------------------------------------------------------- what it is worth


def _captured(bench: Bench, text: str) -> dict[str, tuple[Any, Any, Any]]:
    """Rotated q [T, N, H] and k [T, G, H], and v [T, G, H], of every layer of the model on the first tokens of a text."""
    import torch

    from trimtab.runtime.step import Step

    parts: dict[str, Any] = {}
    values: dict[str, Any] = {}
    step = Step.of([TOKENS], [0])
    step.taps = {"self_attn.qk": lambda path, value: parts.__setitem__(path, value)}
    hooks = []
    for index, layer in enumerate(bench.model.decoder.layers):
        block: Any = layer.self_attn
        path = f"layers.{index}.self_attn"
        hooks.append(
            block.v_proj.register_forward_hook(lambda module, args, out, path=path: values.__setitem__(path, out))
        )
    try:
        bench.model.decoder(torch.from_numpy(_ids(bench, text)[0]), step, None, np.zeros(0, dtype=np.int64))
    finally:
        for hook in hooks:
            hook.remove()
    return {path: (q, k, values[path].view(TOKENS, k.shape[1], -1)) for path, (q, k) in parts.items()}


def _attended(q: Any, k: Any, v: Any, scale: float) -> Any:
    """Causal attention [N, T, H]."""
    import torch.nn.functional as F

    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0]


def _rounded(k: Any, form: BlockFloat) -> Any:
    """Keys [T, G, H] as the cache would give them back."""
    import torch

    return torch.from_numpy(decode_bfp(*encode_bfp(k.numpy(), form), form))


def _orders(bench: Bench) -> dict[str, dict[str, np.ndarray]]:
    """Order of the channels [G, H] by sort and attention path."""
    from trimtab.techniques.cache._key_order import descending, key_rms, row_norms

    def compute() -> dict[str, dict[str, np.ndarray]]:
        spec, weights = bench.model.spec, bench.model.weights
        nodes = {f"layers.{i}.self_attn": layer.self_attn for i, layer in enumerate(spec.layers)}
        rng, rms = np.random.default_rng(0), key_rms(spec, weights, _calibration(bench))
        found: dict[str, dict[str, np.ndarray]] = {sort: {} for sort in SORTS}
        for path, node in nodes.items():
            shape = rms[path].shape
            sizes = {
                "none": np.zeros(shape),
                "random": rng.random(shape),
                "row": row_norms(path, node, weights),  # type: ignore[arg-type]
                "rms": rms[path],
            }
            for sort, size in sizes.items():
                found[sort][path] = descending(size).astype(np.int64)
        return found

    return bench.once("bfp.orders", compute)


def _errors(bench: Bench, text: str) -> Mapping[tuple[int, str], tuple[float, float]]:
    """(relative error of the attention output, relative squared error of the keys) by block and sort, means over layers."""
    import torch

    def compute() -> dict[tuple[int, str], tuple[float, float]]:
        orders, found = _orders(bench), {}
        captured = _captured(bench, text)
        scale = bench.model.spec.layers[0].self_attn.scale  # type: ignore[union-attr]
        exact = {path: _attended(*qkv, scale) for path, qkv in captured.items()}
        for block in (64, 32, 16):
            form = BlockFloat(bits=MAN, block=block)
            for sort in SORTS:
                outputs, keys = [], []
                for path, (q, k, v) in captured.items():
                    order = torch.from_numpy(orders[sort][path]).expand_as(k)
                    coded = _rounded(k.gather(-1, order), form).gather(-1, order.argsort(-1))
                    outputs.append(float((_attended(q, coded, v, scale) - exact[path]).norm() / exact[path].norm()))
                    keys.append(float((coded - k).square().sum() / k.square().sum()))
                found[block, sort] = float(np.mean(outputs)), float(np.mean(keys))
        return found

    return bench.once(f"bfp.errors.{text}", compute)


def _shown(errors: Mapping[tuple[int, str], tuple[float, float]], block: int, which: int = 0) -> str:
    digits = 3 if which == 0 else 4
    return ", ".join(f"{sort} {errors[block, sort][which]:.{digits}f}" for sort in SORTS)


def output_error(bench: Bench) -> Outcome:
    """Error of the attention output with keys in 4 bits, by order, on three texts."""
    shown, met = [], True
    for text in TEXTS:
        errors = _errors(bench, text)
        for block in (32, 16):
            row = errors[block, "row"][0]
            met &= row <= 0.95 * errors[block, "none"][0] and row <= 0.9 * errors[block, "random"][0]
            shown.append(f"{text} n={block}: {_shown(errors, block)}")
    return Outcome(measured="; ".join(shown), met=met)


def one_block_is_equal(bench: Bench) -> Outcome:
    """Blocks as long as a head: the same error in every order."""
    found = [[_errors(bench, text)[64, sort][0] for sort in SORTS] for text in TEXTS]
    spread = max(max(row) - min(row) for row in found)
    return Outcome(
        measured=f"{', '.join(f'{row[0]:.3f}' for row in found)}; spread {spread:.1e}",
        # the same codes; attention adds them in the model's order again
        met=spread == 0,
    )


def judged_by_output(bench: Bench) -> Outcome:
    """Sorted by activations the keys themselves are met better, and what is attended to is met worse."""
    shown, met = [], True
    for text in TEXTS:
        errors = _errors(bench, text)
        met &= errors[32, "rms"][1] < errors[32, "none"][1] and errors[32, "rms"][0] > errors[32, "row"][0]
        shown.append(f"{text}: keys {_shown(errors, 32, 1)}; output {_shown(errors, 32)}")
    return Outcome(measured="; ".join(shown), met=met)


def _perplexity(variant: Any, pieces: list[np.ndarray], form: BlockFloat | None) -> float:
    """Of whole windows, with keys rounded as they are cached."""
    import torch

    from trimtab.runtime.step import Step

    losses = []
    for piece in pieces:
        step = Step.of([len(piece)], [0])
        if form is not None:
            step.taps = {"self_attn.qk": lambda path, value: (value[0], _rounded(value[1], form))}
        ids = torch.from_numpy(piece)
        logits = variant.decoder(ids, step, None, np.arange(len(piece) - 1, dtype=np.int64))
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
    return math.exp(float(np.mean(losses)))


def perplexity(bench: Bench) -> Outcome:
    """Perplexity of the model with keys in 4 bits, sorted and not."""
    pieces = _ids(bench, TEXTS[0], WINDOWS)
    base, row = bench.model.variant, bench.once("bfp.row", lambda: _sorted(bench, bench.model.variant, "row"))
    shown = [f"fp {_perplexity(base, pieces, None):.1f}"]
    for block in (32, 16):
        form = BlockFloat(bits=MAN, block=block)
        found = {sort: _perplexity(variant, pieces, form) for sort, variant in (("none", base), ("row", row))}
        shown.append(f"n={block}: none {found['none']:.1f}, row {found['row']:.1f}")
    return Outcome(measured="; ".join(shown), met=True)


def with_outliers(variant: Any, *, rows: int, factor: float, seed: int = 0) -> Any:
    """The same function with outliers among its keys.

    `rows` rows of k_proj of every KV head are scaled by `factor`, and those of its query heads by the inverse. Both channels of
    a rotary pair are scaled alike: rotation mixes them, so one of the two alone would change the function.

    Args:
        variant: rotated whole heads, no norm of keys.
        rows: even, of every KV head.
        factor: a power of two, so that nothing is rounded.
        seed: of the choice.
    """
    from trimtab.model.variant import Variant
    from trimtab.runtime.weights.packed import packed_float

    rng, changed = np.random.default_rng(seed), {}
    for index, layer in enumerate(variant.spec.layers):
        node, path = layer.self_attn, f"layers.{index}.self_attn"
        size, groups = node.head_dim, node.num_key_value_heads
        gain = np.ones((groups, size), np.float32)
        for head in range(groups):
            first = rng.choice(size // 2, rows // 2, replace=False)
            gain[head, first] = gain[head, first + size // 2] = factor
        queries = 1 / gain.repeat(node.num_attention_heads // groups, axis=0)
        for name, scale in (("k_proj", gain), ("q_proj", queries)):
            stored = variant.weights[f"{path}.{name}"].buffers["data"]
            changed[f"{path}.{name}"] = packed_float(stored * scale.reshape(-1, 1), "fp32")
    return Variant(variant.spec, variant.weights | changed)


def outliers_are_survived(bench: Bench) -> Outcome:
    """Perplexity of the model with injected outliers, of which sorting must win back half of what rounding costs."""
    pieces = _ids(bench, TEXTS[0], WINDOWS)
    base = bench.once("bfp.outliers", lambda: with_outliers(bench.model.variant, rows=OUTLIERS, factor=FACTOR))
    row = _sorted(bench, base, "row")
    exact = _perplexity(base, pieces, None)
    shown, met = [f"fp {exact:.2f}"], False
    for block in (32, 16):
        form = BlockFloat(bits=MAN, block=block)
        none, sorted_ = (_perplexity(variant, pieces, form) for variant in (base, row))
        met |= sorted_ < 0.5 * (none - exact) + exact
        shown.append(f"n={block}: none {none:.1f}, row {sorted_:.1f}")
    return Outcome(measured="; ".join(shown), met=met)


# --------------------------------------------------------------------------------------------------- bytes, predictions


def allocated_bytes(bench: Bench) -> Outcome:
    """Bytes of K in the cache after a prompt, by what the store holds: all of it less the values, which are half of a plain one."""
    from trimtab.techniques.apply import applied

    ids = _ids(bench, TEXTS[0])[0].tolist()
    node: Any = bench.model.spec.layers[0].self_attn
    elements = TOKENS * bench.model.spec.num_hidden_layers * node.num_key_value_heads * node.head_dim

    def held(model: Any) -> int:
        session = model.session()
        session.prefill([ids])
        return session.store.nbytes().held

    values = held(bench.model) // 2
    wanted, found = [], []
    for block in (64, 32, 16):
        with applied(bench.model, f"bfp:man={MAN},block={block}") as model:
            found.append((held(model) - values) / elements)
        wanted.append(MAN / 8 + 1 / block)
    shown = (", ".join(f"{each:.5f}" for each in sizes) for sizes in (wanted, found))
    return Outcome(
        predicted=next(shown), measured=f"{next(shown)} bytes per element, n = 64, 32, 16", met=found == wanted
    )


def _kv_bytes(technique: str | None) -> int:
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    techniques = (technique,) if technique else ()
    plan = make_plan("llama-2-7b", "a100", Workload(prompt=4000, gen=90), techniques, stack="datasheet")
    return predict(plan).counts["kv_bytes"]


def predicts_ratios(bench: Bench) -> Outcome:
    """Bytes of the cache of Llama-2-7B: fp16 over 4 bits, and 8 bits over 4, in blocks of 32."""
    plain, bfp16, bfp12 = (_kv_bytes(name) for name in (None, "bfp:man=8,on=kv", "bfp:man=4,on=kv"))
    keys = _kv_bytes("bfp:man=4")
    met = Fraction(plain, bfp12) == Fraction(1600, 425) and Fraction(bfp16, bfp12) == Fraction(825, 425)
    return Outcome(
        predicted=f"{plain / bfp12:.3f}x of fp16, {bfp16 / bfp12:.3f}x of BFP16; keys alone {plain / keys:.3f}x of the cache",
        met=met and Fraction(keys, plain) == Fraction(1600 + 425, 3200),
    )


def predicts_context(bench: Bench) -> Outcome:
    """Largest context of Llama-2-7B on a chip that holds everything in SRAM."""
    from trimtab.predict.fit import fit
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    def context(*techniques: str) -> int:
        plan = make_plan("llama-2-7b", "cerebras-wse3", Workload(prompt=100, gen=1), techniques, stack="datasheet")
        return fit(plan).rows[0].context

    plain, coded = context(), context(f"bfp:man={MAN},block=32,on=kv")
    wanted = 16 / (MAN + 8 / 32)
    return Outcome(
        predicted=f"{coded:,} tokens for {plain:,}: {coded / plain:.2f}x",
        met=abs(coded / plain / wanted - 1) < 0.01,  # whole pages
    )


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad parameter, and a model packed in tiles, gets one sentence."""
    from trimtab.runtime.numerics import encode
    from trimtab.spec.formats import WeightFormat
    from trimtab.techniques.cache._key_order import with_rows
    from trimtab.techniques.registry import parse_technique

    cases = ("bfp:block=128", "bfp:block=48", "bfp:man=1", "bfp:man=17", "bfp:exp=9", "bfp:sort=size", "bfp:on=x")
    accepted = []
    for case in cases:
        try:
            parse_technique(case).check(bench.model.spec)
            accepted.append(case)
        except TrimtabError:
            continue
    tiled = encode(np.ones((64, 32), np.float32), WeightFormat(kind="bitplane", bits=2, group=32, tiled=True))
    try:
        with_rows("k_proj", tiled, np.arange(64))
        accepted.append("tiles")
    except SpecError:
        pass
    return Outcome(measured=f"{len(cases) + 1 - len(accepted)} of {len(cases) + 1} refused", met=not accepted)


LINES = (
    Line(id="a1", text="codes and exponents, 10^4 blocks; shorthand", needed="equal to fractions", check=bit_exact),
    Line(id="a2", text="sorted keys, nothing rounded: logits", needed="<= 1e-5, cache and chunks", check=same_function),
    Line(
        id="a3", text="attention output, 4 bits, n = 32 and 16, three texts",
        needed="row <= 0.95 none, <= 0.9 random", check=output_error,
    ),
    Line(id="a4", text="the same with one block per head", needed="equal in any order", check=one_block_is_equal),
    Line(
        id="a5", text="sorted by activations: keys nearer, output further", needed="rms < none, > row",
        check=judged_by_output,
    ),
    Line(id="a6", text="perplexity with keys in 4 bits", needed="reported", check=perplexity),
    Line(
        id="a7", text="8 outlier rows per KV head, x16: perplexity", needed="half the loss won back, n = 32 or 16",
        check=outliers_are_survived,
    ),
    Line(id="a8", text="bytes of K in the store", needed="== p/8 + 1/n per element", check=allocated_bytes),
    Line(id="b1", text="cache of Llama-2-7B, n = 32", needed="3.76x of fp16, 1.94x of BFP16", check=predicts_ratios),
    Line(id="b2", text="context of Llama-2-7B in SRAM alone", needed="3.76x within 1 %", check=predicts_context),
    Line(id="c1", text="block, man, exp, sort, on; packed tiles", needed="refused with a sentence", check=refuses_bad_input),
)  # fmt: skip
