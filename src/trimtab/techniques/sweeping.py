"""A sweep over every matrix of a model on calibration text: what differs between methods is the rule of a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.spec.model import ModelSpec
from trimtab.techniques.blocks import change_blocks, weight_paths, windows_of

if TYPE_CHECKING:
    import torch

    from trimtab.model.calibration import Inputs
    from trimtab.runtime.weights.packed import Packed, Weights
    from trimtab.techniques.materials import Materials


def sweep_blocks(
    key: str,
    weights: Weights,
    old: ModelSpec,
    new: ModelSpec,
    materials: Materials,
    *,
    group_of: Callable[[str], int],
    rule_of: Callable[[str, tuple[int, int], torch.Tensor], Any],
    stored: Callable[[str, Any], Packed],
    rotated: Callable[[str], bool] = lambda path: False,
    samples: int,
    window: int,
    tokens: str = "unitnorm",
    damp: float = 0.01,
    act_order: bool = True,
) -> Weights:
    """Change every matrix of the layers column by column, block by block.

    Args:
        key: the technique and its parameters: names the finished blocks on disk.
        weights: of `old`.
        old, new: the model before and after.
        materials: calibration text, cache folder and progress.
        group_of: columns of a matrix that stand together in the order of the sweep, by path.
        rule_of: (path, shape [N, K], order of the columns) -> the rule, see `model.sweep.Rule`.
        stored: (path, rule) -> the matrix once the rule has seen all columns.
        rotated: whether a matrix is changed, and stored, in the basis of `numerics.rotation`.
        samples, window: calibration tokens, and tokens of a text.
        tokens: weight of a token, of `model.calibration.TOKEN_WEIGHTS`.
        damp: share of the mean diagonal added to the Hessian.
        act_order: groups with the largest inputs first.
    """
    import torch

    from trimtab.model.calibration import Inputs
    from trimtab.model.sweep import factor, group_order, sweep
    from trimtab.model.tensors import float_matrix
    from trimtab.runtime.numerics.rotation import rotation_of

    paths = {path for path, _ in weight_paths(new)}

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(rotation_of(x.shape[1]).apply(x.numpy()))

    def factored(inputs: Inputs, group: int, rotate: bool) -> Any:
        h = turned(turned(inputs.hessian).T).contiguous() if rotate else inputs.hessian
        return factor(h, damp, group_order(h.diagonal(), group) if act_order else None)

    def change(found: Mapping[str, Inputs], now: Weights) -> dict[str, Packed]:
        replaced = {}
        for path, inputs in found.items():
            w_NK, group, rotate = float_matrix(now[path]).float(), group_of(path), rotated(path)
            w_NK = turned(w_NK) if rotate else w_NK
            how = inputs.once((group, rotate), lambda i=inputs, g=group, r=rotate: factored(i, g, r))
            rule = rule_of(path, (w_NK.shape[0], w_NK.shape[1]), how.order)
            sweep(w_NK, how, rule)
            replaced[path] = stored(path, rule)
        return replaced

    windows = windows_of(key.partition(":")[0], materials, samples, window)
    return change_blocks(
        key, weights, old, new, materials, windows, paths.__contains__, lambda path: Inputs(tokens), change
    )
