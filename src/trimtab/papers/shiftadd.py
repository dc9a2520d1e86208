"""Checks of ShiftAddLLM (arXiv 2406.05981): coding, the sweep, bits by sensitivity, the kernel, energy, bad input."""

from __future__ import annotations

import datetime
import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import SETTLE_S, Bench, Documented, Line, Outcome

TEXTS = ("cfi_public", "handbook_public")
WINDOW, WINDOWS = 1024, 2
#: Energy in pJ of the paper's model: fp16 multiply, fp16 add, shift of an fp16, look-up; DRAM per 16 bits.
PJ = {"multiply": 1.1, "add": 0.4, "shift": 0.15, "lookup": 0.37, "dram": 200.0}


def _materials(bench: Bench, **fields: Any) -> Any:
    from trimtab.techniques.materials import Materials

    texts = {name: bench.text(name) for name in ("cfi_calib", "handbook_calib")}
    return Materials(texts=texts, tokenizer=bench.model.tokenizer, **fields)


def _variant(bench: Bench, technique: str) -> Any:
    """The model with a technique, made once."""
    from trimtab.techniques.apply import derive, resolve_all
    from trimtab.techniques.registry import parse_all

    def compute() -> Any:
        materials = _materials(bench)
        return derive(bench.model.variant, resolve_all(bench.model, parse_all([technique]), materials), materials)

    return bench.once(f"shiftadd.variant.{technique}", compute)


def _scored(bench: Bench, technique: str) -> Any:
    """Held-out quality of the model with a technique, computed once."""
    from trimtab.measure.textbench import TextBench

    def compute() -> Any:
        texts = bench.once(
            "shiftadd.texts",
            lambda: TextBench(bench.model, {t: bench.text(t) for t in TEXTS}, window=WINDOW, windows=WINDOWS),
        )
        return texts.score(_variant(bench, technique), technique)

    return bench.once(f"shiftadd.{technique}", compute)


# ------------------------------------------------------------------------------------------------------ coding


def coding_error(bench: Bench) -> Outcome:
    """Squared error of binary coding over that of a min-max grid with the same bits, groups of 64."""
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.numerics.bcq import bcq, values_of
    from trimtab.spec.formats import WeightFormat

    shown, met = [], True
    for path in ("layers.5.mlp.up_proj", "layers.5.self_attn.q_proj"):
        w = decode(bench.model.weights[path])
        groups = w.reshape(-1, 64)
        for bits, bar in ((2, 0.58), (3, 0.98)):
            grid = WeightFormat(kind="int", bits=bits, group=64, sym=False)
            base = float(np.square(decode(encode(w, grid)) - w).sum())
            errors = {
                apot: float(np.square(values_of(*bcq(groups, bits, apot, 20)) - groups).sum()) / base
                for apot in (0, 1, 2, 3)
            }
            met &= errors[3] <= bar and errors[3] <= 1.02 * errors[0] and errors[1] >= errors[2] >= errors[3] * 0.999
            name = path.rpartition(".")[2]
            shown.append(
                f"{name} {bits} bits {errors[3]:.3f} (float {errors[0]:.3f}, apot 2 {errors[2]:.3f}, 1 {errors[1]:.3f})"
            )
    return Outcome(measured="; ".join(shown), met=met)


def coding_never_worsens(bench: Bench) -> Outcome:
    """Error after more rounds, group by group."""
    from trimtab.runtime.numerics import decode
    from trimtab.runtime.numerics.bcq import bcq, values_of

    groups = decode(bench.model.weights["layers.5.mlp.up_proj"]).reshape(-1, 64)[:4000]
    worse, before = 0, None
    for rounds in (0, 1, 5, 20, 50):
        left = np.square(values_of(*bcq(groups, 3, 3, rounds)) - groups).sum(1)
        worse += 0 if before is None else int((left > before * (1 + 1e-4) + 1e-9).sum())
        before = left
    return Outcome(measured=f"{worse} of {len(groups)} groups worse after more rounds", met=worse == 0)


