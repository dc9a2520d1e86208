"""Joules of a request and of a token: of a whole device by its power limit, and of single operations by a table of a technology.

The table answers what hardware with other multipliers would save; a device that exists draws its power whatever it multiplies.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.data import root as data_root
from trimtab.errors import SpecError, unknown
from trimtab.graph.build import Phase, build
from trimtab.graph.count import count
from trimtab.graph.ops import Op, StepShape
from trimtab.spec.machine import Machine
from trimtab.spec.model import ModelSpec
from trimtab.spec.product import EXACT, Lmul, Product, Rounded
from trimtab.spec.report import Figure


def energy(machine: Machine, time_s: float | None, band: tuple[float, float], devices: int = 1) -> Figure:
    """Energy of `time_s` seconds at the power limit of `devices`: an upper estimate, since memory-bound work draws less.

    Args:
        machine: its `tdp_w`.
        time_s: seconds of the whole request.
        band: P10 and P90 of measured over predicted time.
        devices: how many of them.
    """
    if machine.tdp_w is None or time_s is None:
        return Figure(
            value=None,
            unit="J",
            kind="datasheet",
            why=f"{machine.id} has no power limit in the catalogue, so there is no source.",
        )
    joules = machine.tdp_w * devices * time_s
    many = f"{devices} x " if devices > 1 else ""
    why = (
        f"tdp_w x time = {many}{machine.tdp_w:g} W x {time_s:.4g} s: the device alone, at its power limit all the time. "
        f"Memory-bound work draws less, how much less has no source, hence no P10. "
        f"Source: {machine.sources.get('tdp_w') or machine.source}"
    )
    return Figure(value=joules, p90=joules * band[1], unit="J", kind="datasheet", why=why)


def joules_per_token(
    machine: Machine, tokens_per_s: float | None, band: tuple[float, float], devices: int = 1
) -> Figure:
    """Energy of one decoded token at the power limit, all sequences sharing the devices."""
    if machine.tdp_w is None or tokens_per_s is None:
        why = "Nothing is decoded after the first token (gen=1)."
        if machine.tdp_w is None:
            why = f"{machine.id} has no power limit in the catalogue, so there is no source."
        return Figure(value=None, unit="J/token", kind="datasheet", why=why)
    joules = machine.tdp_w * devices / tokens_per_s
    many = f"{devices} x " if devices > 1 else ""
    why = (
        f"tdp_w / tokens_per_s = {many}{machine.tdp_w:g} W / {tokens_per_s:.4g}: an upper estimate as for energy_j. "
        f"Source: {machine.sources.get('tdp_w') or machine.source}"
    )
    return Figure(value=joules, p90=joules * band[1], unit="J/token", kind="datasheet", why=why)


# ------------------------------------------------------------------------------------------------- single operations


@dataclass(frozen=True, slots=True, kw_only=True)
class Technology:
    """Energy of operations in one process.

    Args:
        name: of the file in ``data/energy``.
        source: where the figures are from.
        add_pj, multiply_pj: picojoules by type: ``int8 int16 int32 fp16 fp32`` as far as known.
        sram_pj_per_bit: by bytes of the memory.
        dram_pj_per_bit: (low, typical, high).
    """

    name: str
    source: str
    add_pj: Mapping[str, float]
    multiply_pj: Mapping[str, float]
    sram_pj_per_bit: Mapping[int, float]
    dram_pj_per_bit: tuple[float, float, float]


@functools.cache
def technology(name: str = "45nm") -> Technology:
    """Load a table of energies.

    Raises:
        SpecError: there is none of that name.
    """
    known = sorted(path.stem for path in (data_root() / "energy").glob("*.toml"))
    if name not in known:
        raise unknown("technology", name, known)
    table = tomllib.loads((data_root() / "energy" / f"{name}.toml").read_text("utf-8"))
    dram = table["dram_pj_per_bit"]
    return Technology(
        name=table["name"],
        source=table["source"],
        add_pj=table["add_pj"],
        multiply_pj=table["multiply_pj"],
        sram_pj_per_bit={int(size): pj for size, pj in table["sram_pj_per_bit"].items()},
        dram_pj_per_bit=(dram["low"], dram["typical"], dram["high"]),
    )


#: Type of the table for a dtype of activations: bfloat16 is priced as fp16, whose adder and multiplier are of its size or larger.
_FLOAT = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16"}
_INT = {"fp32": "int32", "fp16": "int16", "bf16": "int16"}

#: Energy of one product by class; a technique with a product of its own adds its row here.
_PRODUCT_PJ: dict[type[Product], Callable[[str, Technology], float]] = {
    Product: lambda dtype, table: table.multiply_pj[_FLOAT[dtype]],
    Rounded: lambda dtype, table: table.multiply_pj[_FLOAT[dtype]],
    Lmul: lambda dtype, table: table.add_pj[_INT[dtype]],
}


def product_pj(product: Product, dtype: str, table: Technology) -> float:
    """Picojoules of one product of two numbers of `dtype`: L-Mul takes one addition of integers as wide as they are.

    Raises:
        SpecError: nobody has priced this product.

    >>> [round(1 - product_pj(Lmul(), d, technology()) / product_pj(EXACT, d, technology()), 2) for d in ("fp16", "fp32")]
    [0.95, 0.97]
    """
    if type(product) not in _PRODUCT_PJ:
        priced = ", ".join(cls.__name__ for cls in _PRODUCT_PJ)
        raise SpecError(f"{type(product).__name__} has no energy in {table.name}. Products that have one: {priced}.")
    return _PRODUCT_PJ[type(product)](dtype, table)


def multiply_add_pj(product: Product, dtype: str, table: Technology) -> float:
    """Picojoules of one term of a dot product: the product, and the addition of floats of `dtype`.

    >>> [round(1 - multiply_add_pj(Lmul(), d, technology()) / multiply_add_pj(EXACT, d, technology()), 2) for d in ("fp16", "fp32")]
    [0.7, 0.78]
    """
    return product_pj(product, dtype, table) + table.add_pj[_FLOAT[dtype]]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationEnergy:
    """Joules of a pass by what they go to.

    Args:
        products_j: of terms of dot products.
        sums_j: of the additions of these.
        elementwise_j: the rest of the arithmetic: an estimate, as its count is.
        dram_j: weights and cache moved, activations being on chip.
    """

    products_j: float
    sums_j: float
    elementwise_j: float
    dram_j: float

    @property
    def arithmetic_j(self) -> float:
        """All but the memory."""
        return self.products_j + self.sums_j + self.elementwise_j

    @property
    def total_j(self) -> float:
        """Everything."""
        return self.arithmetic_j + self.dram_j


#: Products that one element of an op's output takes, where they are not terms of dot products: gate with up; the norm and its
#: weight; cosine and sine.
_PER_ELEMENT = {"act": 1, "norm": 2, "rope": 2}


def operation_energy(
    spec: ModelSpec,
    phase: Phase,
    step: StepShape,
    table: Technology | None = None,
    *,
    attention: str = "tiled",
    dram_pj_per_bit: float | None = None,
) -> OperationEnergy:
    """Energy of one pass by single operations.

    Args:
        spec: the model, its products included.
        phase: as in `build`.
        step: the pass.
        table: technology; None = 45 nm.
        attention: as in `count`.
        dram_pj_per_bit: None = the typical one of the table.

    Raises:
        SpecError: a product without a price.
    """
    table = table or technology()
    products = sums = elements = bits = 0.0
    for op in build(spec, phase).ops:
        counts, dtype = count(op, step, attention), op.dtype
        terms = float(np.sum(counts.flops)) / 2
        vector = float(np.sum(counts.vector_flops))
        own = _elementwise_products(op, step)
        products += terms * product_pj(_product(op), dtype, table)
        sums += terms * table.add_pj[_FLOAT[dtype]]
        elements += own * product_pj(_product(op), dtype, table)
        elements += max(vector - own, 0.0) * table.add_pj[_FLOAT[dtype]]
        bits += 8.0 * float(np.sum(counts.weight_read + counts.kv_read + counts.kv_written))
    dram = table.dram_pj_per_bit[1] if dram_pj_per_bit is None else dram_pj_per_bit
    return OperationEnergy(
        products_j=products * 1e-12, sums_j=sums * 1e-12, elementwise_j=elements * 1e-12, dram_j=bits * dram * 1e-12
    )


def _product(op: Op) -> Product:
    """How an op multiplies."""
    node: Any = op.node.rope if op.kind == "rope" else op.node  # type: ignore[attr-defined]
    return getattr(node, "product", EXACT)


def _elementwise_products(op: Op, step: StepShape) -> float:
    per_element = _PER_ELEMENT.get(op.kind, 0)
    if op.kind == "act" and op.node.gate_proj is None:  # type: ignore[attr-defined]
        return 0.0
    return float(sum(per_element * value.width * np.sum(step.rows(value.rows)) for value in op.writes))


def gates(exponent_bits: int, mantissa_bits: int) -> tuple[int, int]:
    """(multiplier of floats, L-Mul) in two-input gates, without registers: a count of our own, from the plainest circuits.

    A full adder is 5 gates, a half adder 2. The multiplier: signs, an array of (m + 1)^2 ANDs with m (m + 1) full adders, the
    exponents and their bias, one step of normalisation, rounding. L-Mul: signs, exponent and mantissa fields through one adder,
    bias and offset (constants, together) through another.

    >>> gates(4, 3), gates(8, 7)
    ((143, 71), (479, 151))
    """
    full, half, xor, mux = 5, 2, 1, 3
    width = mantissa_bits + 1
    array = width * width + mantissa_bits * (mantissa_bits + 1) * full
    exponent = 2 * exponent_bits * full
    finish = (mantissa_bits + 1) * mux + (mantissa_bits + exponent_bits) * half
    field = exponent_bits + mantissa_bits
    return xor + array + exponent + finish, xor + 2 * field * full
