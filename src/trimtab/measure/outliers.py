"""Which feature dimensions of a model hold outliers, in how many layers and positions, and what that costs a product in int8.

A dimension of the hidden state is an emergent outlier if a magnitude of at least 6 appears there in at least a quarter of the
layers, and at 6 % of all positions of all layers.

Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import SpecError
from trimtab.model.outliers import THRESHOLD, Columns, columns_of
from trimtab.runtime.step import IntArray
from trimtab.spec.nodes import FFNSpec

if TYPE_CHECKING:
    from trimtab.model.variant import Variant

#: Least shares of layers and of positions.
LAYERS, POSITIONS = 0.25, 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """An emergent outlier.

    Args:
        block: whose input it is in, ``attention`` or ``ffn``.
        dimension: of the hidden state.
        layers: share of the layers that hold an outlier there.
        positions: share of the positions, of all layers together.
        quartiles: of the outliers' values: 25, 50 and 75 %.
    """

    block: str
    dimension: int
    layers: float
    positions: float
    quartiles: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """What one matrix multiplies apart.

    Args:
        path: of the matrix.
        inputs: its columns.
        columns: of these with an outlier, mean of the windows.
        share: of all columns.
        largest: magnitude.
    """

    path: str
    inputs: int
    columns: float
    share: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierReport:
    """Outliers of a model on a text.

    Args:
        tokens, windows: of the text.
        threshold: magnitude of an outlier.
        dimensions: emergent outliers, by block and dimension.
        matrices: every matrix of the layers.
        columns: all columns with an outlier anywhere in the text, by path: what ``llm-int8:outliers=static`` keeps.
        in_int8: share of the multiply-adds of an average window that are done in int8.
    """

    tokens: int
    windows: int
    threshold: float
    dimensions: tuple[Dimension, ...]
    matrices: tuple[Apart, ...]
    columns: Mapping[str, tuple[int, ...]]
    in_int8: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def outlier_report(
    variant: Variant,
    pieces: Sequence[IntArray],
    threshold: float = THRESHOLD,
    progress: Callable[[str, Iterable[Any]], Iterator[Any]] | None = None,
) -> OutlierReport:
    """Run windows of tokens through a model and report its outliers.

    Args:
        variant: the model.
        pieces: token ids, window by window.
        threshold: magnitude of an outlier.
        progress: ``progress(label, items)``.

    Raises:
        SpecError: the threshold is not above 0.
        CalibrationError: an input is not finite.
    """
    if not threshold > 0:
        raise SpecError(f"threshold={threshold} is not possible. Allowed: numbers above 0. Try 6.")
    found = columns_of(variant.spec, variant.weights, pieces, threshold, progress)
    outputs = {path: node.n for path, node in variant.spec.linears() if path in found}
    matrices = tuple(_apart(path, found[path]) for path in outputs)
    work = np.array([n * each.inputs for n, each in zip(outputs.values(), matrices, strict=True)], float)
    apart = np.array([each.share for each in matrices])
    dimensions = [
        dimension
        for block, inputs in (
            ("attention", _inputs(variant, found, "attention")),
            ("ffn", _inputs(variant, found, "ffn")),
        )
        for dimension in emergent(block, inputs)
    ]
    return OutlierReport(
        tokens=sum(map(len, pieces)),
        windows=len(pieces),
        threshold=threshold,
        dimensions=tuple(dimensions),
        matrices=matrices,
        columns={path: found[path].columns for path in outputs},
        in_int8=float(1 - (work * apart).sum() / work.sum()),
    )


def emergent(block: str, inputs: Sequence[Columns]) -> Iterator[Dimension]:
    """The emergent outliers among the inputs of one block in every layer, ascending."""
    if not inputs:
        return
    hits = np.stack([columns.hits for columns in inputs])
    layers = (hits > 0).mean(axis=0)
    positions = hits.sum(axis=0) / sum(columns.count for columns in inputs)
    for dimension in np.flatnonzero((layers >= LAYERS) & (positions >= POSITIONS)).tolist():
        values = np.concatenate([columns.values[columns.places == dimension] for columns in inputs])
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        yield Dimension(
            block=block,
            dimension=dimension,
            layers=float(layers[dimension]),
            positions=float(positions[dimension]),
            quartiles=(low, middle, high),
        )


def _inputs(variant: Variant, found: Mapping[str, Columns], block: str) -> list[Columns]:
    """Of every layer the input of its attention, or of its feed-forward block."""
    paths = []
    for index, layer in enumerate(variant.spec.layers):
        if block == "attention":
            paths.append(f"layers.{index}.self_attn.q_proj")
        elif isinstance(layer.mlp, FFNSpec):
            paths.append(f"layers.{index}.mlp.{'up_proj' if layer.mlp.gate_proj is None else 'gate_proj'}")
        else:
            paths.append(f"layers.{index}.mlp.router")
    return [found[path] for path in paths if path in found]


def _apart(path: str, columns: Columns) -> Apart:
    peaks = np.max(columns.peaks, axis=0)
    count = columns.mean_columns
    return Apart(path=path, inputs=len(peaks), columns=count, share=count / len(peaks), largest=float(peaks.max()))
