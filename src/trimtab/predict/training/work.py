"""One device's share of the work of one sequence, layer kind by layer kind: what memory and time of training are sums of.

Everything is linear in the micro-batch, so one sequence is counted once per tensor-parallel degree, and a layout costs a few
dozen multiplications.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import scratch_bytes
from trimtab.graph.ops import StepShape, Value
from trimtab.graph.shard import shard
from trimtab.graph.training import PRODUCTS, TrainingOp, all_weights, no_weights, training_ops
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import LayerSpec
from trimtab.spec.parallel import Parallel
from trimtab.spec.training import ITEM, MASK, TrainingSpec
from trimtab.spec.tree import Node, walk

# Bytes per score of an eager attention. Forward: scores written, read and written by softmax, read by the second product.
# Backward: gradient of the weights written, weights read, softmax (two reads, one write), gradient of the scores read twice.
_SCORES_FORWARD, _SCORES_BACKWARD = 4 * ITEM, 7 * ITEM
#: A dropout of its own: read, write, mask; the same backward.
_DROPOUT = 2 * ITEM + MASK
#: Bytes per logit of a cross entropy in fp32: cast (2 + 4), log-softmax (4 + 4), gradient (4 + 4), cast back (4 + 2).
_LOSS = 28


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product of one sequence: FLOPs, weight bytes (once per micro-batch) and activation bytes."""

    flops: int
    weight_bytes: int
    act_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A layer, the embedding or the head on one device, for one sequence.

    Args:
        parameters: on this device.
        forward, dgrad, wgrad: products with weights.
        core_flops, core_backward_flops, core_again_flops: attention as executed; scores that flash computes anew.
        core_bytes, core_backward_bytes: traffic of attention.
        split_bytes, split_backward_bytes: traffic of everything else (activation functions, rope, loss) that tensor
            parallelism divides.
        whole_bytes, whole_backward_bytes: the same (norms, adds, dropout) that only sequence parallelism does.
        launches: kernels of a forward pass.
        model_flops: forward and backward, attention over the full square, this device.
        forward_model_flops, core_model_flops: the forward part of them, and attention's part of that.
        split_kept, whole_kept: bytes kept for the backward pass that tensor parallelism divides, and that only sequence
            parallelism does; without scores.
        score_kept: bytes of scores kept by an eager attention.
        input_bytes: what full recomputation keeps.
        reduced_bytes, backward_reduced_bytes: values summed over tensor-parallel ranks, forward and backward.
    """

    parameters: int
    forward: tuple[Product, ...] = ()
    dgrad: tuple[Product, ...] = ()
    wgrad: tuple[Product, ...] = ()
    core_flops: int = 0
    core_backward_flops: int = 0
    core_again_flops: int = 0
    core_bytes: int = 0
    core_backward_bytes: int = 0
    split_bytes: int = 0
    split_backward_bytes: int = 0
    whole_bytes: int = 0
    whole_backward_bytes: int = 0
    launches: int = 0
    model_flops: int = 0
    forward_model_flops: int = 0
    core_model_flops: int = 0
    split_kept: int = 0
    whole_kept: int = 0
    score_kept: int = 0
    input_bytes: int = 0
    reduced_bytes: int = 0
    backward_reduced_bytes: int = 0


#: Kinds of layer and how many of each.
Kinds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """One device's parts: kinds of layer, and what the first and the last stage hold besides."""

    kinds: tuple[Part, ...]
    embedding: Part
    head: Part


