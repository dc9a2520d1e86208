"""How a model is trained: the layout over devices, what is recomputed, what the optimizer holds, and the network."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from trimtab.errors import SpecError, UnsupportedModelError, unknown
from trimtab.spec.machine import Machine, Stack, data_root, stack_from_table
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec, LatentAttentionSpec

SCHEDULES = ("1f1b", "gpipe", "interleaved")
RECOMPUTES = ("none", "selective", "full")
DTYPES = ("bf16", "fp16", "fp8")
TRAINING_STACKS = ("fsdp", "megatron")
OPTIMIZERS: Mapping[str, int] = {"adam": 12}  # fp32 master weight, first and second moment: bytes per parameter

#: Bytes of a 16-bit weight, of an activation and of a dropout mask.
ITEM, MASK = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSpec:
    """One training step: `global_batch` sequences of `seq_len` tokens over tp * pp * dp devices.

    Args:
        micro_batch: sequences one replica runs at once.
        global_batch: sequences of one optimizer step.
        seq_len: tokens per sequence.
        tp, pp, dp: tensor, pipeline and data parallel degrees; their product is the world size.
        zero: what is divided over dp: 0 nothing, 1 the optimizer's states, 2 gradients too, 3 weights too (FSDP).
        schedule: of the pipeline; ``interleaved`` gives every device `chunks` parts of the model.
        split: layers per pipeline stage where they differ; empty = equal parts.
        recompute: what the backward pass computes anew: nothing, the ``selective`` attention core, or the ``full`` layer.
        sequence_parallel: norms and dropout split over tp as well (reduce-scatter and all-gather for each all-reduce).
        dtype: of weights, activations and matrix products; ``fp8`` is bf16 but for the layers' products, whose inputs are cast.
        flash: attention in tiles: no score reaches memory, the mask's half is skipped, backward computes scores anew.
        dropout: with attention and residual dropout; None = as GPT was trained: where norms are LayerNorms and the FFN is
            plain, not elsewhere.
        optimizer: ``adam``.
        gradient_bytes: of one gradient: 2, or 4 where they add up in fp32.
        reduce_bytes: of one gradient on the network; None = `gradient_bytes`.
        overlap: gradients (and with zero=3 weights) travel while the backward pass computes.
        trainable: False freezes the model's weights (LoRA-like): no weight gradients and no states for them; gradients still
            flow to adapters in every layer, whose own small cost is not counted.

    Raises:
        SpecError: a value that is not possible; the message names the nearest that is.
    """

    micro_batch: int = 1
    global_batch: int = 1
    seq_len: int = 2048
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    schedule: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    chunks: int = 1
    split: tuple[int, ...] = ()
    recompute: Literal["none", "selective", "full"] = "none"
    sequence_parallel: bool = False
    dtype: Literal["bf16", "fp16", "fp8"] = "bf16"
    flash: bool = True
    dropout: bool | None = None
    optimizer: str = "adam"
    gradient_bytes: Literal[2, 4] = 2
    reduce_bytes: Literal[2, 4] | None = None
    overlap: bool = True
    trainable: bool = True

    def __post_init__(self) -> None:
        for name in ("micro_batch", "global_batch", "seq_len", "tp", "pp", "dp", "chunks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}={value!r} is not possible. Allowed: a whole number of 1 or more.")
        for name, allowed in (
            ("zero", (0, 1, 2, 3)), ("schedule", SCHEDULES), ("recompute", RECOMPUTES), ("dtype", DTYPES),
            ("optimizer", tuple(OPTIMIZERS)), ("gradient_bytes", (2, 4)), ("reduce_bytes", (None, 2, 4)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), map(str, allowed))
        at_once = self.micro_batch * self.dp
        if self.global_batch % at_once:
            below = self.global_batch // at_once * at_once
            near = " or ".join(str(batch) for batch in (below, below + at_once) if batch)
            raise SpecError(
                f"global_batch={self.global_batch} is not a multiple of micro_batch * dp = {self.micro_batch} * {self.dp} = "
                f"{at_once}. Nearest: {near}."
            )
        if self.zero >= 2 and self.pp > 1:
            raise SpecError(
                f"zero={self.zero} with pp={self.pp} is not possible: a pipeline adds up gradients over the micro-batches in "
                "flight, so every stage must keep them whole until the last. Use zero=1, or pp=1."
            )
        if (self.schedule == "interleaved") != (self.chunks > 1):
            raise SpecError(
                f"schedule={self.schedule} with chunks={self.chunks} is not possible. Allowed: interleaved with chunks of 2 or "
                "more, 1f1b and gpipe with chunks=1."
            )
        if self.chunks > 1 and (self.pp == 1 or self.micro_batches % self.pp):
            raise SpecError(
                f"schedule=interleaved needs pp > 1 and micro-batches in multiples of pp; there are {self.micro_batches} and "
                f"pp={self.pp}. Nearest global_batch: {-(-self.micro_batches // self.pp) * self.pp * at_once}."
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches one replica runs per step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def world_size(self) -> int:
        """Devices."""
        return self.tp * self.pp * self.dp

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.seq_len

    @property
    def state_bytes(self) -> tuple[int, int, int]:
        """(weight, gradient, optimizer) bytes of one parameter before ZeRO divides them."""
        return (ITEM, self.gradient_bytes, OPTIMIZERS[self.optimizer]) if self.trainable else (ITEM, 0, 0)

    def with_dropout(self, spec: ModelSpec) -> bool:
        """Whether this model trains with dropout."""
        if self.dropout is not None:
            return self.dropout
        first = spec.layers[0]
        plain = isinstance(first.mlp, FFNSpec) and first.mlp.gate_proj is None
        return plain and first.input_layernorm is not None and first.input_layernorm.kind == "layer"

    def layers_of(self, spec: ModelSpec) -> tuple[tuple[int, ...], ...]:
        """Layers of every stage in order, the chunks of a stage together.

        Raises:
            SpecError: they cannot be divided so.
        """
        count, parts = spec.num_hidden_layers, self.pp * self.chunks
        if self.split:
            if len(self.split) != self.pp or sum(self.split) != count or min(self.split) < 1 or self.chunks > 1:
                raise SpecError(
                    f"split={list(self.split)} does not give {spec.name}'s {count} layers to {self.pp} stages of one chunk. "
                    f"Try split={_even(count, self.pp)}."
                )
            starts = [sum(self.split[:stage]) for stage in range(self.pp)]
            return tuple(tuple(range(a, a + n)) for a, n in zip(starts, self.split, strict=True))
        if count % parts:
            fits = [n for n in range(1, count + 1) if count % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - parts))[:3])
            uneven = f" Or split={_even(count, self.pp)}." if self.chunks == 1 and self.pp <= count else ""
            raise SpecError(
                f"{spec.name} has {count} layers, which pp * chunks = {self.pp} * {self.chunks} = {parts} does not divide. "
                f"Nearest that do: {', '.join(map(str, near))}.{uneven}"
            )
        each = count // parts
        return tuple(
            tuple(i for c in range(self.chunks) for i in range((c * self.pp + s) * each, (c * self.pp + s + 1) * each))
            for s in range(self.pp)
        )

    def check(self, spec: ModelSpec, gpus: int | None = None) -> None:
        """Check the layout against a model and a number of devices.

        Raises:
            SpecError: layers, heads or devices do not divide; the message names what does.
        """
        if gpus is not None and self.world_size != gpus:
            rest, over = divmod(gpus, self.tp * self.pp)
            hint = f"dp={rest}" if rest and not over else f"{self.world_size} devices, or tp * pp that divides {gpus}"
            raise SpecError(
                f"tp * pp * dp = {self.tp} * {self.pp} * {self.dp} = {self.world_size} devices, but there are {gpus}. "
                f"Try {hint}."
            )
        self.layers_of(spec)
        heads = {_heads(layer.self_attn, spec.name) for layer in spec.layers}
        if not all(_divides(self.tp, *each) for each in heads):
            fits = [t for t in range(1, min(n for n, _ in heads) + 1) if all(_divides(t, *each) for each in heads)]
            shown = " or ".join(f"{n} heads" + (f" and {g} KV heads" if g != n else "") for n, g in sorted(heads))
            raise SpecError(
                f"tp={self.tp} does not divide {spec.name}'s {shown}. Allowed: {', '.join(map(str, fits))}."
            )
        limit = spec.max_position_embeddings
        if spec.embed_positions is not None and self.seq_len > limit:
            raise SpecError(f"seq_len={self.seq_len} is beyond the {limit} learned positions of {spec.name}.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def layout_on(gpus: int, *, tp: int = 1, pp: int = 1, global_batch: int | None = None, **fields: Any) -> TrainingSpec:
    """Return the layout that uses all of `gpus` devices: dp is what tp and pp leave.

    Args:
        gpus: devices.
        tp, pp: tensor and pipeline parallel degrees.
        global_batch: sequences of one step; None = one micro-batch per replica and pipeline stage.
        fields: the other fields of a `TrainingSpec`.

    Raises:
        SpecError: tp * pp does not divide the devices, or as `TrainingSpec`.
    """
    for name, value in (("gpus", gpus), ("tp", tp), ("pp", pp)):
        if value < 1:
            raise SpecError(f"{name}={value} is not possible. Allowed: a whole number of 1 or more.")
    if gpus % (tp * pp):
        fits = [n for n in range(1, gpus + 1) if gpus % n == 0]
        raise SpecError(
            f"tp * pp = {tp} * {pp} does not divide {gpus} devices. Allowed products: {', '.join(map(str, fits))}."
        )
    dp = gpus // (tp * pp)
    micro = fields.get("micro_batch", 1)
    return TrainingSpec(tp=tp, pp=pp, dp=dp, global_batch=global_batch or micro * dp * pp, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Links between devices: nodes of equal size, fast inside, slower between.

    Args:
        gpus_per_node: devices of one node.
        intra_bytes_per_s: what a ring inside a node moves per device and direction.
        inter_bytes_per_s: what a whole node sends (and receives) at once.
        intra_latency_s, inter_latency_s: of one hop of a ring.
        source: where the numbers come from.
    """

    gpus_per_node: int = 8
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    intra_latency_s: float = 5e-6
    inter_latency_s: float = 15e-6
    source: str = ""

    def __post_init__(self) -> None:
        numbers = (self.gpus_per_node, self.intra_bytes_per_s, self.inter_bytes_per_s)
        if min(numbers) <= 0 or min(self.intra_latency_s, self.inter_latency_s) < 0:
            raise SpecError("A network needs devices per node and bandwidths above 0, and latencies of 0 or more.")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


