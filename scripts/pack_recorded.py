"""Pack the recorded tables that ship: `python scripts/pack_recorded.py FOLDER` reads FOLDER/gpu_ops/*.csv and e2e_serving.csv
(layout in src/trimtab/data/recorded/tables.toml) and writes src/trimtab/data/recorded/*.csv.xz. The same input gives the same
bytes; `--check` writes nothing and fails if a packed file differs from the folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trimtab.measure.recorded.tables import known_tables, pack, packed_path, unpack


def main(folder: Path, check: bool) -> int:
    wrong = 0
    for name, table in known_tables().items():
        if not table.ships:
            continue
        text = (folder / table.path).read_bytes()
        path = packed_path(name)
        if check:
            same = path.is_file() and unpack(name) == text
            wrong += not same
            print(f"{name}: {'as in the folder' if same else 'differs'}")
            continue
        path.write_bytes(pack(text))
        print(f"{name}: {text.count(10) - 1} rows, {len(text)} bytes, packed {path.stat().st_size}")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    sys.exit(main(asked.folder, asked.check))
