"""Read a user's own copy of the aiconfigurator-core tables into the layout of Trimtab's recorded tables.

Inside the wheel lie `systems/data/<device>/<op>/<framework>/<version>/*_perf.parquet` (latency in milliseconds) and
`systems/silicon_sample.csv` (whole servers). Of every framework the newest version of a device is taken. Latencies become
microseconds, shapes measured twice their median. Needs pyarrow, which no other part of Trimtab needs.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import MissingDependency, SpecError, unknown
from trimtab.measure.recorded.tables import Columns, device_name, known_tables, select
from trimtab.spec.machine import aliases, machine_ids

INSTALL = 'pip install "trimtab[aic]"'

_DATA, _SERVERS = "systems/data/", "systems/silicon_sample.csv"


@dataclass(frozen=True, slots=True)
class Imported:
    """A table that was written: its name, file, rows, and the devices in it."""

    name: str
    path: Path
    rows: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """One parquet file: where it lies and what its path says."""

    device: str
    framework: str
    version: str
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How parquet columns become those of a recorded table.

    Args:
        file: name of the parquet file.
        keys: columns besides device and stack, in order, as (ours, theirs).
        keep: rows taken, from the parquet columns.
        derive: columns of ours that no single column of theirs holds.
    """

    file: str
    keys: tuple[tuple[str, str], ...]
    keep: Callable[[Columns], npt.NDArray[np.bool_]]
    derive: Callable[[Columns], Columns] = lambda columns: {}


def _one_of(column: str, *values: str) -> Callable[[Columns], npt.NDArray[np.bool_]]:
    return lambda columns: np.isin(columns[column], values)


def _attention(columns: Columns) -> npt.NDArray[np.bool_]:
    """Queries in 16 bits, a cache in 16 or 8, no beams."""
    queries = np.isin(columns["attn_dtype"], ("bfloat16", "float16"))
    return queries & np.isin(columns["kv_cache_dtype"], ("bfloat16", "fp8")) & (columns["beam_width"] == 1)


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


_HEADS = _same("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype")
_ATTENTION_KEYS = (*_same("kernel_source", "batch_size"), ("ctx", "ctx"), *_HEADS)

_LAYOUTS = {
    "gemm": _Layout(
        file="gemm_perf.parquet",
        keys=_same("gemm_dtype", "m", "n", "k"),
        keep=_one_of("gemm_dtype", "bfloat16", "fp8"),
    ),
    "attention_prefill": _Layout(
        file="context_attention_perf.parquet",
        keys=_ATTENTION_KEYS,
        keep=lambda columns: _attention(columns) & (columns["step"] == 0),
        derive=lambda columns: {"ctx": columns["isl"]},
    ),
    "attention_decode": _Layout(
        file="generation_attention_perf.parquet",
        keys=_ATTENTION_KEYS,
        keep=_attention,
        derive=lambda columns: {"ctx": columns["isl"] + columns["step"]},
    ),
    "moe": _Layout(
        file="moe_perf.parquet",
        keys=_same(
            "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts",
            "moe_tp_size", "moe_ep_size", "distribution",
        ),
        keep=_one_of("moe_dtype", "bfloat16", "fp8", "fp8_block"),
    ),
    "collectives": _Layout(
        file="nccl_perf.parquet",
        keys=_same("op_name", "num_gpus", "message_size"),
        keep=_one_of("nccl_dtype", "half"),
    ),
}  # fmt: skip

#: Columns of e2e_serving.csv after the first ones, as they are named in silicon_sample.csv.
_SERVER_COLUMNS = (
    "model_path", "system", "backend", "backend_version", "precision", "isl", "osl", "concurrency", "tp_size", "pp_size",
    "attention_dp_size", "moe_tp_size", "moe_ep_size", "silicon_ttft_ms", "silicon_tpot_ms", "measured",
)  # fmt: skip


