"""What a step takes: a plane through a few passes timed on this machine, with this model, at the start."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.engine.bounds import longest, most_sequences
from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.step import Step

#: Rows, tokens of the context and tokens of a prompt that are timed, and runs of each.
_ROWS, _CONTEXT, _PROMPT, _RUNS = 8, 256, 64, 3


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a step: ``base_s + token_s * answers + prompt_s * prompt tokens + context_s * tokens attended to``.

    Args:
        base_s: of any step.
        token_s: of each answer that goes on.
        prompt_s: of each prompt token.
        context_s: of each token that one attends to.
    """

    base_s: float
    token_s: float
    prompt_s: float
    context_s: float

    def __call__(self, n_prefill: int, prefill_context: int, n_decode: int, context_sum: int) -> float:
        """Seconds of a `sched.work.Load`; never falls with any of its parts."""
        if not n_prefill and not n_decode:
            return 0.0
        attended = self.context_s * (prefill_context + context_sum)
        return self.base_s + self.token_s * n_decode + self.prompt_s * n_prefill + attended


def calibrate(runner: Runner, clock: Callable[[], float] = time.perf_counter) -> StepCost:
    """Time a few passes; about as long as forty steps.

    Raises:
        SpecError: the model runs too few sequences at a time.
        TrimtabError: the model's numbers are not finite, which is found here rather than by the first request.
    """
    store, context = runner.open_store(), min(_CONTEXT, longest(runner.spec) - 2 * _PROMPT - 8)
    context = max(context, 1)
    prompt = max(min(_PROMPT, longest(runner.spec) - context - 8), 1)

    def run(seqs: list, past: int, count: int) -> float:
        ids = np.arange(len(seqs) * count, dtype=np.int64) % runner.spec.vocab_size
        step = Step.of(
            [count] * len(seqs), [past] * len(seqs), seqs, None, [past + count] * len(seqs), [False] * len(seqs)
        )
        wanted = step.cu[1:] - 1
        start = clock()
        logits = runner.forward(ids, step, store, wanted)
        spent = clock() - start
        if not np.isfinite(logits).all():
            raise TrimtabError(
                f"{runner.spec.name}: the self check found logits that are not finite. Look for damaged weights, or load float32."
            )
        return spent

    def least(seqs: list, past: int, count: int) -> float:
        found = []
        for _ in range(_RUNS):
            forks = [*map(store.fork, seqs)]
            found.append(run(forks, past, count))
            for fork in forks:
                store.free(fork)
        return min(found)

    most = _ROWS if (held := most_sequences(runner.spec)) is None else min(_ROWS, held - 2)
    if most < 2:
        raise SpecError(
            f"{runner.spec.name} runs {held} sequences at a time; a server needs 4 or more. Raise max_batch."
        )
    base = store.open()
    run([base], 0, 1)
    one, rows = least([base], 1, 1), least([base] * most, 1, 1)
    token_s = max((rows - one) / (most - 1), 0.0)
    base_s = max(one - token_s, 1e-6)
    prompts = least([base], 1, prompt)
    long = store.open()
    done = 0
    while done < context:
        count = min(prompt, context - done)
        run([long], done, count)
        done += count
    far = least([long] * most, context, 1)
    context_s = max((far - rows) / (most * context), 0.0)
    attended = prompt * (prompt + 3) / 2
    # On a busy machine the difference may come out as nothing, and a step would take any prompt: never below a tenth.
    prompt_s = max(prompts - base_s - context_s * attended, prompts / 10) / prompt
    return StepCost(base_s, token_s, prompt_s, context_s)
