"""Where in the life of a cache a method acts, and how its cost grows: found by pricing it, not by its name.

Stages and classes as in SCBench (arXiv 2412.10319, table 1): n prompt tokens, m generated tokens, k a constant. A prompt
is priced in one pass, as there; an engine that prefills in chunks over a cache of k tokens pays O(kn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError
from trimtab.graph.count import count as cost
from trimtab.graph.ops import Graph, Op, StepShape
from trimtab.graph.passes import Graphs, prompt_held
from trimtab.spec.configs import load_spec
from trimtab.spec.model import ModelSpec
from trimtab.techniques.base import Technique, compose
from trimtab.techniques.registry import parse_all, technique_class, technique_names

#: A model with a long context that methods are priced on, and the prompts: doubling far above any constant of a method.
PROBE, LENGTHS = "llama-3.1-8b", (32_768, 65_536)
_STAGES = ("", "generation", "compression", "retrieval", "loading")
#: Seams whose techniques may act on the cache; others leave its life alone.
SEAMS = ("cache", "attention", "tokens")

#: Spec name -> stage, cache size, prefill and decode in the paper's table (its StreamingLLM drops after a whole prefill).
PAPER: dict[str, tuple[str, str, str, str]] = {
    "a-shape": ("generation", "O(n)", "O(kn)", "O(nm)"),
    "tri-shape": ("generation", "O(n)", "O(kn)", "O(nm)"),
    "minference": ("generation", "O(n)", "O(kn)", "O(nm)"),
    "streaming-llm": ("compression", "O(k)", "O(n^2)", "O(km)"),
    "snapkv": ("compression", "O(k)", "O(n^2)", "O(km)"),
    "pyramidkv": ("compression", "O(k)", "O(n^2)", "O(km)"),
    "kivi": ("compression", "O(n)", "O(n^2)", "O(nm)"),
    "quest": ("loading", "O(n)", "O(n^2)", "O(km)"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LifeCycle:
    """One row of the table.

    Args:
        spec: the method, as a spec string.
        stage: ``generation``, ``compression``, ``retrieval`` or ``loading``; empty if the cache's life is unchanged.
        kind: how it acts there.
        kv_size: of the cache after a prompt.
        prefill: of attention over a prompt.
        decode: of attention over m generated tokens.
        kv_ratio: bytes of the cache over those of the full one, at the longest prompt priced.
    """

    spec: str
    stage: str
    kind: str
    kv_size: str
    prefill: str
    decode: str
    kv_ratio: float

    @property
    def classes(self) -> tuple[str, str, str, str]:
        """Stage, cache size, prefill and decode, as a row of `PAPER`."""
        return self.stage, self.kv_size, self.prefill, self.decode


def life_cycle(method: str | Sequence[Technique], probe: str | ModelSpec = PROBE) -> LifeCycle:
    """Price a method at two prompt lengths and name its place in the table.

    Args:
        method: a spec string (``full`` = none) or techniques.
        probe: the model it is priced on.

    Raises:
        SpecError, Conflict: the method does not fit the model.
    """
    techniques = tuple(method) if not isinstance(method, str) else () if method == "full" else parse_all([method])
    base = load_spec(probe) if isinstance(probe, str) else probe
    base = base.with_dtype("bfloat16")
    spec = compose(base, techniques)
    name = " + ".join(str(technique) for technique in techniques) or "full"
    ours, full = _Growth(spec), _Growth(base)
    kv, prefill, read = ours.kv_bytes, ours.prefill_pairs, ours.decode_pairs
    stage, kind = _stage(ours, full)
    return LifeCycle(
        spec=name,
        stage=stage,
        kind=kind,
        kv_size={0: "O(k)", 1: "O(n)"}[_order(kv)],
        prefill={0: "O(k)", 1: "O(kn)", 2: "O(n^2)"}[_order(prefill)],
        decode={0: "O(km)", 1: "O(nm)"}[_order(read)],
        kv_ratio=kv(LENGTHS[-1]) / full.kv_bytes(LENGTHS[-1]),
    )


def table(methods: Sequence[str] = (), probe: str | ModelSpec = PROBE) -> list[LifeCycle]:
    """The life-cycle table: of the methods given, or of every technique that acts on the cache, at its defaults.

    Techniques that the probe's predictor refuses are left out.
    """
    if methods:
        return [life_cycle(method, probe) for method in methods]
    rows = [life_cycle("full", probe)]
    for name in technique_names():
        if technique_class(name).__module__.split(".")[-2] not in SEAMS:
            continue
        try:
            row = life_cycle(name, probe)
        except SpecError:
            continue
        if row.stage:
            rows.append(row)
    return sorted(rows, key=lambda row: (_STAGES.index(row.stage), row.spec))


def absent() -> tuple[str, ...]:
    """Methods of the paper's table that are not built here, so that nothing can be priced."""
    return tuple(name for name in PAPER if name not in technique_names())


class _Growth:
    """What one model asks of attention and cache, by prompt length."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self._graphs = spec, Graphs(spec)

    def kv_bytes(self, prompt: int) -> int:
        """Bytes of the cache of one sequence after a prompt."""
        return self.spec.kv_nbytes(prompt_held(self.spec, prompt))

    def prefill_pairs(self, prompt: int) -> int:
        """FLOPs of attention over a prompt, in one pass that skips what its mask hides."""
        held = prompt_held(self.spec, prompt)
        work = self._attention(self._graphs.prefill, StepShape.of([held], [0], logits=1), "flops")
        if held < prompt:
            work += self._attention(self._graphs.filter, StepShape.of([prompt], [0]), "flops")
        return work

    def decode_pairs(self, prompt: int) -> int:
        """FLOPs of attention of one step after a prompt, in the layer that stands in the middle by them: a few layers that are
        left whole do not count, nor what choosing what to read takes.
        """
        step = StepShape.of([1], [prompt_held(self.spec, prompt)], logits=1)
        layers: dict[str, int] = {}
        for op in _attention_ops(self._graphs.decode):
            layer = op.name.partition(".self_attn.")[0]
            layers[layer] = layers.get(layer, 0) + int(np.sum(cost(op, step, "tiled").flops))
        return int(np.median(list(layers.values()))) if layers else 0

    @staticmethod
    def _attention(graph: Graph, step: StepShape, count: str) -> int:
        return sum(int(np.sum(getattr(cost(op, step, "tiled"), count))) for op in _attention_ops(graph))


def _attention_ops(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if ".self_attn." in op.name and not op.name.endswith("_proj")]


def _order(growth: Callable[[int], int]) -> int:
    """The power of n that a quantity grows with between the lengths."""
    short, long = (growth(length) for length in LENGTHS)
    return round(math.log(long / short, LENGTHS[1] / LENGTHS[0])) if short else 0


def _stage(ours: _Growth, full: _Growth) -> tuple[str, str]:
    """Whatever makes the prompt cheaper is generation, a smaller cache compression, a partial read of a whole one loading."""
    longest = LENGTHS[-1]
    if ours.spec.flow.filter is not None:
        return "generation", "prompt compression"
    kv, kv_full = ours.kv_bytes(longest), full.kv_bytes(longest)
    if _order(ours.prefill_pairs) < _order(full.prefill_pairs):
        return "generation", "sparse attention"
    if _order(ours.kv_bytes) < _order(full.kv_bytes):
        return "compression", "dropping"
    if _order(ours.decode_pairs) < _order(full.decode_pairs):
        return "loading", "selective read"
    if kv < kv_full:
        return "compression", "fewer bytes a token or head"
    return "", ""
