"""awq: scale up the columns that meet large activations before rounding, and scale what feeds them down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from trimtab.errors import SpecError
from trimtab.spec.formats import WeightFormat
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec, FFNSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.blocks import change_blocks, check_floats, matrices, windows_of

if TYPE_CHECKING:
    import torch

    from trimtab.model.calibration import Inputs
    from trimtab.runtime.weights.packed import Packed, Weights
    from trimtab.techniques.materials import Materials

#: Powers of the mean magnitude that are tried as scales; 0 = no scaling.
_POWERS = tuple(np.linspace(0, 1, 11).tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Technique):
    """Activation-aware weight quantization.

    Exact: bytes, as `rtn` at the same bits; the model before rounding. Approximated: the weights. Scales of columns are powers of
    the mean magnitude of their inputs, chosen by the error of the outputs on calibration text (by their second moments, so no
    output is stored); then every group's range is searched for by the same weights. Nothing is left to do at run time.

    Source: Lin et al., AWQ, MLSys 2024, arXiv 2306.00978.
    """

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "weights on a group-wise integer grid, columns scaled by the size of their inputs"
    stage: ClassVar[Stage] = Stage.WEIGHTS
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    bits: int = param(4, "bits of one code", "2..8")
    group: int = param(
        64, "weights along the input that share a scale; must divide every row", "a divisor of the row length"
    )
    sym: bool = param(False, "true: scale only; false: scale and minimum", "true, false")
    tokens: str = param("unitnorm", "weight of a token in the error", "unitnorm, cap, plain")
    search: bool = param(True, "search for the range of every group; false: all of it", "true, false")
    samples: int = param(12288, "calibration tokens", "1 or more")
    window: int = param(256, "tokens of a calibration text", "2..context")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SpecError(
                f"awq: bits={self.bits} is not possible. Allowed: 2..8. Try bits={min(max(self.bits, 2), 8)}."
            )
        if self.group < 1:
            raise SpecError(f"awq: group={self.group} is not possible. Allowed: 1 or more. Try group=64.")
        if self.tokens not in ("unitnorm", "cap", "plain"):
            raise SpecError(f"awq: tokens={self.tokens} is not possible. Allowed: unitnorm, cap, plain.")
        if self.samples < 1 or self.window < 2:
            raise SpecError(
                f"awq: samples={self.samples}, window={self.window} is not possible. Allowed: 1 or more, 2 or more. "
                "Try samples=12288, window=256."
            )

    @property
    def format(self) -> WeightFormat:
        """The format every linear of the layers gets."""
        return WeightFormat(kind="int", bits=self.bits, group=self.group, sym=self.sym)

    def check(self, spec: ModelSpec) -> None:
        """Refuse blocks that are not attention and a gated FFN in a row, and groups that divide no row."""
        for index, layer in enumerate(spec.layers):
            mlp = layer.mlp
            dense = (
                isinstance(layer.self_attn, AttentionSpec) and isinstance(mlp, FFNSpec) and mlp.gate_proj is not None
            )
            if not dense or layer.parallel or layer.input_layernorm is None or layer.post_attention_layernorm is None:
                raise SpecError(
                    f"awq: layers.{index} of {spec.name} is not attention and a gated FFN, each behind its norm. Allowed: models "
                    "of such blocks. Use gptq."
                )
        for path, node in matrices(spec):
            check_floats(self.name, spec, path, node)
            try:
                self.format.buffers(*node.stored_shape)
            except SpecError as error:
                raise SpecError(f"awq: {path} of {spec.name}: {error}") from None

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Every linear inside the layers."""
        for path, _ in matrices(spec):
            yield Edit(path, "format", self.format)

    def convert(self, weights: Weights, old: ModelSpec, new: ModelSpec, materials: Materials) -> Weights:
        """Scale and round block by block; a block is scaled as a whole before any of it is rounded."""
        from trimtab.model.calibration import STAGES, Inputs
        from trimtab.model.folding import fold, shared_by_values
        from trimtab.model.rounding import SHARES, rounded
        from trimtab.model.tensors import float_matrix

        pending: dict[str, torch.Tensor] = {}  # what an error in each column costs once it is scaled

        def change(found: Mapping[str, Inputs], now: Weights) -> Mapping[str, Packed]:
            first = next(iter(found))
            path = ".".join(first.split(".")[:2])
            layer = old.layers[int(path.split(".")[1])]
            stage = next(i for i, names in enumerate(STAGES) if first.rpartition(".")[2] in names)
            inputs = found[first]
            wish = inputs.mean_abs.numpy()
            wish = shared_by_values(layer, wish) if stage == 1 else wish
            scale = self._scale([float_matrix(now[p]) for p in found], inputs, wish)
            for p in found:
                pending[p] = (inputs.hessian.diagonal() / _tensor(scale).square()).float()
            replaced = fold(layer, path, now, stage, scale)
            if stage < len(STAGES) - 1:
                return replaced
            shares = SHARES if self.search else (1.0,)
            done = {
                p: rounded(float_matrix((now | replaced)[p]), self.format, cost, shares) for p, cost in pending.items()
            }
            pending.clear()
            return {**replaced, **done}

        windows = windows_of(self.name, materials, self.samples, self.window)
        paths = {path for path, _ in matrices(new)}
        return change_blocks(
            str(self),
            weights,
            old,
            new,
            materials,
            windows,
            paths.__contains__,
            lambda path: Inputs(self.tokens),
            change,
        )

    def _scale(self, matrices_NK: list[torch.Tensor], inputs: Inputs, wish: np.ndarray) -> np.ndarray:
        """The scale of every column [K]: the power of `wish` whose rounding hurts the outputs least."""
        from trimtab.model.rounding import rounded
        from trimtab.model.tensors import float_matrix

        h = inputs.hessian.float()
        base = np.maximum(wish, 1e-4 * wish.max() if wish.max() > 0 else 1.0)
        best, least = np.ones_like(base), np.inf
        for power in _POWERS:
            scale = base**power
            scale /= np.sqrt(scale.max() * scale.min())
            s = _tensor(scale).float()
            left = 0.0
            for w in matrices_NK:
                dw = float_matrix(rounded(w * s, self.format, None, (1.0,))) / s - w
                left += float((dw @ h * dw).sum())
            if left < least:
                best, least = scale, left
        return best


def _tensor(values: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(values)
