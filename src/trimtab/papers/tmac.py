"""Checks of T-MAC (arXiv 2407.00088): exactness, table error, speed by bits, predictions, bad input."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Documented, Line, Needs, Outcome

#: Rows and columns of SmolLM2 (k_proj, q_proj, up_proj, down_proj): neither divides into 128, or into tiles, everywhere.
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536))
GROUPS = (32, 64, 128, -1)
TOKENS = 1024
#: Bytes the weights of a timing cycle through, beyond any last-level cache of a desktop.
WORKING_SET = 512 << 20
RECORDED = Path(__file__).parents[3] / "benchmarks" / "recorded" / "decode.json"


def _format(bits: int | str, group: int, cols: int, zp: bool = False) -> Any:
    from trimtab.spec.formats import WeightFormat

    group = cols if group == -1 else group
    if bits == "ternary":
        return WeightFormat(kind="ternary", group=group, tiled=True)
    return WeightFormat(kind="bitplane", bits=int(bits), group=group, sym=not zp, tiled=True)


def _nmse(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def float_tables_are_exact(bench: Bench) -> Outcome:
    """Tables of floats against dequantize-then-multiply in float64."""
    from trimtab.runtime.native.products import multiply
    from trimtab.runtime.numerics import decode, encode
    from trimtab.spec.product import LookupTable

    rng, worst, cases = np.random.default_rng(0), 0.0, 0
    for bits in (1, 2, 3, 4, "ternary"):
        for rows, cols in (*SHAPES[:1], *SHAPES[2:], (33, 100)):
            for group in GROUPS:
                for zp in (False,) if bits == "ternary" else (False, True):
                    packed = encode(rng.standard_normal((rows, cols), dtype=np.float32), _format(bits, group, cols, zp))
                    x = rng.standard_normal((2, cols), dtype=np.float32)
                    wanted = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
                    found = multiply(packed, LookupTable(table="f32"), x)
                    worst, cases = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max())), cases + 1
    return Outcome(measured=f"largest relative difference {worst:.1e} in {cases} cases", met=worst <= 1e-5)


def _activations(bench: Bench) -> dict[str, np.ndarray]:
    """Inputs [tokens, K] of every linear of the layers, from a held-out text."""
    import torch

    from trimtab.model.linear import Linear
    from trimtab.runtime.text.builtin import builtin_text, split

    def compute() -> dict[str, np.ndarray]:
        model, found = bench.model, {}
        ids = model.tokenizer.encode(split(builtin_text())[1])[:40]

        def keep(module: Any, inputs: tuple[Any, ...]) -> None:
            if module.path.startswith("layers."):
                found[module.path] = np.ascontiguousarray(inputs[0][-4:].float().numpy())

        linears = [module for module in model.decoder.modules() if isinstance(module, Linear)]
        hooks = [module.register_forward_pre_hook(keep) for module in linears]
        try:
            with torch.inference_mode():
                model.logits([ids])
        finally:
            for hook in hooks:
                hook.remove()
        return found

    return bench.once("tmac.activations", compute)


def table_error_is_bounded(act_group: int) -> Callable[[Bench], Outcome]:
    """NMSE of every matrix of the model on its own inputs, against the same codes in floats."""
    return lambda bench: _table_error(bench, act_group)


def _table_error(bench: Bench, act_group: int) -> Outcome:
    from trimtab.runtime.native.products import multiply
    from trimtab.runtime.numerics import decode, encode
    from trimtab.spec.product import LookupTable

    shown, met = [], True
    for bits in (2, 4):
        errors = {}
        for path, x in _activations(bench).items():
            packed = encode(decode(bench.model.weights[path]), _format(bits, 64, x.shape[1]))
            wanted = x.astype(np.float64) @ decode(packed).T.astype(np.float64)
            errors[path] = _nmse(multiply(packed, LookupTable(act_group=act_group), x), wanted)
        worst = max(errors, key=lambda path: errors[path])
        met &= errors[worst] <= 5e-4 and min(errors.values()) > 1e-7
        shown.append(
            f"{bits} bits: median {statistics.median(errors.values()):.1e}, {min(errors.values()):.1e} to {errors[worst]:.1e} ({worst})"
        )
    return Outcome(measured="; ".join(shown), met=met)


def ternary_is_integer_arithmetic(bench: Bench) -> Outcome:
    """Ternary products against int64 sums of int8 activations, bit for bit, on the model's shapes and inputs."""
    from trimtab.runtime.native.products import multiply
    from trimtab.runtime.numerics import decode
    from trimtab.runtime.numerics.lookup import encode_ternary, ternary_of
    from trimtab.spec.product import LookupTable

    same, count = 0, 0
    for path, x in list(_activations(bench).items())[:28]:
        packed = encode_ternary(decode(bench.model.weights[path]), _format("ternary", -1, x.shape[1]), one_scale=True)
        weights, scale = ternary_of(packed)
        most = np.abs(x).max(axis=1, keepdims=True)
        codes = np.rint(x * (np.float32(127) / most)).astype(np.int64)
        wanted = (
            (codes @ weights.T.astype(np.int64)).astype(np.float32)
            * scale.astype(np.float32).T
            * (most / np.float32(127))
        )
        same += int(np.array_equal(multiply(packed, LookupTable(), x), wanted))
        count += 1
    return Outcome(measured=f"{same} of {count} matrices bit-identical", met=same == count)


