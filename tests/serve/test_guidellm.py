"""guidellm's sweep against the real server, where guidellm is installed: it meets no error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.slow


def test_a_sweep_meets_no_error(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del smollm2_path  # skips where the model is not installed
    folder = os.environ.get("TRIMTAB_GUIDELLM")
    if folder is None:
        pytest.skip(
            "guidellm is not named; run benchmarks/peers/guidellm.sh, then set TRIMTAB_GUIDELLM to its environment"
        )
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from guidellm_sweep import MODEL, sweep
    from serving_client import trimtab_server

    assert (Path(folder) / "bin" / "guidellm").exists(), f"there is no guidellm in {folder}"
    with trimtab_server(MODEL, ["--kv-bytes", "1GiB"]) as server:
        rows = sweep(server.port, sizes=2, seconds=8, prompt=32, output=8, concurrency=16)
    assert len(rows) == 2 and not any(row["errored"] for row in rows), rows
    for row in rows:
        assert row["successful"] > 0 and row["ttft_ms"] > 0 and row["output_tokens_per_s"] > 0
