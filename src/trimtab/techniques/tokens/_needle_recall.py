"""Find GemFilter's layer: at which depth does the model first know which tokens hold the answer?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trimtab.model.variant import Model
    from trimtab.techniques.materials import Materials

#: Calibration prompts and their length.
PROMPTS, TOKENS = 16, 1059
#: A layer saturates if its recall is within this of the best layer's.
SLACK = 0.05


def recall_by_layer(model: Model, materials: Materials, *, topk: int, pool: int) -> list[float]:
    """Share of the needle's sentence among the `topk` tokens each layer would keep, averaged over the prompts [layers]."""
    import torch

    from trimtab.model.flow import select_tokens
    from trimtab.runtime.step import Step
    from trimtab.runtime.text.needles import needle_prompts

    haystack = "\n\n".join(materials.texts.values()) or None
    prompts = needle_prompts(model.tokenizer, tokens=TOKENS, count=PROMPTS, seed=materials.seed, haystack=haystack)
    hits = np.zeros((len(prompts), model.spec.num_hidden_layers))
    with torch.inference_mode():
        for row, prompt in enumerate(materials.progress("gemfilter: needle recall", prompts)):
            wanted = np.arange(*prompt.needle)

            def tap(path: str, qk: Any, row: int = row, wanted: np.ndarray = wanted) -> None:
                q_TNH, k_TGH = qk
                kept = select_tokens(q_TNH, k_TGH, topk=topk, pool=pool)
                hits[row, int(path.split(".")[1])] = np.isin(wanted, kept).mean()

            step = Step.of([len(prompt.ids)], [0])
            step.taps = {"self_attn.qk": tap}
            model.decoder.forward(torch.tensor(prompt.ids), step, None, np.zeros(0, dtype=np.int64))
    return hits.mean(axis=0).tolist()


def find_layer(model: Model, materials: Materials, *, topk: int, pool: int) -> int:
    """Return the earliest layer whose recall is within `SLACK` of the best one's; cached by model, text and parameters.

    Budgets of an eighth of the calibration prompt or more are all searched at an eighth: a generous budget would let
    early layers pass by luck.
    """
    from trimtab.runtime.weights.packed import fingerprint

    budget = min(topk, TOKENS // 8)

    def compute() -> list[float]:
        return recall_by_layer(model, materials, topk=budget, pool=pool)

    key = [fingerprint(model.weights), model.spec.hash, budget, pool, PROMPTS, TOKENS]
    recall = materials.cached("gemfilter-recall", key, compute)
    best = max(recall)
    return next(layer for layer, share in enumerate(recall) if share >= best - SLACK)
