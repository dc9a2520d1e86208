"""Facts that ship with Trimtab, no code: `machines/*.toml`, `models/*.json`, `stacks/*.toml`.

machines: datasheet figures, one table per machine id, each number with source and confidence.
models: shape-relevant keys of Hugging Face `config.json` files, with `_source`, `_confidence` and `_aliases`.
stacks: how well software uses a machine (efficiencies, launch costs, fusions, band of the prediction).
"""

from __future__ import annotations

from pathlib import Path


def root() -> Path:
    """Return the folder that holds the catalogues."""
    return Path(__file__).parent
