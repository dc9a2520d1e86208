"""duo: heads that fetch from far back keep every token, the others the first and the latest ones alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from trimtab.errors import CalibrationError, SpecError
from trimtab.spec.cache import Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.train.gates import GateTraining, gate_shape

if TYPE_CHECKING:
    import numpy as np

    from trimtab.model.variant import Model
    from trimtab.techniques.materials import Materials


@dataclass(frozen=True, slots=True, kw_only=True)
class Duo(Technique):
    """Two kinds of KV heads, told apart by gates that were trained once per model.

    Retrieval heads keep every token; streaming heads keep the first `sink` and the latest `recent`, in memory of that size.
    A head is streaming if its gate is below the `sparsity` quantile of all gates.

    Exact: a sequence of at most sink + recent tokens, and `sparsity=0`. Approximated: what streaming heads no longer see.
    The paper runs an unchunked first prompt with full attention on all heads; here streaming heads see the first and the
    latest tokens alone from the start, in prompts of any chunking. Tokens keep their positions. The paper also moves
    retrieval heads to the front of each layer; nothing here needs that.

    Source: Xiao et al., DuoAttention, ICLR 2025, arXiv 2410.10819.
    """

    name: ClassVar[str] = "duo"
    summary: ClassVar[str] = "retrieval heads keep every token, the others the first and the most recent ones"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 16

    sparsity: float = param(0.5, "share of KV heads made streaming (paper: 0.75 for MHA, 0.5 for GQA)", "0..1")
    sink: int = param(64, "first tokens a streaming head keeps", "0 or more")
    recent: int = param(256, "most recent tokens a streaming head keeps", "1 or more")
    gates: str = param(
        "auto", "gates per layer and KV head", "auto (those that ship), train, an id that ships, or the path of a TSV"
    )

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            nearest = 0 if self.sparsity < 0 else 1
            raise SpecError(f"duo: sparsity={self.sparsity} is not possible. Allowed: 0..1. Try sparsity={nearest}.")
        if self.sink < 0 or self.recent < 1:
            raise SpecError(
                f"duo: sink={self.sink}, recent={self.recent} is not possible. Allowed: sink >= 0, recent >= 1. "
                f"Try sink={max(self.sink, 0)},recent={max(self.recent, 1)}."
            )

    def check(self, spec: ModelSpec) -> None:
        """Refuse a model without gates, gates of another shape, and layers without KV heads of their own."""
        self._values(spec)

    @property
    def unresolved(self) -> bool:
        """Gates that are still to be trained."""
        return self.gates == "train"

    def resolve(self, model: Model, materials: Materials) -> Self:
        """Name the gates that ship, or train them; trained gates are kept in the artefact cache."""
        if self.gates == "auto":
            self._values(model.spec)
            from trimtab.techniques.cache._gates import shipped_for

            return dataclasses.replace(self, gates=shipped_for(model.spec.name) or "auto")
        return dataclasses.replace(self, gates=str(self._trained(model, materials))) if self.unresolved else self

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """The streaming heads, one by one."""
        ring = Ring(self.sink, self.recent)
        for layer, row in enumerate(self.streaming(spec).tolist()):
            for head, streams in enumerate(row):
                if streams:
                    yield Edit(f"layers.{layer}.self_attn.cache.heads.{head}", "keep", ring)

    def streaming(self, spec: ModelSpec) -> np.ndarray:
        """Which heads are streaming, bool [layers, KV heads]; its mean is the real share.

        Before gates are trained those that ship stand in, or heads spread evenly: the bytes are the same.
        """
        from trimtab.techniques.cache._gates import streaming_heads

        return streaming_heads(self._values(spec), self.sparsity)

    def _values(self, spec: ModelSpec) -> np.ndarray:
        """The gates [L, G] of a model.

        Raises:
            SpecError: there are none, they have another shape, or the model has no KV heads in some layer.
        """
        from trimtab.techniques.cache._gates import read_gates, shipped, shipped_for, shipped_ids, spread_gates

        layers, heads = gate_shape(spec)
        id = shipped_for(spec.name) if self.gates in ("auto", "train") else self.gates
        how = "Train some: trimtab train duo MODEL --out FILE, then duo:gates=FILE (or duo:gates=train)."
        if self.gates == "train" and (id is None or shipped(id).values.shape != (layers, heads)):
            return spread_gates(layers, heads)
        if id is None:
            raise SpecError(
                f"duo: gates=auto finds none for {spec.name}. Allowed: a TSV of {layers} lines (layers) with {heads} numbers "
                f"(KV heads) each; they ship for {', '.join(shipped_ids())}. {how}"
            )
        values = shipped(id).values if id in shipped_ids() else read_gates(Path(id).expanduser()).values
        if values.shape != (layers, heads):
            raise SpecError(
                f"duo: gates={id} are {values.shape[0]} layers x {values.shape[1]} KV heads, {spec.name} has {layers} x {heads}. "
                f"Allowed: a TSV of {layers} lines with {heads} numbers each. {how}"
            )
        return values

    def _trained(self, model: Model, materials: Materials) -> Path:
        """Path of the gates of this model, trained now unless the cache has them."""
        from trimtab.runtime.weights.packed import fingerprint
        from trimtab.techniques.cache._gates import write_gates
        from trimtab.train.duo_gates import train_gates

        gate_shape(model.spec)
        if materials.cache is None:
            raise CalibrationError(
                "duo: gates=train keeps what it finds in the artefact cache, which is off. Train into a file: "
                "trimtab train duo MODEL --out FILE."
            )
        if not materials.texts:
            raise CalibrationError(
                "duo: gates=train hides passkeys in a text and none was given. Name one with --calibration FILE."
            )
        seen = self.sink + self.recent
        longest = max(2 * seen, min(8 * seen, model.spec.max_position_embeddings * 3 // 4))
        how = GateTraining(
            sink=self.sink, recent=self.recent, min_tokens=2 * seen, max_tokens=longest, seed=materials.seed
        )
        key = [fingerprint(model.weights), model.spec.hash, materials.text_hash(), dataclasses.asdict(how)]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
        path = materials.cache / f"duo-gates-{digest}.tsv"
        if not path.exists():
            tokenizer = materials.tokenizer or model.tokenizer
            text = "\n\n".join(materials.texts.values())
            found = train_gates(model.spec, model.weights, tokenizer, text, how, materials.progress)
            write_gates(path, found.gates, [model.spec.name], [f"trained: {how}"])
        return path
