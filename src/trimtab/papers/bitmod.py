"""Checks of BitMoD (arXiv 2411.11745): grids and their choice, order of the formats, terms, bytes, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError, UnsupportedModelError
from trimtab.papers.claims import Bench, Line, Needs, Outcome

TEXTS = ("handbook_public", "cfi_public")
#: Windows of each text, and tokens of a window.
WINDOWS, WINDOW = 2, 1024
GROUP = 64
#: Names of the card -> types at these bits.
FORMATS = {
    "bitmod4": "bits=4,types=bitmod", "asym4": "bits=4,types=intasym", "fp4": "bits=4,types=fp", "ant4": "bits=4,types=ant",
    "int4": "bits=4,types=int", "bitmod3": "bits=3,types=bitmod", "asym3": "bits=3,types=intasym",
    "int3": "bits=3,types=int", "int6": "bits=6,types=int",
}  # fmt: skip


def _scalar_choice(w: np.ndarray, tables: tuple[tuple[float, ...], ...]) -> tuple[int, np.float32, list[int]]:
    """Table, scale and codes of one group, one weight after the other."""
    found: tuple[float, int, np.float32, list[int]] = (math.inf, 0, np.float32(0), [])
    for index, table in enumerate(tables):
        peak, top = max(abs(v) for v in w), np.float32(max(abs(v) for v in table))
        scale = np.float32(np.float16(min(max(np.float32(peak) / top, np.float32(1e-5)), np.float32(1e4))))
        # Of two values at one distance the lower, of equal values the first code.
        codes = [min(range(len(table)), key=lambda c, x=v / scale: (abs(float(x) - table[c]), table[c], c)) for v in w]
        errors = [np.float32(table[c]) * scale - v for c, v in zip(codes, w, strict=True)]
        error = math.fsum(float(e * e) for e in errors)
        if error < found[0]:
            found = (error, index, scale, codes)
    return found[1:]


def search_is_exact(bench: Bench) -> Outcome:
    """Codes, scales and types of random groups, half of them full of ties, against the scalar rule."""
    from trimtab.runtime.numerics import encode
    from trimtab.runtime.numerics.grids import parts_of
    from trimtab.spec.grids import GridFormat

    rng, same, count = np.random.default_rng(0), 0, 0
    for grid, bits in (
        ("bitmod", 3),
        ("bitmod", 4),
        ("er", 3),
        ("ea", 4),
        ("ant", 3),
        ("ant", 4),
        ("fp", 3),
        ("int", 4),
    ):
        format = GridFormat(grid=grid, bits=bits, group=32)
        smooth = rng.standard_normal((24, 32)).astype(np.float32)
        ties = (rng.integers(-16, 17, (24, 32)) / 2).astype(np.float32)
        ties[:, 0] = rng.choice([3, 4, 6, 7, 8, 12, 16], 24)
        values = np.concatenate((smooth, ties))
        codes, scale, choice = parts_of(encode(values, format))
        for row, w in enumerate(values):
            index, wanted, places = _scalar_choice(w, format.tables)
            same += int(choice[row, 0] == index and scale[row, 0] == wanted and [*codes[row]] == places)
            count += 1
    return Outcome(measured=f"{same} of {count} groups bit-identical", met=same == count)


def text_bench(bench: Bench) -> Any:
    """Windows of the held-out texts and what the unmodified model says to them."""
    from trimtab.measure.textbench import TextBench

    def compute() -> Any:
        found = TextBench(bench.model, {name: bench.text(name) for name in TEXTS}, window=WINDOW, windows=WINDOWS)
        found.prepare()  # while the model is as it was loaded
        return found

    return bench.once("text bench", compute)


def scored(bench: Bench, technique: str) -> Any:
    """Quality of the built-in model with a technique on the held-out texts."""
    from trimtab.techniques.apply import applied
    from trimtab.techniques.materials import Materials

    def compute() -> Any:
        texts = {name: bench.text(name) for name in ("cfi_calib", "handbook_calib")}
        materials = Materials(texts=texts, tokenizer=bench.model.tokenizer)
        found = text_bench(bench)
        with applied(bench.model, technique, materials=materials) as model:
            return found.score(model, technique)

    return bench.once(f"scored {technique}", compute)


def _score(bench: Bench, name: str) -> Any:
    return scored(bench, f"bitmod:group={GROUP},{FORMATS[name]}")


def shown(result: Any) -> str:
    """Perplexities by text."""
    return "/".join(f"{quality.ppl:.1f}" for quality in result.texts.values())


def order_holds(bits: int) -> Callable[[Bench], Outcome]:
    """Perplexity of the formats at 4 or 3 bits, geometric mean of two texts."""

    def check(bench: Bench) -> Outcome:
        names = [name for name in FORMATS if name.endswith(str(bits))]
        found = {name: _score(bench, name) for name in names}
        ppl = {name: result.ppl for name, result in found.items()}
        if bits == 4:
            met = ppl["bitmod4"] < min(ppl["ant4"], ppl["fp4"], ppl["int4"])
        else:
            met = ppl["bitmod3"] < ppl["asym3"] < ppl["int3"]
        listed = ", ".join(f"{name} {ppl[name]:.1f} ({shown(found[name])})" for name in names)
        base = next(iter(found.values())).ppl_base
        return Outcome(measured=f"base {base:.1f}; {listed}", met=met)

    return check


def six_bits_are_near(bench: Bench) -> Outcome:
    """Perplexity of symmetric integers of 6 bits against the unmodified model."""
    result = _score(bench, "int6")
    return Outcome(
        measured=f"{result.ppl:.2f} against {result.ppl_base:.2f} ({result.ppl / result.ppl_base:.4f}x), KL {result.kl_nats:.4f}",
        met=result.ppl <= 1.03 * result.ppl_base,
    )


def superset_is_never_worse(bench: Bench) -> Outcome:
    """Squared error of every matrix: er only and ea only against both."""
    from trimtab.runtime.numerics import decode, encode
    from trimtab.spec.grids import GridFormat

    worse, count, ratios = 0, 0, []
    for path, packed in bench.model.weights.items():
        if not path.startswith("layers.") or min(packed.shape) == 1:
            continue
        w = decode(packed)
        for bits in (3, 4):
            errors = {}
            for grid in ("bitmod", "er", "ea"):
                stored = decode(encode(w, GridFormat(grid=grid, bits=bits, group=GROUP)))
                errors[grid] = float(np.square(stored - w).sum(dtype=np.float64))
            worse += errors["bitmod"] > min(errors["er"], errors["ea"])
            ratios.append(errors["bitmod"] / min(errors["er"], errors["ea"]))
            count += 1
    return Outcome(
        measured=f"{worse} of {count} matrices worse; error {min(ratios):.3f} to {max(ratios):.3f} of the better half alone",
        met=not worse and count > 0,
    )


def terms_are_exact(bench: Bench) -> Outcome:
    """Terms of every code of every type, and their dot product with fp16 activations against that of the values."""
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.numerics.grids import parts_of
    from trimtab.runtime.numerics.terms import bitserial_dot, fixed_point, grid_terms, scaled_sums
    from trimtab.spec.grids import GridFormat

    w = decode(bench.model.weights["layers.0.self_attn.k_proj"])
    x = np.random.default_rng(0).standard_normal((4, w.shape[1])).astype(np.float16)
    met, cycles, same = True, {}, 0
    kinds = [(g, b) for b in (3, 4) for g in ("bitmod", "er", "ea", "fp", "ant", "int")]
    kinds += [("fp", 6), ("int", 5), ("int", 6), ("int", 8)]
    for grid, bits in kinds:
        format = GridFormat(grid=grid, bits=bits, group=GROUP, scale="int8")
        terms = grid_terms(format)
        met &= bool(np.array_equal(terms.values, np.array(format.tables)))
        cycles[bits] = max(cycles.get(bits, 0), terms.cycles)
        packed = encode(w, format)
        codes, scale, choice = parts_of(packed)
        values = np.array(format.tables, np.int64)[np.repeat(choice, GROUP, axis=1), codes]
        sums = np.einsum("tgk,ngk->tng", fixed_point(x).reshape(4, -1, GROUP), values.reshape(len(w), -1, GROUP))
        same += int(np.array_equal(bitserial_dot(x, packed), scaled_sums(sums, scale)))
    met &= same == len(kinds) and cycles[3] <= 2 and cycles[4] <= 2 and cycles[6] == 3 and cycles[8] == 4
    listed = ", ".join(f"{bits} bits {count}" for bits, count in sorted(cycles.items()))
    return Outcome(measured=f"terms at most {listed}; {same} of {len(kinds)} dots bit-identical", met=met)


def bytes_on_disk(bench: Bench) -> Outcome:
    """Files of the buffers of a 1024 x 4096 matrix, groups of 128 with scales of 8 bits."""
    import tempfile
    from pathlib import Path

    from trimtab.runtime.numerics import encode
    from trimtab.spec.grids import GridFormat

    w = np.random.default_rng(0).standard_normal((1024, 4096), dtype=np.float32)
    met, found, predicted = True, [], []
    with tempfile.TemporaryDirectory() as folder:
        for bits, needed in ((3, 3.08), (4, 4.08)):
            format = GridFormat(grid="bitmod", bits=bits, group=128, scale="int8")
            predicted.append(format.nbytes(*w.shape) * 8 / w.size)
            packed = encode(w, format)
            size = 0
            for name, buffer in packed.buffers.items():
                path = Path(folder) / f"{bits}-{name}"
                path.write_bytes(buffer.tobytes())
                size += path.stat().st_size
            found.append(size * 8 / w.size)
            met &= abs(found[-1] / needed - 1) <= 0.01
    listed = ", ".join(f"{bits:.4f}" for bits in predicted)
    return Outcome(predicted=listed, measured=", ".join(f"{bits:.4f} bits a weight" for bits in found), met=met)


def planes_hold_the_codes(bench: Bench) -> Outcome:
    """Symmetric integer grids as planes of bits: the values, and products by table lookup."""
    from trimtab.runtime.native.products import multiply
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.numerics.lookup import lay_out
    from trimtab.spec.grids import GridFormat
    from trimtab.spec.product import LookupTable

    w = decode(bench.model.weights["layers.0.mlp.up_proj"])
    x = np.random.default_rng(0).standard_normal((2, w.shape[1]), dtype=np.float32)
    met, worst = True, 0.0
    for bits in (3, 4):
        packed = encode(w, GridFormat(grid="int", bits=bits, group=GROUP))
        planes = lay_out(packed, "bitplane")
        met &= bool(np.array_equal(decode(planes), decode(packed)))
        wanted = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
        got = multiply(planes, LookupTable(table="f32", kernel="lut"), x)
        worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    return Outcome(measured=f"values the same; products off by {worst:.1e}", met=met and worst <= 1e-5)


def runs_natively(bench: Bench) -> Outcome:
    """The native program, which reads the codes and codes inputs in 8 bits, against the decoder on the same codes."""
    from trimtab.measure.textbench import TextBench
    from trimtab.techniques.apply import applied, load_native

    met, listed = True, []
    for bits in (3, 4):
        technique = f"bitmod:bits={bits},group={GROUP}"
        try:
            native = load_native("smollm2-135m", dtype="float32", techniques=[technique])
        except UnsupportedModelError:
            raise Needs("native kernels of grids") from None
        with applied(bench.model, technique) as model:
            found = TextBench(model, {t: bench.text(t) for t in TEXTS}, window=1024, windows=1).score(native)
        met &= found.kl_nats <= 0.01 and found.top1_agreement >= 0.97
        listed.append(f"{bits} bits: KL {found.kl_nats:.4f}, top-1 {found.top1_agreement:.1%} of {found.tokens} tokens")
    return Outcome(measured="; ".join(listed), met=met)


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets one sentence that says what is allowed."""
    from trimtab.techniques.plan import make_plan

    cases = {
        "bitmod:bits=2,group=64": "Allowed: 3, 4, 5, 6, 8",
        "bitmod:group=128": "64, 96, 192",
        "bitmod:group=1024": "longer than",
        "bitmod:types=ant,bits=6,group=64": "Allowed: 3, 4",
    }
    missed = []
    for technique, words in cases.items():
        try:
            make_plan(bench.model, "a100", techniques=[technique])
            missed.append(technique)
        except TrimtabError as error:
            if words not in str(error):
                missed.append(technique)
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused" + (f"; not so: {missed}" if missed else ""),
        met=not missed,
    )


