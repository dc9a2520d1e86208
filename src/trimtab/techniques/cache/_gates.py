"""Gates of KV heads, one number in 0..1 each: files, those that ship, and which heads they make streaming.

A file has one line per layer and one number per KV head, split by tabs; lines that begin with ``#`` are notes. Of these,
``# names: a b`` lists the models the gates belong to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.files import write_atomically
from trimtab.spec.machine import data_root

#: Breaks ties between equal gates; smaller than any difference training makes.
_NOISE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Gates:
    """Gates as read from a file.

    Args:
        values: float64 [L, G].
        names: models they belong to, in lower case.
    """

    values: np.ndarray
    names: tuple[str, ...]


def shipped_ids() -> tuple[str, ...]:
    """Ids of the gates that ship, sorted."""
    return tuple(sorted(file.stem for file in (data_root() / "duo").glob("*.tsv")))


@functools.cache
def shipped(id: str) -> Gates:
    """Gates that ship, by id."""
    return read_gates(data_root() / "duo" / f"{id}.tsv")


def shipped_for(model: str) -> str | None:
    """Id of the gates that ship for a model (by any of its names), or None."""
    name = model.lower().rpartition("/")[2]
    return next((id for id in shipped_ids() if name in shipped(id).names), None)


def read_gates(path: Path) -> Gates:
    """Read a file of gates.

    Raises:
        SpecError: no such file, lines of different lengths, or something that is not a number.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"duo: gates={path} cannot be read ({error}). Allowed: auto, train, {', '.join(shipped_ids())}, or the path of a "
            "TSV with a line per layer and a number per KV head."
        ) from None
    names = [line.removeprefix("# names:").lower().split() for line in lines if line.startswith("# names:")]
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    try:
        values = np.array([[float(cell) for cell in row] for row in rows], dtype=np.float64)
    except ValueError:  # not numbers, or rows of different lengths
        values = np.zeros(0)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise SpecError(
            f"duo: {path} is no file of gates. Allowed: a line per layer, a finite number per KV head, split by tabs."
        )
    return Gates(values, tuple(name for row in names for name in row))


def write_gates(path: Path, gates: np.ndarray, names: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Write a file of gates [L, G] with its notes."""
    head = [f"# names: {' '.join(name.lower() for name in names)}", *(f"# {note}" for note in notes)]
    rows = ["\t".join(f"{value:.5f}" for value in row) for row in gates]
    write_atomically(path, "\n".join([*head, *rows]) + "\n")


def streaming_heads(gates: np.ndarray, sparsity: float) -> np.ndarray:
    """Which heads are streaming: those below the `sparsity` quantile of all gates.

    A fixed threshold would not do: of the gates of Llama-3.1-8B 91 % are above one half.

    Args:
        gates: [L, G]; clipped to 0..1.
        sparsity: share wanted; what comes out is within one head of it.

    Returns:
        bool [L, G].

    Source: Xiao et al., DuoAttention, arXiv 2410.10819, and its code (utils.py, sparsify_attention_heads).

    >>> streaming_heads(np.array([[0.9, 0.1], [0.8, 0.7]]), 0.5).tolist()
    [[False, True], [False, True]]
    """
    if sparsity <= 0 or sparsity >= 1:
        return np.full(gates.shape, sparsity >= 1)
    noisy = np.clip(gates, 0.0, 1.0) + np.random.default_rng(0).uniform(0, _NOISE, gates.shape)
    return noisy < np.quantile(noisy, sparsity)


def spread_gates(layers: int, heads: int) -> np.ndarray:
    """Gates that stand in where none are known yet: distinct, and evenly spread over the layers [L, G]."""
    golden = (5**0.5 - 1) / 2
    return (np.arange(layers * heads) * golden % 1).reshape(layers, heads)