def _nll(bench: Bench, technique: str) -> tuple[float, float]:
    """Mean negative log-likelihood in nats through the kernel, 8 tokens a pass, and of the same codes in floats."""
    from trimtab.model.variant import Model, Variant
    from trimtab.runtime.engine.generate import Session
    from trimtab.runtime.native import lower
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.text.builtin import builtin_text, split
    from trimtab.spec.formats import FP32
    from trimtab.techniques.apply import reencode
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    model = bench.model
    ids = np.asarray(model.tokenizer.encode(split(builtin_text())[1])[: TOKENS + 1], dtype=np.int64)

    def score(logits: np.ndarray) -> float:
        high = logits.max(axis=1, keepdims=True)
        logs = logits - high - np.log(np.exp(logits - high).sum(axis=1, keepdims=True))
        return -float(logs[np.arange(len(logs)), ids[1 : len(logs) + 1]].mean())

    spec = compose(model.spec, parse_all([technique]))
    weights = reencode(model.weights, spec)
    session = Session(lower(spec, weights, 0))
    rows = [session.prefill([ids[:1]], reserve=len(ids))]
    rows += [session.extend([ids[at : min(at + 8, TOKENS)]]) for at in range(1, TOKENS, 8)]
    plain = model.weights | {
        path: encode(decode(packed), FP32) for path, packed in weights.items() if packed is not model.weights[path]
    }

    def floats() -> float:
        return score(Model(Variant(model.spec, plain)).logits([ids[:TOKENS].tolist()])[0].numpy())

    bits = technique.split(",fast_agg")[0]
    return score(np.concatenate(rows).astype(np.float64)), bench.once(f"tmac.floats.{bits}", floats)


def perplexity_holds(technique: str, limit: float | None) -> Callable[[Bench], Outcome]:
    """Perplexity through the kernel against the same codes dequantized, held-out half of the built-in text."""

    def check(bench: Bench) -> Outcome:
        ours, floats = (math.exp(value) for value in _nll(bench, technique))
        change = ours / floats - 1
        shown = f"{ours:.3f} against {floats:.3f} ({change:+.2%}) over {TOKENS} tokens"
        return Outcome(measured=shown, met=limit is None or abs(change) <= limit)

    return check


