"""What is asked of the scheduler, and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.sched.checks import positive, require, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how much may follow it.

    Args:
        id: names it; no other request that has not ended may have the same.
        prompt: token ids, at least one. Read for hashes and lengths only: a simulator may pass ``range(length)``.
        max_tokens: new tokens of each sample at most, 1 or more.
        n: samples that continue the prompt, 1 or more; the prompt is run once. For best-of give the number to choose from.
        priority: lower is served earlier, as in vLLM; any whole number.
        tenant: whose it is: prefixes are shared, and service is counted for fairness, within one tenant only.
        adapter: what else makes its keys and values differ (an adapter, techniques): prefixes are shared within one only.
        timeout_s: seconds after its arrival at which it is given up; None = never.
        reuse: whether a cached prefix may stand for part of the prompt; no where logits of every prompt token are wanted.

    Raises:
        SpecError: a value outside its range.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int = 128
    n: int = 1
    priority: int = 0
    tenant: str = ""
    adapter: str = ""
    timeout_s: float | None = None
    reuse: bool = True

    def __post_init__(self) -> None:
        require(
            self,
            (
                ("id", isinstance(self.id, str) and bool(self.id), "a text with at least one character", "'r1'"),
                ("prompt", len(self.prompt) > 0, "at least one token", "[1]"),
                ("max_tokens", whole(self.max_tokens, 1), "a whole number, 1 or more", "128"),
                ("n", whole(self.n, 1), "a whole number, 1 or more", "1"),
                (
                    "priority",
                    isinstance(self.priority, int) and not isinstance(self.priority, bool),
                    "a whole number; lower is served earlier",
                    "0",
                ),
                (
                    "timeout_s",
                    self.timeout_s is None or positive(self.timeout_s),
                    "None or seconds above 0",
                    "60.0",
                ),
            ),
        )

    @property
    def salt(self) -> bytes:
        """What the hashes of its prompt start from; the quoting of repr keeps ("a", "bc") and ("ab", "c") apart."""
        return repr((self.tenant, self.adapter)).encode()


class Admitted(NamedTuple):
    """A request stands in the queue.

    Args:
        request: its id.
        ahead: requests that wait beside it.
        wait_s: estimated seconds until it starts; None before a throughput is known.
    """

    request: str
    ahead: int
    wait_s: float | None


class Refusal(NamedTuple):
    """A request was not taken; nothing of it is kept.

    Args:
        request: its id.
        reason: ``draining``, ``queue_full``, ``queue_tokens``, ``queue_seconds`` or ``never_fits``.
        message: a sentence for the user.
        retry_after_s: estimated seconds until it could be taken; None where waiting does not help.
    """

    request: str
    reason: str
    message: str
    retry_after_s: float | None


class Ended(NamedTuple):
    """A request has ended; each that was admitted ends exactly once.

    Args:
        request: its id.
        reason: ``finished``, ``expired`` (its timeout), ``queue_timeout`` (waited longer than `max_queue_s`), ``aborted``
            (dropped by a drain), or what `Scheduler.cancel` was given, ``cancelled`` by default.
        finish: of each sample why it finished, as the executor said, or ``length``; empty where it did not.
        output_tokens: sampled, of all samples together.
    """

    request: str
    reason: str
    finish: tuple[str, ...] = ()
    output_tokens: int = 0
