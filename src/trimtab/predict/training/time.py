"""Seconds of a training step: products, attention, element-wise traffic, collectives, the pipeline's bubble, the optimizer.

    product          max(flops / (peak ec), bytes / (bandwidth eb)) + t0
    everything else  bytes / (bandwidth eb) + t0
    pipeline         m micro-batches of the slowest stage, plus what the others take once (1/v of it when interleaved)
    gradients        one reduction per step (ZeRO-2/3: per micro-batch), less the backward pass it hides under
    ZeRO-3           per layer the longer of computing and gathering

ec, eb and t0 belong to the stack. Source: Narayanan et al., arXiv 2104.04473; Korthikanti et al., arXiv 2205.05198; Dash et
al., arXiv 2312.12705; Zhao et al., PyTorch FSDP, arXiv 2304.11277.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from trimtab.predict.training.network import Ring, ring
from trimtab.predict.training.work import Part, Product, TrainingWork
from trimtab.spec.machine import Efficiency, Machine, Stack
from trimtab.spec.training import ITEM, Network, TrainingSpec

#: Bytes the optimizer moves per parameter besides gradients: master weight and two moments read and written, weight written.
_ADAM_TRAFFIC = 2 * 12 + ITEM


#: Facts of a step that are no part of its sum.
_NO_PART = ("hidden_s", "after_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step; the parts add up to `step_s`.

    Args:
        product_s, attention_s, elementwise_s: computing forward and backward, all micro-batches of the slowest stage.
        recompute_s: computing anew.
        tp_s: tensor-parallel collectives.
        p2p_s: between pipeline stages.
        bubble_s: waiting for the pipeline to fill and drain.
        dp_s: collectives over replicas (and of a matrix that first and last stage share) that hide under nothing.
        optimizer_s: the update.
        overhead_s: per step, of the stack.
        hidden_s: collectives that hide under computing; no part of the sum.
        after_s: part of `dp_s` that follows the last micro-batch; no part of the sum.
    """

    product_s: float
    attention_s: float
    elementwise_s: float
    recompute_s: float
    tp_s: float
    p2p_s: float
    bubble_s: float
    dp_s: float
    optimizer_s: float
    overhead_s: float
    hidden_s: float = 0.0
    after_s: float = 0.0

    @property
    def step_s(self) -> float:
        """The whole step."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in _NO_PART)

    @property
    def pipeline_s(self) -> float:
        """All micro-batches through the slowest stage, without waiting and without what follows the last."""
        return self.step_s - self.bubble_s - self.after_s - self.optimizer_s - self.overhead_s

    @property
    def parts(self) -> dict[str, float]:
        """Every part that is not zero."""
        return {f.name: value for f in fields(self) if f.name not in _NO_PART and (value := getattr(self, f.name))}


@dataclass(frozen=True, slots=True)
class _Rates:
    """A machine as a stack uses it, for one dtype."""

    peak: float
    wide_peak: float
    cast: bool
    vector_bytes: float
    gemm: Efficiency
    attention: Efficiency
    elementwise: Efficiency
    bandwidth: float

    @staticmethod
    def of(machine: Machine, stack: Stack, dtype: str) -> _Rates:
        bandwidth = machine.memory_bandwidth_bytes_per_s
        wide = "bf16" if dtype == "fp8" else dtype
        gemm, attention, rest = (stack.efficiency(name, wide) for name in ("gemm", "attention_prefill", "elementwise"))
        peak, wide_peak = machine.peak(dtype)[0], machine.peak(wide)[0]
        return _Rates(
            peak,
            wide_peak,
            peak != wide_peak,
            bandwidth * rest.bandwidth_efficiency,
            gemm,
            attention,
            rest,
            bandwidth,
        )

    def products_s(
        self, products: tuple[Product, ...], micro_batch: int, extra_weight_bytes: float = 0.0, *, wide: bool = False
    ) -> float:
        total = 0.0
        flops_per_s = (self.wide_peak if wide else self.peak) * self.gemm.compute_efficiency
        bytes_per_s = self.bandwidth * self.gemm.bandwidth_efficiency
        for each in products:
            if each.flops:
                moved = each.weight_bytes * (1 + extra_weight_bytes) + micro_batch * each.act_bytes
                total += max(micro_batch * each.flops / flops_per_s, moved / bytes_per_s) + self.gemm.launch_s
        return total

    def core_s(self, flops: int, nbytes: int, flash: bool) -> float:
        """Attention: as one kernel, which hides its traffic, or product by product at the rate of a GEMM with the scores' traffic."""
        if not flops:
            return 0.0
        if flash:
            traffic = nbytes / (self.bandwidth * self.attention.bandwidth_efficiency)
            return max(flops / (self.wide_peak * self.attention.compute_efficiency), traffic) + self.attention.launch_s
        return flops / (self.wide_peak * self.gemm.compute_efficiency) + nbytes / self.vector_bytes + self.gemm.launch_s


