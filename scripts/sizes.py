"""Keep files readable: warn above 500 lines, fail above 800. Data files are exempt."""

from __future__ import annotations

import sys
from pathlib import Path

WARN, FAIL = 500, 800
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "scripts", "benchmarks", "examples")
SUFFIXES = {".py", ".cpp", ".h", ".js", ".ts"}


def main(root: Path = ROOT) -> int:
    too_long = 0
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in SUFFIXES):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > WARN:
            verdict = "error" if lines > FAIL else "warning"
            print(
                f"{verdict}: {path.relative_to(root)} has {lines} lines (aim for {WARN}, {FAIL} at most)",
                file=sys.stderr,
            )
        too_long += lines > FAIL
    return int(too_long > 0)


if __name__ == "__main__":
    sys.exit(main())
