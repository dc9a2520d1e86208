"""The ledger keeps the prediction, survives a killed process and tells an interrupted run from a running one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.errors import SpecError
from trimtab.measure.ledger import Ledger
from trimtab.spec.report import Figure, Report

PLAN = {"model": "m", "techniques": ["rtn"], "workload": {"batch": 1, "prompt": 2, "gen": 3}}


def report(source: str, tpot_s: float) -> Report:
    figure = Figure(value=tpot_s, unit="s", kind="measured")
    return Report(source=source, plan=PLAN, counts={"kv_bytes": 7}, figures={"tpot_s": figure})  # type: ignore[arg-type]


def test_prediction_is_there_before_the_measurement(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    run = ledger.start(report("predicted", 1.0))
    (row,) = ledger.runs()
    assert row.state == "running" and row.measured is None and row.predicted["counts"] == {"kv_bytes": 7}
    ledger.finish(run, report("measured", 2.0))
    (row,) = ledger.runs()
    assert row.state == "done" and row.measured and row.measured["figures"]["tpot_s"]["value"] == 2.0


def test_an_error_is_recorded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.fail(ledger.start(report("predicted", 1.0)), RuntimeError("it broke"))
    (row,) = ledger.runs()
    assert row.state == "failed" and row.error == "RuntimeError: it broke"


def test_kill_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger(path).finish(Ledger(path).start(report("predicted", 1.0)), report("measured", 1.0))
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from trimtab.measure.ledger import Ledger; from trimtab.spec.report import Report\n"
        f"Ledger(Path(sys.argv[1])).start(Report(source='predicted', plan={PLAN!r}, counts={{}}, figures={{}}))\n"
        "print('started', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), ""], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "started\n"
    assert Ledger(path).runs()[0].state == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    newest, oldest = Ledger(path).runs()
    assert newest.state == "interrupted" and oldest.state == "done"
    assert Ledger(path).start(report("predicted", 3.0)) == 3


def _write(path: str) -> None:
    ledger = Ledger(Path(path))
    for _ in range(20):
        ledger.finish(ledger.start(report("predicted", 1.0)), report("measured", 1.0))
    os._exit(0)


def test_two_processes_write_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(path),)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [row.state for row in Ledger(path).runs()] == ["done"] * 40


def test_a_foreign_or_newer_file_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "f.sqlite"
    foreign.write_bytes(b"not a database, but long enough to look at" * 40)
    with pytest.raises(SpecError, match="not a ledger"):
        Ledger(foreign)
    newer = Ledger(tmp_path / "n.sqlite")
    with newer._open() as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(SpecError, match="newer Trimtab"):
        Ledger(newer.path)
