"""Recorded tables: what is packed is the published CSV to the byte; columns, origin and machine names are right."""

from __future__ import annotations

import csv
import importlib.util
import lzma
import time
from pathlib import Path

import numpy as np
import pytest

from trimtab.errors import SpecError
from trimtab.measure.recorded import tables as recorded
from trimtab.spec.machine import machine_ids

SHIPPED = ("gemm", "attention_prefill", "attention_decode", "moe", "collectives", "e2e_serving")


def test_what_ships() -> None:
    assert tuple(recorded.tables()) == SHIPPED
    assert {t.licence for t in recorded.tables().values()} == {"Apache-2.0"}
    assert all("NVIDIA" in t.copyright and "Apache License" in t.licence_text for t in recorded.tables().values())
    packed = [recorded.packed_path(name).stat().st_size for name in SHIPPED]
    assert sum(packed) < 2_000_000


def test_rows_of_what_ships() -> None:
    rows = {name: len(recorded.load_table(name)["device" if name != "e2e_serving" else "system"]) for name in SHIPPED}
    assert rows == {
        "gemm": 19_035,
        "attention_prefill": 9_438,
        "attention_decode": 10_000,
        "moe": 6_000,
        "collectives": 756,
        "e2e_serving": 532,
    }
    gemm = recorded.load_table("gemm")
    assert [gemm[name][0] for name in gemm] == ["a100_sxm", "vllm 0.14.0", "bfloat16", 1, 256, 512, 3.398]
    assert gemm["m"].dtype == np.int64 and gemm["lat_us"].dtype == np.float64


@pytest.mark.parametrize("name", SHIPPED)
def test_unpacked_equals_the_published_csv(name: str, shared_data: Path) -> None:
    path = shared_data / "analyze" / recorded.known_tables()[name].path
    assert recorded.unpack(name) == path.read_bytes()
    shipped, read = recorded.load_table(name), recorded.load_table(name, shared_data / "analyze")
    with path.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(shipped) == list(cells[0])
    for column, values in shipped.items():
        assert np.array_equal(values, read[column], equal_nan=values.dtype.kind == "f")
        if values.dtype.kind == "U":
            assert list(values) == [row[column] for row in cells]
        else:
            wanted = np.array([float(row[column] or "nan") for row in cells])
            assert np.array_equal(values.astype(float), wanted, equal_nan=True)


def test_packing_is_deterministic() -> None:
    text = recorded.unpack("collectives")
    packed = recorded.pack(text)
    assert packed == recorded.pack(
        text
    )  # another release of liblzma may choose other bytes, so the file is not compared
    assert lzma.decompress(packed) == text


def test_the_script_packs_and_checks(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("pack_recorded", repository / "scripts" / "pack_recorded.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder, out = tmp_path / "data", tmp_path / "packed"
    out.mkdir()
    for name in SHIPPED:
        path = folder / recorded.known_tables()[name].path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(recorded.unpack(name))
    assert script.main(folder, check=True) == 0
    csv_file = folder / recorded.known_tables()["moe"].path
    csv_file.write_bytes(csv_file.read_bytes().replace(b"61.747", b"61.748", 1))
    assert script.main(folder, check=True) == 1
    monkeypatch.setattr(script, "packed_path", lambda name: out / f"{name}.csv.xz")
    assert script.main(folder, check=False) == 0
    assert lzma.decompress((out / "gemm.csv.xz").read_bytes()) == recorded.unpack("gemm")


@pytest.mark.parametrize("name", SHIPPED)
def test_loading_takes_a_moment(name: str) -> None:
    recorded._packed_columns.cache_clear()
    best = min(_seconds(name) for _ in range(3))
    assert best < 0.3


def _seconds(name: str) -> float:
    recorded._packed_columns.cache_clear()
    start = time.perf_counter()
    recorded.load_table(name)
    return time.perf_counter() - start


def test_a_loaded_table_cannot_be_changed_for_others() -> None:
    columns = recorded.load_table("collectives")
    with pytest.raises(ValueError, match="read-only"):
        columns["lat_us"][0] = 0.0
    columns["lat_us"] = np.zeros(1)
    assert len(recorded.load_table("collectives")["lat_us"]) == 756


def test_devices_are_machines_of_the_catalogue() -> None:
    ids = set(machine_ids())
    for name in SHIPPED:
        columns = recorded.load_table(name)
        devices = np.unique(columns.get("device", columns.get("system")))
        assert {recorded.machine_id(device) for device in devices} <= ids
    assert set(recorded._facts()["machines"].values()) <= ids
    assert recorded.machine_id("a100_sxm") == "a100-sxm4-80gb"
    assert recorded.device_name("h100-sxm5-80gb") == "h100_sxm"
    assert recorded.machine_id("rtx-3070") == "rtx-3070"


def test_a_folder_adds_tables(shared_data: Path) -> None:
    folder = shared_data / "analyze"
    assert set(recorded.tables(folder)) == set(recorded.known_tables())
    assert len(recorded.load_table("llamacpp_llama3", folder)["tok_per_s"]) == 196
    assert len(recorded.load_table("megatron_a100_generation", folder)["seconds"]) == 1_080
    assert recorded.load_json("helm_inference", folder)["openai/davinci"]["runtime_per_output_token"] == 0.081


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"Unknown recorded table 'gem'. Did you mean 'gemm'\?"):
        recorded.load_table("gem")
    with pytest.raises(SpecError, match="It does not ship: give the folder"):
        recorded.load_table("llamacpp_llama3")
    with pytest.raises(SpecError, match="holds no recorded table. A data folder has files such as gpu_ops/gemm.csv"):
        recorded.load_table("gemm", tmp_path)
    (tmp_path / "gpu_ops").mkdir()
    for text in ("device,m\n", "device,m\na100\n", ""):
        (tmp_path / "gpu_ops" / "gemm.csv").write_text(text)
        with pytest.raises(SpecError, match="is not a table"):
            recorded.load_table("gemm", tmp_path)
    (tmp_path / "megatron_seqsel.json").write_text("{")
    with pytest.raises(SpecError, match="is not JSON"):
        recorded.load_json("megatron_seqsel", tmp_path)


def test_columns_take_the_narrowest_type() -> None:
    columns = recorded.read_columns("a,b,c,d\n1,1,x,1.5\n2,,y,2\n", "here")
    assert columns["a"].dtype == np.int64 and list(columns["a"]) == [1, 2]
    assert np.isnan(columns["b"][1]) and list(columns["c"]) == ["x", "y"] and list(columns["d"]) == [1.5, 2.0]
    assert list(recorded.select(columns, columns["a"] > 1)["c"]) == ["y"]
