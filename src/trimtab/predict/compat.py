"""The numbers of LLM-Viewer, faults included, and what each fault does.

LLM-Viewer (arXiv 2402.16363, the tool behind the paper's tables) prices a decoder op by op on a roofline. Here its arithmetic
is written again with a switch per fault: all switches on gives its numbers, all off gives Trimtab's own count (`graph.count`
of the unfused graph). Mending the faults one after another in the order of `FAULTS` splits the difference exactly.

Source: what LLM-Viewer prints at commit 472f71f (30 July 2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from trimtab.errors import SpecError
from trimtab.graph.build import build
from trimtab.graph.count import count
from trimtab.graph.ops import Counts, Op, StepShape
from trimtab.spec.machine import Machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec

#: Fault -> what is wrong, in the order in which they are mended.
FAULTS = {
    "head_size": "The head size is taken as hidden size / heads, whatever the config says.",
    "scales": "Weights and cache are priced at bits / 8: the scales and minima of their groups are not there.",
    "dequantization": "Unpacking quantized weights costs nothing.",
    "missing_operators": "Embedding, rotary embedding, biases, norms of queries and keys, and the final norm are not there.",
    "cache_write": "Keys and values go from the projection into the cache without being written and read as activations.",
    "norms": "A norm takes 7 operations per element, RMSNorm too (5), and reads no weights.",
    "residual": "A residual add reads one operand instead of two.",
    "mlp_act": "The activation has the hidden width and 2 operations instead of the intermediate width and 5.",
    "query_heads": "Prefill reads queries for the KV heads only, so grouped-query attention reads too few.",
    "keys": "A decode step after s tokens attends to s keys, not s + 1.",
    "flash_output": "FlashAttention writes tokens x tokens per head, twice, instead of tokens x head size once.",
    "flash_heads": "FlashAttention reads keys and values for every query head instead of every KV head.",
    "flash_tiles": "FlashAttention re-reads keys and values once per block of head-size queries, cache or not.",
    "mask": "FlashAttention computes what the causal mask and the window hide.",
    "lm_head_flops": "The head has one operation per multiply-add instead of two.",
    "lm_head_batch": "The head's activations are those of one sequence whatever the batch.",
    "peak": "int8 rates only where weights, activations and cache are all 8 bits or fewer; int4 rates never.",
    "hardware": "Rates of its own table: H100 3072 GB/s instead of 3350, A100 is the 40 GB card, AVX-512 on a 13900K.",
}
ALL = frozenset(FAULTS)

#: Fault of a whole request -> what is wrong.
REQUEST_FAULTS = {
    "memory_weights": "The memory of the head, the embedding and the norms is not there.",
    "memory_cache": "The cache is that of the prompt: generated tokens take no memory.",
    "extra_step": "As many decode steps as tokens follow the prefill, although the prefill emits the first token.",
}

#: What no figure can show, because the tool has no answer.
ABSENT = (
    "Experts, latent attention, tensor and pipeline parallelism, training and chunked prefill are not there.",
    "The family of a model is guessed from a part of its name, and its config is fetched from the hub when it runs.",
)

#: Its rates by machine id: bytes/s, fp16 FLOP/s, int8 OP/s. The plain A100 and H100 of its menu are the first two.
HARDWARE = {
    "a100-sxm4-80gb": (1555e9, 312e12, 624e12),
    "h100-sxm5-80gb": (3072e9, 989.5e12, 1979e12),
    "a100-sxm4-40gb": (1555e9, 312e12, 624e12),
    "a800-sxm4-80gb": (2039e9, 312e12, 624e12),
    "h100-pcie-80gb": (2048e9, 756.5e12, 1513e12),
    "v100-sxm2-32gb": (900e9, 112e12, 62e12),
    "rtx-a6000": (768e9, 154.8385e12, 309.7e12),
    "a40": (696e9, 149.7e12, 299.3e12),
    "l40": (864e9, 181e12, 362e12),
    "i9-13900k": (89.6e9, 1.3824e12, 1.3824e12),  # it has no int8 rate for this one
}

_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "gate_proj", "up_proj", "down_proj")
_DEQUANT = 2  # vector operations per element, as `graph.count` has it


@dataclass(frozen=True, slots=True)
class Traffic:
    """Operations and bytes of one operator, under the tool's own column names."""

    ops: float = 0.0
    load_weight: float = 0.0
    load_act: float = 0.0
    store_act: float = 0.0
    load_kv_cache: float = 0.0
    store_kv_cache: float = 0.0

    @property
    def nbytes(self) -> float:
        """Bytes moved in all (its `memory_access`)."""
        return self.load_weight + self.load_act + self.store_act + self.load_kv_cache + self.store_kv_cache

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Traffic:
        return Traffic(*(times * getattr(self, f.name) for f in fields(self)))

    def __sub__(self, other: Traffic) -> Traffic:
        return self + other * -1.0


