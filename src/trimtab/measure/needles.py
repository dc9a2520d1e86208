"""Retrieval graded: is the hidden number answered, and how unlikely does the model find it?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trimtab.measure.quality import standard_error
from trimtab.runtime.engine.generate import CHUNK

if TYPE_CHECKING:
    from trimtab.runtime.engine.generator import Generator
    from trimtab.runtime.text.needles import NeedlePrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Retrieval over several prompts.

    Args:
        prompts: how many.
        exact: share answered greedily, digit for digit.
        answer_nll_nats: mean over prompts of the summed nll of the answer's tokens; far less noisy than `exact`.
        answer_nll_se: its standard error.
    """

    prompts: int
    exact: float
    answer_nll_nats: float
    answer_nll_se: float


def grade(model: Generator, prompts: Iterable[NeedlePrompt], *, chunk: int = CHUNK) -> Retrieval:
    """Grade a model as it is now: one prefill per prompt, then the answer is fed token by token.

    Args:
        model: in any engine.
        prompts: what is asked.
        chunk: tokens of a pass over a prompt; a cache that codes its tokens is read as coded by the passes that follow.
    """
    exact, nll = [], []
    for prompt in prompts:
        session = model.session(chunk=chunk)
        logits = session.prefill([list(prompt.ids)], reserve=len(prompt.answer_ids))
        right, total = True, 0.0
        for token in prompt.answer_ids:
            row = logits[0].astype(np.float64)
            row -= row.max()
            total += float(np.log(np.exp(row).sum()) - row[token])
            right &= int(row.argmax()) == token
            logits = session.decode([token])
        session.close()
        exact.append(right)
        nll.append(total)
    return Retrieval(
        prompts=len(exact),
        exact=float(np.mean(exact)),
        answer_nll_nats=float(np.mean(nll)),
        answer_nll_se=standard_error(np.array(nll)),
    )
