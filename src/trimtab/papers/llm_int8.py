"""Checks of LLM.int8() (arXiv 2208.07339): quality, injected outliers, exact products, speed, the outlier report, predictions."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import SETTLE_S, Bench, Line, Outcome

if TYPE_CHECKING:
    from trimtab.model.variant import Variant

TEXTS = ("cfi_public", "handbook_public")
WINDOWS, WINDOW = 3, 1024
#: Columns whose norms are scaled, and by how much; any would do.
PLANTED, FACTOR = (17, 200, 411), 30.0
DEQUANT, PLAIN = "llm-int8:outlier_source=dequant", "llm-int8:decompose=false"


# ------------------------------------------------------------------------------------------------------------ quality


def _windows(bench: Bench, text: str, count: int = WINDOWS, size: int = WINDOW) -> list[np.ndarray]:
    from trimtab.measure.quality import windows

    return windows(bench.model.tokenizer.encode(bench.text(text)), size, count)


def _materials(bench: Bench) -> Any:
    from trimtab.techniques.materials import Materials

    texts = {name: bench.text(name) for name in ("cfi_calib", "handbook_calib")}
    return Materials(texts=texts, tokenizer=bench.model.tokenizer)


def _variant(bench: Bench, spec: str) -> Variant:
    from trimtab.techniques.apply import derive, resolve_all
    from trimtab.techniques.registry import parse_all

    materials = _materials(bench)
    return derive(bench.model.variant, resolve_all(bench.model, parse_all([spec]), materials), materials)


def _base(bench: Bench, text: str) -> list[Any]:
    """Logits of the unmodified model, window by window."""
    return bench.once(
        f"llm-int8.base.{text}", lambda: [_logits(bench.model.variant, window) for window in _windows(bench, text)]
    )


def _logits(variant: Variant, window: np.ndarray) -> Any:
    import torch

    from trimtab.runtime.step import Step

    step, rows = Step.of([len(window)], [0]), np.arange(len(window) - 1, dtype=np.int64)
    return variant.decoder(torch.from_numpy(window), step, None, rows)


def _score(bench: Bench, variant: Variant) -> tuple[float, float, float]:
    """Perplexity, that of the unmodified model (geometric means of the texts) and mean KL in nats (mean of the texts)."""
    import torch

    from trimtab.measure.quality import TokenScores

    found = []
    for text in TEXTS:
        scores = TokenScores()
        for window, base in zip(_windows(bench, text), _base(bench, text), strict=True):
            scores.add(base, _logits(variant, window), torch.from_numpy(window[1:]))
        found.append(scores.result())
    mean = statistics.geometric_mean
    return mean(q.ppl for q in found), mean(q.ppl_base for q in found), statistics.fmean(q.kl_nats for q in found)


def _quality(bench: Bench, spec: str) -> tuple[float, float, float]:
    return bench.once(f"llm-int8.quality.{spec}", lambda: _score(bench, _variant(bench, spec)))


def quality_holds(bench: Bench) -> Outcome:
    """Perplexity and KL with the outliers met by int8 weights, against the unmodified model and plain int8."""
    ppl, base, kl = _quality(bench, DEQUANT)
    plain = _quality(bench, PLAIN)
    return Outcome(
        measured=f"perplexity {ppl:.2f} against {base:.2f} ({ppl / base - 1:+.2%}), KL {kl:.4f} nats; plain int8 {plain[0]:.2f}, KL "
        f"{plain[2]:.4f}: {kl / plain[2]:.2f}x",
        met=abs(ppl / base - 1) <= 0.025 and kl <= 0.025 and kl <= 0.65 * plain[2],
    )


def originals_are_no_worse(bench: Bench) -> Outcome:
    """KL with the outliers met by 16-bit originals."""
    kl, other = _quality(bench, "llm-int8")[2], _quality(bench, DEQUANT)[2]
    return Outcome(measured=f"KL {kl:.4f} against {other:.4f} nats", met=kl <= other)


def one_scale_is_broken(bench: Bench) -> Outcome:
    """One scale for a whole input and one for a whole matrix, without outlier columns."""
    ppl, base, kl = _quality(bench, f"{PLAIN},granularity=tensor")
    return Outcome(
        measured=f"perplexity {ppl:.1f} against {base:.2f} ({ppl / base:.2f}x), KL {kl:.2f} nats",
        met=ppl > 1.5 * base,
    )


def auto_leaves_one_percent(bench: Bench) -> Outcome:
    """The threshold found on calibration text, and what it leaves to 16 bits on other text."""
    from trimtab.measure.outliers import outlier_report
    from trimtab.techniques.registry import parse_technique

    resolved: Any = parse_technique("llm-int8:threshold=auto,outlier_source=dequant").resolve(
        bench.model, _materials(bench)
    )
    kl = _quality(bench, str(resolved))[2]
    windows = [window for text in TEXTS for window in _windows(bench, text, 2, 512)]
    apart = 1 - outlier_report(bench.model.variant, windows, resolved.threshold).in_int8
    return Outcome(
        measured=f"threshold {resolved.threshold:g}: {apart:.2%} of held-out multiply-adds in 16 bits, KL {kl:.4f}",
        met=apart <= 0.015,
    )


def _planted(bench: Bench) -> Variant:
    """The model with outliers in the outputs of every norm, and with what they mean."""
    from trimtab.model.folding import fold
    from trimtab.model.variant import Variant

    def compute() -> Variant:
        spec, weights = bench.model.spec, bench.model.weights
        scale = np.ones(spec.hidden_size, np.float32)
        scale[list(PLANTED)] = 1 / FACTOR
        for index, layer in enumerate(spec.layers):
            for stage in (0, 2):
                weights = weights | fold(layer, f"layers.{index}", weights, stage, scale)
        return Variant(spec, weights)

    return bench.once("llm-int8.planted", compute)


def survives_outliers(bench: Bench) -> Outcome:
    """Three columns of every norm times 30, and the columns that read them divided by it."""
    from trimtab.techniques.apply import derive
    from trimtab.techniques.registry import parse_all

    planted, materials = _planted(bench), _materials(bench)
    window = _windows(bench, TEXTS[0])[0]
    off = float((_logits(planted, window) - _logits(bench.model.variant, window)).abs().max())
    change = {}
    for spec in (PLAIN, "llm-int8"):
        ppl = _score(bench, derive(planted, parse_all([spec]), materials))[0]
        change[spec] = ppl / _quality(bench, spec)[0] - 1
    return Outcome(
        measured=f"logits off by {off:.1e}; perplexity {PLAIN} {change[PLAIN]:+.1%}, llm-int8 {change['llm-int8']:+.2%}",
        met=off <= 1e-3 and change[PLAIN] > 0.2 and abs(change["llm-int8"]) <= 0.01,
    )


# ----------------------------------------------------------------------------------------------------------- the codes


def int8_is_real(bench: Bench) -> Outcome:
    """Buffers of the modules, bytes against fp16, and the kernel against int64."""
    import torch

    from trimtab.model.linear import Linear
    from trimtab.runtime.kernels import int8_product

    variant = _variant(bench, DEQUANT)
    ratios, integer = [], True
    for module in variant.decoder.modules():
        if isinstance(module, Linear) and module.path.startswith("layers."):
            held = module.packed[0]
            integer &= torch.from_numpy(held.buffers["data"]).dtype == torch.int8
            ratios.append(held.nbytes / (2 * held.shape[0] * held.shape[1]))
    kept = [path for path in variant.weights if path.endswith(".outliers")]
    rng, same = np.random.default_rng(0), []
    for k, n in ((576, 64), (1536, 64), (133_000, 4)):
        w, x = (rng.integers(-127, 128, (rows, k)).astype(np.int8) for rows in (n, 5))
        same.append(np.array_equal(int8_product(w, x, 2), x.astype(np.int64) @ w.T.astype(np.int64)))
    return Outcome(
        measured=f"{len(ratios)} matrices in torch.int8, at most {max(ratios):.4f}x fp16, {len(kept)} copies in floats; "
        f"{sum(same)} of 3 products bit-identical to int64",
        met=integer and len(ratios) == 210 and max(ratios) <= 0.51 and not kept and all(same),
    )


def columns_are_chosen(bench: Bench) -> Outcome:
    """One value of 6.0 and one of 5.9999."""
    import torch

    from trimtab.model.int8 import coded, outlier_columns
    from trimtab.spec.product import Int8Vector

    x = torch.full((4, 64), 0.25)
    x[1, 9], x[2, 40] = 6.0, 5.9999
    chosen = outlier_columns(x, Int8Vector()).tolist()
    codes, units, _ = coded(x.index_fill(1, torch.tensor(chosen), 0.0), Int8Vector())
    peaks = (units[:, 0] * 127).tolist()
    return Outcome(
        measured=f"outlier columns {chosen}; largest value of each row's codes {[round(peak, 4) for peak in peaks]}",
        met=chosen == [9] and not codes[:, 9].any() and np.allclose(peaks, [0.25, 0.25, 5.9999, 0.25]),
    )


#: Bytes read one after the other to learn what memory gives.
_READ = 256 << 20


def _gemv_s(n: int, k: int, threads: int, rounds: int = 9) -> tuple[list[float], list[float], list[float], int]:
    """Seconds of the int8 product, of torch's in fp32 and of plain reads of `_READ` bytes, in turn; bytes of ours.

    One token, weights from memory.
    """
    import torch

    from trimtab.runtime.kernels import _core

    rng = np.random.default_rng(0)
    copies = max(6, -(-(320 << 20) // (n * k)))  # together more than a last-level cache
    first, scale = rng.integers(-127, 128, (n, k)).astype(np.int8), np.full(n, 0.01, np.float32)
    programs = []
    for index in range(copies):
        program, data = _core.Program(threads), first if index == 0 else first.copy()
        source, out = program.values(k, False), program.values(n, False)
        program.int8_linear("product", source, None, [((data, scale, None), out, 0, None, 1.0, 0.0)], 6.0, None, 0, 4)
        programs.append((program, source, out))
    x, y = rng.standard_normal((1, k), dtype=np.float32), np.empty((1, n), np.float32)
    x[0, :7] = 8.0
    starts, past, records = np.array([0, 1]), np.array([0]), np.zeros((1, 1, 1, 16), np.int64)
    weights = [torch.from_numpy(first.astype(np.float32)) for _ in range(max(3, -(-copies // 4)))]
    token, before = torch.from_numpy(x), torch.get_num_threads()
    torch.set_num_threads(threads)
    ours, theirs, reads = [], [], []
    plain = torch.ones(_READ // 4)
    try:
        with torch.inference_mode():
            for _ in range(
                rounds
            ):  # one library after the other, each with its threads awake as between the matrices of a step
                time.sleep(SETTLE_S)
                took = [program.run_on(starts, past, records, source, x, out, y) for program, source, out in programs]
                ours += took[2:]
                time.sleep(SETTLE_S)
                for index, weight in enumerate((weights[-1], *weights)):
                    start = time.perf_counter()
                    torch.nn.functional.linear(token, weight)
                    if index:
                        theirs.append(time.perf_counter() - start)
                start = time.perf_counter()
                plain.sum()
                reads.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return ours, theirs, reads, int(programs[0][0].metered()[0][1])


def decoding_is_fast(bench: Bench) -> Outcome:
    """One token through matrices of 64 and 16 MB, 2 threads; time predicted from the bytes and what plain reads reach."""
    met, shown, predicted = True, [], []
    for n, k in ((8192, 8192), (4096, 4096)):
        ours, theirs, reads, nbytes = _gemv_s(n, k, 2)
        mine, other = statistics.median(ours), statistics.median(theirs)
        expected = nbytes * statistics.median(reads) / _READ
        met &= other / mine >= 1.5 and abs(expected / mine - 1) <= 0.35
        low, high = np.quantile(np.array(ours) * 1e3, (0.1, 0.9))
        shown.append(
            f"{n} x {k}: {mine * 1e3:.2f} ms ({low:.2f}-{high:.2f}), {other / mine:.2f}x as fast as torch in fp32"
        )
        predicted.append(f"{expected * 1e3:.2f} ms ({expected / mine - 1:+.0%})")
    return Outcome(
        predicted=", ".join(predicted),
        measured="; ".join(shown) + f" (2 threads, load {os.getloadavg()[0]:.1f})",
        met=met,
    )


def outliers_are_reported(bench: Bench) -> Outcome:
    """Dimensions of SmolLM2, and the planted ones."""
    from trimtab.measure.outliers import outlier_report

    windows = [window for text in TEXTS for window in _windows(bench, text, 2, 512)]
    plain, planted = (outlier_report(variant, windows) for variant in (bench.model.variant, _planted(bench)))
    found = {(d.block, d.dimension) for d in planted.dimensions}
    wanted = {(block, dimension) for block in ("attention", "ffn") for dimension in PLANTED}
    most = max(plain.matrices, key=lambda each: each.share)
    dims = ", ".join(
        f"{d.dimension} ({d.block}: {d.layers:.0%} of layers, {d.positions:.0%} of positions)"
        for d in plain.dimensions[:4]
    )
    return Outcome(
        measured=f"{len(plain.dimensions)} emergent outliers{': ' + dims if dims else ''}; most columns {most.columns:.0f} of "
        f"{most.inputs} ({most.path}), {plain.in_int8:.2%} of multiply-adds in int8; planted: {len(wanted & found)} of {len(wanted)}",
        met=wanted <= found and len(plain.matrices) == 210,
    )


# --------------------------------------------------------------------------------------------------------- predictions


def _specs(name: str, technique: str) -> tuple[Any, Any]:
    from trimtab.spec.configs import load_spec
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    spec = load_spec(name).with_dtype("float16")
    return spec, compose(spec, parse_all([technique]))


def _linear_bytes(spec: Any) -> int:
    return sum(node.nbytes() for path, node in spec.linears() if path.startswith("layers."))


def predicted_memory(bench: Bench) -> Outcome:
    """Bytes of the matrices of the layers, and of a whole small model whose embedding stays in 16 bits."""
    ratios = {}
    for name in ("opt-175b", "bloom-176b"):
        spec, coded = _specs(name, DEQUANT)
        ratios[name] = _linear_bytes(coded) / _linear_bytes(spec)
    spec = bench.model.spec.with_dtype("float16")
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    small = compose(spec, parse_all([DEQUANT])).weight_nbytes() / spec.weight_nbytes()
    return Outcome(
        predicted=", ".join(f"{name} {ratio:.4f}" for name, ratio in ratios.items())
        + f"; all of SmolLM2-135M {small:.3f} (0.605)",
        met=all(abs(ratio / 0.5 - 1) <= 0.01 for ratio in ratios.values()) and abs(small - 0.605) < 0.005,
    )


def predicted_devices(bench: Bench) -> Outcome:
    """A100 80GB that hold BLOOM-176B: as nodes are cut (1, 2, 4, 8), and in any number of stages."""
    from trimtab.predict.fit import fit
    from trimtab.spec.parallel import Parallel
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    def fewest(techniques: tuple[str, ...], layouts: list[Parallel]) -> int:
        for parallel in layouts:
            work = Workload(batch=1, prompt=512, gen=128)
            plan = make_plan(
                "bloom-176b", "a100", work, techniques, dtype="float16", kv_dtype="float16", parallel=parallel
            )
            if fit(plan, context=640).rows[0].batch:
                return parallel.devices
        return 0

    cut = [Parallel(tp=tp) for tp in (1, 2, 4, 8)]
    stages = [Parallel(pp=pp) for pp in range(1, 9)]
    found = [fewest(techniques, layouts) for layouts in (cut, stages) for techniques in ((), (DEQUANT,))]
    return Outcome(
        predicted=f"tensor parallel {found[0]} -> {found[1]}, stages {found[2]} -> {found[3]}",
        measured="8 -> 3..4 (paper)",
        met=found[0] == 8 and found[1] in (3, 4) and found[3] in (3, 4),
    )


def predicted_share(bench: Bench) -> Outcome:
    """Multiply-adds in int8 with 7 outlier columns at d = 14336."""
    from trimtab.graph.build import build
    from trimtab.graph.count import count
    from trimtab.graph.ops import StepShape

    _, spec = _specs("bloom-176b", DEQUANT)
    step, flops = StepShape.of([1024], [0], logits=1), {"linear": 0, "outliers": 0}
    for op in build(spec, "prefill", layers=1, head=False).ops:
        if op.kind in flops:
            flops[op.kind] += int(count(op, step).flops)
    share = 1 - flops["outliers"] / flops["linear"]
    return Outcome(predicted=f"{share:.3%}", measured="> 99.9 % (paper)", met=share > 0.999)


def _speed_ratio(width: int, tokens: int) -> tuple[float, float]:
    """fp16 over int8 time on an A100: the first matrix of the feed-forward block, 4 d x d, and all matrices of a layer."""
    from trimtab.graph.build import build
    from trimtab.graph.fuse import fuse
    from trimtab.graph.ops import StepShape
    from trimtab.predict.price import price
    from trimtab.spec.configs import spec_from_config
    from trimtab.spec.machine import load_machine, load_stack
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    config = {
        "model_type": "opt", "hidden_size": width, "ffn_dim": 4 * width, "num_hidden_layers": 1, "num_attention_heads": width // 64,
        "vocab_size": 64, "max_position_embeddings": 8192, "word_embed_proj_dim": width, "do_layer_norm_before": True,
        "activation_function": "relu",
    }  # fmt: skip
    machine = load_machine("a100")
    stack = load_stack("hf-eager").on(machine)
    spec = spec_from_config(config, "one-layer").with_dtype("float16")
    first, every = [], []
    for each in (spec, compose(spec, parse_all([DEQUANT]))):
        found = price(fuse(build(each, "prefill"), stack), StepShape.of([tokens], [0], logits=1), machine, stack)
        times = {name: float(k.time_s) for k in found.kernels for name in k.group.names if "_proj" in name}
        first.append(sum(time for name, time in times.items() if ".up_proj" in name))
        every.append(sum(times.values()))
    return first[0] / first[1], every[0] / every[1]


def predicted_speed(bench: Bench) -> Outcome:
    """At 1,024 tokens, the overhead of finding, coding, scaling and adding priced as the ops they are."""
    widths = (1024, 2048, 4096, 6656, 12288)
    found = {width: _speed_ratio(width, 1024) for width in widths}
    shown = ", ".join(f"d={width}: {first:.2f} ({every:.2f})" for width, (first, every) in found.items())
    met = all(found[2048][i] < 1 < found[6656][i] and 1.6 <= found[12288][i] <= 2.0 for i in (0, 1))
    return Outcome(
        predicted=f"{shown}: 4d x d (all of a layer)", measured="1.8x at 12288, below 1 up to 6.7B (paper)", met=met
    )


# ----------------------------------------------------------------------------------------------------------- bad input


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets one sentence."""
    import torch

    from trimtab.model.int8 import VectorInt8
    from trimtab.techniques.base import compose
    from trimtab.techniques.registry import parse_all

    def composed(text: str) -> Callable[[], Any]:
        return lambda: compose(bench.model.spec, parse_all([text]))

    def train() -> None:
        variant, path = _variant(bench, DEQUANT), "layers.0.self_attn.q_proj"
        node: Any = dict(variant.spec.linears())[path]
        VectorInt8(path, node, variant.weights)(torch.zeros(1, node.k, requires_grad=True), None)

    cases: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
        "threshold=0": (composed("llm-int8:threshold=0"), ("above 0",)),
        "threshold=-6": (composed("llm-int8:threshold=-6"), ("above 0",)),
        "threshold=six": (composed("llm-int8:threshold=six"), ("above 0",)),
        "on int4": (composed("rtn:bits=4,group=32+llm-int8"), ("already quantized (format int4-g32)",)),
        "on tables": (composed("tmac:bits=4,group=64,kernel=lut+llm-int8"), ("product of its own",)),
        "training": (train, ("no gradient", "LoRA")),
    }
    missed = []
    for name, (case, words) in cases.items():
        try:
            case()
            missed.append(name)
        except TrimtabError as error:
            if not all(word in str(error) for word in words) or (
                name.startswith("threshold") and not isinstance(error, ValueError)
            ):
                missed.append(name)
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused{f'; wrong: {missed}' if missed else ''}",
        met=not missed,
    )


