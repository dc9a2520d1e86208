"""What is committed of the page: made from the current types, whole, offline, small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.ui.explorer.handlers import assets


def test_types_of_the_page_are_those_of_the_server(repository: Path) -> None:
    made = subprocess.run(
        [sys.executable, "scripts/explorer_schema.py"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert json.loads(made.stdout) == json.loads((repository / "web/openapi.json").read_text()), "run: make web"


def test_the_page_asks_nobody_else(repository: Path) -> None:
    """No address in the page but names of XML and the link to a paper, which only a click follows."""
    allowed = {"www.w3.org", "arxiv.org"}
    assert {"index.html", "app.js", "app.css"} <= set(assets())
    for name in ("index.html", "app.js", "app.css"):
        hosts = set(re.findall(r"(?:https?:)?//([a-z0-9-]+(?:\.[a-z0-9-]+)+)", assets()[name].decode()))
        assert hosts <= allowed, name
    assert "default-src 'self'" in assets()["index.html"].decode()


def test_the_lock_names_no_host_and_fits_its_packages(repository: Path) -> None:
    text = (repository / "web/package-lock.json").read_text()
    lock, package = json.loads(text), json.loads((repository / "web/package.json").read_text())
    assert "resolved" not in text
    assert package["engines"]["node"]
    root = lock["packages"][""]
    for kind in ("dependencies", "devDependencies"):
        assert root[kind] == package[kind]
        assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package[kind].values()), "pin each exactly"
    unhashed = [name for name, entry in lock["packages"].items() if name and "integrity" not in entry]
    assert unhashed == []


def test_the_sources_stay_small(repository: Path) -> None:
    files = [p for p in (repository / "web/src").iterdir() if p.suffix in (".ts", ".tsx") and p.name != "schema.d.ts"]
    lines = {p.name: len(p.read_text().splitlines()) for p in files}
    assert len(lines) >= 10 and sum(lines.values()) < 2500, lines
    assert max(lines.values()) < 500, lines
    assert len((repository / "web/src/style.css").read_text().splitlines()) < 200


def test_every_library_in_the_bundle_has_its_licence_there(repository: Path) -> None:
    text = (repository / "src/trimtab/ui/web/LICENSES.txt").read_text()
    found = dict(re.findall(r"^(\S+) [\d.]+ \((.+)\)$", text, re.M))
    assert {"preact", "@preact/signals", "@observablehq/plot", "d3-scale"} <= set(found)
    assert set(found.values()) <= {"MIT", "ISC", "BSD-3-Clause"}
    notice = (repository / "NOTICE").read_text()
    assert [name for name in found if not name.startswith("d3-") and name.removeprefix("@preact/") not in notice] == []


@pytest.mark.slow
def test_a_fresh_build_is_what_is_committed(repository: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("needs node and npm, and the packages of web/package-lock.json")
    done = subprocess.run(["bash", "scripts/check_web.sh"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is what web/ builds to" in done.stdout
