"""Bytes per device of a training step: weights, gradients, optimizer states and activations kept for the backward pass.

Per layer and micro-batch of GPT in 16 bits with dropout (s tokens, b sequences, h wide, a heads, t tensor-parallel ranks):
``sbh (10 + 24/t + 5as/(ht))``, with sequence parallelism ``sbh/t (34 + 5as/h)``; selective recomputation and flash attention
drop the term of the scores, full recomputation keeps ``2sbh``. Other architectures keep what their ops need. Statistics of
norms and of flash attention (below 0.5 %) are left out, as in the source.

Source: Korthikanti et al., arXiv 2205.05198, sections 4 and 5; Rajbhandari et al., ZeRO, arXiv 1910.02054.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.predict.training.work import Part, TrainingWork
from trimtab.spec.training import ITEM, TrainingSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one device of a pipeline stage.

    Args:
        stage: from 0.
        layer_parameters, edge_parameters: on the device: of its layers; of embedding, final norm and head.
        weights, gradients, optimizer: after ZeRO divides them.
        layer_activations: of all micro-batches in flight.
        edge_activations: of embedding and head, fp32 logits included.
        working: what only a moment needs: the layer being recomputed, weights gathered by ZeRO-3.
        reserve: of the engine.
    """

    stage: int
    layer_parameters: int
    edge_parameters: int
    weights: int
    gradients: int
    optimizer: int
    layer_activations: int
    edge_activations: int
    working: int
    reserve: int

    @property
    def activations(self) -> int:
        """Of layers and edges."""
        return self.layer_activations + self.edge_activations

    @property
    def peak(self) -> int:
        """Everything at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.reserve


def kept_bytes(part: Part, training: TrainingSpec, *, layer: bool = True) -> int:
    """Activation bytes a layer (or an edge) keeps for the backward pass of one micro-batch."""
    shared = training.tp if training.sequence_parallel else 1
    if layer and training.recompute == "full":
        return training.micro_batch * part.input_bytes // shared
    return training.micro_batch * _all_kept(part, training, selective=training.recompute == "selective")


def _all_kept(part: Part, training: TrainingSpec, *, selective: bool) -> int:
    shared = training.tp if training.sequence_parallel else 1
    return part.split_kept + part.whole_kept // shared + (0 if selective else part.score_kept)


def in_flight(training: TrainingSpec, stage: int) -> int:
    """Chunks of micro-batches whose activations a stage holds at most; without interleaving a chunk is the whole stage.

    1F1B: min(m, pp - stage). GPipe: m. Interleaved: the warm-up of the schedule, of which the first stage's is
    L (1 + (pp - 1) / (pp v)) layers.
    """
    m, pp, v = training.micro_batches, training.pp, training.chunks
    if training.schedule == "gpipe":
        return m
    if v == 1:
        return min(m, pp - stage)
    return min(m * v, 2 * (pp - stage - 1) + (v - 1) * pp + 1)


def stage_memory(work: TrainingWork, training: TrainingSpec, stage: int, reserve_bytes: int = 0) -> StageMemory:
    """Bytes on one device of a stage.

    Args:
        work: the model's.
        training: the layout.
        stage: from 0.
        reserve_bytes: of the engine.

    Raises:
        SpecError: the work was counted for another sequence length, attention or dropout.
    """
    work.check(training)
    share = work.share(training.tp)
    layers = [(share.kinds[kind], times) for kind, times in work.stages(training)[stage]]
    first, last = stage == 0, stage == training.pp - 1
    edges = [part for part, here in ((share.embedding, first), (share.head, last)) if here]
    tied = work.spec.tie_word_embeddings and first and last
    edge_parameters = sum(part.parameters for part in edges) - (work.tied_parameters(training.tp) if tied else 0)
    layer_parameters = sum(times * part.parameters for part, times in layers)
    parameters = layer_parameters + edge_parameters
    weight, gradient, optimizer = training.state_bytes
    held = {level: -(-parameters // training.dp) if training.zero >= level else parameters for level in (1, 2, 3)}
    # A chunk is 1/v of the stage's layers; equal chunks, so the sum is exact.
    flight, chunks = in_flight(training, stage), training.chunks
    layer_activations = flight * sum(times * kept_bytes(part, training) for part, times in layers) // chunks
    waiting = -(-flight // chunks)
    edge_activations = sum(
        (1 if part is share.head else waiting) * kept_bytes(part, training, layer=False) for part in edges
    )
    largest = max(part.parameters for part, _ in layers)
    working = 0
    if training.recompute == "full":
        working = training.micro_batch * max(_all_kept(part, training, selective=False) for part, _ in layers)
    elif training.recompute == "selective":
        working = training.micro_batch * max(part.score_kept for part, _ in layers)
    if (
        training.zero == 3 and training.dp > 1
    ):  # the layer at work and the one fetched ahead; the gradient of the former
        working += (2 * ITEM + gradient) * largest
    return StageMemory(
        stage=stage,
        layer_parameters=layer_parameters,
        edge_parameters=edge_parameters,
        weights=weight * held[3],
        gradients=gradient * held[2],
        optimizer=optimizer * held[1],
        layer_activations=layer_activations,
        edge_activations=edge_activations,
        working=working,
        reserve=reserve_bytes,
    )
