"""What OliVe finds on a model: scales and normal types of weights, and of what goes into them, kept on disk once found."""

from __future__ import annotations

import base64
import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CalibrationError
from trimtab.runtime.numerics import decode
from trimtab.runtime.numerics.pairs import pair_scale, pair_scales
from trimtab.runtime.weights.packed import Weights, fingerprint
from trimtab.spec.grids import PAIR_NORMALS, PairFormat
from trimtab.spec.model import ModelSpec
from trimtab.techniques.blocks import weight_paths

if TYPE_CHECKING:
    import torch

    from trimtab.techniques.materials import Materials


def normals(bits: int) -> list[str]:
    """Normal types that have these bits."""
    return [name for name, width in PAIR_NORMALS if width == bits]


def node_path(path: str) -> str:
    """Path of the node of a weight: experts share one."""
    return re.sub(r"\.experts\.\d+\.", ".experts.", path)


@dataclass(frozen=True, kw_only=True)
class PairSearch:
    """Searches over one model.

    Args:
        weights, spec: the model as it is.
        materials: calibration text and the cache of what was found.
        wbits, abits: of a weight and of an input.
        search, sigma, both: as in `pair_scales`.
    """

    weights: Weights
    spec: ModelSpec
    materials: Materials
    wbits: int
    abits: int
    search: tuple[int, int, int]
    sigma: float
    both: str
    _memory: dict[str, Any] = field(default_factory=dict)

    @property
    def _how(self) -> dict[str, Any]:
        return {"search": self.search, "sigma": self.sigma, "both": self.both}

    def scales(self, path: str, normal: str) -> np.ndarray:
        """Scales float32 [N, 1] of a weight."""
        stored = base64.b64decode(self._searched(normal)[path][0])
        return np.frombuffer(stored, np.float16).astype(np.float32)[:, None]

    def weight_normals(self) -> dict[str, str]:
        """The normal type of less squared error for every matrix, by the path of its node."""
        found: dict[str, dict[str, float]] = {}
        for normal in normals(self.wbits):
            for path, (_, error) in self._searched(normal).items():
                errors = found.setdefault(node_path(path), dict.fromkeys(normals(self.wbits), 0.0))
                errors[normal] += error
        return _least(found)

    def input_normals(self) -> dict[str, str]:
        """The same for the inputs of every matrix."""
        found: dict[str, dict[str, float]] = {}
        for path, by_normal in self._inputs.items():
            errors = found.setdefault(node_path(path), dict.fromkeys(by_normal, 0.0))
            for normal, (_, error) in by_normal.items():
                errors[normal] += error
        return _least(found)

    def input_scale(self, path: str, normal: str) -> float:
        """Scale of the inputs of a weight.

        Raises:
            CalibrationError: the text never reached it.
        """
        found = self._inputs
        if path not in found:
            raise CalibrationError(
                f"olive: no token of the calibration window reached {path}, so its inputs have no scale. Give a longer window."
            )
        return found[path][normal][0]

    def _found(self, kind: str, bits: int, compute: Any, *more: str) -> Any:
        key = [fingerprint(self.weights), self.spec.hash, bits, *self.search, self.sigma, self.both, *more]
        return self.materials.cached(kind, key, compute)

    def _searched(self, normal: str) -> dict[str, tuple[str, float]]:
        """fp16 scales in base64 and squared error of every weight, by its path."""

        def compute() -> dict[str, tuple[str, float]]:
            found = {}
            for path, node in self.materials.progress(f"olive: scales ({normal})", [*weight_paths(self.spec)]):
                format = PairFormat(bits=self.wbits, normal=normal, group=node.k)
                scale, error = pair_scales(decode(self.weights[path]), format, **self._how)
                stored = base64.b64encode(scale.astype(np.float16).tobytes()).decode()
                found[path] = (stored, float(error.sum()))
            return found

        if normal not in self._memory:
            self._memory[normal] = self._found("olive-weights", self.wbits, compute, normal)
        return self._memory[normal]

    @functools.cached_property
    def _inputs(self) -> dict[str, dict[str, tuple[float, float]]]:
        """(scale, squared error) of the inputs of every weight by normal type, on the first calibration window."""
        return self._found("olive-inputs", self.abits, self._search_inputs)

    def _search_inputs(self) -> dict[str, dict[str, tuple[float, float]]]:
        from trimtab.model.calibration import observed

        seen = observed(self.spec, self.weights, self.materials.token_windows()[:1], lambda path: _Searched(path, self))
        return {path: one.found for path, one in seen.items() if isinstance(one, _Searched)}


class _Searched:
    """Scales for one tensor of inputs."""

    def __init__(self, path: str, search: PairSearch) -> None:
        self.path, self.search = path, search
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, x_TK: torch.Tensor) -> None:
        x = np.ascontiguousarray(x_TK.float().numpy())
        if not np.isfinite(x).all():
            raise CalibrationError(
                f"olive: an input of {self.path} is not finite (NaN or infinite) on the calibration text: the weights of this "
                "model are broken."
            )
        for normal in normals(self.search.abits):
            format = PairFormat(bits=self.search.abits, normal=normal, group=x.shape[1])
            self.found[normal] = pair_scale(x, format, **self.search._how)


def _least(errors: dict[str, dict[str, float]]) -> dict[str, str]:
    return {path: min(found, key=found.__getitem__) for path, found in errors.items()}
