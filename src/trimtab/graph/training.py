"""The backward pass of a graph: what every op multiplies, moves and keeps to get gradients.

A matrix product has two gradients of its own size: of its input (dgrad) and of its weight (wgrad). Attention has no weights
and four products for its two. Ops without products move their saved inputs and the gradients of what they read and wrote.

Source: Korthikanti et al., Reducing Activation Recomputation, arXiv 2205.05198 (what is kept); Dao, FlashAttention-2, arXiv
2307.08691 (scores computed anew).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.errors import UnsupportedModelError
from trimtab.graph.count import count
from trimtab.graph.ops import Counts, Graph, Op, StepShape, Value
from trimtab.spec.nodes import AttentionSpec

#: Products with a weight.
PRODUCTS = frozenset({"linear", "router", "expert", "gated_linear", "expand", "absorb_q", "absorb_v"})

#: Ops whose gradient needs their input; the others' (add, rope, embed, append) does not.
_SAVES = PRODUCTS | {"norm", "act", "softcap", "combine", "attend", "attend_expanded", "attend_latent"}


@dataclass(frozen=True, slots=True)
class TrainingOp:
    """One op of the forward pass and its gradients.

    Args:
        op: what runs forward.
        forward: its counts.
        dgrad: FLOPs of the gradient of what it reads; 0 where nothing before it learns.
        wgrad: FLOPs of the gradient of its weight; 0 where that is frozen.
        again: FLOPs of scores that a tiled attention computes anew in its backward pass; they are no model FLOPs.
        moved: bytes of activations and their gradients that the backward pass reads and writes.
        saved: what it keeps for the backward pass; a value that several ops keep is one.
    """

    op: Op
    forward: Counts
    dgrad: int
    wgrad: int
    again: int
    moved: int
    saved: tuple[Value, ...]

    @property
    def flops(self) -> int:
        """Model FLOPs, forward and backward."""
        return int(self.forward.flops) + self.dgrad + self.wgrad


def all_weights(path: str) -> bool:
    """Every weight learns."""
    return True


def no_weights(path: str) -> bool:
    """None does."""
    return False


def training_ops(
    graph: Graph,
    step: StepShape,
    attention: str = "eager",
    trainable: Callable[[str], bool] = all_weights,
    adapted: Callable[[str], bool] = no_weights,
) -> tuple[TrainingOp, ...]:
    """Return every op of a pass with its gradients.

    Gradients are asked for as autograd does: of an input only where something before it learns.

    Args:
        graph: a pass without a cache (`build(spec, "prefill", cache=False)`).
        step: one pass; logits of all tokens that have a loss.
        attention: ``eager`` multiplies the whole square (model FLOPs are stated so by Megatron), ``tiled`` what the mask leaves.
        trainable: whether the weight of the op of that name learns.
        adapted: whether something small beside the op learns (its bias, a LoRA adapter), so that its output has a gradient.

    Raises:
        UnsupportedModelError: an op whose gradient is not described (state-space scans).
    """
    learns: set[Value] = set()
    cached = False
    found = []
    for op in graph.ops:
        forward = count(op, step, attention)
        inner = any(value in learns for value in op.reads)
        if op.kind == "append":
            cached = inner
        elif op.kind in ("expand", "attend_latent"):  # it reads the cache, where no value says who wrote it
            inner = inner or cached
        weighted = op.kind in PRODUCTS or op.kind in ("embed", "norm")
        outer = inner or (weighted and trainable(op.name)) or adapted(op.name)
        if outer:
            learns.update(op.writes)
        flops = int(forward.flops)
        if op.kind in PRODUCTS:
            dgrad, wgrad, again = flops * inner, flops * trainable(op.name), 0
        elif op.kind.startswith("attend"):
            dgrad, wgrad, again = 2 * flops * inner, 0, _scores_again(op, flops) * inner * (attention == "tiled")
        elif flops:
            raise UnsupportedModelError(f"{op.name}: training through '{op.kind}' is not priced.")
        else:
            dgrad = wgrad = again = 0
        saved = op.reads if outer and op.kind in _SAVES else ()
        moved = _bytes((*op.reads, *op.writes, *(saved if op.kind not in PRODUCTS else ())), step) if outer else 0
        found.append(TrainingOp(op, forward, dgrad, wgrad, again, moved, saved))
    return tuple(found)


def training_flops(ops: tuple[TrainingOp, ...]) -> tuple[int, int]:
    """(forward, backward) model FLOPs of a pass."""
    return sum(int(each.forward.flops) for each in ops), sum(each.dgrad + each.wgrad for each in ops)


def _scores_again(op: Op, flops: int) -> int:
    """The first of attention's two products: queries times keys."""
    node: Any = op.node
    if isinstance(node, AttentionSpec):
        keys = values = 0
        for head in node.cache.heads:
            keys, values = keys + head.head_dim, values + head.v_head_dim
    else:
        keys, values = node.qk_nope_head_dim + node.qk_rope_head_dim, node.v_head_dim
    return flops * keys // (keys + values)


def _bytes(values: tuple[Value, ...], step: StepShape) -> int:
    return sum(value.row_bytes * int(step.rows(value.rows)) for value in values)
