"""The hardware (Machine) and how well software uses it (Stack), read from the TOML catalogue."""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, unknown

#: Id of the machine Trimtab runs on, known after `trimtab calibrate`.
THIS = "this"

OP_CLASSES = ("gemm", "gemv", "attention", "elementwise", "embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device. Absent facts are None or missing keys, never 0.

    Args:
        flops_per_s: dense peak by dtype (``fp32 fp16 bf16 fp8 int8 int4 fp4``), FLOP/s or OP/s.
        memory_bytes: capacity as the datasheet gives it (decimal).
        memory_bandwidth_bytes_per_s: datasheet bandwidth.
        llc_bytes, llc_bandwidth_bytes_per_s: last-level cache.
        source: origin of the facts; `sources` holds exceptions by field.
        confidence: ``high | med | low | measured``.
    """

    id: str
    name: str
    vendor: str
    kind: str
    year: int
    flops_per_s: Mapping[str, float]
    memory_bytes: int
    memory_type: str
    memory_bandwidth_bytes_per_s: float
    llc_bytes: int | None = None
    llc_bandwidth_bytes_per_s: float | None = None
    tier2_bytes: int | None = None
    tier2_bandwidth_bytes_per_s: float | None = None
    tdp_w: float | None = None
    link: str | None = None
    link_bytes_per_s_per_dir: float | None = None
    host_bytes_per_s_per_dir: float | None = None
    list_usd: float | None = None
    usd_per_h: float | None = None
    price_basis: str | None = None
    cores: int | None = None
    aliases: tuple[str, ...] = ()
    source: str = ""
    confidence: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def peak(self, dtype: str) -> tuple[float, str]:
        """Return (FLOP/s, dtype priced) for a dtype; falls back to the next wider one the machine has.

        Raises:
            SpecError: the machine has no floating-point peak at all.
        """
        order = ("int4", "int8", "fp4", "fp8", "bf16", "fp16", "fp32")
        candidates = order[order.index(dtype) :] if dtype in order else order
        if dtype == "fp16":
            candidates = ("fp16", "bf16", "fp32")
        for candidate in candidates:
            if candidate in self.flops_per_s:
                return self.flops_per_s[candidate], candidate
        best = max(self.flops_per_s.items(), key=lambda item: item[1], default=None)
        if best is None:
            raise SpecError(f"machine {self.id} has no peak rate. Add one under [peaks] in its TOML.")
        return best[1], best[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How one class of op runs: shares of peak and of bandwidth, and seconds per launch."""

    compute_efficiency: float
    bandwidth_efficiency: float
    launch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """How software uses a machine.

    Args:
        attention: ``tiled`` reads K and V once per query tile and skips what the mask hides; ``eager`` computes the
            full square and writes the scores.
        prefill_chunk: new tokens of one prefill pass; None = the whole prompt at once.
        op_classes: efficiency by op class (`OP_CLASSES`), optionally by dtype as ``gemm.bf16``; ``gathered``, if there,
            prices rows that a gate picks out of a matrix (else ``gemv``).
        band: P10 and P90 of measured over predicted time.
        bandwidth_by_working_set: (working set in bytes, bytes/s) ascending; empty = the machine's one bandwidth.
        fused: names of fusions this stack performs (``qkv``, ``norm_residual``, ``rope``, ``act``).
        source: where the constants come from; `kind` is ``datasheet | calibrated | table``.
    """

    name: str
    description: str = ""
    attention: str = "tiled"
    prefill_chunk: int | None = None
    reserve_bytes: int = 0
    overhead_per_step_s: float = 0.0
    op_classes: Mapping[str, Efficiency]
    band: tuple[float, float] = (1.0, 1.0)
    bandwidth_by_working_set: tuple[tuple[float, float], ...] = ()
    fused: frozenset[str] = frozenset()
    kind: str = "datasheet"
    source: str = ""

    def efficiency(self, op_class: str, dtype: str) -> Efficiency:
        """Constants of an op class in a dtype."""
        return self.op_classes.get(f"{op_class}.{dtype}") or self.op_classes[op_class]


def data_root() -> Path:
    """Folder of the catalogue inside the package."""
    return Path(__file__).parents[1] / "data"


def home() -> Path:
    """Folder of calibrations, caches and the ledger: ``TRIMTAB_HOME``, else the XDG data folder."""
    asked = os.environ.get("TRIMTAB_HOME")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "trimtab"


@functools.cache
def _machine_tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted((data_root() / "machines").glob("*.toml")):
        tables.update(tomllib.loads(path.read_text("utf-8")))
    return tables


def machine_ids() -> tuple[str, ...]:
    """Ids of the catalogue, and `this` if the machine at hand is calibrated."""
    ids = tuple(_machine_tables())
    return (THIS, *ids) if this_machine_path().exists() else ids


def aliases() -> dict[str, str]:
    """Short names to ids."""
    return {alias: key for key, table in _machine_tables().items() for alias in table.get("aliases", ())}


def load_machine(name: str) -> Machine:
    """Return a machine by id, alias, or ``this``.

    Raises:
        SpecError: no such machine, or ``this`` before it was calibrated.
    """
    asked = name.lower()
    if asked == THIS:
        return machine_from_table(THIS, _this_tables()["machine"])
    tables = _machine_tables()
    key = asked if asked in tables else aliases().get(asked)
    if key is None:
        raise unknown("machine", name, (*aliases(), *tables), "See `trimtab machines`.")
    return machine_from_table(key, tables[key])


def machine_from_table(key: str, table: Mapping[str, Any]) -> Machine:
    """Build a Machine from its TOML table."""
    names = {f for f in Machine.__dataclass_fields__} - {"id", "aliases", "flops_per_s"}
    facts = {name: table[name] for name in names if name in table}
    return Machine(
        id=key, aliases=tuple(table.get("aliases", ())), flops_per_s=dict(table.get("flops_per_s", {})), **facts
    )


def stack_names() -> tuple[str, ...]:
    """Names of the shipped stacks, and `this` if the machine at hand is calibrated."""
    names = tuple(path.stem for path in sorted((data_root() / "stacks").glob("*.toml")))
    return (*names, THIS) if this_machine_path().exists() else names


def load_stack(name: str) -> Stack:
    """Return a stack by name.

    Raises:
        SpecError: no such stack.
    """
    if name == THIS:
        return stack_from_table(THIS, _this_tables()["stack"])
    path = data_root() / "stacks" / f"{name}.toml"
    if name not in stack_names():
        raise unknown("stack", name, stack_names())
    return stack_from_table(name, tomllib.loads(path.read_text("utf-8")))


def stack_from_table(name: str, table: Mapping[str, Any]) -> Stack:
    """Build a Stack from its TOML table."""
    plain = {
        key: table[key]
        for key in (
            "description",
            "attention",
            "prefill_chunk",
            "reserve_bytes",
            "overhead_per_step_s",
            "kind",
            "source",
        )
        if key in table
    }
    return Stack(
        name=name,
        op_classes={key: Efficiency(**value) for key, value in table["op_class"].items()},
        band=(float(table["band"]["p10"]), float(table["band"]["p90"])) if "band" in table else (1.0, 1.0),
        bandwidth_by_working_set=tuple((float(a), float(b)) for a, b in table.get("bandwidth_by_working_set", ())),
        fused=frozenset(table.get("fused", ())),
        **plain,
    )


def this_machine_path() -> Path:
    """File `trimtab calibrate` writes: tables ``[machine]`` and ``[stack]``."""
    return home() / "this.toml"


def _this_tables() -> dict[str, Any]:
    path = this_machine_path()
    if not path.exists():
        raise SpecError(
            "This machine is not calibrated. Run `trimtab calibrate` (under a minute), or name one of `trimtab machines`."
        )
    return tomllib.loads(path.read_text("utf-8"))
