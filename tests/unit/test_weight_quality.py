"""What calibrated quantizers keep of the built-in model on texts they were not calibrated on. Slow."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.measure.quality import Quality, evaluate_text, windows
from trimtab.techniques.apply import derive, load, resolve_all
from trimtab.techniques.materials import Materials
from trimtab.techniques.registry import parse_all

pytestmark = pytest.mark.slow

TEXTS = ("cfi_public", "handbook_public")


class Bench:
    """The model, calibration on two domains, and held-out windows of both."""

    def __init__(self, data: Path) -> None:
        self.model = load("smollm2-135m")

        def read(name: str) -> str:
            return (data / "weights" / f"{name}.txt").read_text("utf-8")

        self.materials = Materials(
            texts={name: read(name) for name in ("cfi_calib", "handbook_calib")}, tokenizer=self.model.tokenizer
        )
        self.pieces = {name: windows(self.model.tokenizer.encode(read(name)), 512, 3) for name in TEXTS}
        self.found: dict[str, dict[str, Quality]] = {}

    def of(self, technique: Any) -> dict[str, Quality]:
        """Quality by text of the model with a technique, once for each."""
        if str(technique) not in self.found:
            chosen = resolve_all(self.model, parse_all([technique]), self.materials)
            variant = derive(self.model.variant, chosen, self.materials)
            self.found[str(technique)] = {
                name: evaluate_text(self.model.variant, variant, pieces) for name, pieces in self.pieces.items()
            }
        return self.found[str(technique)]

    def kl(self, technique: Any) -> float:
        return float(np.mean([one.kl_nats for one in self.of(technique).values()]))

    def log_ppl(self, technique: Any) -> tuple[float, float]:
        """Mean log perplexity of both texts, with the technique and without."""
        found = self.of(technique).values()
        after, before = (
            np.mean([math.log(value) for value in values])
            for values in ([q.ppl for q in found], [q.ppl_base for q in found])
        )
        return float(after), float(before)

    def recovered(self, technique: str, naive: str) -> float:
        """Share of the log perplexity lost by `naive` that `technique` keeps."""
        return 1 - (self.log_ppl(technique)[0] - self.log_ppl(naive)[1]) / (
            self.log_ppl(naive)[0] - self.log_ppl(naive)[1]
        )


@pytest.fixture(scope="module")
def bench(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    found = Bench(shared_data)
    found.materials = dataclasses.replace(found.materials, cache=tmp_path_factory.mktemp("artefacts"))
    return found


@pytest.mark.parametrize(("bits", "least"), [(3, 0.4), (4, 0.45)])
def test_gptq_beats_rounding_on_both_texts(bench: Bench, bits: int, least: float) -> None:
    swept, rounded = f"gptq:bits={bits},group=64,sym=false", f"rtn:bits={bits},group=64,sym=false"
    for name in TEXTS:
        assert bench.of(swept)[name].kl_nats < bench.of(rounded)[name].kl_nats
    assert bench.recovered(swept, rounded) >= least


def test_two_bits_stay_a_language_model(bench: Bench) -> None:
    after, before = bench.log_ppl("gptq:bits=2,group=32,sym=false")
    assert math.exp(after - before) < 100


def test_awq_beats_rounding(bench: Bench) -> None:
    assert bench.kl("awq:bits=3,group=64") < bench.kl("rtn:bits=3,group=64,sym=false")


def test_allotted_bits_beat_even_and_random_ones(bench: Bench) -> None:
    from trimtab.techniques.allocation import groups
    from trimtab.techniques.linear.gptq import Gptq

    auto = Gptq(bits="auto", budget="3.5", sym=False)
    nodes = dict(bench.model.spec.linears())
    parts = groups(bench.model.spec)
    sizes = [sum(nodes[path].n * nodes[path].k for path in part) for part in parts]
    rng = np.random.default_rng(0)
    mixed, left = [3] * len(parts), sum(sizes) / 2
    for index in rng.permutation(len(parts)).tolist():  # 4 bits on a random half of the weights
        if sizes[index] <= left:
            mixed[index], left = 4, left - sizes[index]
    assert bench.kl(auto) < bench.kl(Gptq(bits=tuple(mixed), sym=False)) < bench.kl(Gptq(bits=3, sym=False))
