"""The text bench against hand computation: windows, geometric mean, recovered share, paired errors, and the cache of base logits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, CapacityError, SpecError
from trimtab.measure import base_logits
from trimtab.measure.base_logits import BaseLogits
from trimtab.measure.quality import evaluate_text, windows
from trimtab.measure.textbench import TextBench, paired, recovered_share
from trimtab.model.variant import Model, Variant
from trimtab.runtime.native import lower
from trimtab.techniques.apply import applied, derive
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all

VOCABULARY = 131  # of `tiny_model`


def _ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


TEXTS = {"a": _ids(1, 100), "b": _ids(2, 67)}


@pytest.fixture
def fresh(tiny_model: Model) -> Model:
    """The tiny model with a decoder of its own, so that passes can be counted."""
    return Model(Variant(tiny_model.spec, tiny_model.weights))


def _counted(variant: Variant) -> list[int]:
    passes: list[int] = []
    variant.decoder.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    return passes


def _shaken(scale: float) -> Callable[[np.ndarray], torch.Tensor]:
    """Logits that depend on the ids and on `scale` alone."""

    def logits(ids: np.ndarray) -> torch.Tensor:
        rng = np.random.default_rng(int(ids.sum()))
        plain, noise = (rng.standard_normal((len(ids), VOCABULARY)).astype(np.float32) for _ in range(2))
        return torch.from_numpy(plain + scale * noise)

    return logits


def test_equals_evaluate_text_on_every_text(fresh: Model) -> None:
    """The cached way gives what running both models side by side gives."""
    variant = derive(fresh.variant, parse_all(["rtn:bits=3,group=32"]), Materials())
    bench = TextBench(fresh, TEXTS, window=16, logits=BaseLogits(dtype="float32"))
    found = bench.score(variant)
    for name, ids in TEXTS.items():
        wanted = evaluate_text(fresh.variant, variant, windows(ids, 16))
        for field in ("tokens", "ppl", "ppl_base", "nll_difference", "nll_difference_se", "kl_nats", "kl_se"):
            # the stored log-probabilities are made to sum to one again, which moves the last bits of float32
            assert getattr(found.texts[name], field) == pytest.approx(getattr(wanted, field), rel=1e-4), field
        assert found.texts[name].top1_agreement == pytest.approx(wanted.top1_agreement)


def test_float16_moves_kl_by_a_millionth(fresh: Model) -> None:
    plain = TextBench(fresh, TEXTS, window=16).score(fresh)
    assert 0 <= plain.kl_nats < 2e-6 and plain.top1_agreement == 1 and plain.ppl == plain.ppl_base
    variant = derive(fresh.variant, parse_all(["rtn:bits=3,group=32"]), Materials())
    rounded, exact = (
        TextBench(fresh, TEXTS, window=16, logits=BaseLogits(dtype=dtype)).score(variant)
        for dtype in ("float16", "float32")
    )
    assert rounded.kl_nats == pytest.approx(exact.kl_nats, rel=2e-3)
    assert rounded.ppl == exact.ppl and rounded.ppl_base == exact.ppl_base


def test_windows_do_not_overlap_and_the_first_token_is_not_scored(fresh: Model) -> None:
    bench = TextBench(fresh, TEXTS, window=16, windows=3)
    assert [piece.tolist() for piece in bench.windows["b"]] == [TEXTS["b"][i : i + 16].tolist() for i in (0, 32, 48)]
    seen: list[np.ndarray] = []

    def watching(ids: np.ndarray) -> torch.Tensor:
        seen.append(ids)
        return _shaken(1.0)(ids)

    found = bench.score(watching)
    assert found.tokens == bench.tokens == 2 * 3 * 15
    assert [piece.tolist() for piece in seen] == [p.tolist() for name in TEXTS for p in bench.windows[name]]


def test_base_runs_once_per_window_then_from_disk(fresh: Model) -> None:
    passes = _counted(fresh.variant)
    bench = TextBench(fresh, TEXTS, window=16, windows=2)
    bench.prepare()
    assert passes == [16] * 4 and bench.logits.computed == 4
    first = [bench.score(_shaken(scale)) for scale in (0.5, 1.0)]
    assert len(passes) == 4
    again = TextBench(fresh, TEXTS, window=16, windows=2)
    assert again.score(_shaken(1.0)).to_dict() == first[1].to_dict()
    assert len(passes) == 4 and again.logits.computed == 0
    # other windows, other weights and another spec are other keys
    TextBench(fresh, TEXTS, window=15, windows=2).prepare()
    assert len(passes) == 8
    with applied(fresh, "rtn:bits=4,group=32", materials=Materials(tokenizer=object())):
        other = TextBench(fresh, TEXTS, window=16, windows=2)
        other.prepare()
        assert other.logits.computed == 4


def test_in_memory_leaves_no_file(fresh: Model, home: Path) -> None:
    passes = _counted(fresh.variant)
    bench = TextBench(fresh, TEXTS, window=16, logits=BaseLogits(folder=None))
    for scale in (0.5, 1.0):
        bench.score(_shaken(scale))
    assert len(passes) == 6 + 4 and not home.exists()
    assert bench.logits.nbytes == 10 * 15 * (VOCABULARY * 2 + 4 + 8)


def _window(seed: int) -> Callable[[], tuple[torch.Tensor, np.ndarray]]:
    return lambda: (_shaken(1.0)(_ids(seed, 9)), _ids(seed, 9))


def test_files_unused_for_longest_make_room(tmp_path: Path) -> None:
    for age, name in enumerate("0123"):
        BaseLogits(tmp_path).get(name * 40, _window(0))
        os.utime(next(tmp_path.glob(f"{name}*")), (1000 + age, 1000 + age))
    size = BaseLogits(tmp_path).nbytes // 4
    again = BaseLogits(tmp_path)
    again.get("0" * 40, _window(0))  # used again: 1 is now the oldest
    assert again.computed == 0
    logits = BaseLogits(tmp_path, limit_bytes=4 * size)
    logits.get("2" * 40, _window(0))
    logits.get("4" * 40, _window(0))
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "2", "3", "4"]
    for name in "567":
        logits.get(name * 40, _window(0))
    # what this run uses stays; beyond the limit nothing more is kept, so that windows do not push each other out
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["2", "4", "5", "6"]
    assert logits.nbytes == 4 * size
    memory = BaseLogits(None, limit_bytes=2 * size)
    for name in "012":
        memory.get(name * 40, _window(0))
    assert memory.nbytes <= 2 * size and memory.get("0" * 40, _window(0)) is memory.get("0" * 40, _window(1))
    logits.clear()
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_computed_again_and_no_half_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = BaseLogits(tmp_path)
    first = logits.get("a" * 40, _window(0))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    again = logits.get("a" * 40, _window(0))
    assert logits.computed == 2 and np.array_equal(first.log_probs, again.log_probs)

    def stopped(parts: dict[str, np.ndarray], name: str) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_logits, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        logits.get("b" * 40, _window(0))
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(base_logits.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(CapacityError, match="in memory"):
        logits.get("c" * 40, _window(0))


def test_figures_of_several_texts_by_hand() -> None:
    bench = TextBench(_shaken(0.0), TEXTS, window=16, key="plain")
    found = bench.score(_shaken(1.0), "noise")
    nll, base, kl, agree, name_of = [], [], [], [], []
    for name, ids in TEXTS.items():
        for piece in windows(ids, 16):
            p, q = (_shaken(s)(piece)[:-1].double().log_softmax(-1).numpy() for s in (0.0, 1.0))
            rows = np.arange(15)
            base += (-p[rows, piece[1:]]).tolist()
            nll += (-q[rows, piece[1:]]).tolist()
            kl += (np.exp(p) * (p - q)).sum(-1).tolist()
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()
            name_of += [name] * 15
    arrays = {key: np.array(value) for key, value in {"nll": nll, "base": base, "kl": kl, "agree": agree}.items()}
    parts = {name: np.array(name_of) == name for name in TEXTS}
    ppls = [math.exp(arrays["nll"][rows].mean()) for rows in parts.values()]
    assert found.tokens == len(nll) and found.label == "noise"
    assert found.ppl == pytest.approx(math.sqrt(ppls[0] * ppls[1]), rel=1e-5)
    assert found.kl_nats == pytest.approx(arrays["kl"].mean(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(arrays["agree"].mean())
    differences = {name: (arrays["nll"] - arrays["base"])[rows] for name, rows in parts.items()}
    assert found.nll_difference == pytest.approx(math.log(found.ppl / found.ppl_base), abs=1e-6)
    errors = [d.std(ddof=1) / math.sqrt(len(d)) for d in differences.values()]
    assert found.nll_difference_se == pytest.approx(math.hypot(*errors) / 2, rel=1e-4)
    strata = [arrays["kl"][rows].var(ddof=1) * rows.sum() for rows in parts.values()]
    assert found.kl_se == pytest.approx(math.sqrt(sum(strata)) / len(nll), rel=1e-3)
    as_json = found.to_dict()
    assert as_json["ppl"] == found.ppl and as_json["texts"]["b"]["ppl"] == pytest.approx(ppls[1], rel=1e-5)


def test_recovered_share_and_paired_difference_by_hand() -> None:
    bench = TextBench(_shaken(0.0), TEXTS, window=16, key="plain")
    naive, method = bench.score(_shaken(2.0), "naive"), bench.score(_shaken(0.7), "method")
    share = recovered_share(method, naive)
    for name in TEXTS:
        q, n = method.texts[name], naive.texts[name]
        wanted = 1 - math.log(q.ppl / q.ppl_base) / math.log(n.ppl / n.ppl_base)
        assert share.texts[name] == pytest.approx(wanted)
    wanted = 1 - math.log(method.ppl / method.ppl_base) / math.log(naive.ppl / naive.ppl_base)
    assert share.geometric_mean == pytest.approx(wanted) and 0.2 < wanted < 1
    assert recovered_share(naive, naive).geometric_mean == 0
    difference = paired(method, naive)
    values = np.concatenate([np.array(method.scores[n].nll) - np.array(naive.scores[n].nll) for n in TEXTS])
    assert difference.nll_nats == pytest.approx(values.mean()) and difference.nll_nats < 0
    assert difference.nll_se == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))
    assert difference.kl_nats == pytest.approx(method.kl_nats - naive.kl_nats)


def test_native_runner_and_function_score_as_the_decoder(fresh: Model) -> None:
    program = lower(fresh.spec, fresh.weights, 1)
    bench = TextBench(fresh, TEXTS, window=16)
    native, function = bench.score(program), bench.score(lambda ids: fresh.logits(ids)[0])
    # a program of float32 weights differs from the decoder by the order of its sums
    assert native.kl_nats < 1e-5 and native.ppl == pytest.approx(native.ppl_base, rel=1e-4)
    assert function.ppl == function.ppl_base and function.top1_agreement == 1


def test_bad_input(fresh: Model) -> None:
    shaken = _shaken(0.0)
    with pytest.raises(CalibrationError, match="No text"):
        TextBench(fresh, {})
    with pytest.raises(CalibrationError, match=r"b: The text has 67 tokens"):
        TextBench(fresh, TEXTS, window=80)
    with pytest.raises(SpecError, match="context"):
        TextBench(fresh, TEXTS, window=1024)
    with pytest.raises(SpecError, match="nothing to score"):
        TextBench(fresh, TEXTS, window=1)
    with pytest.raises(SpecError, match="windows=0"):
        TextBench(fresh, TEXTS, window=16, windows=0)
    with pytest.raises(SpecError, match="key="):
        TextBench(shaken, TEXTS, window=16)
    with pytest.raises(SpecError, match="tokenizer"):
        TextBench(fresh, {"a": "text"}, window=16)
    with pytest.raises(SpecError, match="float16, float32"):
        BaseLogits(dtype="int8")
    bench = TextBench(shaken, TEXTS, window=16, key="plain", logits=BaseLogits(folder=None))
    with pytest.raises(SpecError, match="cannot be scored"):
        bench.score("rtn")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"\[7, 131\]"):
        bench.score(lambda ids: shaken(ids)[:7])
    with pytest.raises(SpecError, match="vocabulary"):
        bench.score(lambda ids: shaken(ids)[:, :100])
    other = TextBench(shaken, {"a": TEXTS["a"]}, window=16, key="plain", logits=BaseLogits(folder=None))
    with pytest.raises(SpecError, match="same tokens"):
        paired(bench.score(shaken, "x"), other.score(shaken, "y"))
    exact: Any = bench.score(shaken)
    with pytest.raises(SpecError, match="no gap"):
        recovered_share(exact, exact)
