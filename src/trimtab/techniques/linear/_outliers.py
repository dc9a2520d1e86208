"""What llm-int8 finds on calibration text: a threshold, and the columns that hold outliers; saved, loaded."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import CalibrationError
from trimtab.runtime.files import write_atomically
from trimtab.runtime.weights.packed import fingerprint
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.model.outliers import Columns
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


def _columns(spec: ModelSpec, weights: Weights, materials: Materials, threshold: float) -> dict[str, Columns]:
    from trimtab.model.outliers import columns_of

    return columns_of(spec, weights, materials.token_windows(), threshold, materials.progress)


def calibrate_threshold(spec: ModelSpec, weights: Weights, materials: Materials, outputs: Mapping[str, int]) -> float:
    """The smallest threshold that leaves 1 % of the multiply-adds of matrices with these outputs to outlier columns."""
    from trimtab.model.outliers import THRESHOLD, smallest_threshold

    def compute() -> float:
        return smallest_threshold(_columns(spec, weights, materials, THRESHOLD), outputs)

    return float(materials.cached("llm-int8-threshold", [fingerprint(weights), spec.hash, sorted(outputs)], compute))


def calibrate_columns(
    spec: ModelSpec, weights: Weights, materials: Materials, outputs: Mapping[str, int], threshold: float
) -> Path:
    """Write the columns that held an outlier on the text into the cache and return the file.

    Raises:
        CalibrationError: there is no cache to write to.
    """
    if materials.cache is None:
        raise CalibrationError(
            "llm-int8: outliers=static keeps what it finds in the cache of artefacts, and that is off. "
            "Write a file with `trimtab study outliers`, and name it: outliers=static:FILE."
        )
    key = json.dumps([fingerprint(weights), spec.hash, sorted(outputs), threshold, materials.text_hash()])
    path = materials.cache / f"llm-int8-columns-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        found = _columns(spec, weights, materials, threshold)
        save(path, spec, threshold, {at: found[at].columns for at in outputs})
    return path


def save(path: Path, spec: ModelSpec, threshold: float, columns: Mapping[str, tuple[int, ...]]) -> None:
    """Write columns for ``llm-int8:outliers=static:FILE``."""
    stored = {path: list(found) for path, found in columns.items()}
    write_atomically(
        path,
        json.dumps({"model": spec.name, "layers": spec.num_hidden_layers, "threshold": threshold, "columns": stored}),
    )


def load(name: str, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Read columns by path.

    Raises:
        CalibrationError: no such file, not such a file, or another model's.
    """
    path = Path(name)
    try:
        model, layers, columns = _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise CalibrationError(
            f"llm-int8: outliers=static:{path} cannot be read ({error.strerror}). Leave the file out to calibrate."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CalibrationError(f"llm-int8: {path} holds no outlier columns. Leave it out to calibrate.") from None
    if model != spec.name or layers != spec.num_hidden_layers:
        raise CalibrationError(
            f"llm-int8: {path} was made for {model} of {layers} layers, not for {spec.name} of {spec.num_hidden_layers}. "
            "Leave it out to calibrate."
        )
    return columns


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> tuple[str, int, dict[str, tuple[int, ...]]]:
    del changed_ns  # of the file: part of the key
    stored = json.loads(path.read_text("utf-8"))
    return stored["model"], stored["layers"], {key: tuple(map(int, found)) for key, found in stored["columns"].items()}
