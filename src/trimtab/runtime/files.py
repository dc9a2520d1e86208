"""Files and folders written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import CapacityError, SpecError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def replaced(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """Yield a name beside `path` to write a file or a folder under; what is there at the end takes the place of `path`.

    After an error or an interrupt `path` is what it was before, and nothing else is left.

    Args:
        path: the final name; what bears it is replaced.
        nbytes: about what will be written; less room than that is refused before anything is.

    Raises:
        CapacityError: the disk is full, or would be.
        SpecError: the place cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise CapacityError(
                f"{path} takes {nbytes} bytes and its disk has {free} left. Make room, or write to another disk."
            )
        holder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise SpecError(f"{path} cannot be written: {error.strerror or error}. Choose another place.") from error
    fresh, old = holder / path.name, holder / f"{path.name}.old"
    try:
        yield fresh
        if path.is_dir():  # a folder takes the place of an empty one only
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"The disk is full: {path} was not written, nothing is left of it. Make room, or write to another disk."
            ) from error
        raise SpecError(f"{path} cannot be written: {error.strerror or error}. Nothing is left of it.") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
