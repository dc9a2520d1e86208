"""Reading a copy of aiconfigurator-core: a tiny wheel written here comes out as tables in Trimtab's layout."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import MissingDependency, SpecError
from trimtab.measure.recorded import import_aic as aic
from trimtab.measure.recorded.tables import load_table, tables

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")

_COMMON = {"framework": "VLLM", "version": "0", "device": "NVIDIA", "op_name": "x", "kernel_source": "fa3"}
_HEADS = {"num_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "beam_width": 1, "kv_cache_dtype": "bfloat16"}
_GEMM = {**_COMMON, "gemm_dtype": "bfloat16", "m": 1, "n": 256, "k": 512}
_MOE = {
    **_COMMON, "moe_dtype": "fp8", "num_tokens": 4, "hidden_size": 64, "inter_size": 128, "topk": 2, "num_experts": 8,
    "moe_tp_size": 1, "moe_ep_size": 2, "distribution": "balanced", "latency": 0.5,
}  # fmt: skip
_NCCL = {**_COMMON, "op_name": "all_gather", "nccl_dtype": "half", "num_gpus": 8, "message_size": 256, "latency": 0.009}
_PREFILL = {**_COMMON, **_HEADS, "batch_size": 2, "isl": 64, "attn_dtype": "bfloat16", "step": 0, "latency": 0.2}
_DECODE = {**_PREFILL, "isl": 1, "step": 31, "window_size": 128, "latency": 0.02}

_DATA = "aiconfigurator_core/systems/data"
FILES: dict[str, list[dict[str, Any]]] = {
    f"{_DATA}/h100_sxm/gemm/vllm/0.9.0/gemm_perf.parquet": [{**_GEMM, "latency": 9.0}],
    f"{_DATA}/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet": [
        {**_GEMM, "m": 2, "latency": 0.0061},
        {**_GEMM, "latency": 0.004},
        {**_GEMM, "latency": 0.002},  # measured three times: the median
        {**_GEMM, "latency": 0.0030004},
        {**_GEMM, "gemm_dtype": "int8_wo", "latency": 1.0},
        {**_GEMM, "n": 512, "latency": float("nan")},
        {**_GEMM, "n": 768, "latency": 0.0},
    ],
    f"{_DATA}/a100_sxm/gemm/sglang/0.5.10/gemm_perf.parquet": [{**_GEMM, "latency": 0.01}],
    f"{_DATA}/h100_sxm/attention/vllm/0.24.0/context_attention_perf.parquet": [
        _PREFILL,
        {**_PREFILL, "step": 32},
        {**_PREFILL, "attn_dtype": "fp8"},
        {**_PREFILL, "kv_cache_dtype": "int8"},
    ],
    f"{_DATA}/h100_sxm/attention/vllm/0.24.0/generation_attention_perf.parquet": [
        _DECODE,
        {**_DECODE, "beam_width": 4},
    ],
    f"{_DATA}/h100_sxm/moe/vllm/0.24.0/moe_perf.parquet": [_MOE, {**_MOE, "moe_dtype": "nvfp4"}],
    f"{_DATA}/h100_sxm/comm/nccl/2.29.2/nccl_perf.parquet": [_NCCL, {**_NCCL, "nccl_dtype": "int8"}],
}
SERVERS = """\
id,silicon_data_source,backend,backend_version,model_path,system,precision,mode,isl,osl,batch_size,tp_size,pp_size,\
attention_dp_size,moe_tp_size,moe_ep_size,silicon_ttft_ms,silicon_tpot_ms
a,dump; silicon_concurrency=64; measured=2026-04-17T00:00:00.000Z,vllm,0.19.0,org/m,h100_sxm,fp8,agg,1024,512,8,4,1,1,4,1,90.5,7.25
b,x,vllm,0.19.0,org/m,h100_sxm,fp8,disagg,1024,512,8,4,1,1,4,1,90.5,7.25
c,x,vllm,0.19.0,org/m,h100_sxm,fp8,agg,1024,512,16,4,1,,4,1,80.5,6.25
d,x,vllm,0.19.0,org/m,h100_sxm,fp8,agg,1024,512,16,4,1,,4,1,80.5,
e,x,vllm,0.19.0,org/m,b200_sxm,fp8,agg,1024,512,16,4,1,,4,1,80.5,6.25
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a few rows, with the older version of one table and files nobody asked for."""
    path = tmp_path_factory.mktemp("aic") / "aiconfigurator_core-0.12.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in FILES.items():
            archive.writestr(name, parquet(rows))
        archive.writestr("aiconfigurator_core/systems/silicon_sample.csv", SERVERS)
        archive.writestr(f"{_DATA}/h100_sxm/mla/vllm/0.24.0/context_mla_perf.parquet", b"not read")
        archive.writestr("aiconfigurator_core/__init__.py", "")
    return path


@needs_pyarrow
def test_a_wheel_becomes_a_data_folder(wheel: Path, tmp_path: Path) -> None:
    written = aic.import_aic(wheel, tmp_path / "out")
    assert {item.name: item.rows for item in written} == {
        "gemm": 3,
        "attention_prefill": 1,
        "attention_decode": 1,
        "moe": 1,
        "collectives": 1,
        "e2e_serving": 2,
    }
    assert set(tables(tmp_path / "out")) == {item.name for item in written}
    for item in written:  # the layout is that of what ships
        assert list(load_table(item.name, tmp_path / "out")) == list(load_table(item.name)), item.name
    gemm = load_table("gemm", tmp_path / "out")
    rows = list(zip(*(gemm[name].tolist() for name in gemm), strict=True))
    assert rows == [
        ("a100_sxm", "sglang 0.5.10", "bfloat16", 1, 256, 512, 10.0),
        ("h100_sxm", "vllm 0.24.0", "bfloat16", 1, 256, 512, 3.0),
        ("h100_sxm", "vllm 0.24.0", "bfloat16", 2, 256, 512, 6.1),
    ]
    decode = load_table("attention_decode", tmp_path / "out")
    assert (decode["ctx"][0], decode["window_size"][0], decode["lat_us"][0]) == (32, 128, 20.0)
    prefill = load_table("attention_prefill", tmp_path / "out")
    assert (prefill["ctx"][0], prefill["window_size"][0], prefill["lat_us"][0]) == (64, 0, 200.0)
    servers = load_table("e2e_serving", tmp_path / "out")
    assert list(servers["concurrency"]) == [64, 16] and list(servers["measured"]) == ["2026-04-17", ""]
    assert list(servers["silicon_tpot_ms"]) == [7.25, 6.25]


@needs_pyarrow
def test_an_unpacked_folder_is_the_same(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    aic.import_aic(wheel, tmp_path / "a")
    for source in (tmp_path / "unpacked", tmp_path / "unpacked" / "aiconfigurator_core"):
        aic.import_aic(source, tmp_path / "b")
        for name, table in tables(tmp_path / "a").items():
            assert (tmp_path / "a" / table.path).read_bytes() == (tmp_path / "b" / table.path).read_bytes(), name


@needs_pyarrow
@pytest.mark.parametrize("name", ["a100", "A100-SXM4-80GB", "a100_sxm"])
def test_a_device_by_any_of_its_names(wheel: Path, tmp_path: Path, name: str) -> None:
    written = aic.import_aic(wheel, tmp_path, [name])
    assert [(item.name, item.rows, item.devices) for item in written] == [("gemm", 1, ("a100_sxm",))]


@needs_pyarrow
def test_what_is_wrong_with_a_wheel_is_said(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="Unknown device 'l40s'. Known: a100_sxm, h100_sxm"):
        aic.import_aic(wheel, tmp_path, ["l40s"])
    with pytest.raises(SpecError, match="is neither a wheel nor a folder"):
        aic.import_aic(tmp_path / "absent.whl", tmp_path)
    with pytest.raises(SpecError, match="has no systems/data/DEVICE"):
        aic.import_aic(tmp_path, tmp_path)
    broken = tmp_path / "systems/data/l40s/gemm/vllm/1.0/gemm_perf.parquet"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(parquet([{"gemm_dtype": "fp8", "m": 1}]))
    with pytest.raises(SpecError, match=r"gemm_perf.parquet of l40s \(vllm 1.0\) has no column 'n'"):
        aic.import_aic(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_pyarrow
def test_the_verb(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = _command()
    command([str(wheel), "--out", str(tmp_path), "--device", "h100", "--json"], standalone_mode=False)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["schema"] == 1 and found["tables"][0]["rows"] == 2
    assert "gemm: 2 rows" in printed.err
    command([str(wheel), "--out", str(tmp_path)], standalone_mode=False)
    assert "trimtab validate --data" in capsys.readouterr().out


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependency, match=r'pip install "trimtab\[aic\]"'):
        aic.import_aic(tmp_path, tmp_path)


def test_versions_are_compared_as_versions() -> None:
    order = [
        "0.1.dev19262",
        "0.5.6",
        "0.5.6.post2",
        "0.5.14",
        "1.0.0",
        "1.3.0rc9",
        "1.3.0rc20",
        "1.3.0",
        "1.3.1",
        "2.23",
        "2.27.3",
    ]
    assert sorted(reversed(order), key=aic._version) == order


def test_equal_shapes_become_their_median() -> None:
    keys = {"a": np.array(["y", "x", "y", "x", "x"]), "b": np.array([1, 2, 1, 2, 3])}
    found, values = aic._median_of_equal(keys, np.array([5.0, 1.0, 7.0, 2.0, 9.0]))
    assert list(found["a"]) == ["x", "x", "y"] and list(found["b"]) == [2, 3, 1]
    assert list(values) == [1.5, 9.0, 6.0]
    assert aic._median_of_equal(keys, np.array([]))[1].size == 0


def test_servers_read_concurrency_and_date_from_their_source() -> None:
    columns = aic._servers(SERVERS, {"h100_sxm"})
    assert list(columns["concurrency"]) == ["64", "16"] and list(columns["attention_dp_size"]) == ["1", ""]


def _command() -> Any:
    import typer

    from trimtab.cli.import_aic import register

    app = typer.Typer()
    register(app)
    return typer.main.get_command(app)
