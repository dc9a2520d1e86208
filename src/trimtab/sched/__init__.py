"""Iteration-level scheduling: queue, token budget, KV bytes, prefix index. No clock, no torch, no pages, no threads.

work = scheduler.step(now)
outcome = executor.run(work)
ended = scheduler.commit(work, outcome)
"""

from __future__ import annotations

from trimtab.sched.budget import Seconds
from trimtab.sched.config import SchedulerConfig
from trimtab.sched.counters import Counters
from trimtab.sched.kv import cache_bytes
from trimtab.sched.modelled import ModelledExecutor, lengths
from trimtab.sched.prefix import PrefixIndex, block_hashes
from trimtab.sched.request import Admitted, Ended, Refusal, Request
from trimtab.sched.scheduler import Scheduler
from trimtab.sched.trace import Trace, replay
from trimtab.sched.work import Executor, Fork, Load, MarkPrefix, Outcome, Row, Start, StepWork

__all__ = [
    "Admitted",
    "Counters",
    "Ended",
    "Executor",
    "Fork",
    "Load",
    "MarkPrefix",
    "ModelledExecutor",
    "Outcome",
    "PrefixIndex",
    "Refusal",
    "Request",
    "Row",
    "Scheduler",
    "SchedulerConfig",
    "Seconds",
    "Start",
    "StepWork",
    "Trace",
    "block_hashes",
    "cache_bytes",
    "lengths",
    "replay",
]
