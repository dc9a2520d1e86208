"""Train all weights of a model on text: AdamW, cosine schedule, float32, the decoder that runs everywhere else.

Legend: T tokens of a batch, K inputs, N outputs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.errors import CalibrationError, SpecError
from trimtab.model.decoder import Decoder
from trimtab.model.linear import Linear
from trimtab.model.products import Rule
from trimtab.model.tensors import Learned, float_tensor, learned
from trimtab.runtime.numerics import encode
from trimtab.runtime.step import IntArray, Step
from trimtab.runtime.weights.packed import Packed, Weights
from trimtab.spec.formats import FP32
from trimtab.spec.model import ModelSpec

#: What a linear layer computes while it is trained: (weight path, x [T, K], W [N, K]) -> [T, N], without the bias. The path of a
#: tied head is ``lm_head``. ``torch.nn.functional.linear(x, W)`` is the plain product.
Product = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
Progress = Callable[[str, Iterable[Any]], Iterator[Any]]

#: Last part of the paths of weights that are no matter of gradients.
_FIXED = ("key_order", "threshold", "correction_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a model is trained.

    Args:
        steps: updates.
        batch: windows of an update.
        window: tokens a window predicts.
        lr: peak of the learning rate; it rises over the first `warmup` of the steps and falls by a cosine to `floor` of it.
        warmup, floor: shares.
        weight_decay: of matrices; vectors have none.
        clip: largest norm of the gradient.
        seed: of the order of the windows.

    Raises:
        SpecError: a number that is not possible.
    """

    steps: int
    batch: int = 8
    window: int = 256
    lr: float = 3e-3
    warmup: float = 0.05
    floor: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.window) < 1:
            raise SpecError(
                f"steps={self.steps}, batch={self.batch}, window={self.window} is not possible. Allowed: 1 or more."
            )
        if not (self.lr > 0 and self.clip > 0 and self.weight_decay >= 0):
            raise SpecError(
                f"lr={self.lr}, clip={self.clip}, weight_decay={self.weight_decay} is not possible. "
                "Allowed: lr and clip above 0, weight_decay 0 or more."
            )
        if not (0 <= self.warmup < 1 and 0 <= self.floor <= 1):
            raise SpecError(f"warmup={self.warmup}, floor={self.floor} is not possible. Allowed: shares of 1.")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(self.steps - rising, 1)
        return self.lr * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a training gave.

    Args:
        weights: trained, in float32.
        losses: float64 [steps], mean cross-entropy in nats of each update, before it.
    """

    weights: Weights
    losses: np.ndarray


def fit(
    spec: ModelSpec,
    weights: Weights,
    ids: Sequence[int] | IntArray,
    how: Fit,
    product: Product | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Train every weight of a model; the model given is not changed.

    The decoder is that of inference, built over private copies of the weights. What a node of `spec` asks for is what is
    trained with: a product that lets gradients through (`Lmul` with ``ste``) trains as it runs.

    Args:
        spec, weights: where to start.
        ids: token ids of the text.
        how: settings.
        product: replaces the product of every linear layer. Quantization-aware training rounds its operands here and lets
            the gradient through as if it had not::

                def fake(path, x, w):
                    if path == "lm_head":
                        return F.linear(x, w)
                    return F.linear(x + (rounded(x) - x).detach(), w + (rounded(w) - w).detach())

            The weights that come out are the unrounded ones: encode them afterwards as the rounding had it.
        progress: wraps the steps and shows a bar, ``progress(label, items)``.

    Returns:
        Trained weights and losses; for one seed and one number of threads the same to the bit.

    Raises:
        CalibrationError: the text is shorter than a window.
        SpecError: windows longer than the context of the model, or a loss that is no number.
    """
    if how.window > spec.max_position_embeddings:
        raise SpecError(
            f"window={how.window} is longer than the context of {spec.name}, {spec.max_position_embeddings}. "
            f"Try window={spec.max_position_embeddings}."
        )
    spec = spec.with_dtype("float32", keep_packed=False)
    trained = Weights({path: packed if path.endswith(_FIXED) else learned(packed) for path, packed in weights.items()})
    decoder = _decoder(spec, trained, product)
    optimizer = _optimizer(trained, how)
    leaves = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    step = Step.of([how.window] * how.batch, [0] * how.batch)
    every = np.arange(how.window * how.batch, dtype=np.int64)
    batches = _batches(np.asarray(ids, dtype=np.int64), how)
    losses = []
    steps: Iterable[int] = range(how.steps)
    for index in steps if progress is None else progress("training", steps):
        for group in optimizer.param_groups:
            group["lr"] = how.rate(index)
        batch = torch.from_numpy(next(batches))
        logits_TV = decoder.logits(batch[:, :-1].reshape(-1), step, None, every)
        loss = F.cross_entropy(logits_TV, batch[:, 1:].reshape(-1))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SpecError(f"The loss is {losses[-1]} at step {index}. Lower the learning rate, now {how.lr:g}.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, how.clip)
        optimizer.step()
    return Fitted(Weights({path: _plain(packed) for path, packed in trained.items()}), np.array(losses))


class _Replaced:
    """The rule of a linear layer while `product` stands in for its own."""

    def __init__(self, path: str, rule: Rule, product: Product) -> None:
        self.packed, self._path, self._product = rule.packed, path, product

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def __call__(self, x_TK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stored = float_tensor(self.packed)
        y_TN = self._product(self._path, x_TK, stored.T if self.packed.layout == "transposed" else stored)
        return y_TN if bias is None else y_TN + bias


def _decoder(spec: ModelSpec, weights: Weights, product: Product | None) -> Decoder:
    decoder = Decoder(spec, weights)
    if product is not None:
        for module in decoder.modules():
            if isinstance(module, Linear):
                for index, name in enumerate(module.names):
                    module.rules[index] = _Replaced(name, module.rules[index], product)
    return decoder


def _optimizer(weights: Weights, how: Fit) -> torch.optim.AdamW:
    tensors = {path: packed.tensor for path, packed in weights.items() if isinstance(packed, Learned)}
    matrices = [tensor for tensor in tensors.values() if len(tensor) > 1]
    vectors = [tensor for tensor in tensors.values() if len(tensor) == 1]
    groups = [{"params": matrices, "weight_decay": how.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=how.lr, betas=(0.9, 0.95))


def _batches(ids: IntArray, how: Fit) -> Iterator[IntArray]:
    """Windows [batch, window + 1] without end: each pass over the text cuts it elsewhere and takes the pieces in another order."""
    size = how.window + 1
    if len(ids) < size:
        raise CalibrationError(
            f"The text has {len(ids)} tokens, a window takes {size}. Give a longer text or a smaller window."
        )
    rng = np.random.default_rng(how.seed)

    def pieces() -> Iterator[IntArray]:
        while True:
            first = int(rng.integers(0, min(how.window, len(ids) - size + 1)))
            starts = np.arange(first, len(ids) - size + 1, how.window)
            for start in rng.permutation(starts):
                yield ids[start : start + size]

    stream = pieces()
    while True:
        yield np.stack([next(stream) for _ in range(how.batch)])


def _plain(packed: Packed) -> Packed:
    """A trained matrix as a value that nothing writes to."""
    if not isinstance(packed, Learned):
        return packed
    return encode(np.array(packed.buffers["data"]), FP32, layout=packed.layout)
