"""One pass of calibration text through a model, block by block: what the input of every matrix looks like.

A block is observed with the blocks before it as they are by then, so that a method which changes weights as it goes sees the
inputs its result will really get. Inside a block the matrices are visited in the order of the data flow (`STAGES`), each stage
observed after the one before it has changed. Matrices that read the same tensor (q, k and v; gate and up) share one observer.

Legend: T tokens, K inputs of a matrix, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from trimtab.errors import CalibrationError, unknown
from trimtab.model.decoder import Decoder, Layer, run_blocks
from trimtab.runtime.step import IntArray, Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.model import ModelSpec

#: Matrices of a block by the stage in which they read their input.
STAGES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_STAGE = {name: index for index, names in enumerate(STAGES) for name in names}
#: Tokens of one pass: what a block holds at a time.
_TOKENS = 4096

#: How tokens weigh in a Hessian. ``unitnorm``: every input is scaled to length 1; ``cap``: those longer than the median of their
#: pass are scaled down to it; ``plain``: as they are.
TOKEN_WEIGHTS = ("unitnorm", "cap", "plain")


class Observer(Protocol):
    """Statistics of the input of one or several matrices."""

    def add(self, x_TK: torch.Tensor) -> None:
        """Take in the inputs of a pass, float [T, K]."""
        ...


class Inputs:
    """Second moments and magnitudes of the inputs.

    Args:
        tokens: of `TOKEN_WEIGHTS`.
        moments: False leaves the [K, K] sum out.

    Attributes:
        hessian: float64 [K, K], mean over tokens of w_t x_t x_t^T.
        mean_square, mean_abs: float64 [K], of the inputs as they are.
        peak: float32 [K], largest magnitude.
        count: tokens seen.

    Source: Frantar et al., GPTQ, arXiv 2210.17323 (the Hessian of the squared error of a layer is 2 X X^T).
    """

    def __init__(self, tokens: str = "unitnorm", *, moments: bool = True) -> None:
        if tokens not in TOKEN_WEIGHTS:
            raise unknown("token weight", tokens, TOKEN_WEIGHTS)
        self.tokens, self.moments, self.count = tokens, moments, 0
        self._sum: torch.Tensor | None = None
        self._factors: dict[Any, Any] = {}

    def add(self, x_TK: torch.Tensor) -> None:
        """Take in inputs [T, K].

        Raises:
            CalibrationError: one is not finite.
        """
        x = x_TK.float()
        if not torch.isfinite(x).all():
            raise CalibrationError(
                "The calibration pass met an input that is not finite (NaN or infinite): the weights of this model are broken."
            )
        if self.count == 0:
            k = x.shape[1]
            self._square, self._abs = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
            self.peak = torch.zeros(k)
            if self.moments:
                self._sum = torch.zeros(k, k, dtype=torch.float64)
        self.count += len(x)
        self._square += x.square().sum(0, dtype=torch.float64)
        self._abs += x.abs().sum(0, dtype=torch.float64)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        if self._sum is not None:
            scaled = x * self._weights(x)
            self._sum += scaled.T @ scaled
            self._factors.clear()

    def _weights(self, x_TK: torch.Tensor) -> torch.Tensor | float:
        if self.tokens == "plain":
            return 1.0
        norm = x_TK.norm(dim=1, keepdim=True)
        if self.tokens == "cap":
            return (norm.median() / norm.clamp_min(1e-30)).clamp_max(1.0)
        return 1.0 / norm.clamp_min(1e-30)

    @property
    def hessian(self) -> torch.Tensor:
        assert self._sum is not None
        return self._sum / self.count

    @property
    def mean_square(self) -> torch.Tensor:
        return self._square / self.count

    @property
    def mean_abs(self) -> torch.Tensor:
        return self._abs / self.count

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A value made from these statistics (a Cholesky factor), kept until more inputs come."""
        if key not in self._factors:
            self._factors[key] = compute()
        return self._factors[key]


class _Later(Exception):
    """A matrix of a later stage was reached: the stage has been seen."""


def watched(observe: Callable[[str], Observer], wanted: Callable[[str], bool], found: dict[str, Observer]) -> Any:
    """A tap on the inputs of matrices that feeds observers; those that read the same tensor share one.

    Args:
        observe: makes the observer of a path.
        wanted: which paths.
        found: filled as inputs are seen.
    """
    last: tuple[Any, Observer | None] = (None, None)

    def tap(path: str, x_TK: torch.Tensor) -> None:
        nonlocal last
        if not wanted(path):
            return
        observer = last[1] if last[0] is x_TK else None  # has taken this tensor in already
        if observer is None:
            observer = found.get(path)
            if observer is None:
                observer = observe(path)
            observer.add(x_TK)
        found[path] = observer
        last = (x_TK, observer)

    return tap


