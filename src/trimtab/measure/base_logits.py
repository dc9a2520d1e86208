"""What an unmodified model says to windows of text, kept so that every variant is compared without running it again.

A window takes T * V values: in float16, 100 MB for 1024 tokens of a vocabulary of 49152. They lie on disk, and memory holds
the one window that is being compared; beyond a limit, the files unused for longest go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from trimtab.errors import CapacityError, SpecError
from trimtab.measure.quality import ROWS
from trimtab.spec.machine import home
from trimtab.units import GIB


@dataclass(frozen=True, slots=True)
class BaseWindow:
    """The unmodified model on one window.

    Args:
        log_probs: [T - 1, V] log-probabilities in nats, float16 or float32.
        nll: float32 [T - 1], negative log-likelihood in nats of the true next token, before rounding.
        top: int64 [T - 1], the token it would choose.
    """

    log_probs: np.ndarray
    nll: np.ndarray
    top: np.ndarray

    def rows(self, rows: slice) -> torch.Tensor:
        """Log-probabilities of some rows in float32, summing to one again."""
        return torch.from_numpy(self.log_probs[rows]).float().log_softmax(-1)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.log_probs.nbytes + self.nll.nbytes + self.top.nbytes


class BaseLogits:
    """Windows by key, on disk or in memory.

    Rounding to float16 moves the KL of one position by about 1e-6 nats; perplexity and agreement are kept exactly.

    Args:
        folder: where files are kept; None keeps them in memory. Default: ``logits`` in `home()`.
        dtype: ``float16`` or ``float32``.
        limit_bytes: of everything kept. Files of other runs that were unused for longest make room; what still does not fit
            is computed each time.

    Attributes:
        computed: windows that had to be computed.

    Raises:
        SpecError: another dtype.
    """

    def __init__(
        self, folder: Path | str | None = "home", *, dtype: str = "float16", limit_bytes: int = 8 * GIB
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise SpecError(f"Log-probabilities cannot be kept as {dtype}. Allowed: float16, float32.")
        self.folder = home() / "logits" if folder == "home" else None if folder is None else Path(folder)
        self.dtype, self.limit_bytes, self.computed = np.dtype(dtype), limit_bytes, 0
        self._kept: dict[str, BaseWindow] = {}
        self._used: set[Path] = set()

    @property
    def nbytes(self) -> int:
        """Bytes kept: in memory, or of all files in the folder."""
        if self.folder is None:
            return sum(window.nbytes for window in self._kept.values())
        return sum(size for _, size, _ in self._files())

    def get(self, key: str, compute: Callable[[], tuple[torch.Tensor, np.ndarray]]) -> BaseWindow:
        """Return a window, computing it if it is not there.

        Args:
            key: names model and window; hexadecimal.
            compute: logits [T - 1, V] and the token after each of them [T - 1].

        Raises:
            CapacityError: the disk is full.
        """
        key = f"{key[:40]}-{self.dtype.name}"
        found = self._kept.get(key) if self.folder is None else self._read(key)
        if found is None:
            found = self._made(*compute())
            self.computed += 1
            if self.folder is not None:
                self._write(key, found)
            elif self.nbytes + found.nbytes <= self.limit_bytes:
                self._kept[key] = found
        return found

    def clear(self) -> None:
        """Forget everything kept."""
        self._kept.clear()
        self._used.clear()
        for _, _, path in self._files():
            path.unlink(missing_ok=True)

    def _made(self, logits_TV: torch.Tensor, next_T: np.ndarray) -> BaseWindow:
        log_probs = np.empty(tuple(logits_TV.shape), self.dtype)
        nll, top = np.empty(len(log_probs), np.float32), np.empty(len(log_probs), np.int64)
        for start in range(0, len(log_probs), ROWS):
            rows = slice(start, start + ROWS)
            p = logits_TV[rows].float().log_softmax(-1)
            nll[rows] = -p.gather(-1, torch.from_numpy(next_T[rows, None]))[:, 0].numpy()
            top[rows] = p.argmax(-1).numpy()
            log_probs[rows] = p.numpy()
        return BaseWindow(log_probs, nll, top)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> BaseWindow | None:
        """The window of a file; None if it is not there (any more)."""
        path = self._path(key)
        try:
            os.utime(path)  # the age of a file is the time since its last use
            found = BaseWindow(**load_file(path))
        except (FileNotFoundError, SafetensorError, TypeError):  # not there, deleted meanwhile, or no file of ours
            return None
        self._used.add(path)
        return found

    def _write(self, key: str, window: BaseWindow) -> None:
        """Write a file whole or not at all, if it fits."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        if not self._make_room(window.nbytes):
            return
        free = shutil.disk_usage(self.folder).free
        if window.nbytes > free:
            raise CapacityError(
                f"Log-probabilities of a window take {window.nbytes / 1e6:.0f} MB, {self.folder} has {free / 1e6:.0f} MB left. "
                "Free space, or keep them in memory."
            )
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new.")
        os.close(handle)
        try:
            save_file({name: getattr(window, name) for name in ("log_probs", "nll", "top")}, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._used.add(path)

    def _make_room(self, nbytes: int) -> bool:
        """Delete files this object has not used, the oldest first, until `nbytes` fit; False if they do not."""
        files = self._files()
        total = sum(size for _, size, _ in files) + nbytes
        for _, size, path in files:
            if total > self.limit_bytes and path not in self._used:
                path.unlink(missing_ok=True)
                total -= size
        return total <= self.limit_bytes

    def _files(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of every file, the one unused for longest first."""
        found = []
        for path in self.folder.glob("*.safetensors") if self.folder else ():
            try:
                stat = path.stat()
            except FileNotFoundError:  # deleted by another process meanwhile
                continue
            found.append((stat.st_mtime, stat.st_size, path))
        return sorted(found)
