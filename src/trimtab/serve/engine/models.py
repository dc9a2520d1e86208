"""Loading model ids: bases, techniques on them, and the buffers they have in common."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trimtab.errors import SpecError, UnsupportedModelError
from trimtab.runtime.engine.bounds import longest
from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.native.lower import SharedTiles, lower
from trimtab.runtime.text.detokenize import TokenBytes
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.runtime.weights.load import Loaded, open_model, read_tokenizer
from trimtab.runtime.weights.packed import Packed
from trimtab.serve.config import split_model_id
from trimtab.serve.engine.grammar import Grammars
from trimtab.serve.messages import ModelInfo, Start
from trimtab.spec.formats import FP32
from trimtab.spec.leaves import LinearSpec
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import NO_FLOW
from trimtab.spec.strings import parse_composition
from trimtab.techniques.apply import native_of, resolve_all
from trimtab.techniques.base import Technique, compose
from trimtab.techniques.registry import parse_technique

if TYPE_CHECKING:
    from trimtab.model.variant import Model


@dataclass(eq=False)
class Base:
    """A model as read, and what all ids on it share. The weights stay mapped: an id may be added at any time.

    Args:
        name: as asked for.
        loaded: spec and weights.
        tokenizer: None = it came without one.
        shared: matrices in tiles.
        grammars: compiled ones; None without a tokenizer.
        texts: bytes of its tokens.
    """

    name: str
    loaded: Loaded
    tokenizer: Tokenizer | None
    shared: SharedTiles = field(default_factory=SharedTiles)
    grammars: Grammars | None = None
    texts: TokenBytes | None = None
    torch: Model | None = None

    def model(self, kv_dtype: str) -> Model:
        """The base as a torch model; built when a technique calibrates or nothing native runs."""
        if self.torch is None:
            from trimtab.model.variant import Model, Variant

            spec = self.loaded.spec if self.loaded.saved else self.loaded.spec.with_kv_dtype(kv_dtype)
            tokenizer = self.tokenizer
            self.torch = Model(Variant(spec, self.loaded.weights), None if tokenizer is None else lambda: tokenizer)
        return self.torch


@dataclass(frozen=True, eq=False)
class Served:
    """A model id that can run.

    Args:
        info: for the front.
        base: what it stands on.
        runner: the native program, or a torch variant.
        why: it does not run natively; empty if it does.
    """

    info: ModelInfo
    base: Base
    runner: Runner
    why: str = ""


class Models:
    """Loads ids.

    Args:
        start: settings.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._bases: dict[tuple[str, str], Base] = {}
        self._on_torch: set[Base] = set()

    @property
    def threads(self) -> int:
        """Workers of a pass."""
        return self._start.threads or len(os.sched_getaffinity(0))

    def load(self, asked: str) -> Served:
        """Load ``base`` or ``base@technique+technique``; what other ids hold already is shared.

        Raises:
            SpecError, Conflict, UnsupportedModelError, CapacityError, MissingDependency: as `trimtab run` would.
        """
        name, listed = split_model_id(asked)
        if not name or ("@" in asked and not listed):
            raise SpecError(f"'{asked}' is no model id. Write MODEL or MODEL@technique+technique.")
        chosen = tuple(parse_technique(part) for part in parse_composition(listed)) if listed else ()
        plain = all(type(technique).convert is Technique.convert for technique in chosen)
        dtype = self._start.dtype
        try:  # a technique that fills weights of its own starts from floats
            base = self._base(name, ("file" if plain else "float32") if dtype == "auto" else dtype)
            return self._native(asked, base, self._resolved(base, chosen))
        except UnsupportedModelError as error:
            base = self._base(name, "float32" if dtype == "auto" else dtype)
            return self._torch(asked, base, self._resolved(base, chosen), str(error))

    def forget(self, served: Served, others: list[Served]) -> None:
        """Let go of a base that no id uses any more."""
        if not any(other.base is served.base for other in others):
            self._bases = {key: base for key, base in self._bases.items() if base is not served.base}

    def _base(self, name: str, dtype: str) -> Base:
        found = self._bases.get((name, dtype))
        if found is None:
            loaded = open_model(name, dtype=dtype)
            try:
                tokenizer = read_tokenizer(
                    Path(self._start.tokenizer) if self._start.tokenizer else loaded.tokenizer_source
                )
            except SpecError:
                if self._start.tokenizer:
                    raise
                tokenizer = None
            found = self._bases[name, dtype] = Base(name, loaded, tokenizer)
            if tokenizer is not None:
                found.grammars = Grammars(tokenizer, loaded.spec.vocab_size)
                found.texts = TokenBytes(tokenizer)
        return found

    def _resolved(self, base: Base, chosen: tuple[Technique, ...]) -> tuple[Technique, ...]:
        """Replace every ``auto``; what needs nothing of the model stays without torch."""
        if not any(technique.unresolved for technique in chosen):
            return chosen
        from trimtab.techniques.apply import default_materials

        model = base.model(self._start.kv_dtype)
        return resolve_all(model, chosen, default_materials(model).for_model(model))

    def _native(self, asked: str, base: Base, chosen: tuple[Technique, ...]) -> Served:
        made = native_of(
            base.loaded, chosen, threads=self._start.threads, kv_dtype=self._start.kv_dtype, shared=base.shared
        )
        info = self._info(asked, base, chosen, made.spec, "native", made.program.weight_bytes)
        return Served(info, base, made.program)

    def _torch(self, asked: str, base: Base, chosen: tuple[Technique, ...], why: str) -> Served:
        import torch

        from trimtab.model.variant import Model
        from trimtab.techniques.apply import default_materials, derive

        torch.set_num_threads(self.threads)
        model = base.model(self._start.kv_dtype)
        added = 0 if base in self._on_torch else base.loaded.weights.nbytes
        if chosen:
            compose(model.spec, chosen)
            variant = derive(model.variant, chosen, default_materials(model).for_model(model))
            held = {id(packed) for packed in base.loaded.weights.values()}
            added += sum(packed.nbytes for packed in variant.weights.values() if id(packed) not in held)
            model = Model(variant)
        if model.spec.flow != NO_FLOW:
            raise UnsupportedModelError(
                f"{asked} leaves tokens of a prompt out, so its cache does not follow the prompt; that cannot be served. "
                "Use `trimtab run`."
            )
        info = self._info(asked, base, chosen, model.spec, "torch", added)
        self._on_torch.add(base)
        return Served(info, base, model.runner(), why)

    def _info(
        self, asked: str, base: Base, chosen: tuple[Technique, ...], spec: ModelSpec, runs: str, weight_bytes: int
    ) -> ModelInfo:
        techniques = tuple(str(technique) for technique in chosen)
        name = f"{base.name}@{'+'.join(techniques)}" if techniques else base.name
        return ModelInfo(
            id=name, base=base.name, techniques=techniques, context=longest(spec),
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, runs=runs, spec_hash=spec.hash,
            weight_bytes=weight_bytes, asked=asked if asked != name else "",
        )  # fmt: skip


def hidden_runner(served: Served, kv_dtype: str, threads: int) -> Runner:
    """A runner whose "logits" are the outputs of the last norm [R, D]: the head is replaced by the identity.

    Natively all other matrices are those of the base; techniques that change weights are therefore refused.

    Raises:
        SpecError: a model id whose vectors would not be its own.
    """
    if served.info.techniques or served.info.runs != "native":
        raise SpecError(
            f"Embeddings are made by models without techniques that run natively; {served.info.id} is not one. "
            f"Ask {served.base.name}."
        )
    loaded, size = served.base.loaded, served.info.hidden_size
    spec = loaded.spec if loaded.saved else loaded.spec.with_kv_dtype(kv_dtype)
    spec = dataclasses.replace(
        spec, lm_head=LinearSpec(n=size, k=size, format=FP32), tie_word_embeddings=False, vocab_size=size,
        logit_softcap=None, logit_scale=1.0,
    )  # fmt: skip
    identity = Packed(FP32, (size, size), {"data": np.eye(size, dtype=np.float32)})
    return lower(spec, loaded.weights | {"lm_head": identity}, threads, shared=served.base.shared)
