"""Who is let into the queue: limits, refusals, and when to come back."""

from __future__ import annotations

from trimtab.sched.config import SchedulerConfig
from trimtab.sched.kv import KVBudget
from trimtab.sched.queue import WaitingQueue
from trimtab.sched.request import Refusal, Request
from trimtab.sched.throughput import Throughput

#: Seconds after which to try again while no throughput is known.
_UNKNOWN_S = 1.0


def refuse(
    request: Request, config: SchedulerConfig, kv: KVBudget, queue: WaitingQueue, rate: Throughput, draining: bool
) -> Refusal | None:
    """Return why a request is not let in, or None. What can never fit is told first: waiting would not help it."""
    if draining:
        return Refusal(request.id, "draining", "This server finishes its requests and takes no new ones.", None)
    if request.n > config.max_running:
        said = f"n={request.n} samples at a time are not possible. Allowed: up to {config.max_running}."
        return Refusal(request.id, "never_fits", f"{said} Ask several times.", None)
    prompt = len(request.prompt)
    common = kv.shared(prompt // config.block_tokens * config.block_tokens) if request.n > 1 else 0
    if said := kv.refuse(request, common):
        return Refusal(request.id, "never_fits", said, None)
    if queue.fresh >= config.max_queue:
        each = len(queue) or 1
        after = rate.seconds(queue.prompt_tokens / each, queue.output_tokens / each)
        said = f"{queue.fresh} requests wait already, the most allowed."
        return Refusal(request.id, "queue_full", said, _UNKNOWN_S if after is None else after)
    most = config.max_queue_tokens
    if most is not None and queue.fresh_tokens + prompt > most:
        said = f"Prompts of {queue.fresh_tokens} tokens wait already; with {prompt} more they pass the {most} allowed."
        if prompt > most:
            return Refusal(request.id, "queue_tokens", f"{said} Shorten the prompt.", None)
        over = queue.fresh_tokens + prompt - most
        answers = queue.output_tokens * over / max(queue.prompt_tokens, 1)
        after = rate.seconds(over, answers)
        return Refusal(request.id, "queue_tokens", said, _UNKNOWN_S if after is None else after)
    wait = rate.wait(queue)
    if config.max_queue_s is not None and wait is not None and wait > config.max_queue_s:
        said = f"It would wait for about {wait:.1f} s, more than the {config.max_queue_s:g} s allowed."
        return Refusal(request.id, "queue_seconds", said, wait - config.max_queue_s)
    return None
