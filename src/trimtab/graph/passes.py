"""The forward passes of a request: which graph runs, on how many tokens, how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.graph.build import build, filter_graph
from trimtab.graph.ops import Graph, StepShape
from trimtab.spec.nodes import LatentAttentionSpec, ModelSpec
from trimtab.spec.plan import Plan
from trimtab.spec.workload import Workload

PassPhase = Literal["filter", "prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Pass:
    """Passes that run the same graph.

    Args:
        phase: ``filter`` (layers of a token filter over the whole prompt), ``prefill`` or ``decode``.
        graph: its ops.
        step: [passes, 1] rows; `copies` is the batch.
    """

    phase: PassPhase
    graph: Graph
    step: StepShape

    @property
    def repeat(self) -> int:
        """How many passes."""
        return len(self.step.new)


def prompt_held(spec: ModelSpec, prompt: int) -> int:
    """Prompt tokens the decode steps build on: all, or those a token filter keeps."""
    chosen = spec.flow.filter
    return prompt if chosen is None else min(prompt, chosen.topk)


def passes(plan: Plan) -> tuple[Pass, ...]:
    """Return the passes of a plan in order.

    A token filter that drops something runs first: one pass per prompt, over all of it and without a cache. The prompt (what
    is left of it) is prefilled in chunks of `stack.prefill_chunk`, all sequences side by side, of which the last wants one
    row of logits per sequence. Then come gen - 1 decode steps.
    """
    spec, work, chunk = plan.model, plan.workload, plan.stack.prefill_chunk
    held = prompt_held(spec, work.prompt)
    found = []
    if held < work.prompt:
        found.append(Pass("filter", filter_graph(spec), StepShape.of([[work.prompt]] * work.batch, [[0]])))
    first, last = chunks(held, chunk)
    graph = build(spec, "prefill")
    if first and chunk:
        step = StepShape.of([[chunk]] * first, [[index * chunk] for index in range(first)], copies=work.batch)
        found.append(Pass("prefill", build(spec, "prefill", head=False), step))
    found.append(Pass("prefill", graph, StepShape.of([[last]], [[held - last]], logits=work.batch, copies=work.batch)))
    if work.gen > 1:
        past = [[held + index] for index in range(work.gen - 1)]
        found.append(
            Pass("decode", decode_graph(spec, graph), StepShape.of([[1]], past, logits=work.batch, copies=work.batch))
        )
    return tuple(found)


def chunks(prompt: int, chunk: int | None) -> tuple[int, int]:
    """Return (full chunks before the last one, tokens of the last one).

    >>> chunks(1100, 512), chunks(512, 512), chunks(100, None)
    ((2, 76), (0, 512), (0, 100))
    """
    if chunk is None or prompt <= chunk:
        return 0, prompt
    first = (prompt - 1) // chunk
    return first, prompt - first * chunk


def decode_graph(spec: ModelSpec, prefill: Graph) -> Graph:
    """The graph of a decode step; it is the prefill's unless latent attention changes its form."""
    latent = any(isinstance(layer.self_attn, LatentAttentionSpec) for layer in spec.layers)
    return build(spec, "decode") if latent else prefill


def mean_decode_step(spec: ModelSpec, workload: Workload) -> StepShape:
    """The decode step at mean context: one new token per sequence after the prompt held and half of what is generated."""
    past = prompt_held(spec, workload.prompt) + workload.mean_past - workload.prompt
    return StepShape.of([1], [past], logits=workload.batch, copies=workload.batch)
