"""Bits per byte: how well a text is predicted, whatever the tokenizer, and what counting alone reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch.nn.functional as F

from trimtab.errors import SpecError
from trimtab.measure.quality import windows
from trimtab.model.variant import Model

#: Bytes of a context and the byte after it fill one 64-bit key.
_LONGEST = 8


def bits_per_byte(
    model: Model,
    text: str,
    window: int,
    most: int | None = None,
    progress: Callable[[str, Iterable[Any]], Iterator[Any]] | None = None,
) -> float:
    """Mean -log2 p of the tokens of a text, times tokens per byte.

    Windows do not overlap and the first token of each is not scored, so a model with a short window pays for it.

    Args:
        model: with its tokenizer.
        text: held-out text.
        window: tokens of a window.
        most: most windows, spread over the text; None = all.
        progress: wraps the windows and shows a bar.

    Raises:
        CalibrationError: the text is shorter than a window.
    """
    ids = model.tokenizer.encode(text)
    total, scored = 0.0, 0
    pieces = windows(ids, window, most)
    for piece in pieces if progress is None else progress("held-out text", pieces):
        logits_TV = model.logits(piece.tolist())[0]
        total += F.cross_entropy(logits_TV[:-1], logits_TV.new_tensor(piece[1:]).long(), reduction="sum").item()
        scored += len(piece) - 1
    return total / scored / math.log(2) * len(ids) / len(text.encode())


def ngram_bits_per_byte(train: bytes, valid: bytes, order: int) -> float:
    """Mean -log2 p of every byte of `valid` under interpolated Witten-Bell counts of `train`.

    Args:
        train, valid: texts.
        order: bytes of an n-gram, the predicted one included: 1..8.

    Raises:
        SpecError: another order, or an empty text.

    Source: Witten and Bell, The Zero-Frequency Problem, IEEE Transactions on Information Theory 37, 1991 (method C);
        interpolated as in Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1998, section 2.5.

    >>> round(ngram_bits_per_byte(b"abababab", b"abab", 2), 3)
    0.48
    """
    if not 1 <= order <= _LONGEST:
        raise SpecError(f"order={order} is not possible. Allowed: 1..{_LONGEST}. Try order=6.")
    if not train or not valid:
        raise SpecError("An n-gram model wants bytes to count and bytes to predict. Give two texts that are not empty.")
    seen, asked = (np.frombuffer(text, np.uint8).astype(np.uint64) for text in (train, valid))
    p = np.full(len(asked), 1 / 256)
    for size in range(1, order + 1):
        grams, counts = np.unique(_keys(seen, size), return_counts=True)
        contexts, place = np.unique(grams >> np.uint64(8), return_inverse=True)
        total = np.bincount(place, counts)
        distinct = np.bincount(place).astype(np.float64)
        keys = _keys(asked, size)
        p_size = p[size - 1 :]
        hits = _found(grams, counts.astype(np.float64), keys)
        of, kinds = (_found(contexts, values, keys >> np.uint64(8)) for values in (total, distinct))
        known = of > 0
        p_size[known] = (hits[known] + kinds[known] * p_size[known]) / (of[known] + kinds[known])
    return float(-np.log2(p).mean())


def _keys(text: np.ndarray, size: int) -> np.ndarray:
    """Every run of `size` bytes as a number, the last byte lowest."""
    keys = np.zeros(max(len(text) - size + 1, 0), np.uint64)
    for place in range(size):
        keys = (keys << np.uint64(8)) | text[place : place + len(keys)]
    return keys


def _found(known: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The value of each key, 0 for those that are not known."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[place] == keys, values[place], 0.0)
