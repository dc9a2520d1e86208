"""Thresholds of the FFN gate: calibrated on text, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CalibrationError
from trimtab.runtime.files import write_atomically
from trimtab.runtime.weights.packed import Packed, fingerprint, packed_float
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.model.observers import QuantileSketch
    from trimtab.runtime.weights.packed import Weights
    from trimtab.techniques.materials import Materials


def packed(value: float) -> Packed:
    """A threshold as a weight."""
    return packed_float(np.array([value], dtype=np.float32), "fp32")


def calibrate(
    spec: ModelSpec, weights: Weights, paths: Mapping[int, str], sparsity: Mapping[str, float], materials: Materials
) -> dict[str, float]:
    """Return the threshold of each FFN: the sparsity quantile of |act(gate)| over all tokens and neurons of the text."""
    if not any(sparsity.values()):
        return dict.fromkeys(paths.values(), 0.0)

    def compute() -> dict[str, float]:
        sketches = gate_sketches(spec, weights, materials)
        return {path: sketches[path].quantile(sparsity[path]) for path in paths.values()}

    key = [fingerprint(weights), spec.hash, sorted(sparsity.items())]
    return materials.cached("cats-thresholds", key, compute)


def gate_sketches(
    spec: ModelSpec, weights: Weights, materials: Materials, point: str = "mlp.gate"
) -> dict[str, QuantileSketch]:
    """Run the calibration windows through the model and sketch |gate| at a tap point of every FFN, by path."""
    import torch

    from trimtab.model.decoder import Decoder
    from trimtab.model.observers import QuantileSketch
    from trimtab.runtime.step import Step

    sketches: dict[str, QuantileSketch] = {}

    def tap(path: str, gate_TF: Any) -> None:
        sketches.setdefault(path, QuantileSketch()).add(gate_TF.abs().float().numpy())

    decoder = Decoder(spec, weights)
    with torch.inference_mode():
        for window in materials.progress("cats: gate statistics", materials.token_windows()):
            step = Step.of([len(window)], [0])
            step.taps = {point: tap}
            decoder.forward(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
    return sketches


def save(path: Path, spec: ModelSpec, thresholds: Mapping[str, float]) -> None:
    """Write thresholds for `cats:thresholds=PATH`."""
    write_atomically(
        path, json.dumps({"model": spec.name, "layers": spec.num_hidden_layers, "thresholds": dict(thresholds)})
    )


def load(path: Path, spec: ModelSpec, paths: Mapping[int, str]) -> dict[str, float]:
    """Read thresholds.

    Raises:
        CalibrationError: no such file, not such a file, another model's, or another number of layers.
    """
    try:
        stored = json.loads(path.read_text("utf-8"))
        model, layers, thresholds = stored["model"], stored["layers"], stored["thresholds"]
    except OSError as error:
        raise CalibrationError(
            f"cats: thresholds={path} cannot be read ({error.strerror}). Leave it out to calibrate."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CalibrationError(f"cats: {path} is no thresholds file. Leave it out to calibrate.") from None
    if layers != spec.num_hidden_layers or set(thresholds) != set(paths.values()):
        raise CalibrationError(
            f"cats: {path} holds thresholds for {layers} layers, {spec.name} has {spec.num_hidden_layers}."
        )
    if model != spec.name:
        raise CalibrationError(f"cats: {path} was made for {model}, not for {spec.name}. Leave it out to calibrate.")
    return {key: float(value) for key, value in thresholds.items()}
