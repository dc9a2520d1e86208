"""Which ops a stack runs as one kernel."""

from __future__ import annotations

from trimtab.graph.ops import Graph, Kernel, Op
from trimtab.spec.machine import Stack

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
_START = ("find", "quantize")
_AFTER = (*_START, "add_attn", "add_mlp", "act", "logit_softcap")
#: Fusion name -> neighbours (last segments of their names) that become one kernel.
FUSIONS: dict[str, frozenset[tuple[str, str]]] = {
    "qkv": frozenset({("q_proj", "k_proj"), ("k_proj", "v_proj"), ("gate_proj", "up_proj")}),
    "norm_residual": frozenset(
        {
            ("attn_output_norm", "add_attn"), ("add_attn", "post_attention_layernorm"), ("add_attn", "add_mlp"),
            ("mlp_output_norm", "add_mlp"), ("add_mlp", "input_layernorm"), ("add_mlp", "norm"),
        }
    ),
    "rope": frozenset({("q_norm", "k_norm"), ("k_norm", "rope"), ("rope", "append"), ("append", "attend"), ("rope", "attend")}),
    "act": frozenset({("up_proj", "act"), ("gate_proj", "act")}),
    # What `runtime.native.lower` emits.
    "native": frozenset(
        {
            ("input_layernorm", "q_proj"), ("q_proj", "k_proj"), ("k_proj", "v_proj"), ("q_norm", "k_norm"), ("k_norm", "rope"),
            ("rope", "append"), ("append", "attend"), ("o_proj", "add_attn"), ("attn_output_norm", "add_attn"),
            ("post_attention_layernorm", "gate_proj"), ("post_attention_layernorm", "up_proj"), ("gate_proj", "up_proj"),
            ("up_proj", "act"), ("down_proj", "add_mlp"), ("mlp_output_norm", "add_mlp"), ("norm", "lm_head"),
            ("lm_head", "logit_softcap"),
        }
    ),
}  # fmt: skip
#: Products in int8 take the places of their matrices, with their own ops around them.
FUSIONS["native"] |= {
    *((norm, start) for norm in ("input_layernorm", "post_attention_layernorm", "norm") for start in _START),
    *(("quantize", matrix) for matrix in _MATRICES),
    *((matrix, "dequantize") for matrix in _MATRICES),
    *((end, after) for end in ("dequantize", "outliers") for after in _AFTER),
    ("find", "quantize"),
    ("dequantize", "outliers"),
}


def fuse(graph: Graph, stack: Stack) -> tuple[Kernel, ...]:
    """Return the kernels a stack launches: one op each where it fuses nothing (eager).

    Values that only ops inside a kernel read vanish from its reads and writes, and with them their traffic.
    A stack that fuses anything runs the experts of a layer as one grouped launch.
    """
    pairs = frozenset().union(*(FUSIONS[name] for name in stack.fused if name in FUSIONS))
    whole = "experts" in stack.fused
    runs: list[list[Op]] = []
    for op in graph.ops:
        joins = bool(runs) and (
            (_last(runs[-1][-1]), _last(op)) in pairs or (whole and _same_experts(runs[-1][-1], op))
        )
        runs[-1].append(op) if joins else runs.append([op])
    readers: dict[str, int] = {}
    for op in graph.ops:
        for value in op.reads:
            readers[value.name] = readers.get(value.name, 0) + 1
    return tuple(_kernel(run, readers, bool(stack.fused)) for run in runs)


def _kernel(run: list[Op], readers: dict[str, int], grouped: bool) -> Kernel:
    if len(run) == 1:
        return Kernel((run[0],), run[0].reads, run[0].writes, grouped)
    inside = {value.name for op in run for value in op.writes}
    read_here: dict[str, int] = {}
    for op in run:
        for value in op.reads:
            read_here[value.name] = read_here.get(value.name, 0) + 1
    reads = dict.fromkeys(value for op in run for value in op.reads if value.name not in inside)
    writes = (
        v for op in run for v in op.writes if read_here.get(v.name, 0) < readers.get(v.name, 0) or v.name not in readers
    )
    return Kernel(tuple(run), tuple(reads), tuple(writes), grouped)


def _same_experts(one: Op, other: Op) -> bool:
    """Both belong to the routed experts of one layer, which a fused stack runs as one grouped kernel (``experts``)."""
    path = one.name.rpartition(".")[0]
    return path.endswith(".experts") and path == other.name.rpartition(".")[0]


def _last(op: Op) -> str:
    return op.name.rpartition(".")[2]
