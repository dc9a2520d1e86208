"""What is trained about the gates of KV heads, and how; without torch. `duo_gates` does it."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.spec.cache import Ring
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GateTraining:
    """How gates are trained.

    Args:
        steps: samples, one a step.
        sink, recent: what a streaming head sees.
        needles, words: passkeys of a sample, words of each.
        min_tokens, max_tokens: lengths of the texts, `lengths` of them evenly spread; the questions follow.
        lengths: how many lengths are drawn from.
        lr: peak of the schedule: a tenth of it rises over the first fifth of the steps and falls over the last.
        l1: weight of mean |gate|.
        seed: of lengths, texts, depths and passkeys.

    Raises:
        SpecError: a number that is not possible.
    """

    steps: int = 150
    sink: int = 16
    recent: int = 128
    needles: int = 4
    words: int = 8
    min_tokens: int = 256
    max_tokens: int = 1024
    lengths: int = 50
    lr: float = 0.02
    l1: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lengths < 1:
            raise SpecError(f"steps={self.steps}, lengths={self.lengths} is not possible. Allowed: 1 or more.")
        if self.min_tokens > self.max_tokens:
            raise SpecError(
                f"texts of {self.min_tokens} to {self.max_tokens} tokens: not possible. Allowed: min_tokens <= max_tokens."
            )
        if self.lr <= 0 or self.l1 < 0:
            raise SpecError(f"lr={self.lr}, l1={self.l1} is not possible. Allowed: lr > 0, l1 >= 0.")
        self.keep  # noqa: B018  (refuses a ring that is not possible)

    @property
    def keep(self) -> Ring:
        """What a streaming head sees."""
        return Ring(self.sink, self.recent)

    def factor(self, step: int) -> float:
        """Learning rate of a step over `lr`: 0.1 to 1 over the first fifth, 1, then 1 to 0.1 over the last fifth."""
        fifth = max(1, self.steps // 5)
        return min(1.0, 0.1 + 0.9 * step / fifth, 0.1 + 0.9 * (self.steps - 1 - step) / fifth)


def gate_shape(spec: ModelSpec) -> tuple[int, int]:
    """(layers, KV heads) of a model.

    Raises:
        SpecError: layers without keys and values per head, or with different numbers of KV heads.
    """
    heads = {
        layer.self_attn.num_key_value_heads if isinstance(layer.self_attn, AttentionSpec) else 0
        for layer in spec.layers
    }
    if 0 in heads:
        raise SpecError(
            f"duo: {spec.name} has layers without keys and values per head (latent attention or a recurrent state). "
            "Allowed: models whose every layer has them."
        )
    if len(heads) != 1:
        raise SpecError(
            f"duo: the layers of {spec.name} have {' or '.join(map(str, sorted(heads)))} KV heads. Allowed: the same number in all."
        )
    return spec.num_hidden_layers, heads.pop()
