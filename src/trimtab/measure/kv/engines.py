"""Which engine answers: the native program where a model can be lowered, or the torch decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trimtab.errors import UnsupportedModelError, unknown

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.runtime.engine.generator import Generator

Engine = Literal["torch", "native", "auto"]
ENGINES: tuple[Engine, ...] = ("torch", "native", "auto")


def engine_of(model: Model, engine: Engine = "auto", threads: int = 0) -> tuple[Generator, str]:
    """A model as it is now, in the engine asked for.

    A native program holds a copy of every matrix in tiles; the torch decoders of several methods share theirs.

    Args:
        model: in floats, with techniques applied.
        engine: ``torch``, ``native``, or ``auto``: native where it can be lowered.
        threads: workers of a native program; 0 = as many as this process may run on.

    Returns:
        The model, and why ``auto`` did not lower it (empty if it did, or nothing was asked).

    Raises:
        UnsupportedModelError: native was asked for and is not possible.
        SpecError: another engine.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if engine == "torch":
        return model, ""
    from trimtab.runtime.native import NativeModel, lower

    tokenizer = model.tokenizer
    try:
        return NativeModel(lower(model.spec, model.weights, threads), lambda: tokenizer), ""
    except UnsupportedModelError as error:
        if engine == "native":
            raise
        return model, str(error)