LINES = (
    Line(
        id="a1", text="quality of llm-int8:outlier_source=dequant", check=quality_holds,
        needed="perplexity within 2.5 %, KL <= 0.025 and <= 0.65x plain int8",
    ),
    Line(id="a1.fp", text="16-bit originals for outliers", needed="KL <= that of dequant", check=originals_are_no_worse),
    Line(id="a1.tensor", text="one scale per tensor, no outlier columns", needed="> 1.5x perplexity", check=one_scale_is_broken),
    Line(
        id="a1.auto", text="threshold=auto: 1 % in 16 bits on calibration text", needed="<= 1.5 % on other text",
        check=auto_leaves_one_percent,
    ),
    Line(
        id="a2", text="3 columns of every norm times 30", check=survives_outliers,
        needed="logits to 1e-3; plain int8 > +20 %, llm-int8 within 1 %",
    ),
    Line(id="a3", text="int8 is what is stored and multiplied", needed="<= 0.51x fp16, bit-identical to int64", check=int8_is_real),
    Line(id="a4", text="|x| = 6.0 and 5.9999", needed="the first column alone", check=columns_are_chosen),
    Line(
        id="a5", text="one token, weights from memory, 2 threads", needed=">= 1.5x torch fp32, predicted within 35 %",
        check=decoding_is_fast,
    ),
    Line(id="a6", text="outlier report on SmolLM2", needed="planted dimensions found", check=outliers_are_reported),
    Line(id="b1", text="bytes of the matrices, OPT-175B and BLOOM-176B", needed="0.50 +- 1 %", check=predicted_memory),
    Line(id="b2", text="A100 80GB for BLOOM-176B", needed="8 -> 3..4", check=predicted_devices),
    Line(id="b3", text="share in int8, 7 outlier columns, d = 14336", needed="> 99.9 %", check=predicted_share),
    Line(
        id="b4", text="speed of int8 over fp16, A100", needed="crosses 1 in d = 2048..6656; 1.6-2.0 at 12288", check=predicted_speed,
    ),
    Line(id="c", text="bad input", needed="refused with a sentence", check=refuses_bad_input),
)  # fmt: skip
