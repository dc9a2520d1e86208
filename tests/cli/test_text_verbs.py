"""`trimtab train tiny` and `trimtab eval text` as a user meets them, on a model trained in seconds."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from trimtab.cli.main import main
from trimtab.runtime.text.builtin import builtin_text

SHAPE = [
    "--layers", "2", "--hidden", "32", "--ffn", "48", "--heads", "2", "--kv-heads", "1", "--vocab", "300",
    "--context", "32", "--batch", "2", "--lr", "0.02",
]  # fmt: skip


@pytest.fixture
def trimtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, args)])
        try:
            code = main()
        except SystemExit as stopped:
            code = stopped.code
        found = capsys.readouterr()
        return int(code or 0), found.out, found.err

    return run


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """A little text again and again, so that a hundred steps make matrices matter."""
    found = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "held.txt"]
    for place, path in enumerate(found):
        path.write_text((builtin_text()[2000:2400] * 8)[place * 1000 : 3200])
    return found


def test_train_then_evaluate(trimtab, texts: list[Path], tmp_path: Path, home: Path) -> None:
    a, b, held = texts
    out = tmp_path / "tiny"
    code, shown, _ = trimtab(
        "train", "tiny", "--text", a, "--text", b, "--valid", held, "--out", out, "--steps", 100, *SHAPE, "--json"
    )
    found = json.loads(shown)
    assert code == 0 and found["folder"] == str(out) and found["steps"] == len(found["loss"]) == 100
    assert found["loss"][-1] < found["loss"][0] and 0 < found["bits_per_byte"] < 8
    assert 0 < found["ngram_bits_per_byte"] < 8 and found["ngram_order"] in range(3, 8)
    assert trimtab("train", "tiny", "--text", a, "--out", out, *SHAPE)[0] == 2  # nothing is replaced

    ask = [
        "eval",
        "text",
        out,
        "--text",
        held,
        "--text",
        a,
        "--tokens",
        32,
        "--windows",
        4,
        "-t",
        "rtn:bits=3,group=16",
    ]
    code, shown, err = trimtab(*ask, "--naive", "rtn:bits=2,group=16", "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert code == 0 and list(found["texts"]) == [str(held), str(a)] and "text" not in found
    each = found["texts"].values()
    assert found["ppl"] == pytest.approx(math.sqrt(math.prod(text["ppl"] for text in each)))
    assert found["tokens"] == 2 * 4 * 31 == sum(text["tokens"] for text in each)
    lost, naive = (math.log(arm["ppl"] / arm["ppl_base"]) for arm in (found, found["naive"]))
    assert found["recovered_share"]["geometric_mean"] == pytest.approx(1 - lost / naive)
    assert found["difference"]["kl_nats"] == pytest.approx(found["kl_nats"] - found["naive"]["kl_nats"])
    assert 0 < len(list((home / "logits").iterdir())) <= 8  # the text repeats itself, so may its windows

    code, shown, _ = trimtab(*ask, "--engine", "native")
    rows = [line.split() for line in shown.splitlines()]
    assert code == 0 and ["geometric", "mean", "248"] in [row[:3] for row in rows]
    native = next(float(row[5]) for row in rows if row[:2] == ["geometric", "mean"])
    # the native product codes its inputs in 8 bits
    assert native == pytest.approx(found["kl_nats"], abs=5e-3)


def test_one_text_keeps_its_form(trimtab, texts: list[Path], tmp_path: Path, home: Path) -> None:
    out = tmp_path / "tiny"
    trimtab("train", "tiny", "--text", texts[0], "--out", out, "--steps", 1, *SHAPE)
    code, shown, _ = trimtab("eval", "text", out, "--tokens", 32, "--windows", 2, "--json")
    found = json.loads(shown)
    assert code == 0 and found["text"] == "topics" and found["techniques"] == "" and found["kl_nats"] < 2e-6
    assert {"ppl", "ppl_base", "nll_difference", "nll_difference_se", "kl_se", "top1_agreement"} <= set(found)
    assert len(list((home / "logits").iterdir())) == 2
    ask = ["eval", "text", out, "--tokens", 31, "--windows", 2, "--no-cache", "-t", "rtn:bits=2,group=16"]
    code, shown, _ = trimtab(*ask)
    assert code == 0 and "KL to the unmodified model" in shown and "2 windows of 31, 60 tokens scored" in shown
    assert len(list((home / "logits").iterdir())) == 2
    for args, said in (
        (["--tokens", 64], "context"),
        (["--windows", 0], "windows=0"),
        (["--engine", "gpu"], "auto, native, torch"),
        (["--naive", "rtx"], "rtn"),
        (["--text", "topics", "--text", "topics"], "given twice"),
        (["--naive", "gemfilter", "--engine", "native"], "native kernel"),
    ):
        code, shown, err = trimtab("eval", "text", out, "--tokens", 32, "--windows", 1, *args)
        assert code == 2 and said in err and shown == "" and err.count("\n") == 1, (args, err)


def test_trained_folders_are_kept_and_bad_input_is_one_sentence(trimtab, texts: list[Path], home: Path) -> None:
    ask = ["train", "tiny", "--text", texts[0], "--steps", 2, *SHAPE]
    code, shown, _ = trimtab(*ask)
    (folder,) = (home / "models").iterdir()
    assert code == 0 and str(folder) in shown and "bits per byte" not in shown
    code, shown, _ = trimtab(*ask)
    assert code == 0 and "trained before" in shown and list((home / "models").iterdir()) == [folder]
    code, shown, _ = trimtab(*ask[:4], "--minutes", 0.002, *SHAPE, "--json")
    assert code == 0 and json.loads(shown)["steps"] >= 1
    for args, said in (
        (["--steps", 1, "--minutes", 1], "one of them"),
        (["--minutes", 0], "minutes=0"),
        (["--steps", 0], "steps=0"),
        (["--hidden", 30, "--heads", 4], "hidden=32"),
        (["--text", "no-such-file"], "no-such-file"),
    ):
        code, shown, err = trimtab("train", "tiny", "--text", texts[0], *SHAPE, *args)
        assert code == 2 and said in err and shown == "", (args, err)
