"""The verbs that check, fit, import and idealize, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trimtab.cli.main import VERBS, app
from trimtab.errors import SpecError, TrimtabError

RUNNER = CliRunner()


def run(*args: str) -> str:
    done = RUNNER.invoke(app, list(args))
    assert done.exit_code == 0, (done.stdout, done.exception)
    return done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_its_help(verb: str) -> None:
    assert "Usage" in run(verb, "--help")


def test_validate_one_table_as_json() -> None:
    found = json.loads(run("validate", "--table", "collectives", "--json"))
    assert found["schema"] == 1 and found["ok"] and len(found["lines"]) == 12
    assert all(0 < line["mape"] < 0.2 for line in found["lines"])


def test_idealize_from_the_graph_alone() -> None:
    found = json.loads(run("idealize", "llama-2-7b", "--on", "a100", "--prompt", "300", "--gen", "10", "--json"))
    seconds = found["request"]["predicted"]["seconds"]
    runtime = found["runtimes"]["predicted"]
    assert 0 < runtime["token_s"] < 0.05 and seconds > 9 * runtime["token_s"]
    assert found["request"]["predicted"]["usd"] == pytest.approx(seconds * found["usd_per_device_h"] / 3600)


def test_idealize_refuses_a_machine_without_a_price() -> None:
    done = RUNNER.invoke(app, ["idealize", "llama-2-7b", "--on", "rpi4", "--price", "auto"])
    assert isinstance(done.exception, TrimtabError) and "a100" in str(done.exception)


def test_denoise_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [
        {"prompt_tokens": p, "output_tokens": o, "seconds": 0.1 + p / 1000 + 0.02 * (o - 1) + wait}
        for p in (1, 256, 512)
        for o in (1, 16, 64)
        for wait in (0.0, 0.5, 0.9)
    ]
    log.write_text("\n".join(map(json.dumps, rows)))
    found = json.loads(run("denoise", str(log), "--prompt", "256", "--gen", "16", "--json"))
    assert found["denoised"]["token_s"] == pytest.approx(0.02)
    assert found["request"]["seconds"] == pytest.approx(0.1 + 0.256 + 0.3)
    log.write_text('{"prompt_tokens": 1, "seconds": 2}\n')
    done = RUNNER.invoke(app, ["denoise", str(log)])
    assert isinstance(done.exception, SpecError) and "output_tokens" in str(done.exception)


def test_predict_explains_constants_and_their_source() -> None:
    text = run("predict", "llama-3.1-8b", "--on", "h100", "--stack", "vllm", "--explain", "tpot_s")
    for part in (
        "gemm.bf16: gemm ec=",
        "MAPE",
        "recorded gemm.bf16 kernels of vllm",
        "Check: trimtab measure",
        "captured graph",
    ):
        assert part in text


def test_predict_spreads_over_devices_and_prices_them() -> None:
    args = ["predict", "llama-3.1-70b", "--on", "h100", "--dtype", "fp8", "--tp", "4", "--usd-per-h", "2", "--json"]
    found = json.loads(run(*args))
    assert found["plan"]["parallel"] == {"tp": 4, "pp": 1, "dp": 1, "ep": 1}
    usd, rate = (found["figures"][name]["value"] for name in ("usd_per_million_tokens", "tokens_per_s"))
    assert usd == pytest.approx(4 * 2 / 3600 / rate * 1e6)
    assert not any("price" in note for note in found["notes"])
    text = run("predict", "llama-3.1-70b", "--on", "h100", "--tp", "8", "--concurrency", "16")
    assert "8 x h100-sxm5-80gb (tp8)" in text and "16 requests at a time" in text


def test_predict_a_training_step() -> None:
    args = [
        "predict",
        "llama-3.1-8b",
        "--on",
        "h100",
        "--phase",
        "train",
        "--gpus",
        "16",
        "--zero",
        "3",
        "--micro-batch",
        "2",
    ]
    found = json.loads(run(*args, "--json"))
    assert 0.2 < found["figures"]["mfu"]["value"] < 0.7 and found["counts"]["peak_bytes"] > 1e10
    assert "step_time_s" in run(*args)
    assert "optimizer states" in run(*args, "--explain", "peak_bytes_first")
    done = RUNNER.invoke(app, [*args, "--tp", "3"])
    assert isinstance(done.exception, SpecError) and "does not divide" in str(done.exception)


def test_predict_with_another_tools_numbers() -> None:
    text = run("predict", "llama-2-7b", "--on", "a6000", "--compat", "llm-viewer", "--prompt", "2048")
    assert "q_proj" in text
    faults = run("predict", "llama-2-7b", "--on", "a6000", "--compat", "llm-viewer", "--explain", "faults")
    assert "lm_head" in faults and "Trimtab's count" in faults
    done = RUNNER.invoke(app, ["predict", "llama-2-7b", "--compat", "vidur"])
    assert isinstance(done.exception, SpecError) and "llm-viewer" in str(done.exception)


def test_skew_touches_fewer_experts() -> None:
    even, skewed = (
        json.loads(
            run("predict", "mixtral-8x22b", "--on", "h200", "--tp", "8", "--batch", "4", "--skew", skew, "--json")
        )
        for skew in ("0", "1.2")
    )
    assert skewed["counts"]["weight_read"] < even["counts"]["weight_read"]
    assert any("skew 1.2" in note for note in skewed["notes"])
