"""Classes of recorded kernels: which table holds them, what a row's sizes are, and which form prices them.

`held_out` says which rows no fit may see, from the sizes alone: a fit and whoever checks it agree without sharing state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import HardwareError, SpecError, unknown
from trimtab.predict.forms import FORMS, Device, distinct_experts
from trimtab.spec.machine import Machine

Columns = Mapping[str, npt.NDArray[Any]]
Mask = npt.NDArray[np.bool_]

#: Names of dtypes in the tables -> suffix of the op class and dtype of the peak.
_DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block"}
_ITEM_BYTES = {"bfloat16": 2, "fp8": 1, "fp8_block": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelClass:
    """One class of op as it was recorded.

    Args:
        name: of the class without its dtype, as stacks spell it.
        table: recorded table that holds its rows.
        form: a name of `predict.forms.FORMS`.
        keys: columns whose combinations are held out as a whole.
        variant: column of the dtype, and what a missing suffix stands for; None = one class whatever the dtype.
        columns: further columns that are needed.
        sizes: arguments of the form, from columns.
        work: (flops, bytes) that no kernel can avoid, from columns.
        only: column and value that pick the rows of the class.
        ranges: constant -> (start, least, most) of the fit; a constant that is missing has its `RANGES`.
        choices: constants that take one of a few values.
        few: True where tables hold so few different sizes that a coin per size may leave one side of a split empty.
    """

    name: str
    table: str
    form: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    sizes: Callable[[Columns], dict[str, Any]]
    work: Callable[[Columns], tuple[Any, Any]]
    variant: str | None = None
    plain: str = ""
    only: tuple[str, str] | None = None
    ranges: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    choices: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    few: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """All columns a table of this class must have."""
        named = (self.variant,) if self.variant else ()
        picked = (self.only[0],) if self.only else ()
        return ("device", "stack", *named, *picked, *self.keys, *self.columns, "lat_us")

    def variants(self, columns: Columns) -> dict[str, Mask]:
        """Op class -> its rows."""
        rows = np.ones(len(columns["lat_us"]), bool)
        if self.only:
            rows = columns[self.only[0]] == self.only[1]
        if not self.variant:
            return {self.name: rows}
        dtypes = columns[self.variant].astype(str)
        found = {}
        for dtype in np.unique(dtypes[rows]):
            if dtype not in _DTYPES:
                raise unknown(f"{self.variant} in {self.table}", str(dtype), _DTYPES)
            suffix = _DTYPES[dtype]
            found[self.name if suffix == self.plain else f"{self.name}.{suffix}"] = rows & (dtypes == dtype)
        return found

    def device(self, machine: Machine, op_class: str) -> Device:
        """What the form needs to know of a machine.

        Raises:
            HardwareError: the machine's entry lacks its units or its link.
        """
        if self.form == "collective":
            if machine.link_bytes_per_s_per_dir is None:
                raise HardwareError(f"{machine.id} has no link rate. Add link_bytes_per_s_per_dir to its TOML entry.")
            return Device(1.0, machine.link_bytes_per_s_per_dir)
        if machine.units is None:
            raise HardwareError(
                f"{machine.id} has no number of units (multiprocessors, cores). Add `units` to its TOML."
            )
        # Attention multiplies 16-bit queries whatever the cache holds.
        dtype = "bf16" if self.name.startswith("attention") else op_class.partition(".")[2].partition("_")[0] or "bf16"
        return Device(
            machine.peak(dtype)[0], machine.memory_bandwidth_bytes_per_s, float(machine.llc_bytes or 0), machine.units
        )

    def price(self, columns: Columns, device: Device) -> Callable[[Mapping[str, float]], npt.NDArray[np.float64]]:
        """Seconds of rows as a function of the constants."""
        sizes, form = self.sizes(columns), FORMS[self.form].function
        if self.form == "collective":
            return lambda c: form(link_bytes_per_s=device.bandwidth_bytes_per_s, c=c, **sizes)
        return lambda c: form(device=device, c=c, **sizes)

    def roofline(self, columns: Columns, device: Device) -> Callable[[Mapping[str, float]], npt.NDArray[np.float64]]:
        """Seconds of rows by the plain roofline, as a function of its three constants."""
        flops, nbytes = self.work(columns)
        return lambda c: FORMS["roofline"].function(flops, nbytes, device, c)


def held_out(columns: Columns, op_class: str, seed: int = 0) -> Mask:
    """Rows that a fit with this seed does not see: about half, whole sizes at a time.

    A hash of the sizes (`KernelClass.keys`) and the seed decides, so rows of one model's matrix never stand on both sides,
    and the answer needs nothing but the row. Only for a class of `few` sizes (MoE) neighbours in size are paired and the hash
    holds out one of each pair, so there the answer depends on which sizes the table holds.

    Args:
        columns: a recorded table of the class, or any rows of it.
        op_class: ``gemm``, ``gemm.fp8``, ``attention_decode``, ...
        seed: which of the splits.
    """
    kind = kernel_class(op_class)
    sizes = np.stack([np.asarray(columns[key]).astype(np.int64) for key in kind.keys], axis=1)
    distinct, of_row = np.unique(sizes, axis=0, return_inverse=True)
    hashes = np.array([_hash(kind.table, seed, row) for row in distinct.tolist()])
    hidden = hashes % 2 == 1
    if kind.few:
        hidden[1::2] = ~hidden[: len(distinct) // 2 * 2 : 2]
    return hidden[of_row.reshape(-1)]


def _hash(table: str, seed: int, sizes: list[int]) -> int:
    text = f"{table}/{seed}/{'/'.join(map(str, sizes))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def kernel_class(op_class: str) -> KernelClass:
    """Class by name, dtype or not.

    Raises:
        SpecError: no recorded class of that name.
    """
    name = op_class.partition(".")[0]
    found = next((kind for kind in KERNEL_CLASSES if kind.name == name), None)
    if found is None:
        raise unknown("op class", op_class, (kind.name for kind in KERNEL_CLASSES))
    return found


def check_columns(kind: KernelClass, columns: Columns, origin: str) -> None:
    """Refuse a table that lacks a column of the class, or whose latencies are no times.

    Raises:
        SpecError: which column is missing or wrong.
    """
    missing = [name for name in kind.needed if name not in columns]
    if missing:
        raise SpecError(
            f"{origin} lacks {'the column' if len(missing) == 1 else 'the columns'} {', '.join(missing)}. "
            f"Needed: {', '.join(kind.needed)}."
        )
    latency = columns["lat_us"]
    if latency.dtype.kind not in "iuf" or not np.all(np.isfinite(latency) & (latency > 0)):
        raise SpecError(f"{origin} has latencies that are no positive numbers. lat_us is in microseconds.")


def _gemm_sizes(t: Columns) -> dict[str, Any]:
    item = _items(t, "gemm_dtype")
    m, n, k = _real(t, "m", "n", "k")
    return {"m": m, "n": n, "k": k, "weight_bytes": n * k * item, "io_bytes": m * k * item + 2 * m * n}


def _gemm_work(t: Columns) -> tuple[Any, Any]:
    sizes = _gemm_sizes(t)
    return 2 * sizes["m"] * sizes["n"] * sizes["k"], sizes["weight_bytes"] + sizes["io_bytes"]


def _windows(t: Columns) -> Any:
    """Keys a query sees at most; the tables write 0 where there is no window."""
    (window,) = _real(t, "window_size")
    return np.where(window > 0, window, np.inf)


def _attention_sizes(t: Columns) -> dict[str, Any]:
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim")
    batch, heads, kv_heads, head_dim = _real(t, *names)
    shared = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": _windows(t)}
    return shared | {"kv_item_bytes": _items(t, "kv_cache_dtype")}


def _prefill_sizes(t: Columns) -> dict[str, Any]:
    return _attention_sizes(t) | {"new": _real(t, "ctx")[0], "past": 0.0}


def _prefill_work(t: Columns) -> tuple[Any, Any]:
    s = _prefill_sizes(t)
    new, window = s["new"], np.minimum(s["window"], s["new"])
    pairs = window * (window + 1) / 2 + (new - window) * window
    rows = s["batch"] * s["head_dim"]
    return 4 * rows * s["heads"] * pairs, rows * new * (4 * s["heads"] + 2 * s["kv_heads"] * s["kv_item_bytes"])


def _decode_sizes(t: Columns) -> dict[str, Any]:
    return _attention_sizes(t) | {"keys": _real(t, "ctx")[0]}


def _decode_work(t: Columns) -> tuple[Any, Any]:
    s = _decode_sizes(t)
    seen = np.minimum(s["keys"], s["window"])
    rows = s["batch"] * s["head_dim"]
    return 4 * rows * s["heads"] * seen, rows * (4 * s["heads"] + 2 * s["kv_heads"] * s["kv_item_bytes"] * seen)


def _moe_sizes(t: Columns) -> dict[str, Any]:
    tokens, hidden, inter, topk, experts = _real(t, "num_tokens", "hidden_size", "inter_size", "topk", "num_experts")
    tp, ep = _real(t, "moe_tp_size", "moe_ep_size")
    inter = inter / tp
    return {
        "tokens": tokens,
        "hidden": hidden,
        "inter": inter,
        "topk": topk,
        "num_experts": experts,
        "weight_bytes_per_expert": 3 * hidden * inter * _items(t, "moe_dtype"),
        "expert_ranks": ep,
        "skewed": np.char.startswith(t["distribution"].astype(str), "power_law").astype(float),
    }


def _moe_work(t: Columns) -> tuple[Any, Any]:
    s = _moe_sizes(t)
    ranks, hidden, inter = s["expert_ranks"], s["hidden"], s["inter"]
    picks = s["tokens"] * s["topk"] / ranks
    touched = distinct_experts(s["tokens"], s["topk"], s["num_experts"]) / ranks
    return 6 * picks * hidden * inter, touched * s["weight_bytes_per_expert"] + 4 * s["tokens"] * hidden / ranks


def _collective_sizes(kind: str) -> Callable[[Columns], dict[str, Any]]:
    def sizes(t: Columns) -> dict[str, Any]:
        elements, ranks = _real(t, "message_size", "num_gpus")
        return {"kind": kind, "nbytes": 2 * elements, "ranks": ranks}  # message_size counts 16-bit elements

    return sizes


def _collective_work(kind: str) -> Callable[[Columns], tuple[Any, Any]]:
    def work(t: Columns) -> tuple[Any, Any]:
        elements, ranks = _real(t, "message_size", "num_gpus")
        return 0.0 * elements, (2 if kind == "all_reduce" else 1) * 2 * elements * (ranks - 1) / ranks

    return work


def _items(t: Columns, column: str) -> Any:
    return np.array([_ITEM_BYTES[str(name)] for name in t[column]], np.float64)


def _real(t: Columns, *names: str) -> tuple[Any, ...]:
    return tuple(np.asarray(t[name], np.float64) for name in names)


#: Constant -> (start, least, most) of every fit.
RANGES: dict[str, tuple[float, float, float]] = {
    "compute_efficiency": (0.8, 0.2, 1.0),
    "bandwidth_efficiency": (0.8, 0.25, 1.0),
    "launch_s": (5e-6, 1e-7, 6e-5),
    "sharpness": (3.0, 1.0, 10.0),
    "step_s": (5e-10, 1e-12, 2e-8),
    "edge_s": (5e-12, 1e-15, 5e-10),
    "wave_s": (5e-7, 1e-9, 2e-5),
    "split_s": (5e-7, 1e-9, 2e-5),
    "input_bytes": (0.3, 1e-3, 50.0),
    "output_bytes": (0.3, 1e-3, 50.0),
    "cache_saving": (0.3, 0.01, 0.9),
    "cache_share": (0.5, 0.05, 2.0),
    "tile_s": (5e-7, 1e-9, 5e-5),
    "key_s": (5e-9, 1e-12, 5e-7),
    "tail": (0.5, 0.01, 1.0),
    "kv_passes": (1.2, 1.0, 10.0),
    "part_s": (5e-7, 1e-9, 5e-5),
    "element_s": (5e-11, 1e-13, 1e-8),
    "combine_s": (2e-6, 1e-8, 2e-5),
    "sequence_s": (1e-9, 1e-12, 1e-6),
    "padding": (0.5, 1e-3, 2.0),
    "passes": (2.0, 1e-3, 50.0),
    "pick_s": (1e-10, 1e-12, 1e-6),
    "rank_skew": (0.7, 1e-3, 5.0),
    "hop_s": (1e-6, 1e-8, 5e-5),
    "kept": (0.9, 1e-3, 1.0),
    "contention": (0.1, 1e-3, 4.0),
}

_ATTENTION = {
    "keys": ("num_heads", "num_key_value_heads", "head_dim"),
    "columns": ("batch_size", "ctx", "window_size"),
    "variant": "kv_cache_dtype",
    "plain": "bf16",
}

KERNEL_CLASSES: tuple[KernelClass, ...] = (
    KernelClass(
        name="gemm",
        table="gemm",
        form="gemm",
        keys=("n", "k"),
        columns=("m",),
        variant="gemm_dtype",
        sizes=_gemm_sizes,
        work=_gemm_work,
    ),
    KernelClass(
        name="attention_prefill",
        table="attention_prefill",
        form="prefill_attention",
        sizes=_prefill_sizes,
        work=_prefill_work,
        **_ATTENTION,
    ),
    KernelClass(
        name="attention_decode",
        table="attention_decode",
        form="decode_attention",
        sizes=_decode_sizes,
        work=_decode_work,
        choices={"windows_ungrouped": (0.0, 1.0)},
        **_ATTENTION,
    ),
    KernelClass(
        name="moe",
        table="moe",
        form="moe",
        keys=("hidden_size", "inter_size", "topk", "num_experts"),
        columns=("num_tokens", "moe_tp_size", "moe_ep_size", "distribution"),
        variant="moe_dtype",
        sizes=_moe_sizes,
        work=_moe_work,
        ranges={"launch_s": (1.5e-5, 1e-7, 1e-4)},
        few=True,
    ),
    *(
        KernelClass(
            name=name,
            table="collectives",
            form="collective",
            keys=("message_size",),
            columns=("num_gpus",),
            only=("op_name", recorded),
            sizes=_collective_sizes(name),
            work=_collective_work(name),
            ranges={
                "sharpness": (0.6, 0.3, 4.0),
                "bandwidth_efficiency": (0.8, 1e-3, 1.0),
                "launch_s": (5e-6, 5e-7, 1e-4),
            },
        )
        for name, recorded in (
            ("all_reduce", "all_reduce"),
            ("all_gather", "all_gather"),
            ("reduce_scatter", "reduce_scatter"),
            ("all_to_all", "alltoall"),
        )
    ),
)
