"""How recorded kernels are predicted: columns -> cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from trimtab.graph.routing import distinct_experts
from trimtab.measure.recorded.fit_stack import DATASHEET, IDEAL_CACHES, THREE
from trimtab.measure.recorded.kernel_classes import KERNEL_CLASSES, KernelClass, held_out
from trimtab.measure.recorded.scoreboard import Case, Limits, limits_of
from trimtab.measure.recorded.tables import Columns, load_table, machine_id, select
from trimtab.spec.machine import Machine, Stack, load_machine, machine_ids

#: Tokens up to which an expert kernel is bound by the weights of the experts it touches.
_FEW_TOKENS = 8


def kernels(table: str) -> Callable[[Columns, str | None, Stack], Iterator[Case]]:
    """The predictor of one table of kernels."""

    def cases(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
        for kind in (kind for kind in KERNEL_CLASSES if kind.table == table):
            for op_class, rows in kind.variants(columns).items():
                unseen = rows & _unseen(kind, op_class, columns)
                for name, software in _groups(columns, unseen):
                    machine = _machine(name)
                    if machine is None or device not in (None, machine.id):
                        continue
                    if kind.form == "collective" and machine.link_bytes_per_s_per_dir is None:
                        continue
                    mine = unseen & (columns["device"] == name) & (columns["stack"] == software)
                    yield _case(kind, op_class, machine, software, select(columns, mine), stack)

    return cases


def _case(kind: KernelClass, op_class: str, machine: Machine, software: str, rows: Columns, stack: Stack) -> Case:
    # Where nothing was fitted the roofline prices the rows, and it needs no units.
    hardware = kind.device(machine if machine.units else replace(machine, units=1), op_class)
    fitted = stack.on(machine).efficiency(*op_class.split("."))
    constants = {name: getattr(fitted, name) for name in THREE} | dict(fitted.constants)
    price = kind.price if fitted.form == kind.form else kind.roofline
    # Which experts a router picks is chance: their bytes are an expectation, not a bound.
    loose = (np.asarray(kind.work(rows)[1]) < IDEAL_CACHES * hardware.llc_bytes) | (kind.name == "moe")
    own = software in fitted.source
    return Case(
        table=kind.table,
        device=machine.id,
        stack=software,
        op_class=op_class,
        measured_s=rows["lat_us"] * 1e-6,
        predicted_s=price(rows, hardware)(constants),
        datasheet_s=kind.roofline(rows, hardware)(DATASHEET),
        loose=loose,
        band=fitted.band if own else None,
        half=held_out(rows, op_class, seed=-1),
        held_out=True,
        limits=limits_of(op_class, machine.id) if own else Limits(),
        note="" if own else f"{software}; constants of other software",
    )


def _unseen(kind: KernelClass, op_class: str, columns: Columns) -> npt.NDArray[np.bool_]:
    """[rows] of sizes that the shipped constants were not fitted on, wherever the rows come from."""
    shipped = load_table(kind.table)
    fitted = ~held_out(shipped, op_class)
    seen = {key for key, used in zip(_keys(kind, shipped), fitted, strict=True) if used}
    return np.array([key not in seen for key in _keys(kind, columns)])


def _keys(kind: KernelClass, columns: Columns) -> Iterable[tuple[int, ...]]:
    return zip(*(columns[key].tolist() for key in kind.keys), strict=True)


def _groups(columns: Columns, rows: npt.NDArray[np.bool_]) -> list[tuple[str, str]]:
    """Devices and software of rows."""
    return sorted(set(zip(columns["device"][rows].tolist(), columns["stack"][rows].tolist(), strict=True)))


def _machine(device: str) -> Machine | None:
    """The catalogue's machine for a device of a table; None where it has none."""
    key = machine_id(device)
    return load_machine(key) if key in machine_ids() else None


def moe(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """The kernels, and what few tokens cost: as much as the weights of the distinct experts they touch."""
    yield from kernels("moe")(columns, device, stack)
    few = (columns["num_tokens"] <= _FEW_TOKENS) & (columns["moe_dtype"] == "bfloat16") & (columns["moe_ep_size"] == 1)
    large = (columns["num_experts"] <= 8) & (columns["moe_tp_size"] <= 4)  # weights far above the launch
    rows = select(columns, few & large)
    touched, picks = _touched_experts(rows), rows["num_tokens"] * rows["topk"]  # what is read, and what is computed
    names = ("device", "stack", "hidden_size", "inter_size", "moe_tp_size", "distribution")
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, key in enumerate(zip(*(rows[name].tolist() for name in names), strict=True)):
        alike.setdefault(key, []).append(index)
    tokens = rows["num_tokens"]
    pairs = [
        pair for same in alike.values() for pair in itertools.permutations(same, 2) if tokens[pair[0]] < tokens[pair[1]]
    ]
    if not pairs or device is not None:
        return
    fewer, more = np.array(pairs).T
    growth = rows["lat_us"][more] / rows["lat_us"][fewer]
    for name, expected, contrast in (("distinct experts", touched, False), ("picks", picks, True)):
        yield Case(
            table="moe",
            device="all",
            stack="vLLM",
            op_class=f"moe, by {name}",
            measured_s=growth,
            predicted_s=(expected[more] / expected[fewer]).astype(float),
            held_out=True,
            limits=limits_of(f"moe, by {name}", "all"),
            contrast=contrast,
            note=f"growth with tokens up to {_FEW_TOKENS}",
        )


def _touched_experts(rows: Columns) -> npt.NDArray[np.float64]:
    """[rows] distinct experts: those of a skewed router, or of one that deals picks to experts in turn."""
    names = ("num_experts", "topk", "num_tokens", "distribution")
    found = []
    for experts, topk, tokens, routing in zip(*(rows[name].tolist() for name in names), strict=True):
        skew = float(routing.removeprefix("power_law_")) if routing.startswith("power_law") else 0.0
        found.append(distinct_experts(experts, topk, tokens, 1, skew) if skew else min(tokens * topk, experts))
    return np.array(found, float)


def llmcompass(columns: Columns, device: str | None, stack: Stack) -> Iterator[Case]:
    """Products of another software (PyTorch, 16-bit) under the constants of the recorded kernels."""
    rows = len(columns["m"])
    added = {"stack": np.full(rows, "PyTorch"), "gemm_dtype": np.full(rows, "bfloat16")}
    for case in kernels("gemm")(dict(columns) | added, device, stack):
        yield replace(case, table="llmcompass_matmul", limits=Limits(), note="PyTorch fp16, LLMCompass")