def import_aic(
    source: str | Path,
    out: str | Path,
    devices: Sequence[str] = (),
    progress: Callable[[str, int], None] = lambda name, rows: None,
) -> list[Imported]:
    """Write the tables of a wheel or an unpacked folder as CSV files.

    Args:
        source: the wheel (a zip), or a folder that holds `systems/data` or `aiconfigurator_core/systems/data`.
        out: folder the files go to, laid out like a `--data` folder; created if absent.
        devices: machine ids, aliases or the tables' own names (`h100_sxm`); empty = all.
        progress: called with a table's name and its rows after each.

    Raises:
        MissingDependency: pyarrow is not installed.
        SpecError: no such source, nothing to read in it, an unknown device, or a file without the columns expected.
    """
    _pyarrow()
    files = _files(Path(source).expanduser())
    wanted = _devices(devices, files)
    folder = Path(out).expanduser()
    written = []
    for name, layout in _LAYOUTS.items():
        sources = [item for item in _sources(files, layout.file) if item.device in wanted]
        parts = [_read(item, layout) for item in sources]
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
        if len(columns.get("lat_us", ())):
            written.append(_write(name, folder, columns))
            progress(name, written[-1].rows)
    servers = files.get(_SERVERS)
    if servers is not None:
        columns = _servers(servers().decode("utf-8"), wanted)
        if len(columns["system"]):
            written.append(_write("e2e_serving", folder, columns))
            progress("e2e_serving", written[-1].rows)
    if not written:
        raise SpecError(
            f"{source} holds no rows for {', '.join(sorted(wanted))}. Name another device, or none for all."
        )
    return written


# ------------------------------------------------------------------------------------------------------------- sources


def _pyarrow() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingDependency(f"Reading parquet files needs pyarrow. Install it: {INSTALL}") from None


def _files(source: Path) -> dict[str, Callable[[], bytes]]:
    """Path from `systems/` on -> reader, of every table."""
    if source.is_dir():
        names = [(path.relative_to(source).as_posix(), path.read_bytes) for path in sorted(source.rglob("*.*"))]
    elif zipfile.is_zipfile(source):
        archive = zipfile.ZipFile(source)
        names = [(name, lambda name=name: archive.read(name)) for name in archive.namelist()]
    else:
        raise SpecError(
            f"{source} is neither a wheel nor a folder. Get one: pip download --no-deps aiconfigurator-core"
        )
    found = {}
    for name, read in names:
        at = name.find("systems/")
        if at >= 0 and (name.endswith(("_perf.parquet", _SERVERS))):
            found[name[at:]] = read
    if not any(name.startswith(_DATA) for name in found):
        raise SpecError(f"{source} has no systems/data/DEVICE/OP/FRAMEWORK/VERSION/*_perf.parquet inside.")
    return found


def _devices(asked: Sequence[str], files: Iterable[str]) -> set[str]:
    there = {name.split("/")[2] for name in files if name.startswith(_DATA)}
    if not asked:
        return there
    short, known = aliases(), machine_ids()
    found = set()
    for name in asked:
        key = short.get(name.lower(), name.lower())
        device = name if name in there else device_name(key) if key in known else name
        if device not in there:
            raise unknown("device", name, there, "A machine id or alias of `trimtab machines` will do as well.")
        found.add(device)
    return found


def _sources(files: Mapping[str, Callable[[], bytes]], file: str) -> list[_Source]:
    """The newest version of each framework on each device, among the files of that name."""
    newest: dict[tuple[str, str], _Source] = {}
    for name, read in files.items():
        parts = name.split("/")
        if parts[-1] != file or len(parts) != 7:  # systems data DEVICE OP FRAMEWORK VERSION FILE
            continue
        item = _Source(parts[2], parts[4], parts[5], read)
        other = newest.get((item.device, item.framework))
        if other is None or _version(item.version) > _version(other.version):
            newest[item.device, item.framework] = item
    return [newest[key] for key in sorted(newest)]