#: Share of a link's datasheet rate that a ring of 8 devices reaches: 222 of 300 GB/s on A100 (recorded NCCL all-reduce).
RING_EFFICIENCY = 0.74


def default_network(machine: Machine) -> Network:
    """Nodes with the machine's own link inside and one 200 Gbit/s adapter per device between them.

    Raises:
        SpecError: the catalogue knows no link of the machine.
    """
    link = machine.link_bytes_per_s_per_dir or machine.host_bytes_per_s_per_dir
    if link is None:
        raise SpecError(f"{machine.id} has no link in the catalogue. Give a Network with its bandwidths in bytes/s.")
    return Network(
        gpus_per_node=machine.node_devices,
        intra_bytes_per_s=RING_EFFICIENCY * link,
        inter_bytes_per_s=RING_EFFICIENCY * machine.node_devices * 25e9,
        source=(
            f"{RING_EFFICIENCY:g} (recorded NCCL all-reduce on 8 A100) of {link / 1e9:g} GB/s in a node and of one 25 GB/s "
            f"adapter per device between nodes (assumed: no source names the cluster). {machine.source}"
        ),
    )


def _heads(node: object, name: str) -> tuple[int, int]:
    """Query and key-value heads of an attention; latent attention has as many of both."""
    if isinstance(node, AttentionSpec):
        return node.num_attention_heads, node.num_key_value_heads
    if isinstance(node, LatentAttentionSpec):
        return node.num_attention_heads, node.num_attention_heads
    raise UnsupportedModelError(f"{name} has layers without attention; training them is not priced.")