LINES = (
    Line(id="a1", text="codes, scales and types against a scalar rule", needed="bit-identical", check=search_is_exact),
    Line(
        id="a2.4",
        text=f"4 bits, groups of {GROUP}, two texts: order of perplexities",
        needed="bitmod below ant, fp, int",
        check=order_holds(4),
    ),
    Line(
        id="a2.3",
        text=f"3 bits, groups of {GROUP}, two texts: order of perplexities",
        needed="bitmod < asym < int",
        check=order_holds(3),
    ),
    Line(id="a2.6", text="6-bit integers, two texts", needed="perplexity within 3 %", check=six_bits_are_near),
    Line(
        id="a3",
        text="er or ea alone, every matrix, 3 and 4 bits",
        needed="never below both in error",
        check=superset_is_never_worse,
    ),
    Line(
        id="a4",
        text="bit-serial terms and their dot products",
        needed="<= 2, int6 3, int8 4; exact",
        check=terms_are_exact,
    ),
    Line(id="a5", text="bytes of a packed matrix", needed="3.08 / 4.08 bits +- 1 %", check=bytes_on_disk),
    Line(id="a5.l", text="integer grids as planes of bits", needed="the same values", check=planes_hold_the_codes),
    Line(
        id="a5.n",
        text="native program on packed codes",
        needed="KL <= 0.01, top-1 >= 97 % of the decoder's",
        check=runs_natively,
    ),
    Line(id="c", text="bad input", needed="refused with a sentence", check=refuses_bad_input),
)
