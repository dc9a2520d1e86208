"""The catalogues: every figure has a source, every name is unique, parameter counts equal the published ones."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimtab.data import root
from trimtab.spec.configs import active_parameters, load_spec
from trimtab.spec.machine import OP_CLASSES, Machine, load_machine, load_stack

DTYPES = {"fp32", "fp16", "bf16", "fp8", "int8", "int4", "fp4"}
CONFIDENCE = {"high", "med", "low"}


def machine_tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted((root() / "machines").glob("*.toml")):
        added = tomllib.loads(path.read_text("utf-8"))
        assert not tables.keys() & added.keys(), f"{path.name} repeats an id"
        tables |= added
    return tables


def model_tables() -> dict[str, dict[str, Any]]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return {
        path.stem: json.loads(path.read_text("utf-8"), parse_constant=refuse)
        for path in sorted((root() / "models").glob("*.json"))
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


MACHINES = machine_tables()
MODELS = model_tables()
PAPERS: list[dict[str, Any]] = tomllib.loads((root().parent / "papers" / "catalogue.toml").read_text("utf-8"))["paper"]


# ---- machines ------------------------------------------------------------------------------------------------------


def test_the_catalogue_holds_78_machines() -> None:
    assert len(MACHINES) == 78
    assert {"rtx-3070", "rtx-3080"} <= MACHINES.keys()
    assert "ci-2core" not in MACHINES  # the machine at hand is calibrated, never assumed


@pytest.mark.parametrize("key", MACHINES)
def test_every_number_has_a_source_and_a_confidence(key: str) -> None:
    table = MACHINES[key]
    assert table["source"] and table["confidence"] in CONFIDENCE
    facts = set(table) | {f"flops_per_s.{dtype}" for dtype in table["flops_per_s"]}
    for field, text in table.get("sources", {}).items():
        confidence, _, source = text.partition(": ")
        assert field in facts, f"{key} gives a source for a field it does not have: {field}"
        assert confidence in CONFIDENCE and source, f"{key}.{field}: write 'confidence: source'"


@pytest.mark.parametrize("key", MACHINES)
def test_a_machine_loads_and_nothing_unknown_is_zero(key: str) -> None:
    table = MACHINES[key]
    assert table.keys() <= (Machine.__dataclass_fields__.keys() - {"id"}), "a field that no program reads"
    machine = load_machine(key)
    assert machine.id == key and machine.flops_per_s and machine.flops_per_s.keys() <= DTYPES
    numbers = [value for value in (*table.values(), *table["flops_per_s"].values()) if isinstance(value, int | float)]
    assert all(value > 0 for value in numbers)
    assert isinstance(machine.memory_bytes, int)
    # 0.1 (Raspberry Pi 4) .. 21e6 GB/s (wafer SRAM): catches a figure in GB/s or GiB that was not scaled
    assert 1e9 < machine.memory_bandwidth_bytes_per_s < 1e17
    assert all(1e10 < rate < 1e17 for rate in machine.flops_per_s.values())


def test_prices_say_what_they_are() -> None:
    for key, table in MACHINES.items():
        for field in ("usd_per_h", "list_usd"):
            assert field not in table or field in table["sources"], f"{key}.{field} needs its own source"


def test_machine_aliases_are_unique_and_fixed() -> None:
    aliases = [alias for table in MACHINES.values() for alias in table["aliases"]]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & MACHINES.keys()
    expected = {
        "a100": "a100-sxm4-80gb", "h100": "h100-sxm5-80gb", "h200": "h200-sxm-141gb", "b200": "b200-sxm-180gb",
        "4090": "rtx-4090", "3090": "rtx-3090", "3080": "rtx-3080", "3070": "rtx-3070", "a6000": "rtx-a6000",
        "v100": "v100-sxm2-32gb", "m1": "m1-7c", "rpi5": "rpi5-8gb",
    }  # fmt: skip
    assert {alias: load_machine(alias).id for alias in expected} == expected
    assert load_machine("L40S").id == "l40s" and load_machine("t4").id == "t4" and load_machine("mi300x").id == "mi300x"


def test_machines_equal_the_compiled_table(shared_data: Path) -> None:
    columns = {
        "memory_bytes": ("mem_gb", 1e9), "memory_bandwidth_bytes_per_s": ("mem_bw_gbs", 1e9),
        "llc_bytes": ("llc_mb", 1e6), "llc_bandwidth_bytes_per_s": ("llc_bw_gbs", 1e9),
        "tier2_bytes": ("tier2_mem_gb", 1e9), "tier2_bandwidth_bytes_per_s": ("tier2_bw_gbs", 1e9),
        "link_bytes_per_s_per_dir": ("link_gbs_per_dir", 1e9), "host_bytes_per_s_per_dir": ("host_gbs_per_dir", 1e9),
        "tdp_w": ("tdp_w", 1), "list_usd": ("list_usd", 1), "usd_per_h": ("usd_hour", 1), "year": ("year", 1),
    }  # fmt: skip
    for row in read_csv(shared_data / "analyze" / "hardware.csv"):
        if row["id"] == "ci-2core":
            continue
        table = MACHINES[row["id"]]
        for field, (column, scale) in columns.items():
            asked = float(row[column]) * scale if row[column] else None
            assert table.get(field) == (pytest.approx(asked, rel=1e-12) if asked else None), (row["id"], field)
        for dtype in DTYPES:
            if (row["id"], dtype) == ("xeon-8480p", "fp16"):
                continue  # the table gives the AMX bf16 rate, but AMX of that part has no fp16
            text = row.get(f"{dtype}_tflops") or row.get(f"{dtype}_tops")
            asked = pytest.approx(float(text) * 1e12, rel=1e-12) if text else None
            assert table["flops_per_s"].get(dtype) == asked, (row["id"], dtype)


# ---- models --------------------------------------------------------------------------------------------------------

#: Parameter counts as published: safetensors headers on the Hugging Face Hub, or the instantiated transformers model.
PUBLISHED = {
    "bloom-176b": 176_247_271_424, "bloom-560m": 559_214_592, "bloom-7b1": 7_069_016_064,
    "deepseek-v3": 671_026_419_200, "gemma-2-27b": 27_227_128_320, "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984, "gemma-3-1b": 999_885_952, "gpt2": 124_439_808, "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168, "gpt2-xl": 1_557_611_200, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616, "llama-3-70b": 70_553_706_496, "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800, "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "mixtral-8x22b": 140_620_634_112, "mixtral-8x7b": 46_702_792_704,
    "opt-1.3b": 1_315_758_080, "opt-125m": 125_239_296, "opt-13b": 12_853_473_280, "opt-2.7b": 2_651_596_800,
    "opt-30b": 29_974_540_288, "opt-6.7b": 6_658_473_984, "phi-2": 2_779_683_840, "phi-3-mini-128k": 3_821_079_552,
    "phi-3-mini-4k": 3_821_079_552, "qwen1.5-moe-a2.7b": 14_315_784_192, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-72b": 72_706_203_648, "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 596_049_920,
    "qwen3-235b-a22b": 235_093_634_560, "qwen3-30b-a3b": 30_532_122_624, "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360, "qwen3-next-80b-a3b": 79_674_391_296, "smollm2-1.7b": 1_711_376_384, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120,
    "tinyllama-1.1b": 1_100_048_384, "yi-34b": 34_388_917_248, "yi-6b": 6_061_035_520, "yi-9b": 8_829_407_232,
}  # fmt: skip


@pytest.mark.parametrize("key", PUBLISHED)
def test_parameters_equal_the_published_count(key: str) -> None:
    assert load_spec(key).num_parameters() == PUBLISHED[key]


def test_active_parameters_of_a_mixture() -> None:
    assert active_parameters(load_spec("mixtral-8x7b")) == 12_879_925_248
    assert active_parameters(load_spec("deepseek-v3")) == pytest.approx(37.55e9, rel=1e-3)


@pytest.mark.parametrize("key", MODELS)
def test_a_model_says_where_its_facts_come_from(key: str) -> None:
    table = MODELS[key]
    assert table["_source"] and table["_confidence"] in CONFIDENCE
    assert "model_type" in table and "vocab_size" in table.get("text_config", table)
    assert not {"vision_config", "audio_config", "auto_map"} & table.keys(), "not a shape fact of the decoder"


def test_model_names_are_unique_whatever_their_case() -> None:
    names = [name.lower() for key, table in MODELS.items() for name in (key, *table["_aliases"])]
    assert sorted(names) == sorted(set(names))
    assert load_spec("meta-llama/Llama-2-7b-hf") == load_spec("llama-2-7b")


def test_every_model_builds() -> None:
    for key in MODELS:
        spec = load_spec(key)
        assert spec.name == key and spec.kv_nbytes(1) > 0


def test_models_equal_the_recorded_configs(shared_data: Path) -> None:
    by_hub_id = {alias: table for table in MODELS.values() for alias in table["_aliases"]}
    files = sorted((shared_data / "analyze" / "model_configs").glob("*.json"))
    assert len(files) == 19
    for path in files:
        recorded, ours = json.loads(path.read_text("utf-8")), by_hub_id[path.stem.replace("--", "/")]
        for key, value in ours.items():
            if key == "text_config":
                assert value.items() <= recorded[key].items()
            elif not key.startswith("_"):
                assert value == recorded[key], (path.stem, key)


# ---- stacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ideal", "datasheet"])
def test_a_stack_loads_and_knows_every_op_class(name: str) -> None:
    stack = load_stack(name)
    assert set(OP_CLASSES) <= stack.op_classes.keys()
    for efficiency in stack.op_classes.values():
        assert 0 < efficiency.compute_efficiency <= 1
        assert 0 < efficiency.bandwidth_efficiency <= 1
        assert efficiency.launch_s >= 0
    assert 0 < stack.band[0] <= 1 <= stack.band[1]


def test_ideal_is_a_bound_and_datasheet_is_not() -> None:
    for efficiency in load_stack("ideal").op_classes.values():
        assert efficiency.compute_efficiency == efficiency.bandwidth_efficiency == 1
        assert efficiency.launch_s == 0
    assert load_stack("datasheet").band[1] > 1


@pytest.mark.parametrize(("dtype", "precision", "stated"), [("bfloat16", "bf16", 0.17), ("fp8", "fp8", 0.29)])
def test_datasheet_constants_are_as_good_as_their_comment_says(
    shared_data: Path, dtype: str, precision: str, stated: float
) -> None:
    machines = {"a100_sxm": "a100", "h100_sxm": "h100", "h200_sxm": "h200", "l40s": "l40s"}
    constants = load_stack("datasheet").efficiency("gemm", precision)
    errors: list[float] = []
    for row in read_csv(shared_data / "analyze" / "gpu_ops" / "gemm.csv"):
        if row["gemm_dtype"] != dtype:
            continue
        machine = load_machine(machines[row["device"]])
        m, n, k, measured_s = int(row["m"]), int(row["n"]), int(row["k"]), float(row["lat_us"]) * 1e-6
        nbytes = (2 if precision == "bf16" else 1) * (m * k + k * n) + 2 * m * n
        compute_s = 2 * m * n * k / (machine.flops_per_s[precision] * constants.compute_efficiency)
        memory_s = nbytes / (machine.memory_bandwidth_bytes_per_s * constants.bandwidth_efficiency)
        errors.append(abs(max(compute_s, memory_s) + constants.launch_s - measured_s) / measured_s)
    assert len(errors) > 8000
    assert sum(errors) / len(errors) < stated


# ---- papers --------------------------------------------------------------------------------------------------------

FAMILIES = {
    "accelerators", "analysis", "applications", "architecture", "attention", "cluster", "interpretability", "kv-cache",
    "moe-offload", "pruning", "quantization", "serving", "sparsity", "tokens", "training",
}  # fmt: skip
KINDS = {"technique", "study", "planner", "policy", "recipe", "app", "device", "survey"}
SEAMS = {
    "shape", "linear", "cache", "attention", "ffn", "route", "tokens", "decoding", "head", "loss", "place", "sched",
    "train", "taps",
}  # fmt: skip


def test_there_are_ninety_papers() -> None:
    assert [row["number"] for row in PAPERS] == list(range(1, 91))
    for field in ("short", "title"):
        assert len({row[field].casefold() for row in PAPERS}) == 90
    numbers = [row["arxiv"] for row in PAPERS if "arxiv" in row]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: str(row["number"]))
def test_a_paper_row_is_well_formed(row: dict[str, Any]) -> None:
    assert row["family"] in FAMILIES and row["kinds"] and set(row["kinds"]) <= KINDS and set(row["seams"]) <= SEAMS
    assert row["state"] in {"planned", "implemented"}
    assert not row["seams"] or {"technique", "policy", "planner", "study"} & set(row["kinds"])
    if "arxiv" in row:
        year, month = re.fullmatch(r"(\d\d)(\d\d)\.\d{5}", row["arxiv"]).groups()  # type: ignore[union-attr]
        assert row["year"] == 2000 + int(year) and 1 <= int(month) <= 12


def test_part_names_are_spec_names_and_unique() -> None:
    parts = [part for row in PAPERS for part in row["parts"]]
    assert len(parts) == len(set(parts))
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", part) for part in parts)


def test_what_is_implemented_is_registered() -> None:
    from trimtab.techniques.registry import technique_names

    for row in PAPERS:
        if row["state"] == "implemented" and "technique" in row["kinds"]:
            assert set(row["parts"]) <= set(technique_names()), f"paper {row['number']} claims parts that do not exist"


# ---- pages ---------------------------------------------------------------------------------------------------------


def docs_script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "catalogue_docs.py"
    loaded = importlib.util.spec_from_file_location("catalogue_docs", path)
    assert loaded and loaded.loader
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


def test_pages_are_fresh() -> None:
    assert docs_script().main(["--check"]) == 0


def test_a_stale_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = docs_script()
    monkeypatch.setattr(script, "DOCS", tmp_path)
    assert script.main([]) == 0 and script.main(["--check"]) == 0
    page = tmp_path / "machines.md"
    page.write_text(page.read_text("utf-8").replace("2039 GB/s", "2093 GB/s"), "utf-8")
    assert script.main(["--check"]) == 1
    assert "machines.md" in capsys.readouterr().err
