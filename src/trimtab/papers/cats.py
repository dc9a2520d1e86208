"""Checks of CATS (arXiv 2404.08763): sparsity, quality, skipping, predictions, bad input."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.papers.claims import Bench, Documented, Line, Outcome

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
TEXTS = ("cfi_public", "handbook_public")
WINDOWS, WINDOW = 8, 1024


def _materials(bench: Bench) -> Any:
    from trimtab.techniques.materials import Materials

    texts = {name: bench.text(name) for name in ("cfi_calib", "handbook_calib")}
    return Materials(texts=texts, tokenizer=bench.model.tokenizer)


def _windows(bench: Bench, text: str) -> list[np.ndarray]:
    ids = np.asarray(bench.model.tokenizer.encode(bench.text(text)), dtype=np.int64)
    count = min(WINDOWS, len(ids) // WINDOW)
    return list(ids[: count * WINDOW].reshape(count, WINDOW))


def _sketches(bench: Bench) -> dict[str, Any]:
    from trimtab.techniques.ffn._thresholds import gate_sketches

    return bench.once("cats.sketches", lambda: gate_sketches(bench.model.spec, bench.model.weights, _materials(bench)))


def _held_out(bench: Bench, text: str) -> dict[str, Any]:
    """Sketch of |act(gate)| per layer on a held-out text."""
    from trimtab.techniques.ffn._thresholds import gate_sketches
    from trimtab.techniques.materials import Materials

    def compute() -> dict[str, Any]:
        materials = Materials(
            texts={text: bench.text(text)}, tokenizer=bench.model.tokenizer, window=WINDOW, windows=WINDOWS
        )
        return gate_sketches(bench.model.spec, bench.model.weights, materials)

    return bench.once(f"cats.held.{text}", compute)


def sparsity_holds(bench: Bench) -> Outcome:
    """Share of gate activations below the calibrated threshold on held-out text, worst layer."""
    calibrated = _sketches(bench)
    worst = {}
    for share in SPARSITIES:
        errors = []
        for text in TEXTS:
            for path, sketch in _held_out(bench, text).items():
                errors.append(abs(sketch.share_below(calibrated[path].quantile(share)) - share))
        worst[share] = max(errors)
    shown = ", ".join(f"k={share}: {error:.3f}" for share, error in worst.items())
    return Outcome(measured=f"worst layer off by {shown}", met=max(worst.values()) <= 0.03)


#: What a gate may become: (pre-activation, activation) -> activation.
Gate = Callable[[str, Any, Any], Any]


def _kls(bench: Bench) -> dict[str, dict[str, float]]:
    """Mean KL in nats to the unmodified model, by text and by what every gate passes through.

    The unmodified logits of a window are computed once for all of them.
    """
    import torch

    from trimtab.measure.quality import kl_nats
    from trimtab.runtime.step import Step

    before: dict[str, Any] = {}
    gates = {f"k={share}": _thresholded(_thresholds(bench, share)) for share in (0.3, 0.5, 0.7)} | _rivals(bench)

    def logits(ids: np.ndarray, gate: Gate | None) -> Any:
        step = Step.of([len(ids)], [0])
        if gate is not None:
            taps = {"mlp.gate_pre": before.__setitem__, "mlp.gate": lambda path, act: gate(path, before.pop(path), act)}
            step.taps = taps
        return bench.model.decoder.forward(torch.from_numpy(ids), step, None, np.arange(len(ids), dtype=np.int64))

    def compute() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, list[float]]] = {text: {name: [] for name in gates} for text in TEXTS}
        with torch.inference_mode():
            for text in TEXTS:
                for window in _windows(bench, text):
                    base = logits(window, None)
                    for name, gate in gates.items():
                        found[text][name].append(kl_nats(base, logits(window, gate)))
        return {text: {name: float(np.mean(kls)) for name, kls in row.items()} for text, row in found.items()}

    return bench.once("cats.kls", compute)


def _thresholds(bench: Bench, share: float) -> dict[str, float]:
    return {path: sketch.quantile(share) for path, sketch in _sketches(bench).items()}


def _rivals(bench: Bench) -> dict[str, Gate]:
    """Simpler ways to the same sparsity of one half."""
    import torch

    whole = None
    for sketch in _sketches(bench).values():
        whole = sketch.copy() if whole is None else whole.merge(sketch)
    assert whole is not None
    one = dict.fromkeys(_sketches(bench), whole.quantile(0.5))
    pre_thresholds = {path: sketch.quantile(0.5) for path, sketch in _pre_sketches(bench).items()}
    return {
        "ReLU": lambda path, pre, act: torch.relu(pre),
        "pre-activation": lambda path, pre, act: act * (pre.abs() > pre_thresholds[path]),
        "one threshold": _thresholded(one),
    }


def _thresholded(thresholds: Mapping[str, Any]) -> Gate:
    return lambda path, pre, act: act * (act.abs() > thresholds[path])


def quality_holds(share: float, bar: float | None) -> Callable[[Bench], Outcome]:
    """KL of one sparsity on both held-out texts, 8 windows of 1024 tokens each."""

    def check(bench: Bench) -> Outcome:
        found = {text: row[f"k={share}"] for text, row in _kls(bench).items()}
        shown = ", ".join(f"{text} {value:.3f}" for text, value in found.items())
        return Outcome(measured=f"KL {shown} nats", met=bar is None or max(found.values()) <= bar)

    return check


def beats_baselines(bench: Bench) -> Outcome:
    """CATS at one half against ReLU, thresholding before the activation, and one threshold for all layers."""
    met, shown = True, []
    for text, row in _kls(bench).items():
        theirs = {name: row[name] for name in _rivals(bench)}
        met &= all(row["k=0.5"] < value for value in theirs.values())
        shown.append(
            f"{text}: {row['k=0.5']:.3f} against " + ", ".join(f"{n} {value:.3f}" for n, value in theirs.items())
        )
    return Outcome(measured="; ".join(shown), met=met)


def _pre_sketches(bench: Bench) -> dict[str, Any]:
    from trimtab.techniques.ffn._thresholds import gate_sketches

    model = bench.model
    return bench.once(
        "cats.pre", lambda: gate_sketches(model.spec, model.weights, _materials(bench), point="mlp.gate_pre")
    )


def _ffn(rows: int, width: int, neurons: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, width), dtype=np.float32)
    gate, up, down_t = (rng.standard_normal((neurons, width), dtype=np.float32) / np.sqrt(width) for _ in range(3))
    return x, *(np.ascontiguousarray(w, dtype=np.float32) for w in (gate, up, down_t))


def _dense(
    x: np.ndarray, gate: np.ndarray, up: np.ndarray, down_t: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    pre = x.astype(np.float64) @ gate.T
    act = pre / (1 + np.exp(-pre))
    kept = np.abs(act) > threshold
    return (act * kept * (x.astype(np.float64) @ up.T)) @ down_t, kept


def skipping_is_real(bench: Bench) -> Outcome:
    """Bytes of up and down touched by the kernel, and poison in the rows that are inactive."""
    from trimtab.runtime.kernels import gate_first

    met, shown = True, []
    for share in SPARSITIES:
        x, gate, up, down_t = _ffn(1, 576, 1536)
        pre = x @ gate.T
        threshold = float(np.quantile(np.abs(pre / (1 + np.exp(-pre))), share))
        _, kept = _dense(x, gate, up, down_t, threshold)
        clean = gate_first(x, gate, up, down_t, threshold=threshold, act="silu")
        up[~kept[0]], down_t[~kept[0]] = np.nan, np.nan
        poisoned = gate_first(x, gate, up, down_t, threshold=threshold, act="silu")
        touched = sum(clean.bytes_read[1:]) / (up.nbytes + down_t.nbytes)
        met &= bool(np.array_equal(clean.y, poisoned.y)) and abs(touched - kept.mean()) < 1e-9
        shown.append(f"k={share}: {touched:.3f} of the bytes")
    return Outcome(
        predicted="share 1 - k", measured=", ".join(shown) + "; NaN in skipped rows changes nothing", met=met
    )


#: One layer with the feed-forward block of Mistral-7B. Its attention adds nothing, so that the block's input is known.
_LAYER = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def _block_s(session: Any, token: int) -> tuple[float, int]:
    """Decode one token: seconds of the feed-forward block, and neurons whose rows it read (0 = no count, all)."""
    from trimtab.runtime.step import Recorder

    session.record = Recorder()
    session.decode([token])
    times = {name: seconds for name, *_, seconds in session.runner.metered()}
    return (
        sum(seconds for name, seconds in times.items() if "post_attention_layernorm" in name or ".mlp." in name),
        session.record.observed.get("layers.0.mlp.active_rows", 0),
    )


def speed(bench: Bench) -> Outcome:
    """The block of the native program that skips rows against its dense one, fp32 weights from memory, 2 threads, in turn."""
    from trimtab.runtime.engine.generate import Session
    from trimtab.runtime.native.lower import lower
    from trimtab.runtime.numerics import decode, encode
    from trimtab.runtime.weights.packed import Weights
    from trimtab.runtime.weights.random import random_weights
    from trimtab.spec.configs import spec_from_config
    from trimtab.spec.formats import FP32
    from trimtab.techniques.ffn.cats import Cats

    spec = spec_from_config(_LAYER, "one-layer").with_dtype("float32")
    cut = spec.edit(Cats().edits(spec), by="cats")
    weights = dict(random_weights(spec))
    o_proj, norm = "layers.0.self_attn.o_proj", "layers.0.post_attention_layernorm"
    weights[o_proj] = encode(np.zeros_like(decode(weights[o_proj])), FP32)
    weights[norm] = encode(np.ones_like(decode(weights[norm])), FP32)
    transposed = np.ascontiguousarray(decode(weights["layers.0.mlp.down_proj"]).T)
    # Thresholds from half of the tokens; the other half is decoded.
    tokens = decode(weights["embed_tokens"])
    normed = tokens / np.sqrt((tokens**2).mean(axis=1, keepdims=True) + _LAYER["rms_norm_eps"])
    gates = normed[:32] @ decode(weights["layers.0.mlp.gate_proj"]).T
    strengths = np.abs(gates / (1 + np.exp(-gates)))

    dense = Session(lower(spec, Weights(weights), 2))
    dense.prefill([np.arange(1)], reserve=48)
    met, shown = True, []
    for share, needed in ((0.5, 1.3), (0.9, 2.0)):
        skipping = weights | {
            "layers.0.mlp.down_proj": encode(transposed, FP32, layout="transposed"),
            "layers.0.mlp.threshold": encode(np.full((1, 1), np.quantile(strengths, share), np.float32), FP32),
        }
        sparse = Session(lower(cut, Weights(skipping), 2))
        sparse.prefill([np.arange(1)], reserve=24)
        ratios, seconds, active = [], [], []
        for token in range(32, 53):
            (whole, _), (part, rows) = _block_s(dense, token), _block_s(sparse, token)
            ratios.append(whole / part)
            seconds.append((whole, part))
            active.append(rows)
        ratio, (whole, part) = float(np.median(ratios)), np.median(seconds, axis=0)
        met &= ratio >= needed
        shown.append(
            f"k={share}: {ratio:.2f}x ({np.quantile(ratios, 0.1):.2f}-{np.quantile(ratios, 0.9):.2f}), {whole * 1e3:.1f} to "
            f"{part * 1e3:.1f} ms, {np.mean(active) / gates.shape[1]:.2f} of the rows"
        )
    return Outcome(predicted="bytes: 1.50x, 2.50x", measured="; ".join(shown) + " (2 threads)", met=met)


def equals_reference(bench: Bench) -> Outcome:
    """Kernel output against threshold-then-dense in float64, one to four tokens, from none to all active."""
    from trimtab.runtime.kernels import gate_first

    worst = 0.0
    for rows in (1, 2, 3, 4):
        for threshold in (0.0, 0.2, 1e9):
            x, gate, up, down_t = _ffn(rows, 576, 1536, seed=rows)
            wanted, _ = _dense(x, gate, up, down_t, threshold)
            worst = max(
                worst, float(np.abs(gate_first(x, gate, up, down_t, threshold=threshold, act="silu").y - wanted).max())
            )
    return Outcome(measured=f"largest difference {worst:.1e}", met=worst <= 1e-5)


def _l40s(model: str, techniques: tuple[str, ...], batch: int) -> Any:
    from trimtab.predict.predict import predict
    from trimtab.spec.workload import Workload
    from trimtab.techniques.plan import make_plan

    workload = Workload(batch=batch, prompt=32, gen=256)
    return predict(
        make_plan(model, "l40s", workload, techniques, dtype="float32", kv_dtype="float32", stack="datasheet")
    )


def predicted_throughput(bench: Bench) -> Outcome:
    """Decode throughput ratio at 50 % on L40S in fp32, batch 1 and 16."""
    met, shown = True, []
    for model in ("mistral-7b-v0.1", "llama-2-7b"):
        ratios = {}
        for batch in (1, 16):
            dense, sparse = (_l40s(model, techniques, batch) for techniques in ((), ("cats:sparsity=0.5",)))
            ratios[batch] = dense.figures["tpot_s"].value / sparse.figures["tpot_s"].value
        met &= 1.15 <= ratios[1] <= 1.30 and ratios[16] < 1.05
        shown.append(f"{model} {ratios[1]:.3f}x at batch 1, {ratios[16]:.3f}x at 16")
    return Outcome(predicted="; ".join(shown), met=met)


def predicted_bytes(bench: Bench) -> Outcome:
    """Share of the weight bytes a decode step still reads."""
    met, shown = True, []
    for model, wanted in (("mistral-7b-v0.1", 0.74), ("llama-2-7b", 0.786)):
        dense, sparse = (_l40s(model, techniques, 1) for techniques in ((), ("cats:sparsity=0.5",)))
        ratio = sparse.counts["weight_read"] / dense.counts["weight_read"]
        met &= abs(ratio - wanted) <= 0.01
        shown.append(f"{model} {ratio:.3f}")
    return Outcome(predicted=", ".join(shown), met=met)


def refuses_bad_input(bench: Bench) -> Outcome:
    """Every documented bad input gets one sentence."""
    import json
    import tempfile
    from pathlib import Path

    from trimtab.techniques.apply import applied
    from trimtab.techniques.materials import Materials
    from trimtab.techniques.plan import make_plan

    model = bench.model
    folder = Path(tempfile.mkdtemp())
    short, foreign = folder / "short.json", folder / "foreign.json"
    layers = model.spec.num_hidden_layers
    short.write_text(json.dumps({"model": model.spec.name, "layers": 3, "thresholds": {}}))
    foreign.write_text(
        json.dumps({"model": "other", "layers": layers, "thresholds": {f"layers.{i}.mlp": 0.1 for i in range(layers)}})
    )
    cases: dict[str, Callable[[], Any]] = {
        "sparsity=1": lambda: make_plan(model, "a100", techniques=["cats:sparsity=1.0"]),
        "sparsity=-0.1": lambda: make_plan(model, "a100", techniques=["cats:sparsity=-0.1"]),
        "no gated FFN": lambda: make_plan("gpt2", "a100", techniques=["cats"]),
        "no text": lambda: applied(model, "cats", materials=Materials(cache=None)).__enter__(),
        "wrong number of layers": lambda: applied(model, f'cats:thresholds="{short}"').__enter__(),
        "another model's file": lambda: applied(model, f'cats:thresholds="{foreign}"').__enter__(),
    }
    missed = []
    for name, case in cases.items():
        try:
            case()
            missed.append(name)
        except TrimtabError:
            continue
    return Outcome(
        measured=f"{len(cases) - len(missed)} of {len(cases)} refused" + (f"; accepted: {missed}" if missed else ""),
        met=not missed,
    )


LINES = (
    Line(
        id="a1",
        text="share cut on held-out text, every layer, k = .3 .5 .7 .9",
        needed="within 0.03 of k",
        check=sparsity_holds,
    ),
    Line(id="a2.5", text="quality at k = 0.5, two texts", needed="KL <= 0.33", check=quality_holds(0.5, 0.33)),
    Line(id="a2.3", text="quality at k = 0.3, two texts", needed="reported", check=quality_holds(0.3, None)),
    Line(id="a2.7", text="quality at k = 0.7, two texts", needed="KL <= 1.2", check=quality_holds(0.7, 1.2)),
    Line(
        id="a2.b",
        text="better than ReLU, pre-activation and global thresholds at k = 0.5",
        needed="lower KL",
        check=beats_baselines,
        documented=Documented(
            figure="KL 0.253 and 0.242 (cfi_public, handbook_public) against 0.211 and 0.196 of thresholding |gate| before "
            "the activation; ReLU (4.7) and one threshold for all layers (0.29, 0.27) are worse, as claimed",
            tried=(
                "other sparsities, cfi_public, 3 windows: 0.3 gives 0.075 against 0.040, 0.7 0.941 against 0.781, 0.9 4.78 against 4.63",
                "thresholds calibrated on the evaluated text itself: 0.256 against 0.208",
                "the share really cut compared: 0.497 against 0.501, so it is not a matter of unequal sparsity",
            ),
            date=datetime.date(2026, 11, 25),
        ),
    ),
    Line(
        id="a3",
        text="skipped rows of up and down are not read",
        needed="bytes = 1 - k, poison harmless",
        check=skipping_is_real,
    ),
    Line(id="a4", text="decode FFN 4096 x 14336, 2 threads", needed=">= 1.3x at k=.5, >= 2.0x at .9", check=speed),
    Line(
        id="a5",
        text="equals threshold then dense, B = 1..4, none to all active",
        needed="<= 1e-5",
        check=equals_reference,
    ),
    Line(
        id="b1",
        text="Mistral-7B, Llama-2-7B decode on L40S, fp32, 50 %",
        needed="1.15-1.30x; < 1.05x at batch 16",
        check=predicted_throughput,
    ),
    Line(id="b2", text="weight bytes read per step, 50 %", needed="0.74 / 0.786", check=predicted_bytes),
    Line(id="c", text="bad input", needed="refused with a sentence", check=refuses_bad_input),
)
