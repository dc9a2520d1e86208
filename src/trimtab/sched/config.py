"""The limits of a scheduler."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.errors import SpecError
from trimtab.sched.checks import positive, require, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The limits of a scheduler.

    Args:
        max_running: sequences that hold keys and values at a time.
        max_step_tokens: tokens of a step at most; at least `max_running`, so that every answer goes on in every step.
        target_step_s: seconds of a step that prompts may fill it up to, by the cost function handed to the scheduler; None =
            tokens alone count. Answers always go on, whatever they take.
        answer_step_s: seconds of a step without prompts, by the cost function, beyond which no further request is started; None = no
            limit. One request runs whatever it takes.
        min_prefill_tokens: of prompts, run even when `target_step_s` is passed, so that they get there.
        max_queue: requests waiting for the first time.
        max_queue_tokens: prompt tokens of these together; None = no limit.
        max_queue_s: estimated wait beyond which a request is refused, and true wait after which it ends; None = no limit.
        ageing_s: seconds of waiting that make up for one step of priority.
        fair: whether tenants get equal service (virtual token counter) and priorities count within a tenant only.
        input_weight, output_weight: service of one token of a prompt and of an answer.
        reserve_tokens: new tokens whose bytes are reserved when a request starts; None = its `max_tokens`, and then nothing
            is ever preempted. With fewer, more requests run, and one may have to be recomputed.
        grow_tokens: by which a reservation that is used up grows, if there is room.
        max_preemptions: after so many a request starts again only with all its bytes reserved, and then runs to its end.
        prefix_cache: whether prefixes of prompts are kept and shared.
        block_tokens: tokens hashed together. A whole number of cache pages, or `shared_bytes` must say what a prefix shares.
        rewindable: whether sequences can be cut back to any block, so that part of a kept prefix can be used. Rings,
            recurrent states and caches that give up tokens cannot: prompts are then run up to a block and marked there.

    Raises:
        SpecError: a value outside its range.
    """

    max_running: int = 64
    max_step_tokens: int = 512
    target_step_s: float | None = None
    answer_step_s: float | None = None
    min_prefill_tokens: int = 1
    max_queue: int = 256
    max_queue_tokens: int | None = None
    max_queue_s: float | None = None
    ageing_s: float = 30.0
    fair: bool = False
    input_weight: float = 1.0
    output_weight: float = 2.0
    reserve_tokens: int | None = None
    grow_tokens: int = 64
    max_preemptions: int = 3
    prefix_cache: bool = True
    block_tokens: int = 64
    rewindable: bool = True

    def __post_init__(self) -> None:
        count, more = "a whole number, 1 or more", "a whole number, 0 or more"
        weights = all(
            isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in (self.input_weight, self.output_weight)
        )
        require(
            self,
            (
                ("max_running", whole(self.max_running, 1), count, "64"),
                ("max_step_tokens", whole(self.max_step_tokens, 1), count, "512"),
                ("target_step_s", _optional(self.target_step_s, positive), "None or seconds above 0", "0.05"),
                ("answer_step_s", _optional(self.answer_step_s, positive), "None or seconds above 0", "0.1"),
                ("min_prefill_tokens", whole(self.min_prefill_tokens, 1), count, "1"),
                ("max_queue", whole(self.max_queue, 0), more, "256"),
                (
                    "max_queue_tokens",
                    _optional(self.max_queue_tokens, lambda v: whole(v, 0)),
                    f"None or {more}",
                    "65536",
                ),
                ("max_queue_s", _optional(self.max_queue_s, positive), "None or seconds above 0", "30.0"),
                ("ageing_s", positive(self.ageing_s), "seconds above 0, so that nothing waits for ever", "30.0"),
                ("input_weight", weights, "weights of 0 or more, for inputs and outputs", "1.0"),
                ("reserve_tokens", _optional(self.reserve_tokens, lambda v: whole(v, 1)), f"None or {count}", "64"),
                ("grow_tokens", whole(self.grow_tokens, 1), count, "64"),
                ("max_preemptions", whole(self.max_preemptions, 0), more, "3"),
                ("block_tokens", whole(self.block_tokens, 1), count, "64"),
            ),
        )
        if self.max_step_tokens < self.max_running:
            raise SpecError(
                f"max_step_tokens={self.max_step_tokens} is not possible with max_running={self.max_running}: every answer takes "
                f"a token of every step. Allowed: max_running or more. Try max_step_tokens={max(512, self.max_running)}."
            )


def _optional(value: object, good: object) -> bool:
    return value is None or (callable(good) and bool(good(value)))
