"""The queue: priorities that age, and service shared fairly between tenants.

A request's place is its arrival, put off by `ageing_s` for each step of priority. Waiting therefore makes up for priority, and the
order of two requests never changes: nothing that arrives more than `ageing_s` times their difference in priority after a
request is served before it.
"""

from __future__ import annotations

import heapq

from trimtab.sched.group import WAITING, Group

#: Tenants whose service is remembered before those that have had less than all who wait are forgotten.
_TENANTS = 4096


class FairShare:
    """Virtual token counter: the tenant that has been served least is next.

    Service is a weighted sum of the tokens of prompts, counted when a request starts, and of answers, counted when they are
    sampled. A tenant whose queue was empty starts with no less than the least of those who wait, so that idling earns no credit.

    Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (arXiv 2401.00588), the VTC algorithm. As
    there, a prompt counts whole, whatever of it was cached; unlike there, a request may be sent back, and is not charged again.
    """

    __slots__ = ("_last", "service")

    def __init__(self) -> None:
        self.service: dict[str, float] = {}
        self._last = ""  # tenant whose queue emptied last

    def lift(self, tenant: str, waiting: list[str]) -> None:
        """A tenant without waiting requests gets one; `waiting` are those that have some."""
        if waiting:
            floor = min(self.service.get(other, 0.0) for other in waiting)
        else:
            floor = self.service.get(self._last, 0.0)
        self.service[tenant] = max(self.service.get(tenant, 0.0), floor)
        if len(self.service) > _TENANTS:  # a lift would give these the same again
            kept = {*waiting, tenant, self._last}
            self.service = {name: done for name, done in self.service.items() if done > floor or name in kept}

    def emptied(self, tenant: str) -> None:
        """A tenant's last waiting request has started."""
        self._last = tenant

    def charge(self, tenant: str, service: float) -> None:
        """Count service."""
        self.service[tenant] = self.service.get(tenant, 0.0) + service


class WaitingQueue:
    """Requests that wait, in the order they are to start.

    Args:
        fair: counts service; None = tenants do not matter.

    Attributes:
        fresh: waiting for the first time, which is what limits count.
        fresh_tokens: of their prompts.
        prompt_tokens, output_tokens: of all that wait: to run before answers go on, and to be sampled at most.
    """

    def __init__(self, fair: FairShare | None = None) -> None:
        self.fair = fair
        self.fresh = self.fresh_tokens = self.prompt_tokens = self.output_tokens = 0
        self._count = self._stale = 0
        self._heaps: dict[str, list[tuple[float, int, Group]]] = {}
        self._waiting: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def push(self, group: Group) -> None:
        """Let a request wait; one that was preempted has its old place."""
        tenant = self._tenant(group)
        if self.fair is not None and not group.started and tenant not in self._waiting:
            self.fair.lift(tenant, list(self._waiting))
        heapq.heappush(self._heaps.setdefault(tenant, []), (group.key, group.order, group))
        self._count_in(group, 1)

    def peek(self) -> Group | None:
        """The request to start next."""
        if not self._count:
            return None
        if self.fair is None:
            return self._top("")
        service = self.fair.service
        tops = [(service.get(tenant, 0.0), *self._place(tenant)) for tenant in self._waiting]
        return min(tops)[-1]

    def pop(self, group: Group) -> None:
        """Take out the request that `peek` gave."""
        tenant = self._tenant(group)
        heapq.heappop(self._heaps[tenant])
        self._count_in(group, -1)
        if self.fair is not None and tenant not in self._waiting:
            self.fair.emptied(tenant)

    def discard(self, group: Group) -> None:
        """Take out any request; its state must have changed already."""
        self._count_in(group, -1)
        self._stale += 1
        if self._stale > 16 + self._count:
            self._sweep()

    def fresh_groups(self) -> list[Group]:
        """All that wait for the first time, in the order they came."""
        waiting = (group for heap in self._heaps.values() for _, _, group in heap if group.state is WAITING)
        return sorted((group for group in waiting if not group.started), key=lambda group: group.order)

    def _tenant(self, group: Group) -> str:
        return group.request.tenant if self.fair is not None else ""

    def _top(self, tenant: str) -> Group:
        heap = self._heaps[tenant]
        while heap[0][2].state is not WAITING:
            heapq.heappop(heap)
            self._stale -= 1
        return heap[0][2]

    def _place(self, tenant: str) -> tuple[float, int, Group]:
        group = self._top(tenant)
        return group.key, group.order, group

    def _sweep(self) -> None:
        """Forget entries of requests that no longer wait: the queue's memory is bounded too."""
        for tenant, heap in list(self._heaps.items()):
            kept = [entry for entry in heap if entry[2].state is WAITING]
            heapq.heapify(kept)
            self._heaps[tenant] = kept
            if not kept:
                del self._heaps[tenant]
        self._stale = 0

    def _count_in(self, group: Group, sign: int) -> None:
        tenant, pending = self._tenant(group), group.pending
        self._count += sign
        if not group.started:
            self.fresh += sign
            self.fresh_tokens += sign * group.prompt
        self.prompt_tokens += sign * pending
        self.output_tokens += sign * sum(seq.left for seq in group.unfinished)
        waiting = self._waiting.get(tenant, 0) + sign
        if waiting:
            self._waiting[tenant] = waiting
        else:
            del self._waiting[tenant]
