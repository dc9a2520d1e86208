"""Change the matrices of a model block by block on calibration text, and go on where an interrupted run stopped.

What `GPTQ` and its relatives share besides the sweep: the pass over the text, the paths concerned, finished blocks on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CalibrationError, SpecError
from trimtab.runtime.weights.packed import Packed, Weights, fingerprint
from trimtab.spec import tree
from trimtab.spec.formats import WeightFormat
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec

if TYPE_CHECKING:
    from trimtab.model.calibration import Observer
    from trimtab.techniques.materials import Materials

#: Fewer calibration tokens than this say too little about the inputs of a matrix.
LEAST_TOKENS = 2048


def windows_of(name: str, materials: Materials, tokens: int, window: int) -> list[np.ndarray]:
    """Calibration windows of `window` tokens, together about `tokens`, or all there are with a warning.

    Raises:
        CalibrationError: less text than `LEAST_TOKENS`, or than asked for where that is less.
    """
    found = dataclasses.replace(materials, window=window, windows=-(-tokens // window)).token_windows()
    count = sum(map(len, found))
    if count < min(LEAST_TOKENS, tokens):
        raise CalibrationError(
            f"{name}: the calibration text holds {count} tokens in windows of {window}; at least {min(LEAST_TOKENS, tokens)} are "
            f"needed, {tokens} were asked for. Give a longer text with --calibration FILE."
        )
    if count < tokens - window:
        warnings.warn(
            f"{name}: the calibration text holds {count} tokens in windows of {window}, {tokens} were asked for: it goes with fewer.",
            stacklevel=2,
        )
    return found


def change_blocks(
    key: str,
    weights: Weights,
    old: ModelSpec,
    new: ModelSpec,
    materials: Materials,
    windows: list[np.ndarray],
    wanted: Callable[[str], bool],
    observe: Callable[[str], Observer],
    change: Callable[[Mapping[str, Any], Weights], Mapping[str, Packed]],
) -> Weights:
    """Take calibration windows through the model and change its matrices on the way.

    Args:
        key: the technique and its parameters: names the finished blocks on disk.
        weights: of `old`.
        old, new: the model before and after; what `change` returns is in the formats of `new`.
        materials: cache folder and progress.
        windows: token ids.
        wanted: paths of the matrices to observe.
        observe: makes the observer of a path.
        change: from the observers of one stage and the weights as they are to what replaces them.

    Returns:
        The weights with what was changed. A second call with the same arguments reads them from disk; after an interrupt the
        finished blocks are not computed again.
    """
    import torch

    from trimtab.model.calibration import Blocks

    count = len(old.layers)
    texts = hashlib.sha256(b"".join(np.asarray(window, np.int64).tobytes() + b"|" for window in windows)).hexdigest()
    digest = hashlib.sha256(json.dumps([key, fingerprint(weights), old.hash, new.hash, texts]).encode()).hexdigest()[
        :24
    ]
    shelf = _Shelf(None if materials.cache is None else materials.cache / f"blocks-{digest}", new)
    before, hidden = shelf.finished(count)
    changed = weights
    for replaced in before:
        changed = changed | replaced
    if len(before) == count:
        return changed
    blocks = Blocks(old, weights, windows, None if hidden is None else [torch.from_numpy(h) for h in hidden])
    for index in materials.progress(key.partition(":")[0], range(len(before), count)):
        after = blocks.visit(index, changed, wanted, observe, change)
        replaced = {path: packed for path, packed in after.items() if packed is not changed[path]}
        changed = after
        shelf.keep(index, replaced, [h.float().numpy() for h in blocks.hidden] if index + 1 < count else [])
    return changed


class _Shelf:
    """Finished blocks of one run in a folder: weights of every block, hidden states behind the last one."""

    def __init__(self, folder: Path | None, spec: ModelSpec) -> None:
        self.folder = folder
        self.nodes = dict(tree.walk(spec))

    def finished(self, count: int) -> tuple[list[dict[str, Packed]], list[np.ndarray] | None]:
        """What the finished blocks changed, in order, and the hidden states behind the last of them."""
        if self.folder is None or not self.folder.is_dir():
            return [], None
        found: list[dict[str, Packed]] = []
        while len(found) < count and (file := self.folder / f"block-{len(found)}.npz").is_file():
            found.append(self._read(file))
        if not found or len(found) == count:
            return found, None
        states = self.folder / f"hidden-{len(found) - 1}.npz"
        if not states.is_file():
            return [], None
        with np.load(states) as stored:
            return found, [stored[name] for name in stored.files]

    def keep(self, index: int, replaced: Mapping[str, Packed], hidden: Iterable[np.ndarray]) -> None:
        """Store a block; hidden states go first, so that a block on disk always has them."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        states = {f"{pack:04}": h for pack, h in enumerate(hidden)}
        if states:
            _write(self.folder / f"hidden-{index}.npz", states)
        buffers = {
            f"{path}|{name}": buffer for path, packed in replaced.items() for name, buffer in packed.buffers.items()
        }
        shapes = json.dumps({path: [*packed.shape, packed.layout] for path, packed in replaced.items()})
        _write(self.folder / f"block-{index}.npz", buffers | {"shapes": np.frombuffer(shapes.encode(), np.uint8)})
        (self.folder / f"hidden-{index - 1}.npz").unlink(missing_ok=True)

    def _read(self, file: Path) -> dict[str, Packed]:
        with np.load(file) as stored:
            shapes = json.loads(stored["shapes"].tobytes())
            buffers: dict[str, dict[str, np.ndarray]] = {}
            for key in stored.files:
                path, _, name = key.partition("|")
                if name:
                    buffers.setdefault(path, {})[name] = stored[key]
        found = {}
        for path, (rows, cols, layout) in shapes.items():
            found[path] = Packed(self._format(path), (rows, cols), buffers[path], layout)
        return found

    def _format(self, path: str) -> WeightFormat:
        """The format of a weight; experts share a node, a bias is named after its own."""
        path, bias = path.removesuffix(".bias"), path.endswith(".bias")
        if path not in self.nodes and ".experts." in path:
            head, _, rest = path.partition(".experts.")
            path = f"{head}.experts.{rest.partition('.')[2]}"
        node: Any = self.nodes[path]
        return getattr(node, "bias_format", node.format) if bias else node.format


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def forget(materials: Materials) -> None:
    """Remove every finished block of every run from the cache folder."""
    if materials.cache is not None:
        for folder in materials.cache.glob("blocks-*"):
            shutil.rmtree(folder)