class TrainingWork:
    """The work of a model as a function of the layout; each share is counted once.

    Args:
        spec: the model; its dtypes do not matter, training runs in 16 bits.
        training: its sequence length, attention, dropout and what learns are fixed here; the layout is not.
    """

    def __init__(self, spec: ModelSpec, training: TrainingSpec) -> None:
        self.spec = spec.with_dtype("float16" if training.dtype == "fp16" else "bfloat16", keep_packed=False)
        self.seq_len, self.flash = training.seq_len, training.flash
        self.dropout, self.trainable = training.with_dropout(spec), training.trainable
        kinds = {layer: index for index, layer in enumerate(dict.fromkeys(self.spec.layers))}
        self._kinds, self._layers = tuple(kinds), tuple(kinds[layer] for layer in self.spec.layers)
        self._shares: dict[int, Share] = {}
        self._stages: dict[tuple[int, int, tuple[int, ...]], tuple[Kinds, ...]] = {}

    def check(self, training: TrainingSpec) -> None:
        """Refuse a layout of other work.

        Raises:
            SpecError: sequence length, attention, dropout or what learns differ from those counted.
        """
        mine = (self.seq_len, self.flash, self.dropout, self.trainable)
        asked = (training.seq_len, training.flash, training.with_dropout(self.spec), training.trainable)
        if mine != asked:
            raise SpecError(
                f"This work was counted for (seq_len, flash, dropout, trainable) = {mine}, not {asked}. Make a TrainingWork "
                "for the layout asked."
            )

    def share(self, tp: int) -> Share:
        """Work of one of `tp` tensor-parallel ranks."""
        if tp not in self._shares:
            self._shares[tp] = self._count(tp)
        return self._shares[tp]

    def stages(self, training: TrainingSpec) -> tuple[Kinds, ...]:
        """Kinds of layer in every pipeline stage, and how many of each."""
        key = training.pp, training.chunks, training.split
        if key not in self._stages:
            self._stages[key] = tuple(
                tuple(sorted(Counter(self._layers[index] for index in layers).items()))
                for layers in training.layers_of(self.spec)
            )
        return self._stages[key]

    def tied_parameters(self, tp: int) -> int:
        """Parameters of one rank's part of the matrix that embedding and head share; 0 if they share none."""
        return -(-self.spec.vocab_size // tp) * self.spec.hidden_size if self.spec.tie_word_embeddings else 0

    def _count(self, tp: int) -> Share:
        small = shard(replace(self.spec, layers=self._kinds), Parallel(tp=tp))
        graph = build(small, "prefill", cache=False)
        step = StepShape.of([self.seq_len], [0], logits=self.seq_len)
        trainable = all_weights if self.trainable else no_weights
        adapted = no_weights if self.trainable else all_weights
        square = training_ops(graph, step, "eager", trainable, adapted)
        ops = training_ops(graph, step, "tiled", trainable, adapted) if self.flash else square
        rows: dict[str, list[tuple[TrainingOp, TrainingOp]]] = {}
        for run, model in zip(ops, square, strict=True):
            head, _, rest = run.op.name.partition(".")
            rows.setdefault(f"layers.{rest.partition('.')[0]}" if head == "layers" else head, []).append((run, model))
        whole = {value.name for each in ops for value in each.op.writes if _is_whole(each)}
        kinds = tuple(
            self._part(layer, rows[f"layers.{index}"], step, whole) for index, layer in enumerate(small.layers)
        )
        embedding = [pair for name in ("embed_tokens", "embed_positions", "embed_norm") for pair in rows.get(name, ())]
        head = [pair for name in ("norm", "lm_head", "logit_softcap") for pair in rows.get(name, ())]
        first = self._part((small.embed_tokens, small.embed_positions, small.embed_norm), embedding, step, whole)
        last = self._part((small.norm, small.lm_head), head, step, whole)
        tokens, hidden = self.seq_len, ITEM * self.spec.hidden_size
        loss = tokens * small.lm_head.n * _LOSS
        if self.dropout:  # on the embeddings
            first = replace(
                first,
                whole_kept=first.whole_kept + tokens * hidden * MASK // ITEM,
                whole_bytes=first.whole_bytes + tokens * hidden * _DROPOUT // ITEM,
                whole_backward_bytes=first.whole_backward_bytes + tokens * hidden * _DROPOUT // ITEM,
            )
        reduced = tokens * hidden if tp > 1 else 0  # the head is cut by columns: its input's gradient is summed
        last = replace(
            last,
            split_bytes=last.split_bytes + loss,
            split_kept=last.split_kept + 4 * tokens * small.lm_head.n,  # logits in fp32
            backward_reduced_bytes=reduced,
        )
        return Share(kinds, first, last)

    def _part(
        self,
        nodes: LayerSpec | tuple[Node | None, ...],
        pairs: list[tuple[TrainingOp, TrainingOp]],
        step: StepShape,
        whole: set[str],
    ) -> Part:
        found: dict[str, int] = dict.fromkeys(_SUMS, 0)
        forward, dgrad, wgrad = [], [], []
        kept: dict[str, Value] = {}
        scores = 0
        for run, model in pairs:
            op, moved = run.op, int(run.forward.act_read + run.forward.act_written)
            found["model_flops"] += model.flops
            found["forward_model_flops"] += int(model.forward.flops)
            found["launches"] += op.kind not in ("all_gather", "all_reduce")
            kept |= {value.name: value for value in run.saved}
            if op.kind in ("all_reduce", "all_to_all"):
                found["reduced_bytes"] += int(run.forward.comm)
            elif op.kind in PRODUCTS:
                weights = int(run.forward.weight_read)
                forward.append(Product(int(run.forward.flops), weights, moved))
                dgrad.append(Product(run.dgrad, weights, moved))
                wgrad.append(Product(run.wgrad, weights, moved))
            elif op.kind.startswith("attend"):
                elements = int(scratch_bytes(op, step, "eager")) // (2 * ITEM)
                scores += elements
                extra = 0 if self.flash else elements
                plain = sum(value.row_bytes * int(step.rows(value.rows)) for value in (*op.reads, *op.writes))
                drop = _DROPOUT if self.dropout else 0
                found["core_flops"] += int(run.forward.flops)
                found["core_backward_flops"] += run.dgrad
                found["core_again_flops"] += run.again
                found["core_bytes"] += plain + (_SCORES_FORWARD + drop) * extra
                found["core_backward_bytes"] += run.moved + (_SCORES_BACKWARD + drop) * extra
                found["core_model_flops"] += int(model.forward.flops)
            elif op.kind not in ("append", "all_gather"):
                held = "whole" if all(value.name in whole for value in op.writes) else "split"
                found[f"{held}_bytes"] += moved
                found[f"{held}_backward_bytes"] += run.moved
        tokens = self.seq_len
        for value in kept.values():
            found["whole_kept" if value.name in whole else "split_kept"] += value.row_bytes * int(step.rows(value.rows))
        if isinstance(nodes, LayerSpec):
            hidden = tokens * self.spec.hidden_size
            found["input_bytes"] = ITEM * hidden
            found["backward_reduced_bytes"] = found["reduced_bytes"]
            if not self.flash:
                found["score_kept"] = scores * (2 * ITEM + MASK if self.dropout else ITEM)
            if self.dropout:  # behind attention and behind the FFN, each fused with the add that follows
                found["whole_kept"] += 2 * hidden * MASK
                found["whole_bytes"] += 2 * hidden * MASK
                found["whole_backward_bytes"] += 2 * hidden * _DROPOUT
        nodes = (nodes,) if isinstance(nodes, LayerSpec) else nodes
        return Part(
            parameters=sum(_parameters(node) for node in nodes if node is not None),
            forward=tuple(forward),
            dgrad=tuple(dgrad),
            wgrad=tuple(wgrad),
            **found,
        )


#: Fields of a Part that are sums over its ops.
_SUMS = tuple(name for name in Part.__slots__ if name not in ("parameters", "forward", "dgrad", "wgrad"))


def _is_whole(each: TrainingOp) -> bool:
    """Whether all tensor-parallel ranks hold the value an op writes: the residual stream and what is made of it."""
    op = each.op
    if op.kind in ("embed", "add", "combine", "all_reduce", "router"):
        return True
    last = op.name.rpartition(".")[2]
    if op.kind == "norm":
        return last not in ("q_norm", "k_norm")
    return last in ("o_proj", "down_proj", "q_a_proj", "kv_a_proj_with_mqa", "shared_gate")


def _parameters(node: Node) -> int:
    """Parameters of a node and all below it; experts as often as this device holds them."""
    total = 0
    for path, each in _tree(node):
        size = getattr(each, "num_parameters", None)
        total += 0 if size is None else size() * _times(node, path)
    return total


def _tree(node: Node) -> Iterable[tuple[str, Node]]:
    yield "", node
    yield from walk(node)


def _times(root: Node, path: str) -> int:
    moe = getattr(root, "mlp", None)
    return moe.num_experts // moe.ranks if path.startswith("mlp.experts") and moe is not None else 1
