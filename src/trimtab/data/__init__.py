"""Facts that ship with Trimtab, no code: machines, models, stacks, kernels, recorded timings.

machines: datasheet figures, one table per machine id, each number with source and confidence.
models: shape-relevant keys of Hugging Face `config.json` files, with `_source`, `_confidence` and `_aliases`.
recorded: timings others published, compressed, with origin and licence.
kernels: constants fitted to recorded kernels, one file per machine.
duo: gates of KV heads, one file per model: which heads need the whole context.
energy: picojoules of single operations, one file per technology.
stacks: how well software uses a machine (efficiencies, launch costs, fusions, band of the prediction).
"""

from __future__ import annotations

from pathlib import Path


def root() -> Path:
    """Return the folder that holds the catalogues."""
    return Path(__file__).parent