def matrices(spec: ModelSpec, *, head: bool = False) -> Iterable[tuple[str, LinearSpec]]:
    """(path, node) of the matrices that weight quantizers change: those of the layers, routers left out, and the head if asked."""
    return (
        (path, node)
        for path, node in spec.linears()
        if (path.startswith("layers.") and not path.endswith("router")) or (head and path == "lm_head")
    )


def weight_paths(spec: ModelSpec) -> Iterable[tuple[str, LinearSpec]]:
    """As `matrices`, by the paths of their weights: experts one by one."""
    from trimtab.techniques.apply import linear_weights

    return (
        (path, node)
        for path, node in linear_weights(spec)
        if path.startswith("layers.") and not path.endswith("router")
    )


def check_floats(name: str, spec: ModelSpec, path: str, node: LinearSpec) -> None:
    """Refuse a matrix that is rounded already, or stored transposed.

    Raises:
        SpecError: names the matrix and what to do.
    """
    if node.format.is_rounded:
        raise SpecError(
            f"{name}: {path} of {spec.name} is already quantized (format {node.format}); rounding twice is worse than its name "
            "says. Start from floats."
        )
    if node.layout != "row":
        raise SpecError(f"{name}: {path} of {spec.name} is stored transposed. Drop what stores it so, or use rtn.")