def beats_the_peer(bench: Bench) -> Outcome:
    """Recorded decoding against the faster of llama.cpp's formats at each width; the record is that of benchmarks/decode.py."""
    try:
        runs = [run for run in json.loads(RECORDED.read_text("utf-8"))["runs"] if run["model"] == "1b"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Needs("`make bench-peers`") from None
    shown, met = [], bool(runs)
    for run in runs:
        peers = {
            row["arm"]: row["decode"]["ours_over_this"]["median"]
            for row in run["rows"]
            if row["arm"].startswith("llama.cpp") and row.get("decode", {}).get("ours_over_this")
        }
        if run["width"] == "8-bit" or not peers:
            continue
        peer, ratio = min(peers.items(), key=lambda item: item[1])
        shown.append(f"{ratio:.2f}x {peer.split()[-1]} ({run['threads']} threads)")
        met = met and ratio > 1
    return Outcome(measured="recorded decoding of the 1B shape: " + ", ".join(shown), met=met and bool(shown))


def _cycled_s(bits: int | str) -> float:
    """Median seconds of one 8192 x 2048 product on all threads, over copies of the weights larger than any cache."""
    import os

    from trimtab.runtime.kernels import _core
    from trimtab.runtime.native.dataflow import ONLY
    from trimtab.runtime.native.products import as_tiles, core_tiles, tiles_of
    from trimtab.runtime.numerics import encode
    from trimtab.runtime.weights.packed import Packed
    from trimtab.spec.product import LookupTable

    rows, cols, product = 8192, 2048, LookupTable()
    rng = np.random.default_rng(0)
    packed = encode(
        rng.standard_normal((rows, cols), dtype=np.float32), _format(bits, -1 if bits == "ternary" else 128, cols)
    )
    packed = as_tiles(packed, tiles_of(packed.format, product, rows, cols))
    copies = [
        core_tiles(Packed(packed.format, packed.shape, {name: b.copy() for name, b in packed.buffers.items()}), product)
        for _ in range(WORKING_SET // packed.nbytes + 1)
    ]
    x, threads = rng.standard_normal((1, cols), dtype=np.float32), len(os.sched_getaffinity(0))
    (times,) = _core.time_products(copies, x, threads, [ONLY["flat"]], 3 * len(copies))
    return statistics.median(times[len(copies) :])


def time_falls_with_bits(bench: Bench) -> Outcome:
    """Time of 4-bit, 2-bit and ternary weights read from memory."""
    import os

    found = {bits: _cycled_s(bits) for bits in (4, 2, "ternary")}
    half, third = found[2] / found[4], found["ternary"] / found[2]
    shown = ", ".join(f"{bits} {seconds * 1e6:.0f} us" for bits, seconds in found.items())
    return Outcome(
        measured=f"t(2)/t(4) {half:.2f}, t(ternary)/t(2) {third:.2f} ({shown}; memory; load {os.getloadavg()[0]:.1f})",
        met=half <= 0.62 and third <= 0.95,
    )


# ----------------------------------------------------------------------------------------------------- predictions

#: Matrices of a layer of Llama-2-7B, [N, K], and its head; 32 layers.
LLAMA_7B = (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1))
LAYERS, HEAD = 32, 32000 * 4096


def _gemv_bytes(rows: int, cols: int, bits: int, group: int = 128) -> float:
    """Weights, fp16 scales and tables of one product. Source: the paper's cost model."""
    return rows * cols * bits / 8 + rows * cols / group * 2 + cols / 4 * 16


def _token_s(bits: int, *, lookups_per_s: float, adds_per_s: float, bandwidth: float, head_macs_per_s: float) -> float:
    """Seconds of one token: the larger of lookups and bytes, product by product, tables, and the 8-bit head of the engine."""
    total = 0.0
    for (rows, cols), times in LLAMA_7B:
        lookups = rows * cols / 4 * bits
        tables = cols / 4 * (8 + 16)
        busy = lookups / lookups_per_s + tables / adds_per_s
        total += LAYERS * times * max(busy, _gemv_bytes(rows, cols, bits) / bandwidth)
    return total + max(HEAD / head_macs_per_s, HEAD / bandwidth)


#: M2 Ultra performance core. Datasheet: 800 GB/s for the package. Assumed, without a source at hand: 3.49 GHz, one `tbl` of 16
#: lookups with its additions a cycle, 100 GB/s drawn by one core. From llama.cpp's 3.82 tok/s: about 8 multiply-adds a cycle.
M2_HZ, M2_LANES, M2_BANDWIDTH, M2_CORE_BANDWIDTH = 3.49e9, 16, 800e9, 100e9

#: Measured by the authors: llama.cpp b2794, tok/s of W4 on 8 threads of an M2 Ultra, and J/token of W2 on AGX Orin. Source:
#: microsoft/T-MAC docs/profiling_data.md.
LLAMA_CPP_W4, LLAMA_CPP_W2_J = 31.57, 2.12


def _m2_s(bits: int, threads: int) -> float:
    rate = threads * M2_HZ
    bandwidth = min(threads * M2_CORE_BANDWIDTH, M2_BANDWIDTH)
    return _token_s(
        bits, lookups_per_s=rate * M2_LANES, adds_per_s=rate * 16, bandwidth=bandwidth, head_macs_per_s=rate * 8
    )


def predicted_ratio(bench: Bench) -> Outcome:
    """Speed of 2-bit over 4-bit Llama-2-7B, one thread of an M2 Ultra."""
    ratio = _m2_s(4, 1) / _m2_s(2, 1)
    return Outcome(predicted=f"{ratio:.2f}", measured="1.86", met=abs(ratio / 1.86 - 1) <= 0.15)


def predicted_saturation(bench: Bench) -> Outcome:
    """4-bit Llama-2-7B on 8 threads: llama.cpp's speed tells what the memory gives, and lookups must not be the limit.

    Q4_0 takes 4.5 bits a weight and T-MAC in groups of 128 takes 4.125; both then run at the rate of their bytes.
    """
    weights = sum(rows * cols * times for (rows, cols), times in LLAMA_7B) * LAYERS + HEAD
    bandwidth = LLAMA_CPP_W4 * weights * 4.5 / 8
    bytes_s = weights * 4.125 / 8 / bandwidth
    lookups_s = _m2_s(4, 8)
    speed = 1 / max(bytes_s, lookups_s)
    return Outcome(
        predicted=f"{speed:.1f} tok/s ({speed / LLAMA_CPP_W4 - 1:+.0%}); lookups alone {1 / lookups_s:.0f}",
        measured="35.65 (+13%)",
        met=abs(speed / 35.65 - 1) <= 0.15 and bytes_s > lookups_s,
    )


def predicted_energy(bench: Bench) -> Outcome:
    """Joules a token of 2-bit Llama-2-7B on AGX Orin, from llama.cpp's and the speed-up r * 4 / bits of the cost model.

    r, lookups over unpack-and-multiply, is what 4 bits gain on one thread (8.97 over 5.65 tok/s, M2 Ultra). Energy of the cores
    follows their time at one power; DRAM takes 17.5 pJ a bit whoever reads it.
    """
    weights = sum(rows * cols * times for (rows, cols), times in LLAMA_7B) * LAYERS
    dram_j = (weights * 2.125 + HEAD * 8) * 17.5e-12
    speed_up = 8.97 / 5.65 * 4 / 2
    ours_j = (LLAMA_CPP_W2_J - dram_j) / speed_up + dram_j
    ratio = LLAMA_CPP_W2_J / ours_j
    return Outcome(
        predicted=f"{ratio:.2f}x ({ours_j:.2f} J)", measured="3.2x (0.66 J)", met=abs(ratio / 3.2 - 1) <= 0.25
    )


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets one sentence; rows of any length are padded, and a bias is added."""
    from trimtab.runtime.kernels import _core
    from trimtab.runtime.native.products import multiply
    from trimtab.runtime.numerics import decode, encode
    from trimtab.spec.product import LookupTable
    from trimtab.techniques.apply import applied
    from trimtab.techniques.registry import parse_technique

    def run(text: str) -> None:
        with applied(bench.model, text) as model:
            model.logits([[1]])

    cases: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
        "bits=5": (lambda: parse_technique("tmac:bits=5"), ("T-MAC handles 1-4 bits or ternary",)),
        "group=34": (lambda: parse_technique("tmac:group=34"), ("group=34", "g=4")),
    }
    if _core.missing_flags("avx512") not in ("", "?"):
        cases["isa=avx512"] = (
            lambda: run("tmac:isa=avx512,group=64"),
            (_core.missing_flags("avx512").split(",")[-1].strip(),),
        )
    missed = []
    for name, (case, words) in cases.items():
        try:
            case()
            missed.append(name)
        except TrimtabError as error:
            if not all(word in str(error) for word in words):
                missed.append(name)
    packed = encode(np.random.default_rng(0).standard_normal((48, 37), dtype=np.float32), _format(4, -1, 37))
    x = np.random.default_rng(1).standard_normal((1, 37), dtype=np.float32)
    error = float(np.abs(multiply(packed, LookupTable(table="f32"), x) - x @ decode(packed).T).max())
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused{f'; wrong: {missed}' if missed else ''}; "
        f"K=37 padded, off by {error:.0e}; {_bias(bench)}",
        met=not missed and error < 1e-4 and _bias(bench).endswith("kept"),
    )


def _bias(bench: Bench) -> str:
    import torch

    from trimtab.model.linear import Linear
    from trimtab.runtime.numerics import encode
    from trimtab.runtime.step import Step
    from trimtab.runtime.weights.packed import Weights
    from trimtab.spec.formats import FP32
    from trimtab.spec.leaves import LinearSpec
    from trimtab.spec.product import LookupTable

    node = LinearSpec(
        n=32, k=64, bias=True, format=_format(4, 64, 64), bias_format=FP32, product=LookupTable(kernel="lut")
    )
    zero, bias = np.zeros((32, 64), np.float32), np.arange(32, dtype=np.float32)
    linear = Linear("x", node, Weights({"x": encode(zero, node.format), "x.bias": encode(bias, FP32)}))
    y = linear(torch.ones(1, 64), Step.of([1], [0]))[0].numpy()
    return "bias kept" if np.array_equal(y, bias) else "bias lost"


LINES = (
    Line(id="a1", text="float tables equal dequantize-then-multiply", needed="<= 1e-5 relative", check=float_tables_are_exact),
    Line(
        id="a2", text="int8 tables on the model's layers and activations, act_group=32", needed="1e-7 < NMSE <= 5e-4",
        check=table_error_is_bounded(32),
    ),
    Line(
        id="a2.64", text="the same, act_group=64", needed="1e-7 < NMSE <= 5e-4", check=table_error_is_bounded(64),
        documented=Documented(
            figure="6.4e-4 at 4 bits in v_proj of layers 12, 13 and 16, 1.0e-3 at 2 bits; the median of all matrices is 8e-5",
            tried=(
                "act_group=32: at most 3.1e-4 at 4 bits",
                "act_group=K: worse, a few channels of the residual stream are much larger than the others",
                "table=i16: 1e-8, at twice the lookups",
            ),
            date=datetime.date(2026, 11, 26),
        ),
    ),
    Line(id="a3", text="ternary equals integer W1.58A8", needed="bit-identical", check=ternary_is_integer_arithmetic),
    Line(
        id="a4", text="perplexity, 4 bits in groups of 64, kernel against the same codes", needed="within 1 %",
        check=perplexity_holds("tmac:bits=4,group=64,kernel=lut", 0.01),
    ),
    Line(
        id="a4.f", text="the same with fast_agg=1, act_group=32", needed="reported",
        check=perplexity_holds("tmac:bits=4,group=64,kernel=lut,act_group=32,fast_agg=1", None),
    ),
    Line(id="a5", text="decode against llama.cpp; single products are not compared", needed="faster at every format", check=beats_the_peer),
    Line(
        id="a6", text="time falls with bits, 8192 x 2048 from memory", needed="t(2)/t(4) <= 0.62, t(ternary)/t(2) <= 0.95",
        check=time_falls_with_bits,
    ),
    Line(id="b1", text="2 over 4 bits, Llama-2-7B, one thread of M2 Ultra", needed="1.86 within 15 %", check=predicted_ratio),
    Line(
        id="b2", text="4 bits, Llama-2-7B, 8 threads of M2 Ultra: bound by memory", needed="35.65 tok/s within 15 %",
        check=predicted_saturation,
    ),
    Line(id="b3", text="energy, 2-bit Llama-2-7B on AGX Orin", needed="3.2x within 25 %", check=predicted_energy),
    Line(id="c", text="bad input", needed="refused with a sentence", check=refuses_bad_input),
)  # fmt: skip