@dataclass(frozen=True, slots=True)
class OpRow:
    """One line of the operator table: `traffic` of one operator, which runs `times` times in a pass."""

    name: str
    traffic: Traffic
    times: int
    time_s: float
    bound: str

    @property
    def arithmetic_intensity(self) -> float:
        """Operations per byte."""
        return self.traffic.ops / self.traffic.nbytes if self.traffic.nbytes else math.inf


@dataclass(frozen=True, slots=True)
class Stage:
    """Prefill or decode: its operators, and their sums over a pass."""

    rows: tuple[OpRow, ...]

    @property
    def total(self) -> Traffic:
        """Operations and bytes of a pass."""
        return sum((row.traffic * row.times for row in self.rows), Traffic())

    @property
    def time_s(self) -> float:
        """Seconds of a pass."""
        return sum(row.times * row.time_s for row in self.rows)

    def row(self, name: str) -> OpRow:
        """The operator of that name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True, slots=True)
class Fault:
    """What one fault adds to a stage (negative: what it leaves out), the faults before it being mended.

    Args:
        ops, nbytes, time_s: the tool's figure with the fault minus without it, for one pass. Seconds are those of the tool's
            roofline, without any stack.
    """

    name: str
    sentence: str
    phase: str
    ops: float
    nbytes: float
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked of the tool.

    Args:
        batch, seqlen: sequences and tokens of each; prefill runs them, decode comes after them.
        w_bit, a_bit, kv_bit: bits of weights, activations and cache; None = those of the model (cache: as activations).
        flash: its FlashAttention option.
    """

    batch: int = 1
    seqlen: int = 2048
    w_bit: int | None = None
    a_bit: int | None = None
    kv_bit: int | None = None
    flash: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "seqlen"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} is not possible. Allowed: 1 or more.")
        for name in ("w_bit", "a_bit", "kv_bit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 32:
                raise SpecError(f"{name}={value} is not possible. Allowed: 1..32.")


def analyze(spec: ModelSpec, machine: Machine, case: Case, phase: str, present: Iterable[str] = ALL) -> Stage:
    """The tool's operator table of one pass.

    Args:
        spec: a dense Llama-like model.
        machine: rates; those of `HARDWARE` where the tool has its own.
        case: sizes and bits.
        phase: ``prefill`` or ``decode``.
        present: the faults that are there; all gives the tool's numbers, none Trimtab's count.

    Raises:
        SpecError: a model the tool has no operators for.
    """
    faults = frozenset(present)
    rates = _rates(machine, *_bits(spec, case), faults)
    rows = _Table(spec, case, phase, faults, machine.llc_bytes).rows()
    return Stage(tuple(_roofline(name, traffic, times, *rates) for name, (traffic, times) in rows.items()))


def faults(spec: ModelSpec, machine: Machine, case: Case, phase: str) -> tuple[Fault, ...]:
    """The effect of every fault on a pass, in the order of `FAULTS`; their sums are the whole difference.

    Raises:
        SpecError: a model the tool has no operators for.
    """
    found, present = [], list(FAULTS)
    before = analyze(spec, machine, case, phase, present)
    for name, sentence in FAULTS.items():
        present.remove(name)
        after = analyze(spec, machine, case, phase, present)
        change = before.total - after.total
        found.append(Fault(name, sentence, phase, change.ops, change.nbytes, before.time_s - after.time_s))
        before = after
    return tuple(found)


def generation_s(spec: ModelSpec, machine: Machine, case: Case, gen: int) -> tuple[float, float]:
    """Seconds the tool gives for a prompt and `gen` tokens, and how many of them are one decode step too many.

    It runs `gen` decode steps after the prefill, although the prefill has emitted the first token.
    """
    lengths = range(case.seqlen, case.seqlen + gen)
    steps = [analyze(spec, machine, _at(case, length), "decode").time_s for length in lengths]
    return analyze(spec, machine, case, "prefill").time_s + sum(steps), steps[-1] if steps else 0.0


def memory_bytes(spec: ModelSpec, machine: Machine, case: Case, gen: int = 0) -> dict[str, float]:
    """Memory the tool reports, and what it forgets: head, embedding and norms, and the cache of generated tokens.

    Returns:
        ``reported`` (weights + cache + activations of one layer, at prefill), ``missing_weights``, ``missing_cache``.
    """
    stage = analyze(spec, machine, case, "prefill")
    layer = [row for row in stage.rows if row.name != "lm_head"]
    weights = sum(row.times * row.traffic.load_weight for row in layer)
    cache = sum(row.times * row.traffic.store_kv_cache for row in layer)
    w_bit, _, kv_bit = _bits(spec, case)
    attention: Any = spec.layers[0].self_attn
    head_size = spec.hidden_size // attention.num_attention_heads
    token = 2 * attention.num_key_value_heads * head_size * spec.num_hidden_layers * kv_bit / 8
    return {
        "reported": weights + cache + sum(row.traffic.store_act for row in layer),
        "missing_weights": spec.num_parameters() * w_bit / 8 - weights,
        "missing_cache": case.batch * gen * token,
    }


def request_faults(spec: ModelSpec, machine: Machine, case: Case, gen: int) -> tuple[Fault, ...]:
    """The effect of the faults that concern a whole request of `gen` tokens: bytes held, seconds (negative: left out)."""
    memory = memory_bytes(spec, machine, case, gen)
    _, extra_s = generation_s(spec, machine, case, gen)
    held = {"memory_weights": -memory["missing_weights"], "memory_cache": -memory["missing_cache"], "extra_step": 0.0}
    return tuple(
        Fault(name, sentence, "request", 0.0, held[name], extra_s if name == "extra_step" else 0.0)
        for name, sentence in REQUEST_FAULTS.items()
    )


# ---------------------------------------------------------------------------------------------------------- arithmetic


class _Table:
    """Operators of one pass under a set of faults: name -> (traffic, how often it runs)."""

    def __init__(self, spec: ModelSpec, case: Case, phase: str, faults: frozenset[str], llc_bytes: int | None) -> None:
        self.layer = _llama_like(spec)
        self.spec, self.case, self.phase, self.faults = spec, case, phase, faults
        attention: Any = self.layer.self_attn
        self.H, self.K = attention.num_attention_heads, attention.num_key_value_heads
        self.h, self.f, self.V = spec.hidden_size, self.layer.mlp.up_proj.n, spec.lm_head.n
        self.d = self.h // self.H if "head_size" in faults else attention.head_dim
        w_bit, a_bit, kv_bit = _bits(spec, case)
        self.w, self.a = w_bit / 8, a_bit / 8
        # Bytes of one key or value of one head.
        own = attention.cache.heads[0].token_bytes() / 2
        self.k = self.d * kv_bit / 8 if "scales" in faults else own
        self.new = case.seqlen if phase == "prefill" else 1
        past = 0 if phase == "prefill" else case.seqlen
        self.T = case.batch * self.new
        self.keys = self.new if phase == "prefill" else past + ("keys" not in faults)
        self.step = StepShape.of(new=[self.new], past=[past], logits=case.batch, copies=case.batch)
        self.ops = build(
            spec, "prefill" if phase == "prefill" else "decode", layers=1
        ).ops  # all layers are like the first
        self.tiled = count(self._op("attend"), self.step, "tiled", llc_bytes)

    def rows(self) -> dict[str, tuple[Traffic, int]]:
        """Everything, in the tool's order; what it forgets comes last and only where that is mended."""
        layers = self.spec.num_hidden_layers
        attention = {"fused_attention": self._flash()} if self.case.flash else self._attention()
        layer = {name: self._linear(name) for name in _LINEARS} | attention | self._elementwise()
        if "cache_write" not in self.faults:
            layer["append"] = Traffic(load_act=2 * self.T * self.K * self.d * self.a)
        found = {name: (traffic, layers) for name, traffic in layer.items()}
        found["lm_head"] = self._head(), 1
        if "missing_operators" not in self.faults:
            found |= self._missing()
        return found

    def _linear(self, name: str) -> Traffic:
        inner = self.H * self.d
        k, n = {
            "q_proj": (self.h, inner),
            "k_proj": (self.h, self.K * self.d),
            "v_proj": (self.h, self.K * self.d),
            "out_proj": (inner, self.h),
            "down_proj": (self.f, self.h),
        }.get(name, (self.h, self.f))
        cached = name in ("k_proj", "v_proj")
        weight, unpacking = self._weight(self._op(name.replace("out_", "o_")).node, n, k)
        return Traffic(
            ops=2 * self.T * n * k + unpacking,
            load_weight=weight,
            load_act=self.T * k * self.a,
            store_act=0 if cached and "cache_write" in self.faults else self.T * n * self.a,
            store_kv_cache=self.T * self.K * self.k if cached else 0,
        )

    def _weight(self, node: Any, n: int, k: int) -> tuple[float, float]:
        """(bytes, vector operations) of reading a matrix."""
        nbytes = n * k * self.w if "scales" in self.faults else node.format.nbytes(*node.stored_shape)
        free = node.format.is_float or "dequantization" in self.faults
        return nbytes, 0 if free else _DEQUANT * n * k

    def _attention(self) -> dict[str, Traffic]:
        B, n = self.case.batch, self.new
        pairs = B * self.H * n * self.keys
        kv = B * self.K * self.keys * self.k
        few = self.phase == "prefill" and "query_heads" in self.faults
        return {
            "qk_matmul": Traffic(
                ops=2 * pairs * self.d,
                load_act=self.T * (self.K if few else self.H) * self.d * self.a,
                store_act=pairs * self.a,
                load_kv_cache=kv,
            ),
            "sv_matmul": Traffic(
                ops=2 * pairs * self.d,
                load_act=pairs * self.a,
                store_act=self.T * self.H * self.d * self.a,
                load_kv_cache=kv,
            ),
            "softmax": Traffic(ops=5 * pairs, load_act=pairs * self.a, store_act=pairs * self.a),
        }

    def _flash(self) -> Traffic:
        """Its row block is min(ceil(on-chip bytes / (k d)), d): always d on any GPU of its table."""
        B, n = self.case.batch, self.new
        pairs = B * self.H * n * self.keys
        ops: float = pairs * (4 * self.d + 5)
        if "mask" not in self.faults:
            ops = int(self.tiled.flops) + int(self.tiled.vector_flops)
        heads = self.H if "flash_heads" in self.faults else self.K
        kv: float = math.ceil(n / self.d) * self.keys * B * heads * 2 * self.k
        if "flash_tiles" not in self.faults:
            kv = int(self.tiled.kv_read)
        out = 2 * pairs if "flash_output" in self.faults else self.T * self.H * self.d
        return Traffic(ops=ops, load_act=self.T * self.H * self.d * self.a, store_act=out * self.a, load_kv_cache=kv)

    def _elementwise(self) -> dict[str, Traffic]:
        row = self.T * self.h * self.a
        found = {}
        for name, ours in (("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
            counted = count(self._op(ours), self.step)
            wrong = "norms" in self.faults
            ops = 7 * self.T * self.h if wrong else int(counted.vector_flops)
            found[name] = Traffic(ops, 0 if wrong else int(counted.weight_read), row, row)
        for name in ("attn_add", "mlp_add"):
            found[name] = Traffic(self.T * self.h, 0, row * (1 if "residual" in self.faults else 2), row)
        width, each = (self.h, 2) if "mlp_act" in self.faults else (self.f, 5)
        active = self.T * width
        found["mlp_act"] = Traffic(each * active, 0, 2 * active * self.a, active * self.a)
        return found

    def _head(self) -> Traffic:
        B = self.case.batch
        weight, unpacking = self._weight(self.spec.lm_head, self.V, self.h)
        rows = 1 if "lm_head_batch" in self.faults else B
        return Traffic(
            ops=(1 if "lm_head_flops" in self.faults else 2) * B * self.h * self.V + unpacking,
            load_weight=weight,
            load_act=rows * self.h * self.a,
            store_act=rows * self.V * self.a,
        )

    def _missing(self) -> dict[str, tuple[Traffic, int]]:
        """Operators the tool lacks, as Trimtab counts them; biases as one operator per layer."""
        names = {"embed_tokens": 1, "norm": 1, "rope": 0, "q_norm": 0, "k_norm": 0}
        found: dict[str, tuple[Traffic, int]] = {}
        for name, times in names.items():
            op = next((op for op in self.ops if op.name.rpartition(".")[2] == name), None)
            if op is not None:
                found[name] = _traffic(count(op, self.step)), times or self.spec.num_hidden_layers
        biased = [self._op(name.replace("out_", "o_")).node for name in _LINEARS]
        bias = sum((self._bias(node, self.T) for node in biased), Traffic())
        if bias.nbytes:
            found["bias"] = bias, self.spec.num_hidden_layers
        return found

    @staticmethod
    def _bias(node: Any, rows: int) -> Traffic:
        return Traffic(rows * node.n, node.bias_format.nbytes(1, node.n)) if node.bias else Traffic()

    def _op(self, name: str) -> Op:
        return next(op for op in self.ops if op.name.rpartition(".")[2] == name)


def _llama_like(spec: ModelSpec) -> Any:
    """The layer all layers are like, if the tool has operators for it."""
    layer = spec.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    why = ""
    if not isinstance(attention, AttentionSpec):
        why = "latent attention"
    elif not isinstance(mlp, FFNSpec):
        why = "experts"
    elif mlp.gate_proj is None or layer.parallel or layer.post_attention_layernorm is None:
        why = "an FFN or a layer that is not Llama's"
    elif layer.attn_output_norm or layer.mlp_output_norm or attention.softcap or attention.sinks or spec.logit_softcap:
        why = "norms, caps or sinks Llama does not have"
    elif len({(item.mlp, _plain(item.self_attn)) for item in spec.layers}) > 1 or spec.lm_head.bias:
        why = "layers that differ"
    if why:
        raise SpecError(
            f"{spec.name} has {why}, for which LLM-Viewer has no operators. Try a Llama-like model: llama-2-7b."
        )
    return layer


def _plain(attention: Any) -> tuple[int, int, int, int | None]:
    return attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim, attention.window


def _bits(spec: ModelSpec, case: Case) -> tuple[int, int, int]:
    """(weights, activations, cache); what is not asked for is the model's own, the cache as the activations."""
    kind = _llama_like(spec).mlp.up_proj.format
    number = re.search(r"\d+", kind.kind)
    own = kind.bits or int(number.group() if number else 16)
    a_bit = case.a_bit or 8 * spec.act_bytes
    return case.w_bit or own, a_bit, case.kv_bit or a_bit


def _at(case: Case, seqlen: int) -> Case:
    return Case(
        batch=case.batch, seqlen=seqlen, w_bit=case.w_bit, a_bit=case.a_bit, kv_bit=case.kv_bit, flash=case.flash
    )


def _rates(machine: Machine, w_bit: int, a_bit: int, kv_bit: int, faults: frozenset[str]) -> tuple[float, float]:
    """(FLOP/s, bytes/s) of every operator."""
    bandwidth, fp16, int8 = machine.memory_bandwidth_bytes_per_s, machine.peak("fp16")[0], machine.peak("int8")[0]
    if "hardware" in faults and machine.id in HARDWARE:
        bandwidth, fp16, int8 = HARDWARE[machine.id]
    if "peak" in faults:
        return (int8 if max(w_bit, a_bit, kv_bit) <= 8 else fp16), bandwidth
    operands = max(w_bit, a_bit)  # the cache is unpacked where it is read
    int4 = machine.flops_per_s.get("int4", int8)
    return (fp16 if operands > 8 else int8 if operands > 4 else int4), bandwidth


def _roofline(name: str, traffic: Traffic, times: int, flops_per_s: float, bytes_per_s: float) -> OpRow:
    compute, memory = traffic.ops / flops_per_s, traffic.nbytes / bytes_per_s
    return OpRow(name, traffic, times, max(compute, memory), "memory" if memory > compute else "compute")


def _traffic(counts: Counts) -> Traffic:
    return Traffic(
        int(counts.flops) + int(counts.vector_flops),
        int(counts.weight_read),
        int(counts.act_read),
        int(counts.act_written),
        int(counts.kv_read),
        int(counts.kv_written),
    )
