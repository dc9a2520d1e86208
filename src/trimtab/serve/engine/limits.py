"""What one id may do at a time, and whether a request is possible at all."""

from __future__ import annotations

from trimtab.errors import SpecError
from trimtab.runtime.engine.bounds import block_tokens, most_sequences
from trimtab.sched.config import SchedulerConfig
from trimtab.serve.engine.choice import Choice, Served
from trimtab.serve.engine.memory import MAX_SEQUENCES, STEP_TOKENS
from trimtab.serve.engine.models import Base
from trimtab.serve.messages import ModelInfo, Start, Submit
from trimtab.spec.model import ModelSpec

#: New tokens whose bytes are reserved when a request starts; more are found as it goes, or another is sent back.
_RESERVE = 128
#: Prompt tokens that a step runs whatever they take.
_LEAST_PROMPT = 32


def scheduler_config(start: Start, spec: ModelSpec, *, plain: bool) -> SchedulerConfig:
    """Limits of one id's scheduler.

    Args:
        start: settings of the engine.
        spec: of the model.
        plain: sequences can be cut back, so prefixes and preemption cost nothing but time. Caches that code or give up tokens
            depend on where a prompt ended and was cut, so there nothing is kept, and every byte is reserved at the start.
    """
    rows = min(start.max_sequences or MAX_SEQUENCES, most_sequences(spec) or MAX_SEQUENCES)
    return SchedulerConfig(
        max_running=rows,
        max_step_tokens=max(start.step_tokens or STEP_TOKENS, rows),
        target_step_s=None if start.step_tokens else start.step_ms / 1000,
        answer_step_s=start.answer_ms / 1000 if start.answer_ms else None,
        min_prefill_tokens=_LEAST_PROMPT,
        max_queue=start.max_queue,
        max_queue_tokens=start.max_queue_tokens,
        max_queue_s=start.max_queue_s,
        fair=start.fairness,
        reserve_tokens=None if start.deterministic or not plain else _RESERVE,
        prefix_cache=start.prefix_cache and plain and not start.deterministic,
        block_tokens=block_tokens(spec),
        rewindable=True,
    )


def check(submit: Submit, info: ModelInfo) -> None:
    """Refuse what is not possible.

    Raises:
        SpecError: no prompt, more tokens than the context, or ids that the model has not.
    """
    asked, prompt = submit.sampling, len(submit.prompt)
    if not prompt:
        raise SpecError("The prompt has no token. Send at least one.")
    if prompt + asked.max_tokens > info.context:
        raise SpecError(
            f"The prompt has {prompt} tokens and {asked.max_tokens} new ones are asked for; the context of {info.id} is "
            f"{info.context}. Shorten the prompt or lower max_tokens."
        )
    if asked.max_tokens < 1 and asked.prompt_logprobs is None:
        raise SpecError("max_tokens is 0. Allowed: 1 or more, or 0 together with prompt_logprobs.")
    ids = [*submit.prompt, *(token for token, _ in asked.logit_bias)]
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        raise SpecError(f"A token id of the prompt or of logit_bias is not in 0..{info.vocab_size - 1}.")


def answers(served: Served, base: Base, ends: frozenset[int]) -> list[Choice]:
    """The answers to draw for a request, none of them begun.

    Raises:
        SpecError: settings out of range, a grammar that cannot be compiled, or text without a tokenizer.
    """
    asked, grammar = served.asked, served.submit.grammar
    if (asked.stop or grammar is not None) and base.texts is None:
        raise SpecError(f"{base.name} has no tokenizer, so stop texts and grammars mean nothing. Leave them out.")
    first = None if grammar is None or base.grammars is None else base.grammars.matcher(grammar)
    made = []
    for index in range(served.drawn):
        stream = base.texts.stream(skip_special_tokens=asked.skip_special_tokens) if base.texts else None
        made.append(Choice(served, index, ends, stream, first.copy() if first is not None and index else first))
    return made
