"""From weights by path to the tensors of a file: what `read_weights` picks apart is put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError
from trimtab.runtime.numerics import decode
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec import tree
from trimtab.spec.families.sources import Source, Want, wanted
from trimtab.spec.model import ModelSpec

#: Fields of a node that say how a product is computed, which is for whoever runs the file to choose.
_RUN_FIELDS = frozenset({"format", "bias_format", "layout", "product", "kernels"})


@dataclass(frozen=True, slots=True)
class Part:
    """One weight and its place in a tensor."""

    want: Want
    source: Source
    packed: Packed


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor of the file, of one weight or of several that share it (a fused q, k and v; the experts of a layer).

    Args:
        name: in the file.
        parts: what it is made of.
        dims: extents in the file, outermost first.
    """

    name: str
    parts: tuple[Part, ...]
    dims: tuple[int, ...]

    def rows(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Put one array of every part, its first axis the rows of the untransposed weight, where the file has it.

        Returns:
            [rows of the tensor, ...], or [elements, 1] of a vector.
        """
        if len(arrays) == 1 and self.parts[0].source.rows is None and self.parts[0].source.block is None:
            return arrays[0]
        total = sum(len(array) for array in arrays)
        out = np.empty((total, *arrays[0].shape[1:]), arrays[0].dtype)
        for part, array in zip(self.parts, arrays, strict=True):
            block, rows = part.source.block, part.source.rows
            into = out if block is None else out[block.start : block.stop]
            if rows is None:
                into[...] = array
            else:
                into[np.asarray(rows)] = array
        return out

    def floats(self) -> np.ndarray:
        """The values as the file has them, float32 of `dims`."""
        arrays = []
        for part in self.parts:
            values = decode(part.packed)
            values = values.T if part.packed.layout == "transposed" else values
            values = values - np.float32(part.source.shift) if part.source.shift else values
            arrays.append(values.reshape(-1, 1) if part.want.vector else values)
        if any(part.source.transposed for part in self.parts):
            blocks = [part.source.block for part in self.parts]
            if blocks[0] is None:
                return np.ascontiguousarray(self.rows(arrays).T).reshape(self.dims)
            return self._stack(arrays).reshape(self.dims)
        return self.rows(arrays).reshape(self.dims)

    def _stack(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Experts whose matrices are stored transposed: the rows of a part are columns of its block."""
        out = np.empty((int(np.prod(self.dims[:-1])), self.dims[-1]), np.float32)
        for part, array in zip(self.parts, arrays, strict=True):
            block, rows = part.source.block, part.source.rows
            assert block is not None
            out[block.start : block.stop, slice(None) if rows is None else np.asarray(rows)] = array.T
        return out


def wholes(spec: ModelSpec, weights: Weights, found: Mapping[str, Source], stacked: bool) -> Iterator[Whole]:
    """Yield every tensor of a file, in the order of its first weight.

    Args:
        spec: the model.
        weights: of it.
        found: where the file keeps each weight.
        stacked: the file stacks experts along an axis of its own.
    """
    gathered: dict[str, list[Part]] = {}
    for want in wanted(spec):
        source = found[want.key]
        gathered.setdefault(source.tensor, []).append(Part(want, source, weights[want.key]))
    for name, parts in gathered.items():
        first = parts[0]
        count = sum(part.want.shape[1] if part.want.vector else part.want.shape[0] for part in parts)
        cols = () if first.want.vector else (first.want.shape[1],)
        experts = len({part.want.expert for part in parts})
        if first.want.expert is not None and stacked and first.source.block is not None:
            dims = (experts, count // experts, *cols)
        else:
            dims = (count, *cols)
        if first.source.transposed:
            dims = (*dims[:-2], dims[-1], dims[-2])
        yield Whole(name, tuple(parts), dims)


def unsaid(spec: ModelSpec, base: ModelSpec, weights: Weights) -> str:
    """What of a model no file of weights alone can say, in words; empty if there is nothing.

    Args:
        spec: the model as it is.
        base: as it was loaded.
        weights: of `spec`.
    """
    known, plain = dict(tree.walk(spec)), dict(tree.walk(base))
    writers = {(written.path, written.field): written.by for written in spec.history}
    for path, node in (("", spec), *known.items()):
        before = base if not path else plain.get(path)
        if type(before) is not type(node):
            return f"{path} ({type(node).__name__}) is not in the model that was loaded"
        for name in _values_of(node):
            if name not in _RUN_FIELDS and getattr(node, name) != getattr(before, name):
                by = writers.get((path, name))
                return f"{path or spec.name}: {name} = {getattr(node, name)}{f' (set by {by})' if by else ''}"
    if missing := [path for path in plain if path not in known]:
        return f"{missing[0]} is gone"
    keys = {want.key for want in wanted(spec)}
    if extra := [key for key in weights if key not in keys]:
        return f"{extra[0]} ({weights[extra[0]].format})"
    return ""


def _values_of(node: tree.Node) -> Iterator[str]:
    """Names of the fields that hold no nodes and take part in equality."""
    import dataclasses

    inside = {name.partition(".")[0] for name, _ in tree.children(node)}
    for field in dataclasses.fields(node):  # type: ignore[arg-type]
        if field.compare and field.name not in inside:
            yield field.name


def one_format(whole: Whole, target: str) -> None:
    """Refuse a tensor whose parts are coded differently.

    Raises:
        SpecError: names two of them.
    """
    first = whole.parts[0]
    for part in whole.parts[1:]:
        if part.packed.format != first.packed.format:
            raise SpecError(
                f"{target} keeps {first.want.key} and {part.want.key} in one tensor, {whole.name}, and they are held in "
                f"{first.packed.format} and {part.packed.format}. Give both one format, or save with --to own."
            )