def gaussian_rows(bench: Bench) -> Outcome:
    """A Gaussian matrix, one group a row: binary coding against the min-max grid at 3 bits."""
    from trimtab.runtime.numerics.bcq import bcq, values_of

    w = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    low, step = w.min(1, keepdims=True), (np.ptp(w, axis=1) / 7)[:, None]
    base = float(np.square(np.rint((w - low) / step) * step + low - w).sum())
    ratio = float(np.square(values_of(*bcq(w, 3, 3, 50)) - w).sum()) / base
    return Outcome(measured=f"{ratio:.3f} of the error (512 rows of 4096)", met=ratio <= 0.6)


# ------------------------------------------------------------------------------------------------------ the sweep


def swept_against_unswept(bench: Bench) -> Outcome:
    """Error of the outputs on held-out inputs, layer mean of swept over unswept."""
    from trimtab.model.calibration import Inputs, observed
    from trimtab.runtime.numerics import decode

    swept = _variant(bench, "shiftadd:bits=3,group=64")
    spec = swept.spec
    held = _materials(bench).__class__(
        texts={t: bench.text(t) for t in TEXTS}, tokenizer=bench.model.tokenizer, window=512, windows=8
    )
    inputs = observed(bench.model.spec, bench.model.weights, held.token_windows(), lambda path: Inputs("unitnorm"))
    from trimtab.runtime.numerics import encode

    nodes, ratios = dict(spec.linears()), []
    for path, seen in inputs.items():
        assert isinstance(seen, Inputs)
        h, w = seen.hessian.numpy(), decode(bench.model.weights[path])
        errors = []
        for found in (decode(swept.weights[path]), decode(encode(w, nodes[path].format))):
            dw = found - w
            errors.append(float(((dw @ h) * dw).sum()))
        ratios.append(errors[0] / errors[1])
    return Outcome(
        measured=f"mean {np.mean(ratios):.3f} over {len(ratios)} matrices (worst {max(ratios):.2f})",
        met=float(np.mean(ratios)) <= 0.7,
    )


def three_bits(bench: Bench) -> Outcome:
    """Recovered share of the log perplexity that rounding loses, and KL against GPTQ."""
    from trimtab.measure.textbench import recovered_share

    naive = _scored(bench, "rtn:bits=3,group=64,sym=false")
    ours, gptq = _scored(bench, "shiftadd:bits=3,group=64"), _scored(bench, "gptq:bits=3,group=64")
    share = recovered_share(ours, naive).geometric_mean
    return Outcome(
        measured=f"share {share:.2f}; KL {ours.kl_nats:.3f}, GPTQ (symmetric) {gptq.kl_nats:.3f} nats; {ours.tokens} tokens",
        met=share >= 0.35 and ours.kl_nats < gptq.kl_nats,
    )


def two_bits(bench: Bench) -> Outcome:
    """Perplexity at 2 bits over that of the model."""
    ours = _scored(bench, "shiftadd:bits=2,group=64")
    ratio = math.exp(ours.nll_difference)
    return Outcome(measured=f"{ratio:.2f} times the perplexity, KL {ours.kl_nats:.2f} nats", met=ratio < 50)


def accuracy_mode(bench: Bench) -> Outcome:
    """Scales of single columns against scales of eight."""
    acc, lat = (_scored(bench, f"shiftadd:bits=3,group=64,mode={mode}") for mode in ("acc", "lat"))
    return Outcome(measured=f"KL acc {acc.kl_nats:.3f}, lat {lat.kl_nats:.3f} nats", met=acc.kl_nats <= lat.kl_nats)


