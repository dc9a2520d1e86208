"""The hardware (Machine) and how well software uses it (Stack), read from the TOML catalogue."""

from __future__ import annotations

import datetime
import functools
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.errors import SpecError, unknown

#: Id of the machine Trimtab runs on, known after `trimtab calibrate`.
THIS = "this"
#: Stack of the native program on this machine; `this` is that of the torch decoder.
NATIVE = "native"

OP_CLASSES = ("gemm", "gemv", "attention", "elementwise", "embedding")

#: Kernels an engine may run faster or slower than a benchmark does.
FACTORS = ("gemm", "attention", "moe", "link")

#: Most of a kernel's time that a captured graph can save: launch and ramp-up.
GRAPH_SHARE = 0.6

#: Class -> the more general one that stands in where a stack has no constants for it.
GENERAL = {
    "attention_prefill": "attention",
    "attention_decode": "attention",
    "moe": "gemm",
    "scan": "elementwise",
    **dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"), "link"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device. Absent facts are None or missing keys, never 0.

    Args:
        flops_per_s: dense peak by dtype (``fp32 fp16 bf16 fp8 int8 int4 fp4``), FLOP/s or OP/s.
        memory_bytes: capacity as the datasheet gives it (decimal).
        memory_bandwidth_bytes_per_s: datasheet bandwidth.
        llc_bytes, llc_bandwidth_bytes_per_s: last-level cache.
        usd_per_h, price_basis, price_date: hourly price of one device, what it is, and the day (ISO) it was looked up.
        units: streaming multiprocessors or compute units over which a kernel spreads its tiles.
        link_bytes_per_s_per_dir: of one device to its neighbours in a node, each way; `node_devices` of them form a node.
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
    price_date: str | None = None
    cores: int | None = None
    units: int | None = None
    node_devices: int = 8
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

    def priced(self, usd_per_h: float) -> Machine:
        """Return this machine at another hourly price, looked up today.

        Raises:
            SpecError: a price below 0.
        """
        if usd_per_h < 0:
            raise SpecError(f"usd_per_h={usd_per_h:g} is not a price. Allowed: 0 or more.")
        today = datetime.date.today().isoformat()
        return replace(self, usd_per_h=usd_per_h, price_basis="given", price_date=today)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How one class of op runs.

    Args:
        compute_efficiency, bandwidth_efficiency: shares of peak and of bandwidth that are reached.
        launch_s: seconds before the first byte moves.
        form: the formula, a name of `predict.forms`; ``roofline`` needs the three numbers alone.
        constants: further fitted numbers of that form.
        band: P10 and P90 of measured over predicted time on rows that were not fitted; None = the stack's.
        rows, mape, source: rows behind the band, their mean absolute error as a share, and where they come from.
    """

    compute_efficiency: float
    bandwidth_efficiency: float
    launch_s: float
    form: str = "roofline"
    constants: Mapping[str, float] = field(default_factory=dict)
    band: tuple[float, float] | None = None
    rows: int = 0
    mape: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What an engine adds to its passes when requests come and go (`predict.serving` has the formulas).

    Args:
        interference: share of a prefill pass by which it holds up the decode steps of the others.
        queue: share of the prefills of the requests that came with it that a request waits for.
        held: share of its tokens-to-come for which a request needs a place in the cache, on average: 1 where an engine
            admits no request it might have to interrupt, 0.5 where places are given token by token.
    """

    interference: float = 1.0
    queue: float = 0.5
    held: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """How software uses a machine.

    Args:
        attention: ``tiled`` reads K and V once per query tile and skips what the mask hides; ``eager`` computes the
            full square and writes the scores.
        prefill_chunk: new tokens of each sequence in one prefill pass, all sequences side by side; None = the whole prompt.
        max_batched_tokens: new tokens of all sequences in one prefill pass, as serving engines limit them; None = no limit.
        reserve_bytes: what the engine takes for itself.
        memory_share: share of the machine's memory the engine uses.
        factors: time of kernels inside the engine over their recorded or predicted time, by `FACTORS`; absent = 1.
        graph_saving_s: seconds a kernel takes less where a captured graph launches it, at most `GRAPH_SHARE` of its time.
        overhead_per_step_s, overhead_per_sequence_s: host time of every pass, and of every sequence in it.
        overhead_per_prefill_s: host time of a request before its first pass.
        overhead_per_layer_s: added for every layer of a pass.
        floor_per_layer_s, floor_per_collective_s: a pass takes at least this for every layer and for every collective: a host
            that launches kernels one by one.
        op_classes: efficiency by op class (`OP_CLASSES`), optionally by dtype or weight format as ``gemm.bf16``;
            ``gathered``, if there, prices rows that a gate picks out of a matrix (else ``gemv``).
        kernels: True if constants fitted to the machine's recorded kernels (``data/kernels``) go before `op_classes`.
        devices: op classes and overheads fitted for one machine, by its id.
        band: P10 and P90 of measured over predicted time of a request; `bands` by figure goes first, for models with experts
            as ``tpot_s.experts``.
        serving: how requests hold each other up.
        bandwidth_by_working_set: (working set in bytes, bytes/s) ascending; empty = the machine's one bandwidth.
        fused: names of fusions this stack performs (``qkv``, ``norm_residual``, ``rope``, ``act``, ``experts``; ``native``: those of
            the native program).
        measured: True once constants of the machine at hand were put in (`on`).
        source: where the constants come from; `kind` is ``datasheet | calibrated | table``.
    """

    name: str
    description: str = ""
    attention: str = "tiled"
    prefill_chunk: int | None = None
    max_batched_tokens: int | None = None
    reserve_bytes: int = 0
    memory_share: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    graph_saving_s: float = 0.0
    overhead_per_step_s: float = 0.0
    overhead_per_sequence_s: float = 0.0
    overhead_per_prefill_s: float = 0.0
    overhead_per_layer_s: float = 0.0
    floor_per_layer_s: float = 0.0
    floor_per_collective_s: float = 0.0
    op_classes: Mapping[str, Efficiency]
    kernels: bool = False
    devices: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    band: tuple[float, float] = (1.0, 1.0)
    bands: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    serving: Serving = Serving()
    bandwidth_by_working_set: tuple[tuple[float, float], ...] = ()
    fused: frozenset[str] = frozenset()
    measured: bool = False
    kind: str = "datasheet"
    source: str = ""

    def efficiency(self, op_class: str, *variants: str) -> Efficiency:
        """Constants of an op class, in the first of `variants` (dtypes, weight formats) that has its own."""
        for variant in variants:
            found = self.op_classes.get(f"{op_class}.{variant}")
            if found is not None:
                return found
        return self.op_classes.get(op_class) or self.op_classes[GENERAL[op_class]]

    def on(self, machine: Machine) -> Stack:
        """Return this stack with the constants fitted for `machine`, where there are some."""
        own = self.devices.get(machine.id, {})
        fitted = _kernel_classes(machine.id) if self.kernels else {}
        if not own and not fitted:
            return self
        classes = {name: _efficiency(table) for name, table in own.get("op_class", {}).items()}
        plain = {key: value for key, value in own.items() if key != "op_class"}
        return replace(self, op_classes={**self.op_classes, **fitted, **classes}, measured=True, kind="table", **plain)


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
def _machine_texts() -> tuple[str, ...]:
    return tuple(path.read_text("utf-8") for path in sorted((data_root() / "machines").glob("*.toml")))


@functools.cache
def _machine_tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for text in _machine_texts():
        tables.update(tomllib.loads(text))
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
    for text in _machine_texts():
        if f"[{asked}]" in text or f'"{asked}"' in text:  # parse the one file that may hold it, not all of them
            tables = tomllib.loads(text)
            for key, table in tables.items():
                if asked == key or asked in table.get("aliases", ()):
                    return machine_from_table(key, table)
    raise unknown("machine", name, (*aliases(), *_machine_tables()), "See `trimtab machines`.")


def machine_from_table(key: str, table: Mapping[str, Any]) -> Machine:
    """Build a Machine from its TOML table."""
    names = {f for f in Machine.__dataclass_fields__} - {"id", "aliases", "flops_per_s"}
    facts = {name: table[name] for name in names if name in table}
    return Machine(
        id=key, aliases=tuple(table.get("aliases", ())), flops_per_s=dict(table.get("flops_per_s", {})), **facts
    )


def stack_names() -> tuple[str, ...]:
    """Names of the shipped stacks, and `this` and `native` if the machine at hand is calibrated."""
    names = tuple(path.stem for path in sorted((data_root() / "stacks").glob("*.toml")))
    return (*names, THIS, NATIVE) if this_machine_path().exists() else names


def load_stack(name: str) -> Stack:
    """Return a stack by name; `Stack.on` then puts in what was fitted for a machine.

    Raises:
        SpecError: no such stack.
    """
    if name in (THIS, NATIVE):
        tables, table = _this_tables(), {THIS: "stack", NATIVE: "native"}[name]
        if table not in tables:
            raise SpecError(f"The calibration of this machine has no {name} stack. Run `trimtab calibrate` again.")
        return stack_from_table(name, tables[table])
    path = data_root() / "stacks" / f"{name}.toml"
    if name not in stack_names():
        raise unknown("stack", name, stack_names())
    return stack_from_table(name, tomllib.loads(path.read_text("utf-8")))


def stack_from_table(name: str, table: Mapping[str, Any]) -> Stack:
    """Build a Stack from its TOML table."""
    facts = {**table, **table.get("overheads", {})}
    plain = {key: facts[key] for key in _PLAIN if key in facts}
    return Stack(
        name=name,
        op_classes={key: _efficiency(value) for key, value in table["op_class"].items()},
        band=_pair(table["band"]) if "band" in table else (1.0, 1.0),
        bands={key: _pair(value) for key, value in table.get("bands", {}).items()},
        serving=Serving(**table.get("serving", {})),
        factors=table.get("factors", {}),
        devices=table.get("device", {}),
        bandwidth_by_working_set=tuple((float(a), float(b)) for a, b in table.get("bandwidth_by_working_set", ())),
        fused=frozenset(table.get("fused", ())),
        **plain,
    )


#: Fields of a Stack that stand in its TOML as they are.
_PLAIN = (
    "description", "attention", "prefill_chunk", "max_batched_tokens", "reserve_bytes", "memory_share", "graph_saving_s",
    "overhead_per_step_s", "overhead_per_sequence_s", "overhead_per_prefill_s", "overhead_per_layer_s", "floor_per_layer_s",
    "floor_per_collective_s",     "kernels", "kind", "source",
)  # fmt: skip


def _pair(table: Mapping[str, float]) -> tuple[float, float]:
    return float(table["p10"]), float(table["p90"])


def _efficiency(table: Mapping[str, Any]) -> Efficiency:
    """Constants of one class from TOML; facts of the fit that no formula needs stay in the file."""
    known = {name: table[name] for name in Efficiency.__dataclass_fields__ if name in table}
    if "band" in known:
        known["band"] = tuple(float(end) for end in known["band"])
    return Efficiency(**known)


def _kernel_classes(machine: str) -> dict[str, Efficiency]:
    """Classes fitted to recorded kernels of one machine, the user's own first; empty where none were recorded."""
    path = next((file for place in _kernel_folders() if (file := place / f"{machine}.toml").is_file()), None)
    return {} if path is None else _read_kernels(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _read_kernels(path: Path, modified_ns: int) -> dict[str, Efficiency]:
    table = tomllib.loads(path.read_text("utf-8"))
    return {name: _efficiency(value) for name, value in table["op_class"].items()}


def _kernel_folders() -> tuple[Path, Path]:
    """Where `trimtab fit-stack --out` of a user may write, and what ships."""
    return home() / "kernels", data_root() / "kernels"


def kernel_machines() -> tuple[str, ...]:
    """Ids of the machines whose kernels were recorded and fitted."""
    return tuple(sorted({path.stem for place in _kernel_folders() for path in place.glob("*.toml")}))


def this_machine_path() -> Path:
    """File `trimtab calibrate` writes: tables ``[machine]``, ``[stack]`` and ``[native]``."""
    return home() / "this.toml"


def _this_tables() -> dict[str, Any]:
    path = this_machine_path()
    if not path.exists():
        raise SpecError(
            "This machine is not calibrated. Run `trimtab calibrate` (under a minute), or name one of `trimtab machines`."
        )
    return tomllib.loads(path.read_text("utf-8"))
