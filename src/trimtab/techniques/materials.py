"""What techniques may draw on while they resolve and convert: text, seed, threads, progress and a cache of artefacts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.errors import CalibrationError
from trimtab.runtime.files import write_atomically
from trimtab.spec.machine import home

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.text.tokenizer import Tokenizer


Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


def no_progress(label: str, items: Iterable[Any]) -> Iterator[Any]:
    """Pass the items through."""
    del label
    yield from items


@dataclass(frozen=True, kw_only=True)
class Materials:
    """Calibration input.

    Args:
        texts: calibration texts by name; disjoint from whatever is evaluated later.
        tokenizer: of the model.
        seed: of every random choice.
        window: tokens of one calibration window.
        windows: most windows used, spread evenly over the texts.
        progress: wraps an iterable and shows a bar, ``progress(label, items)``.
        cache: folder of artefacts; None turns the cache off.
        use_shipped: take what ships for well-known models; False looks afresh.
    """

    texts: dict[str, str] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    seed: int = 0
    window: int = 512
    windows: int = 16
    progress: Progress = no_progress
    cache: Path | None = field(default_factory=lambda: home() / "artefacts")
    use_shipped: bool = True

    def for_model(self, model: Model, progress: Progress | None = None) -> Materials:
        """Return the same materials with the model's tokenizer where none is set, and with progress shown."""
        return dataclasses.replace(
            self, tokenizer=self.tokenizer or model.tokenizer, progress=progress or self.progress
        )

    def token_windows(self) -> list[np.ndarray]:
        """Calibration windows [windows][window] of token ids, evenly spread over all texts.

        Raises:
            CalibrationError: there is no text, or not enough for one window.
        """
        if not self.texts or self.tokenizer is None:
            raise CalibrationError(
                "This technique calibrates on text and none was given. Name one with --calibration FILE."
            )
        pieces: list[np.ndarray] = []
        for text in self.texts.values():
            ids = np.asarray(self.tokenizer.encode(text), dtype=np.int64)
            count = len(ids) // self.window
            pieces.extend(ids[: count * self.window].reshape(count, self.window))
        if not pieces:
            raise CalibrationError(
                f"The calibration text is shorter than one window of {self.window} tokens. Give a longer one."
            )
        chosen = np.linspace(0, len(pieces) - 1, min(self.windows, len(pieces))).round().astype(int)
        return [pieces[index] for index in dict.fromkeys(chosen.tolist())]

    def text_hash(self) -> str:
        """Digest of texts, window and seed: part of the key of every artefact."""
        parts = [*(f"{name}\0{text}" for name, text in self.texts.items()), f"{self.window}/{self.windows}/{self.seed}"]
        return hashlib.sha256("\1".join(parts).encode()).hexdigest()

    def cached(self, kind: str, key: object, compute: Callable[[], Any]) -> Any:
        """Return the JSON artefact of `kind` for `key`, computing and storing it once (atomically)."""
        digest = hashlib.sha256(json.dumps([kind, key, self.text_hash()], sort_keys=True).encode()).hexdigest()[:24]
        path = self.cache / f"{kind}-{digest}.json" if self.cache else None
        if path and path.exists():
            return json.loads(path.read_text("utf-8"))
        value = compute()
        if path:
            write_atomically(path, json.dumps(value))
        return value


def text_materials(path: Path) -> Materials:
    """Calibrate on a text file.

    Raises:
        CalibrationError: the file cannot be read.
    """
    try:
        return Materials(texts={path.name: path.read_text("utf-8")})
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"Calibration text {path} cannot be read: {error}. Give a UTF-8 text file.") from None