def allotted_bits(bench: Bench) -> Outcome:
    """2.5 bits on average: allotted against the first half of the layers at 3 bits, and five random halves."""
    from trimtab.techniques.allocation import groups

    spec = bench.model.spec
    quick = "group=64,rounds=10,samples=4096"
    parts = groups(spec)
    nodes = dict(spec.linears())
    sizes = np.array([sum(nodes[path].n * nodes[path].k for path in part) for part in parts])
    auto = _scored(bench, f"shiftadd:bits=2.5,alloc=auto,{quick}").kl_nats
    first = [3 if int(part[0].split(".")[1]) < spec.num_hidden_layers // 2 else 2 for part in parts]
    others = {"first half": _scored(bench, f"shiftadd:bits={'|'.join(map(str, first))},{quick}").kl_nats}
    for seed in range(5):
        bits, left = [2] * len(parts), sizes.sum() / 2
        for index in np.random.default_rng(seed).permutation(len(parts)).tolist():
            if sizes[index] <= left:
                bits[index], left = 3, left - sizes[index]
        others[f"random {seed}"] = _scored(bench, f"shiftadd:bits={'|'.join(map(str, bits))},{quick}").kl_nats
    shown = ", ".join(f"{name} {kl:.3f}" for name, kl in others.items())
    return Outcome(measured=f"allotted {auto:.3f} nats; {shown}", met=auto < min(others.values()))


# ------------------------------------------------------------------------------------------------------ the kernel


def _matrix(rows: int, cols: int, bits: int, group: int = 128, seed: int = 0) -> Any:
    """Random signs and scales, as tiles."""
    from trimtab.runtime.numerics.bcq import terms_of, tile
    from trimtab.runtime.weights.packed import Packed
    from trimtab.spec.bcq import BcqFormat

    form = BcqFormat(bits=bits, group=group)
    rng = np.random.default_rng(seed)
    signs, scales = form.buffers(rows, cols)
    values = np.exp(rng.uniform(-6, -3, scales.shape[:-1])).astype(np.float32)
    buffers = {"signs": rng.integers(0, 256, signs.shape, np.uint8), "scales": terms_of(values, form.apot)[0]}
    return tile(Packed(form, (rows, cols), buffers))


def kernel_is_exact(bench: Bench) -> Outcome:
    """The look-up kernel against the unpacked matrix, a flipped byte of signs, and a number without multiplication."""
    from trimtab.runtime.kernels.binary import binary_multiply, binary_multiply_plain
    from trimtab.runtime.numerics import decode
    from trimtab.runtime.weights.packed import Packed

    packed = _matrix(576, 1536, 3)
    x = np.random.default_rng(1).standard_normal((3, 1536)).astype(np.float32)
    w = decode(packed).astype(np.float64)
    wanted = x @ w.T
    found = binary_multiply(packed, x)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    flipped = packed.buffers["signs"].copy()
    flipped[2, 7, 1, 5] ^= 1 << 3  # row 2 * 16 + 5, plane 1, column 7 * 8 + 3
    other = Packed(packed.format, packed.shape, {**packed.buffers, "signs": flipped})
    change = binary_multiply(other, x) - found
    expected = x @ (decode(other).astype(np.float64) - w).T
    only = bool((change[:, np.arange(576) != 37] == 0).all()) and float(np.abs(change - expected).max()) < 1e-3
    plain = binary_multiply_plain(packed, x)
    apart = float(np.abs(plain - wanted).max() / np.abs(wanted).max())
    return Outcome(
        measured=f"{error:.1e} relative; a flipped sign moves row 37 alone as predicted: {only}; without any multiplication {apart:.1e}",
        met=error <= 1e-5 and only and apart <= 1e-5,
    )


def packed_size(bench: Bench) -> Outcome:
    """Bytes of the live buffers and on disk against q + 8 apot q / group bits."""
    import tempfile
    from pathlib import Path

    packed = _matrix(1536, 576, 3)
    predicted = 1536 * 576 * (3 + 8 * 3 * 3 / 128) / 8
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrix.npz"
        np.savez(file, **packed.buffers)  # type: ignore[arg-type]
        on_disk = file.stat().st_size
        with np.load(file) as stored:
            same = all(np.array_equal(stored[name], buffer) for name, buffer in packed.buffers.items())
    return Outcome(
        predicted=f"{predicted / 1e3:.1f} kB",
        measured=f"{packed.nbytes / 1e3:.1f} kB held, {on_disk / 1e3:.1f} kB on disk, reloaded alike: {same}",
        met=abs(on_disk / predicted - 1) <= 0.01 and packed.nbytes == predicted and same,
    )


def kernel_speed(bench: Bench) -> Outcome:
    """One token times 4096 x 4096 at 2 bits, against fp32, two threads; predicted from what rows take in smaller matrices."""
    import torch

    from trimtab.runtime.kernels.binary import binary_multiply

    w, x = torch.randn(4096, 4096), torch.randn(1, 4096)
    looked_up = {rows: _matrix(rows, 4096, 2) for rows in (1024, 2048, 4096)}
    runs: dict[str, Callable[[], Any]] = {
        str(rows): functools.partial(binary_multiply, packed, x.numpy(), 2) for rows, packed in looked_up.items()
    }
    runs["fp32"] = lambda: torch.nn.functional.linear(x, w)
    times: dict[str, list[float]] = {name: [] for name in runs}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            for name, run in runs.items():
                if name in (
                    "1024",
                    "fp32",
                ):  # one library after the other: waiting threads of one take the cores of the other
                    time.sleep(SETTLE_S)
                for place in range(5):
                    start = time.perf_counter()
                    run()
                    if place:
                        times[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    few, some, binary, fp32 = (statistics.median(times[name]) for name in runs)
    predicted = some + 2 * (some - few)  # what does not depend on rows, tables and the start of threads, stays
    low, high = np.quantile(np.array(times["4096"]) * 1e3, (0.1, 0.9))
    return Outcome(
        predicted=f"{predicted * 1e3:.2f} ms ({predicted / binary - 1:+.0%})",
        measured=f"{binary * 1e3:.2f} ms ({low:.2f}-{high:.2f}) against {fp32 * 1e3:.2f} ms; {fp32 / binary:.2f} times as fast",
        met=binary < fp32 and abs(predicted / binary - 1) <= 0.4,
    )


# ------------------------------------------------------------------------------------------------------ prediction


def _joules(n: int, k: int, bits: int, scales: str) -> float:
    """Energy in pJ of one token through a matrix by the paper's table, weights from DRAM.

    Args:
        n, k: of the matrix.
        bits: of a weight.
        scales: ``none``: fp16 weights, multiplied. ``apot``: an eighth of the rows and 8 columns share scales, so that the 256 sums
            of a table are shifted instead of the rows. ``float``: 128 columns of a row share an fp16 scale (LUT-GEMM).
    """
    if scales == "none":
        return n * k * (PJ["multiply"] + PJ["add"] + PJ["dram"])
    looked_up = bits * n * k / 8 * (PJ["lookup"] + PJ["add"]) + 255 * k / 8 * PJ["add"]
    if scales == "apot":
        stored = bits + 8 * 3 * bits / n
        scaled = 3 * min(8 * 256, n) * bits * k / 8 * (PJ["shift"] + PJ["add"])
    else:
        stored = bits + 16 * bits / 128
        scaled = bits * n * k / 128 * (PJ["multiply"] + PJ["add"])
    return n * k * stored / 16 * PJ["dram"] + looked_up + scaled


def memory_and_energy(bench: Bench) -> Outcome:
    """OPT-66B and Llama-2-70B at 2 and 3 bits: bytes of the matrices by their format, energy by the paper's table."""
    from trimtab.spec.configs import load_spec
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    shown, met = [], True
    for model in ("opt-66b", "llama-2-70b"):
        spec = load_spec(model).with_dtype("float16")
        for bits in (2, 3):
            new = compose(spec, parse_all([f"shiftadd:bits={bits},group=-1"]))
            sizes = [
                (old.nbytes(), node.nbytes(), old.n, old.k)
                for (path, old), (_, node) in zip(spec.linears(), new.linears(), strict=True)
                if path.startswith("layers.")
            ]
            memory = 1 - sum(new for _, new, _, _ in sizes) / sum(old for old, _, _, _ in sizes)
            energy = 1 - sum(_joules(n, k, bits, "apot") for *_, n, k in sizes) / sum(
                _joules(n, k, 16, "none") for *_, n, k in sizes
            )
            met &= (memory > 0.8 or (bits == 3 and memory > 0.77)) and energy > 0.77
            shown.append(f"{model} {bits} bits: memory -{memory:.1%}, energy -{energy:.1%}")
    return Outcome(predicted="; ".join(shown), met=met)


def mlp_energy(bench: Bench) -> Outcome:
    """One MLP of OPT-66B: energy ratio, and look-ups with float scales."""
    parts = ((36864, 9216), (9216, 36864))
    base = sum(_joules(n, k, 16, "none") for n, k in parts)
    found = {bits: base / sum(_joules(n, k, bits, "apot") for n, k in parts) for bits in (2, 3)}
    dearer = sum(_joules(n, k, 2, "float") for n, k in parts) > sum(_joules(n, k, 2, "apot") for n, k in parts)
    return Outcome(
        predicted=f"{found[2]:.2f} times less at 2 bits, {found[3]:.2f} at 3; float scales cost more: {dearer}",
        met=abs(found[2] / 8.2 - 1) <= 0.3 and dearer,
    )


# ------------------------------------------------------------------------------------------------------ bad input


def bad_input(bench: Bench) -> Outcome:
    """Each is refused with a sentence."""
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    asked = ("bits=0", "bits=5", "group=12", "apot=0", 'mix="2:0.8|3:0.3",alloc=auto', "mode=x", "bits=2.2")
    refused = 0
    for text in asked:
        try:
            compose(bench.model.spec, parse_all([f"shiftadd:{text}"]))
        except TrimtabError as error:
            refused += "shiftadd" in str(error) and "llowed" in str(error)
    from trimtab.spec.tree import Edit

    odd = bench.model.spec.edit([Edit("layers.3.mlp.up_proj", "k", 580)], by="check")
    try:
        compose(odd, parse_all(["shiftadd"]))
    except TrimtabError as error:
        refused += "layers.3.mlp.up_proj" in str(error)
    return Outcome(measured=f"{refused} of {len(asked) + 1} refused in words", met=refused == len(asked) + 1)


def singular_hessian(bench: Bench) -> Outcome:
    """A singular Hessian is damped more, and says by how much; NaN in the calibration is refused."""
    import torch

    from trimtab.model.calibration import Inputs
    from trimtab.model.sweep import factor

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = factor(torch.ones(16, 16) - 1e-6 * torch.eye(16), 1e-9)
    try:
        Inputs().add(torch.full((1, 4), float("nan")))
        refused = False
    except TrimtabError as error:
        refused = "not finite" in str(error)
    return Outcome(
        measured=f"damped by {found.damp:g} of the mean, said: {len(said) == 1}; NaN refused: {refused}",
        met=found.damp > 1e-9 and len(said) == 1 and refused,
    )


LINES = (
    Line(
        id="a1", text="binary coding against a min-max grid", needed="<= 0.58, 0.98 (2, 3 bits); apot 3 within 2 %", check=coding_error
    ),
    Line(id="a1", text="more rounds never worsen a group", needed="0", check=coding_never_worsens),
    Line(id="a1", text="Gaussian rows of 4096 at 3 bits", needed="<= 0.6", check=gaussian_rows),
    Line(id="a2", text="swept over unswept on held-out inputs", needed="<= 0.7", check=swept_against_unswept),
    Line(id="a2", text="3 bits: recovered share; KL below GPTQ", needed=">= 0.35; below", check=three_bits),
    Line(id="a2", text="2 bits: perplexity", needed="< 50 times", check=two_bits),
    Line(id="a2", text="acc at least as good as lat", needed="KL <=", check=accuracy_mode),
    Line(id="a3", text="2.5 bits allotted against even and random", needed="best", check=allotted_bits),
    Line(id="a4", text="look-up kernel against the unpacked matrix", needed="1e-5; no multiplication", check=kernel_is_exact),
    Line(id="a5", text="packed size", needed="within 1 %, reloads alike", check=packed_size),
    Line(
        id="a6", text="4096 x 4096 at 2 bits against fp32", needed="faster; predicted within 40 %", check=kernel_speed,
        documented=Documented(
            figure="0.62 to 0.82 times as fast as fp32 on processors that stop at AVX2 (EPYC Zen 3), which look up one value at a time; "
            "1.0 to 1.8 times with AVX-512",
            tried=(
                "the gather of AVX2 in place of eight loads: slower",
                "one addition and one comparison for a term in place of four operations: 6.3 -> 4.9 ms",
                "terms by code in a table of 256 entries beside the tables of sums, so that both stay in the nearest cache: in the 4.9 ms",
            ),
            date=datetime.date(2026, 11, 27),
        ),
    ),
    Line(id="b1", text="memory and energy of 66B and 70B models", needed="> 80 % saved at 2-3 bits", check=memory_and_energy),
    Line(id="b2", text="energy of an MLP of OPT-66B", needed="8.2 times less, +-30 %", check=mlp_energy),
    Line(id="c1", text="bad input is refused", needed="all", check=bad_input),
    Line(id="c2", text="singular Hessian, NaN", needed="damped; refused", check=singular_hessian),
)  # fmt: skip
