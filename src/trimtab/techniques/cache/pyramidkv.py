"""pyramidkv: as snapkv, with more tokens in early layers and fewer in late ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from trimtab.errors import SpecError
from trimtab.spec.cache import Budget
from trimtab.spec.model import ModelSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param
from trimtab.techniques.cache.snapkv import check_votes, last_queries
from trimtab.techniques.layers import attentions, heads


@dataclass(frozen=True, slots=True, kw_only=True)
class PyramidKV(Technique):
    """Budgets that fall linearly over the layers, `cap` on average; tokens are chosen as in snapkv.

    Beside its window the last layer keeps (cap - window) // beta tokens, the first what makes the mean `cap`: late
    layers attend to few tokens, early ones to many.

    Exact: a prompt that fits the smallest budget. Approximated: what was given up. The authors' code shortens the slope
    for prompts that the first layer would hold whole, and gives all layers one budget for those shorter than twice
    `cap`; here budgets are numbers of the model and do not depend on the prompt. Layers with a window of their own are
    left alone and take no part in the mean.

    Source: Cai et al., PyramidKV, arXiv 2406.02069, section 4, and its code (pyramidkv_utils.py).
    """

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "snapkv with budgets that fall from layer to layer"
    stage: ClassVar[Stage] = Stage.RUN

    cap: int = param(1024, "tokens of the prompt that stay, mean of all layers", "more than window")
    window: int = param(32, "last queries of the prompt, which vote and whose tokens stay", "1 or more")
    kernel: int = param(7, "neighbours whose votes are pooled", "an odd number, 1 or more")
    beta: int = param(20, "how steep: the last layer keeps (cap - window) // beta beside the window", "1 or more")
    pool: Literal["avg", "max"] = param("avg", "how votes are pooled", "avg, max")

    def __post_init__(self) -> None:
        check_votes(self.name, self.cap, self.window, self.kernel)
        if self.beta < 1:
            raise SpecError(f"pyramidkv: beta={self.beta} is not possible. Allowed: 1 or more. Try beta=20.")

    def check(self, spec: ModelSpec) -> None:
        """Refuse latent attention, and a model all of whose layers have windows."""
        attentions(self.name, spec, whole=True)

    def budgets(self, layers: int) -> list[int]:
        """Tokens that stay in each of so many layers; their mean is `cap`.

        >>> PyramidKV(cap=104, window=4, beta=5).budgets(5)
        [184, 144, 104, 64, 24]
        """
        chosen = self.cap - self.window
        least = chosen // self.beta if layers > 1 else chosen
        fall = 2 * (chosen - least)
        # Rounded alike from both ends, so that the mean stays.
        falls = [
            fall * i // (layers - 1) if 2 * i < layers - 1 else fall - fall * (layers - 1 - i) // max(layers - 1, 1)
            for i in range(layers)
        ]
        return [self.window + least + fall - each for each in falls]

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Budget and policy of every KV head."""
        found = attentions(self.name, spec, whole=True)
        policy = last_queries(self.window, self.kernel, self.pool)
        for layer, budget in zip(found, self.budgets(len(found)), strict=True):
            for at, _ in heads([layer]):
                yield Edit(at, "keep", Budget(budget))
                yield Edit(at, "policy", policy)
