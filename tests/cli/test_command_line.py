"""The command line as a user meets it: exit codes, one sentence for bad input, JSON, no torch where none is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "trimtab.cli.main"]


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=120, cwd=cwd)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predict", "smollm3-135m", "--on", "a100"], "smollm2-135m"),
        (["predict", "smollm2-135m", "--on", "a101"], "a100"),
        (["predict", "smollm2-135m", "--on", "a100", "-t", "rtm"], "rtn"),
        (["predict", "smollm2-135m", "--on", "a100", "-t", "rtn:bits=9"], "2..8"),
        (["predict", "smollm2-135m", "--on", "a100", "-t", "rtn:group=37"], "group=36"),
        (["predict", "smollm2-135m", "--on", "a100", "-t", "rtn:bits=4", "-t", "rtn:bits=8"], "rtn:bits=8"),
        (["predict", "smollm2-135m", "--on", "a100", "--batch", "0"], "1 or more"),
        (["predict", "smollm2-135m", "--on", "a100", "--dtype", "float31"], "float32"),
        (["predict", "smollm2-135m", "--on", "this"], "trimtab calibrate"),
        (["measure", "smollm2-135m", "--prompt", "9000"], "8192"),
        (["run", "smollm2-135m", "hello", "--gen", "9000"], "8192"),
        (["measure"], "wants a model"),
        (["papers", "91"], "1 to 90"),
        (["verify", "2"], "no checks yet"),
        (["prdict"], "predict"),
        (["techniques", "kvi"], "Known"),
        (["eval", "text", "smollm2-135m", "--text", "no-such-file"], "no-such-file"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(args: list[str], said: str, smollm2_path: Path) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_truncated_gguf(tmp_path: Path, smollm2_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm2_path.open("rb") as whole:
        cut.write_bytes(whole.read(3_000_000))
    for verb in (["predict", str(cut), "--on", "a100"], ["run", str(cut), "hello"]):
        done = run(*verb)
        assert done.returncode == 2 and "cut.gguf" in done.stderr and "Traceback" not in done.stderr


def test_config_with_a_missing_key_and_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    done = run("predict", str(tmp_path), "--on", "a100")
    assert done.returncode == 2 and "num_hidden_layers" in done.stderr
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("predict", str(tmp_path), "--on", "a100", "--prompt", "32", "--gen", "8").returncode == 0
    done = run("run", str(tmp_path), "hello")
    assert done.returncode == 2 and "safetensors" in done.stderr and "Traceback" not in done.stderr


def test_prompt_beyond_the_context_is_a_warning_for_predict() -> None:
    done = run("predict", "smollm2-135m", "--on", "a100", "--prompt", "9000")
    assert done.returncode == 0 and "8192" in done.stdout.replace(",", "")


def test_predict_json_has_the_public_names() -> None:
    done = run(
        "predict",
        "smollm2-135m",
        "--on",
        "a100",
        "--batch",
        "1",
        "--prompt",
        "512",
        "--gen",
        "128",
        "-t",
        "rtn",
        "--json",
    )
    report = json.loads(done.stdout)
    assert report["schema"] == 1 and {"plan", "counts", "figures", "ops"} <= set(report)
    counts = {
        "weight_bytes",
        "kv_bytes",
        "activation_bytes",
        "peak_bytes",
        "prefill_flops",
        "decode_flops",
        "weight_read",
        "kv_read",
    }
    assert counts <= set(report["counts"]) and all(isinstance(report["counts"][name], int) for name in counts)
    for name in ("ttft_s", "tpot_s", "tokens_per_s", "energy_j", "usd_per_million_tokens"):
        assert {"value", "p10", "p90", "unit", "kind", "check"} <= set(report["figures"][name])


def test_help_and_prediction_need_no_torch(tmp_path: Path) -> None:
    """With torch blocked the light verbs work and every technique imports; `--help` does not even load numpy."""
    (tmp_path / "torch.py").write_text("raise ImportError('blocked')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for args in (
        ["predict", "smollm2-135m", "--on", "a100", "-t", "rtn+cats+gemfilter+streaming-llm"],
        ["machines"],
        ["models"],
        ["papers"],
        ["techniques"],
    ):
        done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == 0, done.stderr
    code = (
        "from trimtab.techniques.registry import technique_class, technique_names\n"
        "[technique_class(name) for name in technique_names()]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)
    code = "import sys, trimtab.cli.main; assert not {'numpy', 'torch', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_startup_is_quick() -> None:
    """Half a second is the aim; the bar is generous because test machines are shared."""
    best = {"--help": 9.0, "predict": 9.0}
    for _ in range(3):
        for name, args in (("--help", ["--help"]), ("predict", ["predict", "smollm2-135m", "--on", "a100"])):
            start = time.perf_counter()
            assert run(*args).returncode == 0
            best[name] = min(best[name], time.perf_counter() - start)
    assert best["--help"] < 1.0 and best["predict"] < 2.0


def test_interrupt_leaves_no_half_report(tmp_path: Path, smollm2_path: Path) -> None:
    report = tmp_path / "report.html"
    process = subprocess.Popen(
        [*COMMAND, "demo", "--report", str(report)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A test run in the background inherits an ignored SIGINT; a user's terminal does not ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Interrupted" in errors and "Traceback" not in errors
    assert list(tmp_path.glob("*.html")) == [] and list(tmp_path.glob(".*.html*")) == []
