"""vattn: every sequence at one fixed address, and memory mapped under it page by page as it grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import SpecError
from trimtab.spec.model import ModelSpec
from trimtab.spec.slots import Slots
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads

#: Bytes of a page of the system, and those that ``auto`` comes near.
_PAGE, _AUTO = 4096, 1 << 16
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VAttention(Technique):
    """Contiguous keys and values without reserving memory for the longest sequence, and without block tables.

    Address space for `max_batch` sequences of `max_len` tokens is reserved in 2 tensors of every layer, [slot, token, KV head,
    head size] (`per_layer`), or in 2 altogether, with the layers between token and head (`mega`). Pages of a file in memory are
    mapped into a slot as its sequence grows, one page of every tensor at a time, by bytes: tokens need not divide a page. Keys and
    values never move, kernels read a slot as one page, and forks map the same pages until either side writes.

    Exact: every result; bytes, which exceed those of the tokens by less than a page of each tensor and sequence. Not reproduced:
    pages of other sizes in a GPU's driver. On systems without such files the cache is kept in pages.

    Policies that give tokens up, code or choose among them need pages (``kivi``, ``h2o``, ``quest``, ...) and are refused.

    Source: Prabhu et al., vAttention, ASPLOS 2025, arXiv 2405.04437, sections 5 and 6.
    """

    name: ClassVar[str] = "vattn"
    summary: ClassVar[str] = "sequences at fixed addresses; memory is mapped under them as they grow"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 63

    page: int | Literal["auto"] = param(
        "auto", "bytes of a page; auto = whole tokens of all heads, near 64 KiB", "auto, a multiple of 4096"
    )
    max_batch: int = param(64, "slots: sequences that run at a time", "1..999")
    max_len: int = param(8192, "tokens of the longest sequence; a model's context where that is shorter", "1..1048576")
    async_: bool = param(True, "a thread maps what the next steps need", "true, false")
    eager_steps: int = param(10, "how many steps ahead it looks", "0 or more")
    eager_blocks: int = param(2, "page groups after which it stops", "0 or more")
    deferred_reclaim: bool = param(True, "pages of a sequence that ended stay mapped for the next", "true, false")
    layout: Literal["per_layer", "mega"] = param(
        "per_layer", "2 tensors of every layer, or 2 with the layers inside", "per_layer, mega"
    )
    secure: bool = param(False, "pages are zeroed before another sequence has them", "true, false")
    backend: Literal["vattn", "static"] = param(
        "vattn", "static maps a slot whole as it is taken: the baseline", "vattn, static"
    )

    def __post_init__(self) -> None:
        if self.page != "auto" and (self.page < _PAGE or self.page % _PAGE):
            nearest = max(_PAGE, round(self.page / _PAGE) * _PAGE)
            raise SpecError(
                f"vattn: page={self.page} is not possible. Allowed: auto, or a multiple of {_PAGE} bytes. Try page={nearest}."
            )
        for name, value, least, most in (
            ("max_batch", self.max_batch, 1, 999),
            ("max_len", self.max_len, 1, _MOST_TOKENS),
            ("eager_steps", self.eager_steps, 0, _MOST_TOKENS),
            ("eager_blocks", self.eager_blocks, 0, _MOST_TOKENS),
        ):
            if not least <= value <= most:
                nearest = min(max(value, least), most)
                raise SpecError(
                    f"vattn: {name}={value} is not possible. Allowed: {least}..{most}. Try {name}={nearest}."
                )

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and heads that differ: a tensor holds heads of one size and format."""
        found = heads(attentions(self.name, spec))
        kinds = {(head.head_dim, head.v_head_dim, head.k_format, head.v_format) for _, head in found}
        counts = {len(node.cache.heads) for _, node in attentions(self.name, spec)}
        if len(kinds) > 1 or len(counts) > 1:
            raise SpecError(
                f"vattn: the KV heads of {spec.name} differ in number, size or format. Allowed: the same heads in every layer."
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Where the tokens of every KV head lie."""
        layers = attentions(self.name, spec)
        each = len(layers[0][1].cache.heads)
        together = each * (len(layers) if self.layout == "mega" else 1)
        slots = Slots(
            self.backend,
            self.page_bytes(together),
            self.max_batch,
            min(self.max_len, spec.max_position_embeddings),
            together,
            self.async_,
            self.eager_steps,
            self.eager_blocks,
            self.deferred_reclaim,
            self.secure,
        )
        for at, _ in heads(layers):
            yield Edit(at, "slots", slots)

    def page_bytes(self, together: int) -> int:
        """Bytes of a page of a tensor of so many heads: with ``auto``, each head has as many pages' worth of it."""
        if self.page != "auto":
            return self.page
        whole = _PAGE * together
        return whole * max(1, round(_AUTO / whole))
