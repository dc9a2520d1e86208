"""The column loop that every method with a Hessian shares: change one input column of a matrix, spread its error over the rest.

What is done to a column is the rule: round it to a grid (GPTQ), to binary codes, set part of it to zero (SparseGPT). The error of
column j, divided by U[j, j], is taken out of the columns still to come along row j of U, the upper Cholesky factor of the
inverse Hessian; columns are worked off in blocks so that most of that is one matrix product.

Legend: N outputs, K inputs of a matrix, j a column in the order of the sweep.
Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from trimtab.errors import CalibrationError

#: Columns whose errors are spread together.
BLOCK = 128
#: Damping is raised by this factor, at most as many times, where the Hessian has no Cholesky factor.
_RAISE, _RAISES = 10.0, 5


class Rule(Protocol):
    """What becomes of the columns.

    Attributes:
        group: columns that share scales and stand together in the order of the sweep.
    """

    group: int

    def start(self, j: int, w_Ng: torch.Tensor, cost_g: torch.Tensor) -> None:
        """Called where a group begins, with the columns of the group as the sweep has left them so far [N, group], and what a
        squared error in each of them costs: the rule fixes the scales of the group.
        """
        ...

    def column(self, j: int, w_N: torch.Tensor) -> torch.Tensor:
        """What column j becomes, float32 [N]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The inverse Hessian, factored.

    Args:
        upper: U, float32 [K, K] upper triangular with U^T U = inverse of the damped Hessian, columns in the order of the sweep.
        order: int64 [K], which column comes at which place.
        dead: bool [K], columns whose input was always zero, by place.
        damp: share of the mean diagonal that was added.
    """

    upper: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    damp: float

    @property
    def cost(self) -> torch.Tensor:
        """What a squared error in the column at each place costs, later columns making up for it as they can [K]."""
        return self.upper.diagonal().square().reciprocal()


def factor(hessian_KK: torch.Tensor, damp: float = 0.01, order: torch.Tensor | None = None) -> Factor:
    """Factor a Hessian for `sweep`.

    Args:
        hessian_KK: mean of x x^T over the inputs, symmetric [K, K].
        damp: share of the mean diagonal added to it; raised where that is not enough.
        order: int64 [K], columns in the order of the sweep; None = as they come.

    Raises:
        CalibrationError: no input was ever different from zero, or no damping makes it positive definite.
    """
    h = hessian_KK.to(torch.float64)
    order = torch.arange(len(h)) if order is None else order
    h = h[order][:, order].clone()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    if bool(dead.all()):
        raise CalibrationError("The calibration text gave a matrix nothing but zeros. Give another text.")
    mean = float(diagonal[~dead].mean())
    diagonal[dead] = mean
    asked = damp
    for _ in range(_RAISES):
        damped = h + torch.eye(len(h), dtype=h.dtype) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                if damp > asked:
                    warnings.warn(
                        f"A Hessian is singular: damped by {damp:g} of its mean instead of {asked:g}. A longer calibration text helps.",
                        stacklevel=2,
                    )
                return Factor(upper.float(), order, dead, damp)
        damp = max(damp, 1e-4) * _RAISE
    raise CalibrationError(
        f"The Hessian of a matrix is not positive definite, damped by {damp / _RAISE:g} of its mean either. "
        "Give a longer calibration text."
    )


def sweep(w_NK: torch.Tensor, how: Factor, rule: Rule, block: int = BLOCK) -> tuple[torch.Tensor, float]:
    """Change a matrix column by column.

    Args:
        w_NK: float32 [N, K], columns in their own order; not written to.
        how: from `factor`.
        rule: what becomes of a column.
        block: columns whose errors are spread together.

    Returns:
        The changed matrix float32 [N, K], columns in their own order, and the loss: the sum over rows of dw H dw^T, which a rule
        that changes nothing has at 0.
    """
    w = w_NK[:, how.order].float().clone()
    w[:, how.dead] = 0.0  # an input that is always zero asks for nothing
    upper, cost_K = how.upper, how.cost
    done = torch.empty_like(w)
    loss = 0.0
    for first, last in _blocks(w.shape[1], rule.group, block):
        errors = torch.empty(len(w), last - first)
        for j in range(first, last):
            if j % rule.group == 0:
                rule.start(j, w[:, j : j + rule.group], cost_K[j : j + rule.group])
            column = w[:, j]
            found = rule.column(j, column)
            done[:, j] = found
            error = (column - found) / upper[j, j]
            loss += float(error.square().sum())
            w[:, j + 1 : last].addr_(error, upper[j, j + 1 : last], alpha=-1)
            errors[:, j - first] = error
        w[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    back = torch.empty_like(done)
    back[:, how.order] = done
    return back, loss


def _blocks(cols: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the blocks: a group begins where all errors before it have been spread."""
    size = block // group * group if group <= block else block
    for start in range(0, cols, size if group <= block else group):
        stop = min(cols, start + (size if group <= block else group))
        for first in range(start, stop, block):
            yield first, min(first + block, stop)


def group_order(diagonal_K: torch.Tensor, group: int) -> torch.Tensor:
    """Whole groups by the mean of their diagonal, largest first, and so the columns inside a group: int64 [K].

    Groups stay together, so each can fix its scales when its first column is reached, and what is stored keeps the order of the
    inputs.
    """
    parts = diagonal_K.split(group)
    means = torch.stack([part.mean() for part in parts])
    found = []
    for index in means.argsort(descending=True, stable=True).tolist():
        found.append(index * group + parts[index].argsort(descending=True, stable=True))
    return torch.cat(found)
