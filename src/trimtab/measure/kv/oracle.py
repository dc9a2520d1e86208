"""How far the tokens that matter for one question matter for the next: what no choice made for the first can know.

A token matters to a question where it is among those that get the most attention from the question's tokens, in one KV head
of one layer. The full cache is read; nothing is dropped.

Legend: T tokens, s of a question, N query heads, G KV heads, H head size, n tokens of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.errors import SpecError
from trimtab.runtime.step import Step

if TYPE_CHECKING:
    from trimtab.measure.kv.prompts import Prompt
    from trimtab.model.variant import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Tokens that matter, of pairs of questions about one context.

    Args:
        share: of the tokens that matter to the first question, those that matter to the second as well; mean over layers, heads
            and pairs.
        by_layer: the same for each layer.
        chance: the share that two random choices of this size have in common.
        mass: attention that the tokens of the first question's choice get from the second, of all the second gives the context.
        kept: tokens that count as those that matter.
        pairs: pairs of questions.
    """

    share: float
    by_layer: tuple[float, ...]
    chance: float
    mass: float
    kept: int
    pairs: int


def overlap(model: Model, prompts: Sequence[Prompt], kept: int, last: int = 0) -> Overlap:
    """Compare the first question of each dialogue with its second.

    Args:
        model: runs in PyTorch; read without a cache.
        prompts: dialogues with at least two questions.
        kept: tokens of the context that count as those that matter, in each head.
        last: tokens of the question, its newest, whose attention counts; 0 = all. Most of a question is the same in the next one;
            its last token is what the answer starts from.

    Raises:
        SpecError: a dialogue with one question, or a context of no more than `kept` tokens.
    """
    if not prompts or min(len(prompt.turns) for prompt in prompts) < 2:
        raise SpecError("Two questions about one context are compared. Give dialogues of two turns or more.")
    shortest = min(len(prompt.context) for prompt in prompts)
    if not 1 <= kept < shortest:
        raise SpecError(f"kept={kept} of a context of {shortest} tokens: not possible. Allowed: 1..{shortest - 1}.")
    shares, masses, chances = [], [], []
    for prompt in prompts:
        first, second = (attention_to_context(model, prompt.context, asked.alone, last) for asked in prompt.turns[:2])
        chosen = [np.argpartition(-found, kept - 1, axis=-1)[..., :kept] for found in (first, second)]
        marked = np.zeros(first.shape, bool)
        np.put_along_axis(marked, chosen[0], True, axis=-1)
        shares.append(np.take_along_axis(marked, chosen[1], axis=-1).mean(axis=(1, 2)))
        masses.append(float((second * marked).sum() / second.sum()))
        chances.append(kept / len(prompt.context))
    by_layer = np.mean(shares, axis=0)
    return Overlap(
        share=float(by_layer.mean()),
        by_layer=tuple(by_layer.tolist()),
        chance=float(np.mean(chances)),
        mass=float(np.mean(masses)),
        kept=kept,
        pairs=len(prompts),
    )


def attention_to_context(model: Model, context: Sequence[int], question: Sequence[int], last: int = 0) -> np.ndarray:
    """Attention weights that a question gives each token of its context, summed over its tokens and the queries of a head.

    Args:
        model: runs in PyTorch.
        context, question: token ids.
        last: only so many tokens of the question, its newest; 0 = all.

    Returns:
        float32 [layers, G, n].
    """
    ids = np.asarray([*context, *question], np.int64)
    n, found = len(context), {}
    first = max(len(ids) - last, n) if last else n
    scales = {
        f"layers.{i}.self_attn": getattr(layer.self_attn, "scale", 1.0) for i, layer in enumerate(model.spec.layers)
    }

    def look(path: str, value: Any) -> None:
        q_TNH, k_TGH = value
        shared = q_TNH.shape[1] // k_TGH.shape[1]
        q_NsH = q_TNH[first:].transpose(0, 1).float()
        k_NTH = k_TGH.transpose(0, 1).float().repeat_interleave(shared, dim=0)
        scores = torch.matmul(q_NsH, k_NTH.transpose(1, 2)) * scales[path]
        later = torch.arange(len(ids))[None, :] > torch.arange(first, len(ids))[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)[..., :n].sum(1)
        found[path] = weights.unflatten(0, (-1, shared)).sum(1).numpy()

    step = Step.of([len(ids)], [0])
    step.taps = {"self_attn.qk": look}
    model.decoder(torch.from_numpy(ids), step, None, np.zeros(0, np.int64))
    return np.stack([found[path] for path in scales])
