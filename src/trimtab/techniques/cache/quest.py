"""quest: hold every token, and read in a step only the pages that promise most to its query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.cache import HeadSpec, Pieces, Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.layers import attentions, heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(Technique):
    """Decode steps that read `budget` tokens of each KV head, in pages of `page`, chosen anew for every query.

    Beside each page stand the least and the largest of each channel of its keys, in bf16; with them a page's largest
    product with the query is bounded, and the pages with the largest bounds are read, the newest always. The first
    `skip` layers read everything. Prompts are read whole.

    Exact: bytes read, bounds included, and a sequence of at most `budget` tokens. Approximated: what is not read;
    nothing is given up, so another query may read it. The paper chooses per query head; here the bounds are summed over
    the queries that share a KV head, which read the same pages. Layers with a window of their own are left alone, and
    so are heads that keep a ring.

    Source: Tang et al., Quest, ICML 2024, arXiv 2406.10774, sections 3.2 and 3.3.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "every token is held, a step reads the pages that promise most to its query"
    stage: ClassVar[Stage] = Stage.RUN

    budget: int = param(1024, "tokens a step reads, per KV head", "a multiple of page")
    page: int = param(16, "neighbouring tokens that are read together", "1 or more")
    skip: int = param(2, "first layers that read everything", "0 or more")

    def __post_init__(self) -> None:
        if self.page < 1:
            raise SpecError(f"quest: page={self.page} is not possible. Allowed: 1 or more. Try page=16.")
        if self.budget < self.page or self.budget % self.page:
            nearest = max(self.page, round(self.budget / self.page) * self.page)
            raise SpecError(
                f"quest: budget={self.budget} is not possible. Allowed: a multiple of page={self.page}. "
                f"Try budget={nearest}."
            )
        if self.skip < 0:
            raise SpecError(f"quest: skip={self.skip} is not possible. Allowed: 0 or more. Try skip=0.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model in which nothing is left to choose from."""
        if not self._chosen(spec):
            raise SpecError(
                f"quest: skip={self.skip} leaves no head of {spec.name} that could read less (rings, windows and recurrent "
                "layers do not count). Allowed: fewer layers than have such heads. Try skip=0."
            )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """What a step reads of the heads after the first layers."""
        for at, _ in self._chosen(spec):
            yield Edit(at, "select", Pieces(self.budget, self.page))

    def _chosen(self, spec: ModelSpec) -> list[tuple[str, HeadSpec]]:
        layers = attentions(self.name, spec, whole=True)[self.skip :]
        return [(at, head) for at, head in heads(layers) if not isinstance(head.keep, Ring)]
