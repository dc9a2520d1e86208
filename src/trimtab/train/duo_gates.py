"""Find the heads that need the whole context: one gate per KV head is trained, the model stays as it is.

Two branches read the same tokens. The teacher attends to everything. In the student each head mixes what the teacher's head
gave with what it gives itself when it sees the first and the latest tokens alone; the gate is the share of the former. A
penalty pulls gates to 0, and a head whose gate stays up is one the answer cannot do without.

Legend: L layers, T tokens, N/G query/KV heads, H head size, D hidden size, s queries of a block, S keys it may see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.model.attention import Attention, eager, visible
from trimtab.model.decoder import Decoder, run_blocks
from trimtab.runtime.numerics import transcode
from trimtab.runtime.step import Step
from trimtab.runtime.weights.packed import Weights
from trimtab.spec.cache import Ring
from trimtab.spec.formats import FP32
from trimtab.spec.model import ModelSpec
from trimtab.spec.nodes import AttentionSpec
from trimtab.train.gates import GateTraining, gate_shape
from trimtab.train.passkeys import passkey_sample

if TYPE_CHECKING:
    from trimtab.runtime.text.tokenizer import Tokenizer

Progress = Callable[[str, Iterable[Any]], Iterator[Any]]


@dataclass(slots=True)
class Trained:
    """What a training gave.

    Args:
        gates: float32 [L, G] in 0..1.
        distilled: per step, mean squared difference of the two branches over the supervised tail.
        penalty: per step, `l1` * mean |gate|.
    """

    gates: np.ndarray
    distilled: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)

    @property
    def losses(self) -> np.ndarray:
        """Loss of each step."""
        return np.array(self.distilled) + np.array(self.penalty)


class Branches:
    """A model whose attention can be run as teacher and as student.

    Args:
        spec, weights: the model; its matrices are held in float32 here, and nothing of it is changed.
        keep: what a streaming head sees.

    Attributes:
        gates: [L, G], the only parameter.

    Raises:
        SpecError: layers without keys and values per head, or with different numbers of KV heads.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, keep: Ring) -> None:
        layers, heads = gate_shape(spec)
        spec = spec.with_dtype("float32", keep_packed=False)
        weights = Weights({path: transcode(packed, FP32) for path, packed in weights.items()})
        self.decoder = Decoder(spec, weights)
        self.gates = torch.ones(layers, heads, requires_grad=True)
        self._keep, self._teaching = keep, True
        self._full: list[torch.Tensor] = [torch.empty(0)] * layers
        for index, layer in enumerate(self.decoder.layers):
            block: Any = layer.self_attn
            block.backend = self._backend(index, block.backend)

    def distance(self, ids: Sequence[int], tail: int) -> torch.Tensor:
        """Mean squared difference of the last hidden states (after the last norm) over the tokens from `tail` on."""
        tokens, step = torch.tensor(ids), Step.of([len(ids)], [0])
        with torch.no_grad():
            teacher = self._run(tokens, step, teaching=True)[tail:]
        student = self._run(tokens, step, teaching=False)[tail:]
        return (teacher - student).square().mean()

    def _run(self, tokens: torch.Tensor, step: Step, *, teaching: bool) -> torch.Tensor:
        self._teaching = teaching
        h_TD = run_blocks(self.decoder.layers, self.decoder.embed(tokens, step), step, None)  # type: ignore[arg-type]
        return h_TD if self.decoder.norm is None else self.decoder.norm(h_TD, step)

    def _backend(self, index: int, full: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Attention of one layer: as it was for the teacher, gated for the student."""

        def attend(block: Attention, q_TNH, k_GTH, v_GTH, bias, heads) -> torch.Tensor:
            if self._teaching:
                self._full[index] = full(block, q_TNH, k_GTH, v_GTH, bias, heads)
                return self._full[index]
            near = streaming(block, q_TNH, k_GTH, v_GTH, self._keep)
            gate_N1 = self.gates[index].repeat_interleave(q_TNH.shape[1] // k_GTH.shape[0])[:, None]
            return gate_N1 * self._full[index] + (1 - gate_N1) * near

        return attend


def streaming(
    block: Attention, q_TNH: torch.Tensor, k_GTH: torch.Tensor, v_GTH: torch.Tensor, keep: Ring
) -> torch.Tensor:
    """Attention over the first tokens and the latest alone, by blocks of queries: work grows with T, not T * T. [T, N, H]."""
    tokens = len(q_TNH)
    every = slice(0, q_TNH.shape[1])
    size = max(keep.recent, 32)
    found = []
    for first in range(0, tokens, size):
        end = min(first + size, tokens)
        near = max(keep.sink, first - keep.recent + 1)
        at_S = torch.arange(end) if near <= keep.sink else torch.cat((torch.arange(keep.sink), torch.arange(near, end)))
        mask_sS = visible(torch.arange(first, end), at_S, block.spec.window, keep)
        bias = None if mask_sS is None else torch.zeros(mask_sS.shape).masked_fill_(~mask_sS, float("-inf"))
        found.append(eager(block, q_TNH[first:end], k_GTH[:, at_S], v_GTH[:, at_S], bias, every))
    return torch.cat(found)


def train_gates(
    spec: ModelSpec,
    weights: Weights,
    tokenizer: Tokenizer,
    haystack: str,
    how: GateTraining | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train one gate per KV head; the model is not changed.

    Args:
        spec, weights: the model.
        tokenizer: of the model.
        haystack: text in which passkeys are hidden.
        how: lengths, steps and weights.
        progress: wraps the steps and shows a bar, ``progress(label, items)``.

    Raises:
        SpecError: a model without KV heads in every layer, with ALiBi, or texts too short for the passkeys.

    Source: Xiao et al., DuoAttention, arXiv 2410.10819, section 2.2, and its code (train.py): AdamW on gates that start
        at 1 and are clamped to 0..1 before each step.
    """
    how = how or GateTraining()
    if any(layer.self_attn.alibi for layer in spec.layers if isinstance(layer.self_attn, AttentionSpec)):
        raise SpecError(
            f"duo: gates of {spec.name}, which has ALiBi, cannot be trained. Allowed: rotary or learned positions."
        )
    branches = Branches(spec, weights, how.keep)
    ids = tokenizer.encode(haystack)
    rng = random.Random(how.seed)
    lengths = np.linspace(how.min_tokens, how.max_tokens, how.lengths).round().astype(int).tolist()
    optimizer = torch.optim.AdamW([branches.gates], lr=how.lr, weight_decay=0.0)
    result = Trained(np.zeros(0, np.float32))
    steps: Iterable[int] = range(how.steps)
    for step in steps if progress is None else progress("duo: gates", steps):
        optimizer.param_groups[0]["lr"] = how.lr * how.factor(step)
        sample = passkey_sample(tokenizer, ids, rng.choice(lengths), how.needles, how.words, rng)
        if len(sample.ids) > spec.max_position_embeddings:
            raise SpecError(
                f"duo: a sample of {len(sample.ids)} tokens is longer than the context of {spec.name}, "
                f"{spec.max_position_embeddings}. Allowed: shorter texts or fewer passkeys. "
                f"Try max_tokens={spec.max_position_embeddings * 3 // 4}."
            )
        with torch.no_grad():
            branches.gates.clamp_(0, 1)
        distilled = branches.distance(sample.ids, sample.tail)
        penalty = how.l1 * branches.gates.abs().mean()
        optimizer.zero_grad()
        (distilled + penalty).backward()
        optimizer.step()
        result.distilled.append(distilled.item())
        result.penalty.append(penalty.item())
    result.gates = branches.gates.detach().clamp(0, 1).numpy()
    return result