def _divides(tp: int, heads: int, kv_heads: int) -> bool:
    """KV heads may be fewer than ranks: they are replicated then."""
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def load_training_stack(name: str, machine: Machine) -> Stack:
    """Return how a training framework uses a machine: its constants and the GEMM efficiency recorded for that machine.

    Args:
        name: ``fsdp`` (PyTorch, separate kernels) or ``megatron`` (fused kernels, unfused attention).
        machine: one without a recorded efficiency gets the generic one, and the stack's source says so.

    Raises:
        SpecError: no such stack.
    """
    if name not in TRAINING_STACKS:
        raise unknown("training stack", name, TRAINING_STACKS)
    table = tomllib.loads((data_root() / "training" / f"{name}.toml").read_text("utf-8"))
    known: dict[str, float] = table["gemm_efficiency"]
    stack = stack_from_table(name, table)
    gemm = replace(stack.op_classes["gemm"], compute_efficiency=known.get(machine.id, known["generic"]))
    ratio = table["attention_of_gemm"]
    attention = replace(stack.op_classes["attention"], compute_efficiency=gemm.compute_efficiency * ratio)
    missing = (
        "" if machine.id in known else f" No training was recorded on {machine.id}: its GEMM efficiency is generic."
    )
    return replace(
        stack,
        op_classes={**stack.op_classes, "gemm": gemm, "attention": attention},
        source=stack.source + missing,
        kind=stack.kind if machine.id in known else "datasheet",
    )


def _even(count: int, parts: int) -> list[int]:
    """As equal as it goes; the first stages take one more."""
    return [count // parts + (stage < count % parts) for stage in range(parts)]
