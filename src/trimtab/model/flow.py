"""What happens to a prompt before the model runs on it: the token filter.

Source: Shi et al., Discovering the Gems in Early Layers, arXiv 2409.17422, Algorithm 1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.model.decoder import Decoder, Layer, run_blocks
from trimtab.runtime.step import IntArray, Recorder, Step


def select_tokens(q_TNH: torch.Tensor, k_TGH: torch.Tensor, *, topk: int, pool: int) -> IntArray:
    """Return the sorted indices of the tokens whose keys the last query likes most.

    The score of a token is the raw inner product of the last query with its key, summed over query heads (no scaling,
    no softmax, so that no sink token wins), then averaged over `pool` neighbours with zeros beyond the ends.

    Args:
        q_TNH: queries after RoPE; only the last token's are used.
        k_TGH: keys after RoPE.
        topk: tokens kept, at most T.
        pool: odd width of the average.
    """
    tokens, groups, _ = k_TGH.shape
    q_GH = q_TNH[-1].float().unflatten(0, (groups, -1)).sum(1)  # summing queries first is summing the products
    score_T = torch.einsum("gh,tgh->t", q_GH, k_TGH.float())
    pooled_T = F.avg_pool1d(score_T[None, None], pool, stride=1, padding=pool // 2)[0, 0]
    return np.sort(pooled_T.topk(min(topk, tokens)).indices.numpy())


@torch.inference_mode()
def filter_prompt(decoder: Decoder, ids_T: IntArray, record: Recorder | None = None) -> IntArray:
    """Return the indices of the prompt tokens to keep: all of them without a filter or for a short prompt.

    Layers before the filter layer run whole and without a cache; of the filter layer only what queries and keys need.
    """
    chosen = decoder.spec.flow.filter
    if chosen is None or len(ids_T) <= chosen.topk:
        return np.arange(len(ids_T), dtype=np.int64)
    step = Step.of([len(ids_T)], [0], record=record)
    layers: list[Layer] = list(decoder.layers[: chosen.layer + 1])  # type: ignore[arg-type]
    h_TD = run_blocks(layers[:-1], decoder.embed(torch.from_numpy(ids_T), step), step, None)
    last = layers[-1]
    normed = h_TD if last.input_layernorm is None else last.input_layernorm(h_TD, step)
    q_TNH, k_TGH = last.self_attn.queries_and_keys(normed, step)
    if record is not None:
        record.op("flow.score", flops=2 * k_TGH.numel())  # the queries of a group are summed before they meet the keys
    return select_tokens(q_TNH, k_TGH, topk=chosen.topk, pool=chosen.pool)
