"""guidellm's sweep against `trimtab serve`: what a load generator that is not ours measures, and whether it meets any error.

Usage: benchmarks/peers/guidellm.sh [--seconds 20] [--sizes 3] ..., which installs guidellm in an environment of its own. Works without
a network: the tokenizer is taken from the built-in file. guidellm needs about a minute to start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from decode import HERE, about
from serving_client import trimtab_server

from trimtab.runtime.weights.load import open_model

MODEL = "smollm2-135m"
ENVIRONMENT = "TRIMTAB_GUIDELLM"
_EXPORT = """
import sys
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1], gguf_file=sys.argv[2]).save_pretrained(sys.argv[3])
"""


def venv() -> Path:
    """The environment with guidellm.

    Raises:
        SystemExit: there is none.
    """
    found = Path(os.environ.get(ENVIRONMENT, ".venv-guidellm"))
    if not (found / "bin" / "guidellm").exists():
        raise SystemExit(
            f"There is no guidellm in {found}. Run benchmarks/peers/guidellm.sh, or set {ENVIRONMENT} to its environment."
        )
    return found


def sweep(
    port: int, sizes: int, seconds: float, prompt: int, output: int, concurrency: int = 64, chat: bool = True
) -> list[dict[str, Any]]:
    """Run guidellm; what it says of each of its strategies."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["GUIDELLM__MAX_WORKER_PROCESSES"] = (
        "2"  # of ten, some give up on a small machine before they have started
    )
    file = Path(open_model(MODEL, dtype="file").tokenizer_source)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, report = Path(folder) / "tokenizer", Path(folder) / "report.json"
        subprocess.run(
            [venv() / "bin" / "python", "-c", _EXPORT, file.parent, file.name, tokenizer],
            check=True,
            env=environment,
            capture_output=True,
        )
        format = "/v1/chat/completions" if chat else "/v1/completions"
        command = [
            venv() / "bin" / "guidellm", "run",
            "--backend", f"kind=openai_http,target=http://127.0.0.1:{port},model={MODEL},request_format={format}",
            "--profile", f"kind=sweep,sweep_size={sizes},strategy_type=poisson,max_concurrency={concurrency}",
            "--constraint", f"kind=max_duration,seconds={seconds:g}",
            "--tokenizer", f"kind=hf_auto,model={tokenizer}",
            "--data", f"kind=synthetic_text,prompt_tokens={prompt},output_tokens={output}",
            "--output", f"kind=json,path={report}", "--disable-console",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not report.exists():
            raise SystemExit(f"guidellm failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return [strategy(each) for each in json.loads(report.read_text())["benchmarks"]]


def strategy(told: dict[str, Any]) -> dict[str, Any]:
    """The figures of one strategy."""
    metrics, config = told["metrics"], told["config"]["strategy"]
    totals = metrics["request_totals"]

    def value(name: str, which: str) -> float | None:
        return (metrics.get(name) or {}).get("successful", {}).get(which)

    return {
        "strategy": config.get("type_") or config.get("kind"), "rate": config.get("rate"),
        "successful": totals["successful"], "errored": totals["errored"], "incomplete": totals["incomplete"],
        "requests_per_s": value("requests_per_second", "mean"), "output_tokens_per_s": value("output_tokens_per_second", "mean"),
        "ttft_ms": value("time_to_first_token_ms", "median"), "tpot_ms": value("time_per_output_token_ms", "median"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=4, help="strategies of the sweep")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--gen", type=int, default=32)
    parser.add_argument(
        "--concurrency", type=int, default=64, help="most requests open; more than --max-queue are answered with 429"
    )
    parser.add_argument("--server-flags", default="", help="of trimtab serve, in one text")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "guidellm.json")
    options = parser.parse_args()
    venv()
    with trimtab_server(MODEL, options.server_flags.split()) as server:
        rows = sweep(
            server.port, options.sizes, options.seconds, options.prompt_tokens, options.gen, options.concurrency
        )
    print(
        f"{'strategy':14}{'rate':>8}{'done':>7}{'errors':>8}{'requests/s':>12}{'tokens/s':>10}{'TTFT ms':>10}{'TPOT ms':>10}"
    )
    for row in rows:
        figures = [row[name] for name in ("requests_per_s", "output_tokens_per_s", "ttft_ms", "tpot_ms")]
        told = "".join(
            f"{'-' if v is None else format(v, '.1f'):>{w}}" for v, w in zip(figures, (12, 10, 10, 10), strict=True)
        )
        rate = "" if row["rate"] is None else f"{row['rate']:.2f}"
        print(f"{row['strategy']:14}{rate:>8}{row['successful']:>7}{row['errored']:>8}{told}")
    errors = sum(row["errored"] for row in rows)
    print(f"errors: {errors} (needed: 0)")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(about() | vars(options) | {"json": str(options.json), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