def _version(text: str) -> tuple[tuple[int, int], ...]:
    """Order of versions: numbers as numbers; `1.3.0rc20` before `1.3.0`."""
    marks = {"": 0, "dev": -3, "rc": -2, "post": 1}
    parts = [
        (marks.get(word, -1), int(number or 0)) for word, number in re.findall(r"([a-z]*)(\d*)", text) if word or number
    ]
    return (*parts, (0, -1))  # the end stands after a pre-release mark and before everything else


# ---------------------------------------------------------------------------------------------------------------- rows


def _read(source: _Source, layout: _Layout) -> Columns:
    table = _pyarrow().read_table(io.BytesIO(source.read()))
    theirs = {name: _array(table.column(name)) for name in table.column_names}
    theirs.setdefault("window_size", np.zeros(table.num_rows, np.int64))  # older collectors knew no windows
    try:
        theirs = select(theirs, layout.keep(theirs))
        theirs |= layout.derive(theirs)
        keys = {ours: theirs[name] for ours, name in layout.keys}
        latency_us = 1e3 * theirs["latency"].astype(float)
    except KeyError as error:
        raise SpecError(
            f"{layout.file} of {source.device} ({source.framework} {source.version}) has no column {error}. "
            f"Its columns: {', '.join(table.column_names)}."
        ) from None
    good = np.isfinite(latency_us) & (latency_us > 0)
    keys, latency_us = _median_of_equal(select(keys, good), latency_us[good])
    rows = len(latency_us)
    stack = f"{source.framework} {source.version}"
    return {
        "device": np.full(rows, source.device),
        "stack": np.full(rows, stack),
        **keys,
        "lat_us": latency_us.round(3),
    }


def _array(column: Any) -> npt.NDArray[Any]:
    values = column.to_numpy(zero_copy_only=False) if hasattr(column, "num_chunks") else np.asarray(column)
    return values.astype(str) if values.dtype == object else values


def _median_of_equal(keys: Columns, values: npt.NDArray[np.float64]) -> tuple[Columns, npt.NDArray[np.float64]]:
    """One row per distinct key, sorted by key, with the median of its values."""
    if not len(values):
        return keys, values
    codes = [np.unique(column, return_inverse=True)[1] for column in keys.values()]
    order = np.lexsort((values, *reversed(codes)))
    sorted_codes = np.stack([code[order] for code in codes])
    starts = np.flatnonzero(np.concatenate([[True], (sorted_codes[:, 1:] != sorted_codes[:, :-1]).any(0)]))
    counts = np.diff(np.append(starts, len(values)))
    ordered = values[order]  # ascending inside a group, so the median is one or two places
    median = 0.5 * (ordered[starts + (counts - 1) // 2] + ordered[starts + counts // 2])
    return {name: column[order][starts] for name, column in keys.items()}, median


def _servers(text: str, devices: set[str]) -> Columns:
    """Servers whose prefill and decode share the GPUs; concurrency and date are facts of the free-text source column."""
    rows = []
    for row in csv.DictReader(io.StringIO(text)):
        if (
            row["system"] not in devices
            or row["mode"] != "agg"
            or not (row["silicon_ttft_ms"] and row["silicon_tpot_ms"])
        ):
            continue
        facts = dict(re.findall(r"(\w+)=([^;]*)", row["silicon_data_source"]))
        row["concurrency"] = facts.get("silicon_concurrency", row["batch_size"])
        row["measured"] = facts.get("measured", "")[:10]
        rows.append(row)
    return {name: np.array([row.get(name, "") for row in rows], dtype=str) for name in _SERVER_COLUMNS}


def _write(name: str, folder: Path, columns: Columns) -> Imported:
    path = folder / known_tables()[name].path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    partial.replace(path)
    device = columns["system" if "system" in columns else "device"]
    return Imported(name, path, len(device), tuple(sorted(set(device.tolist()))))