def observed(
    spec: ModelSpec,
    weights: Weights,
    windows: Sequence[IntArray],
    observe: Callable[[str], Observer],
    progress: Callable[[str, Iterable[Any]], Iterator[Any]] | None = None,
) -> dict[str, Observer]:
    """Run text through the model as it is and return the observer of every matrix of its layers, by path.

    Args:
        spec, weights: the model.
        windows: token ids; each is a text of its own.
        observe: makes the observer of a path.
        progress: ``progress(label, items)``.
    """
    found: dict[str, Observer] = {}
    decoder = Decoder(spec, weights)
    tap = watched(observe, lambda path: path.startswith("layers."), found)
    shown = progress or (lambda label, items: iter(items))
    with torch.inference_mode():
        for window in shown("statistics of inputs", windows):
            step = Step.of([len(window)], [0])
            step.taps = {"linear": tap}
            decoder.forward(torch.from_numpy(window), step, None, np.zeros(0, dtype=np.int64))
    return found


def packs(windows: Sequence[IntArray], tokens: int = _TOKENS) -> list[list[IntArray]]:
    """Windows in the order they come, as many in a pass as fit into `tokens`."""
    found: list[list[IntArray]] = []
    for window in windows:
        if not found or sum(map(len, found[-1])) + len(window) > tokens:
            found.append([])
        found[-1].append(window)
    return found


class Blocks:
    """Calibration windows on their way through a model whose weights change block by block.

    Args:
        spec, weights: the model as it is at the start.
        windows: token ids; each is a text of its own.
        hidden: float [T, D] per pack of `packs`, as `hidden` was when an earlier run stopped; None = from the embedding on.

    Attributes:
        hidden: inputs of the next block, one tensor [T, D] per pack.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, windows: Sequence[IntArray], hidden: list[torch.Tensor] | None = None
    ) -> None:
        self.spec, self.packs = spec, packs(windows)
        self.rows = [[len(window) for window in pack] for pack in self.packs]
        if hidden is None:
            with torch.inference_mode():
                embed = Decoder(spec, weights).embed
                hidden = [
                    embed(torch.from_numpy(np.concatenate(pack)), self._step(i)) for i, pack in enumerate(self.packs)
                ]
        self.hidden = hidden

    def _step(self, pack: int) -> Step:
        return Step.of(self.rows[pack], [0] * len(self.rows[pack]))

    @torch.inference_mode()
    def visit(
        self,
        index: int,
        weights: Weights,
        wanted: Callable[[str], bool],
        observe: Callable[[str], Observer],
        change: Callable[[Mapping[str, Any], Weights], Mapping[str, Packed]],
    ) -> Weights:
        """Take the windows through block `index`, changing its matrices stage by stage.

        Args:
            index: of the block; blocks are visited in order.
            weights: as they are now.
            wanted: paths of the matrices to observe.
            observe: makes the observer of a path.
            change: from the observers of a stage, by path, and the weights by then to what replaces its matrices; norms may be
                replaced too.

        Returns:
            The weights with everything `change` returned.
        """
        for stage in range(len(STAGES)):
            here = self._stage(index, weights, stage, wanted, observe)
            if here:
                weights = weights | change(here, weights)
        layer = self._layer(index, weights)
        for pack, h_TD in enumerate(self.hidden):
            self.hidden[pack] = run_blocks([layer], h_TD, self._step(pack), None)
        return weights

    def _layer(self, index: int, weights: Weights) -> Layer:
        return Layer(index, self.spec.layers[index], weights, self.spec.max_position_embeddings)

    def _stage(
        self,
        index: int,
        weights: Weights,
        stage: int,
        wanted: Callable[[str], bool],
        observe: Callable[[str], Observer],
    ) -> dict[str, Observer]:
        """Observers of the matrices of one stage; the pass ends where a later stage begins."""
        found: dict[str, Observer] = {}
        look = watched(observe, lambda path: wanted(path) and _STAGE.get(path.rpartition(".")[2]) == stage, found)

        def tap(path: str, x_TK: torch.Tensor) -> None:
            if _STAGE.get(path.rpartition(".")[2], -1) > stage and not _may_repeat(path):
                raise _Later
            look(path, x_TK)

        layer = self._layer(index, weights)
        for pack, h_TD in enumerate(self.hidden):
            step = self._step(pack)
            step.taps = {"linear": tap}
            try:
                run_blocks([layer], h_TD, step, None)
            except _Later:
                continue
        return found


def _may_repeat(path: str) -> bool:
    """Experts run one after the other: a later stage of one comes before an earlier one of the next."""
    return ".experts." in path or ".shared." in path
