"""kivi: keys in few bits per channel, values in few bits per token, the newest tokens as they came."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import SpecError
from trimtab.spec.cache import PageFormat
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.spec.tree import Edit
from trimtab.techniques.base import Stage, Technique, param

_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kivi(Technique):
    """A cache of 2, 4 or 8 bits without calibration.

    Outliers of keys stand in fixed channels, those of values nowhere in particular: keys share a scale over `group` tokens of a
    channel, values over `group` channels of a token. Keys are coded after they are rotated, `residual` tokens at a time; of the
    values the last `residual` stay as they came, and the oldest of them is coded with every new token. New tokens are read as
    they came, whatever is coded afterwards; codes never change.

    Exact: bytes, b + 32 / group bits per element and the residual in the cache's own floats. Approximated: keys and values, once
    each. Models that share KV heads among queries lose more at 2 bits than those that do not; the authors advise 4 bits there.
    A sequence shorter than `residual` is not coded at all, and a ring (streaming-llm, duo) stays in floats: it is a residual.

    Source: Liu et al., KIVI, ICML 2024, arXiv 2402.02750, section 3 and algorithm 1.
    """

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = "cache of 2, 4 or 8 bits: keys by channel, values by token, the newest tokens in floats"
    stage: ClassVar[Stage] = Stage.RUN
    paper: ClassVar[int | None] = 49

    bits: int = param(2, "bits of a key and of a value", "2, 4, 8")
    kbits: int = param(0, "bits of a key; 0 = bits", "2, 4, 8; 0")
    vbits: int = param(0, "bits of a value; 0 = bits", "2, 4, 8; 0")
    group: int = param(32, "elements that share a scale", "a multiple of 8 that divides the head size")
    residual: int = param(128, "newest tokens that stay in floats", "group or more, a multiple of group")

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bits", self.bits, _BITS),
            ("kbits", self.kbits, (0, *_BITS)),
            ("vbits", self.vbits, (0, *_BITS)),
        ):
            if value not in allowed:
                listed = ", ".join(map(str, allowed))
                raise SpecError(f"kivi: {name}={value} is not possible. Allowed: {listed}. Try {name}=4.")
        if self.group < 8 or self.group % 8:
            raise SpecError(
                f"kivi: group={self.group} is not possible. Allowed: a multiple of 8, 8 or more. Try group=32."
            )
        if self.residual < self.group or self.residual % self.group:
            nearest = max(self.group, round(self.residual / self.group) * self.group)
            raise SpecError(
                f"kivi: residual={self.residual} is not possible. Allowed: a multiple of group={self.group}, {self.group} or "
                f"more. Try residual={nearest}."
            )

    def check(self, spec: ModelSpec) -> None:
        """Refuse models without keys per head, caches that are coded already, and groups that do not divide heads."""
        for layer in spec.layers:
            if not isinstance(layer.self_attn, AttentionSpec):
                raise SpecError(
                    f"kivi: {spec.name} has layers without keys and values per head (latent attention or a recurrent state). "
                    "Not supported. Allowed: models whose layers all cache keys and values."
                )
            for head in layer.self_attn.cache.heads:
                for size in (head.head_dim, head.v_head_dim):
                    if size % self.group:
                        allowed = [n for n in range(8, size + 1, 8) if size % n == 0]
                        raise SpecError(
                            f"kivi: group={self.group} does not divide head_dim={size} ({spec.name}). "
                            f"Allowed: {', '.join(map(str, allowed)) or 'none'}. Try group={max(allowed, default=8)}."
                        )
                for form in head.landing:
                    if not form.is_float:
                        raise SpecError(
                            f"kivi: the cache of {spec.name} is kept in {form} already. "
                            "Allowed: a cache in float32, bfloat16 or float16."
                        )

    def edits(self, spec: ModelSpec) -> Iterable[Edit]:
        """Formats, tail and residual of every KV head; pages of whole groups."""
        whole = math.lcm(self.group, 16)
        for index, layer in enumerate(spec.layers):
            assert isinstance(layer.self_attn, AttentionSpec)
            for place, head in enumerate(layer.self_attn.cache.heads):
                at = f"layers.{index}.self_attn.cache.heads.{place}"
                yield Edit(at, "tail", head.k_format)
                yield Edit(at, "k_format", PageFormat(f"int{self.kbits or self.bits}", self.group, by_channel=True))
                yield Edit(at, "v_format", PageFormat(f"int{self.vbits or self.bits}", self.group))
                yield Edit(at, "residual", self.residual)
                page = -(-min(head.page, self.residual) // whole) * whole  # a small tail is not worth large pages
                if page != head.page:
                    yield Edit(at, "page", page)