@dataclass(frozen=True, slots=True)
class _PartTime:
    """Seconds of one micro-batch through a layer or an edge, and its parameters."""

    forward: float
    attention_forward: float
    elementwise_forward: float
    backward: float
    attention_backward: float
    elementwise_backward: float
    recompute: float
    tp: float
    tp_backward: float
    parameters: int

    @property
    def forward_s(self) -> float:
        return self.forward + self.attention_forward + self.elementwise_forward + self.tp

    @property
    def backward_s(self) -> float:
        return self.backward + self.attention_backward + self.elementwise_backward + self.recompute + self.tp_backward


def step_time(work: TrainingWork, training: TrainingSpec, machine: Machine, stack: Stack, network: Network) -> StepTime:
    """Price one step.

    Args:
        work: the model's; made for this sequence length, attention and dropout.
        training: the layout.
        machine: peaks and bandwidth.
        stack: efficiency of ``gemm``, ``attention`` and ``elementwise``, overhead per step.
        network: links. Tensor-parallel ranks are neighbours, then come replicas, then pipeline stages.
    """
    work.check(training)
    share = work.share(training.tp)
    rates = _Rates.of(machine, stack, training.dtype)
    tensor = ring(network, training.tp)
    replicas = ring(network, training.dp, training.tp)
    kinds = [_part_time(part, training, rates, tensor, work.flash) for part in share.kinds]
    embedding = _part_time(share.embedding, training, rates, tensor, work.flash, layer=False)
    head = _part_time(share.head, training, rates, tensor, work.flash, layer=False)
    if training.pp == 1:  # a matrix that embedding and head share is gathered, reduced and updated once
        head = replace(head, parameters=head.parameters - work.tied_parameters(training.tp))
    hop_s = _hop_s(work, training, network)
    stages, same = [], {}
    for stage, layers in enumerate(work.stages(training)):
        ends = stage == 0, stage == training.pp - 1
        if (layers, ends) not in same:
            parts = [(kinds[kind], times) for kind, times in layers]
            parts += [(embedding, 1)] * ends[0] + [(head, 1)] * ends[1]
            same[layers, ends] = _stage_time(parts, training, replicas, hop_s, stage)
        stages.append(same[layers, ends])
    slowest = max(stages, key=lambda each: each.micro_s)
    m = training.micro_batches
    bubble = (sum(each.micro_s for each in stages) - slowest.micro_s) / training.chunks
    after_s = max(each.dp_s for each in stages) + _tied_s(work, training, network)
    parameters = max(each.parameters for each in stages)
    updated = -(-parameters // training.dp) if training.zero else parameters
    update_bytes = updated * (_ADAM_TRAFFIC + 2 * training.gradient_bytes) if training.trainable else 0
    return StepTime(
        product_s=m * slowest.product,
        attention_s=m * slowest.attention,
        elementwise_s=m * slowest.elementwise,
        recompute_s=m * slowest.recompute,
        tp_s=m * slowest.tp,
        p2p_s=m * slowest.p2p,
        bubble_s=bubble,
        dp_s=m * slowest.gathering + after_s,
        optimizer_s=update_bytes / rates.vector_bytes,
        overhead_s=stack.overhead_per_step_s,
        hidden_s=m * slowest.hidden + max(each.dp_hidden for each in stages),
        after_s=after_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StageTime:
    """Seconds of one micro-batch through a stage, and of what follows the last one."""

    product: float
    attention: float
    elementwise: float
    recompute: float
    tp: float
    p2p: float
    gathering: float
    hidden: float
    dp_s: float
    dp_hidden: float
    parameters: int
    micro_s: float


def _stage_time(
    parts: list[tuple[_PartTime, int]], training: TrainingSpec, replicas: Ring, hop_s: float, stage: int
) -> _StageTime:
    def total(name: str) -> float:
        return sum(times * getattr(part, name) for part, times in parts)

    parameters = int(total("parameters"))
    learned = parameters if training.trainable else 0
    reduce_bytes = training.reduce_bytes or training.gradient_bytes
    gathering = hidden = dp_s = dp_hidden = 0.0
    if training.dp > 1 and training.zero == 3:
        for part, times in parts:
            fetch = replicas.pass_s(ITEM * part.parameters)
            put = replicas.pass_s(reduce_bytes * part.parameters) if learned else 0.0
            for compute, send in ((part.forward_s, fetch), (part.backward_s, fetch + put)):
                shown = max(0.0, send - compute) if training.overlap else send
                gathering, hidden = gathering + times * shown, hidden + times * (send - shown)
        if training.overlap:  # nothing to compute before the first weights, nor after the last gradients
            ends = max(part.parameters for part, _ in parts)
            dp_s = replicas.pass_s(ITEM * ends) + (replicas.pass_s(reduce_bytes * ends) if learned else 0.0)
    elif training.dp > 1 and learned:
        reduce = replicas.pass_s(reduce_bytes * learned, 1 if training.zero else 2)
        # The last bucket has no backward pass left to hide under.
        last = reduce / sum(times for _, times in parts)
        shown = max(reduce - total("backward_s"), last) if training.overlap else reduce
        if training.zero == 2:  # a replica keeps only its share of the gradients, so every micro-batch is reduced
            gathering, hidden = shown, reduce - shown
        else:
            dp_s, dp_hidden = shown, reduce - shown
        if training.zero:
            dp_s += replicas.pass_s(ITEM * learned)  # the updated weights
    p2p = hop_s * sends(training, stage)
    return _StageTime(
        micro_s=sum(times * (part.forward_s + part.backward_s) for part, times in parts) + p2p + gathering,
        product=total("forward") + total("backward"),
        attention=total("attention_forward") + total("attention_backward"),
        elementwise=total("elementwise_forward") + total("elementwise_backward"),
        recompute=total("recompute"),
        tp=total("tp") + total("tp_backward"),
        p2p=p2p,
        gathering=gathering,
        hidden=hidden,
        dp_s=dp_s,
        dp_hidden=dp_hidden,
        parameters=parameters,
    )


def _part_time(
    part: Part, training: TrainingSpec, rates: _Rates, tensor: Ring, flash: bool, *, layer: bool = True
) -> _PartTime:
    b, shared = training.micro_batch, training.tp if training.sequence_parallel else 1
    rest = rates.elementwise
    calls = max(part.launches - len(part.forward), 0) * rest.launch_s
    wide = not layer
    forward = rates.products_s(part.forward, b, wide=wide)
    # A weight gradient is added to what is there: 2 or 4 bytes read and as many written, for the weight's 2.
    extra = training.gradient_bytes - 1.0
    backward = rates.products_s(part.dgrad, b, wide=wide) + rates.products_s(part.wgrad, b, extra, wide=wide)
    core = rates.core_s(b * part.core_flops, b * part.core_bytes, flash)
    core_backward = rates.core_s(
        b * (part.core_backward_flops + part.core_again_flops), b * part.core_backward_bytes, flash
    )
    light = b * (part.split_bytes + part.whole_bytes / shared) / rates.vector_bytes + calls
    light_backward = b * (part.split_backward_bytes + part.whole_backward_bytes / shared) / rates.vector_bytes + calls
    if layer and rates.cast:  # inputs forward, gradients of outputs backward: 2 read, 1 written and 1 more transposed
        light += b * sum(each.act_bytes for each in part.forward) / rates.vector_bytes
        light_backward += b * sum(each.act_bytes for each in part.dgrad) / rates.vector_bytes
    tp = tensor.all_reduce_s(b * part.reduced_bytes)
    tp_backward = tensor.all_reduce_s(b * part.backward_reduced_bytes)
    again = 0.0
    if layer and training.recompute == "full":
        again, tp_backward = forward + core + light, tp_backward + tp
    elif layer and training.recompute == "selective" and not flash:
        again = core
    return _PartTime(
        forward, core, light, backward, core_backward, light_backward, again, tp, tp_backward, part.parameters
    )


def sends(training: TrainingSpec, stage: int) -> int:
    """Values a stage sends per micro-batch: forward and backward for every chunk, but at the two ends of the model."""
    if training.pp == 1:
        return 0
    return 2 * training.chunks - (stage == 0) - (stage == training.pp - 1)


def hop_bytes(work: TrainingWork, training: TrainingSpec) -> int:
    """Bytes of one value sent between stages by one device."""
    whole = training.micro_batch * training.seq_len * work.spec.hidden_size * ITEM
    return whole // training.tp if training.sequence_parallel else whole


def _hop_s(work: TrainingWork, training: TrainingSpec, network: Network) -> float:
    """Seconds of one value between two stages, which are tp * dp devices apart and send all at once."""
    if training.pp == 1:
        return 0.0
    nbytes = hop_bytes(work, training)
    if training.world_size <= network.gpus_per_node:
        return nbytes / network.intra_bytes_per_s + network.intra_latency_s
    senders = min(network.gpus_per_node, training.tp * training.dp)
    rate = min(network.intra_bytes_per_s, network.inter_bytes_per_s / senders)
    return nbytes / rate + network.inter_latency_s


def _tied_s(work: TrainingWork, training: TrainingSpec, network: Network) -> float:
    """A matrix shared by the first and the last stage: its two gradients are summed."""
    tied = work.tied_parameters(training.tp)
    if training.pp == 1 or not tied or not training.trainable:
        return 0.0
    pair = ring(network, 2, training.tp * training.dp * (training.pp - 1))
    return pair.all_reduce_s(tied * (training.reduce_bytes or training.gradient_bytes))
