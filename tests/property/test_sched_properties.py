"""The scheduler under any arrivals, cancellations, deadlines and capacities, against an executor with real pages of tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.sched import (
    Admitted,
    ModelledExecutor,
    Outcome,
    Refusal,
    Request,
    Scheduler,
    SchedulerConfig,
    StepWork,
    Trace,
    lengths,
    replay,
)

BLOCK = 4  # tokens of a block and of a page
TOKEN_BYTES, FIXED_BYTES = 3, 5


def nbytes(tokens: int) -> int:
    """Bytes of the pages of one sequence, and some it has whatever its length."""
    return FIXED_BYTES + -(-tokens // BLOCK) * BLOCK * TOKEN_BYTES


def shared_bytes(tokens: int) -> int:
    return tokens * TOKEN_BYTES


def seconds(n_prefill: int, prefill_context: int, n_decode: int, context_sum: int) -> float:
    return 0.01 + 0.001 * n_prefill + 0.00001 * prefill_context + 0.002 * n_decode + 0.00002 * context_sum


class Pages:
    """Refuses work that a store of pages with copy on write could not do, and counts what it really holds."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.config = scheduler, scheduler.config
        self.inner = ModelledExecutor(seconds, lengths(answer))
        self.seqs: dict[int, tuple[list[int], list[object]]] = {}  # tokens, pages
        self.marks: dict[int, tuple[list[int], list[object], tuple[str, str]]] = {}
        self.reach: dict[int, int] = {}
        self.salt: dict[int, tuple[str, str]] = {}
        self.requests: dict[str, Request] = {}

    def held_bytes(self) -> int:
        pages = {id(p) for _, held in self.seqs.values() for p in held} | {
            id(p) for _, held, _ in self.marks.values() for p in held
        }
        return len(pages) * BLOCK * TOKEN_BYTES + FIXED_BYTES * (len(self.seqs) + len(self.marks))

    def check_bytes(self) -> None:
        assert self.held_bytes() <= self.scheduler.kv.capacity

    def run(self, work: StepWork) -> Outcome:
        for mark, seq, count in work.marks:
            tokens, pages = self.seqs[seq]
            assert mark not in self.marks and 0 < count <= len(tokens) and count % BLOCK == 0
            assert self.config.rewindable or count == len(tokens)
            self.marks[mark] = tokens[:count], pages[: count // BLOCK], self.salt[seq]
        for fork in work.forks:
            tokens, pages = self.seqs[fork.parent]
            assert fork.seq not in self.seqs and fork.tokens == len(tokens)
            self.seqs[fork.seq] = list(tokens), list(pages)
            self.salt[fork.seq], self.reach[fork.seq] = self.salt[fork.parent], fork.reach
        for seq in work.free:
            self.seqs.pop(seq, None)
        for seq in work.preempt:
            del self.seqs[seq]
        for mark in work.release:
            del self.marks[mark]
        for start in work.starts:
            assert start.seq not in self.seqs
            request = self.requests[start.request]
            self.salt[start.seq], self.reach[start.seq] = (request.tenant, request.adapter), start.reach
            if start.mark is None:
                assert start.tokens == 0
                self.seqs[start.seq] = [], []
                continue
            tokens, pages, salt = self.marks[start.mark]
            assert salt == self.salt[start.seq], "a prefix of another tenant or adapter"
            assert start.tokens == len(tokens) if not self.config.rewindable else 0 < start.tokens <= len(tokens)
            self.seqs[start.seq] = tokens[: start.tokens], pages[: start.tokens // BLOCK]
        self.check_bytes()
        for row in work.rows:
            tokens, pages = self.seqs[row.seq]
            assert row.first == len(tokens) and row.count >= 1
            # A token is drawn only after all tokens before it.
            assert all(self.scheduler._seqs[seq].total == row.first + row.count for seq in row.sample)
            tokens += self.scheduler.tokens(row)
            if row.first % BLOCK:
                pages[-1] = object()  # copied, should another own it too; harmless otherwise
            while len(pages) * BLOCK < len(tokens):
                pages.append(object())
        self.check_bytes()
        return dataclasses.replace(self.inner.run(work), held_bytes=self.held_bytes())


def answer(request: str, sample: int) -> int:
    """Tokens of an answer: any, the same every time."""
    return 1 + (sum(map(ord, request)) * 7 + sample * 5) % 23


class Watch:
    """Drives a scheduler and checks what must hold after every step."""

    def __init__(self, config: SchedulerConfig, capacity: int) -> None:
        self.trace = Trace()
        self.config, self.capacity = config, capacity
        self.scheduler = self.fresh(self.trace)
        self.pages = Pages(self.scheduler)
        self.now = 0.0
        self.admitted: dict[str, Request] = {}
        self.ends: Counter[str] = Counter()
        self.arrival: dict[str, float] = {}
        self.run_of: dict[int, int] = {}  # tokens run since a sequence was opened
        self.cancelled: set[str] = set()

    def fresh(self, trace: Trace | None = None) -> Scheduler:
        return Scheduler(
            self.config,
            capacity_bytes=self.capacity,
            nbytes=nbytes,
            shared_bytes=shared_bytes,
            seconds=seconds,
            tokens_per_s=50.0,
            trace=trace,
        )

    def submit(self, request: Request) -> None:
        self.pages.requests[request.id] = request
        self.arrival[request.id] = self.now
        if isinstance(self.scheduler.submit(request, self.now), Admitted):
            self.admitted[request.id] = request
        else:
            self.ends[request.id] += 1

    def step(self, cancel: str = "") -> StepWork:
        """One step; a request may be cancelled while it runs."""
        scheduler, config = self.scheduler, self.config
        waiting = {g.request.id for g in scheduler._groups.values() if g.state == "waiting"}
        ready = {
            seq.id: seq.computed
            for group in scheduler._running.values()
            for seq in group.running
            if group.forked and seq.computed >= group.prompt and seq.total - seq.computed == 1
        }
        held = set(self.pages.seqs)
        work = scheduler.step(self.now)
        assert not {start.seq for start in work.starts} & set(work.preempt), "sent back and in again at once"
        # Bytes, rows and tokens stay within their limits.
        assert 0 <= scheduler.kv.used <= self.capacity
        assert scheduler.kv.used == sum(g.bytes for g in scheduler._groups.values()) + scheduler.index.bytes
        assert len(work.rows) <= config.max_running
        assert sum(row.count for row in work.rows) == work.tokens <= config.max_step_tokens
        if config.target_step_s is not None and work.load.n_prefill > config.min_prefill_tokens:
            assert seconds(*work.load) <= config.target_step_s
        # Every answer goes on, whatever else runs, unless it is sent back or has been ended.
        gone = {*work.preempt, *work.free}
        decodes = {row.seq: row.first for row in work.rows if row.seq in ready}
        assert decodes == {seq: first for seq, first in ready.items() if seq not in gone}
        assert all(row.count == 1 for row in work.rows if row.seq in ready)
        # What has been cancelled holds nothing any more.
        assert not {s for s in held - gone if s not in {q.id for g in scheduler._groups.values() for q in g.samples}}
        # Nobody starts before a request that has waited longer than the difference in priority allows.
        if not config.fair:
            for start in work.starts:
                for other in waiting - {s.request for s in work.starts} - {e.request for e in work.ended}:
                    gap = (self.admitted[other].priority - self.admitted[start.request].priority) * config.ageing_s
                    assert self.arrival[start.request] <= self.arrival[other] + gap + 1e-9
        outcome = self.pages.run(work)
        self.follow(work)
        scheduler.cancel(cancel, self.now)
        ended = [*work.ended, *scheduler.commit(work, outcome)]
        self.ends.update(end.request for end in ended)
        self.now += outcome.seconds or 0.001
        return work

    def follow(self, work: StepWork) -> None:
        """Every token is run exactly once each time its sequence is opened, in order, and none of a kept prefix."""
        for start in work.starts:
            self.run_of[start.seq] = start.tokens
        for fork in work.forks:
            self.run_of[fork.seq] = fork.tokens
        for row in work.rows:
            assert self.run_of[row.seq] == row.first
            self.run_of[row.seq] = row.first + row.count

    def finish(self) -> None:
        """Run out, then compare gauges, marks and ends with nothing, and the work with that of a replay."""
        for _ in range(4000):
            if not self.scheduler.busy:
                break
            self.step()
        assert not self.scheduler.busy, "some request does not end"
        counters = self.scheduler.counters()
        assert (counters.running, counters.running_sequences, counters.waiting, counters.waiting_tokens) == (0, 0, 0, 0)
        assert counters.kv_bytes == counters.prefix_bytes == self.scheduler.index.bytes
        assert (
            self.scheduler._queue.fresh
            == self.scheduler._queue.fresh_tokens
            == self.scheduler._queue.output_tokens
            == 0
        )
        assert not self.scheduler._seqs and not self.scheduler._running and counters.overruns == 0
        assert not self.pages.seqs and set(self.pages.marks) == self.scheduler.index.marks
        assert self.scheduler.index.pinned_bytes == 0
        assert not self.pages.inner.known, "the executor was not told of every end"
        assert all(count == 1 for count in self.ends.values()) and set(self.ends) == set(self.arrival)
        assert counters.finished + counters.aborted.total() == counters.admitted == len(self.admitted)
        self.scheduler.clear_prefixes(self.now)
        self.step()
        assert not self.pages.marks and self.scheduler.kv.used == 0 and not len(self.scheduler.index)
        for executor in (None, self.trace.executor()):
            assert replay(self.trace, self.fresh(), executor).work == self.trace.work


configs = st.builds(
    lambda rows, extra, **more: SchedulerConfig(
        max_running=rows, max_step_tokens=rows + extra, block_tokens=BLOCK, **more
    ),
    st.integers(1, 6),
    st.integers(0, 20),
    target_step_s=st.sampled_from([None, None, 0.02, 0.05]),
    max_queue=st.sampled_from([100, 100, 3]),
    max_queue_tokens=st.sampled_from([None, None, 60]),
    max_queue_s=st.sampled_from([None, None, 0.5, 5.0]),
    ageing_s=st.sampled_from([0.05, 1.0]),
    fair=st.booleans(),
    reserve_tokens=st.sampled_from([None, 1, 1, 3]),
    grow_tokens=st.sampled_from([1, 4]),
    max_preemptions=st.integers(0, 3),
    prefix_cache=st.sampled_from([True, True, False]),
    rewindable=st.booleans(),
)
requests = st.fixed_dictionaries(
    {
        "family": st.sampled_from([0, 0, 1]),
        "prompt": st.integers(1, 40),
        "max_tokens": st.integers(1, 30),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "priority": st.integers(-2, 2),
        "tenant": st.sampled_from(["", "", "a"]),
        "timeout_s": st.sampled_from([None, None, None, 0.05, 0.5]),
        "reuse": st.sampled_from([True, True, True, True, False]),
    }
)
# Strategies of one kind are drawn alike, so what is common stands several times.
actions = st.lists(
    st.one_of(
        *[requests] * 3,
        *[st.just("step")] * 4,
        st.tuples(st.sampled_from(["cancel", "in flight"]), st.integers(0, 20)),
        st.sampled_from(["clear", "wait"]),
    ),
    min_size=20,
    max_size=60,
)


def drive(watch: Watch, events: list[Any], drain: str = "") -> None:
    number = 0
    for event in events:
        if event == "step":
            watch.step()
        elif event == "wait":
            watch.now += 0.2
        elif event == "clear":
            watch.scheduler.clear_prefixes(watch.now)
        elif isinstance(event, tuple):
            if event[0] == "in flight":
                watch.step(f"r{event[1]}")
            else:
                watch.scheduler.cancel(f"r{event[1]}", watch.now)
        else:
            fields = dict(event)
            family, length = fields.pop("family"), fields.pop("prompt")
            # Prompts of a family begin alike, and like each other's answers: token ids are positions there.
            prompt = [(family, 100)[i < 2] + i % 5 for i in range(length)] if family else list(range(length))
            watch.submit(Request(id=f"r{number}", prompt=prompt, **fields))
            number += 1
    if drain:
        watch.scheduler.drain(watch.now, drop_waiting=drain == "drop")
        watch.submit(Request(id="late", prompt=[1]))
        assert watch.ends["late"] == 1


@settings(max_examples=150, deadline=None)
@given(config=configs, capacity=st.integers(100, 600), events=actions, drain=st.sampled_from(["", "keep", "drop"]))
def test_limits_hold_and_everything_ends_once(
    config: SchedulerConfig, capacity: int, events: list[Any], drain: str
) -> None:
    watch = Watch(config, capacity)
    drive(watch, events, drain)
    watch.finish()
    if drain:
        assert watch.scheduler.drained


@settings(max_examples=40, deadline=None)
@given(config=configs, capacity=st.integers(150, 500), events=actions)
def test_the_same_events_give_the_same_work(config: SchedulerConfig, capacity: int, events: list[Any]) -> None:
    first, second = Watch(config, capacity), Watch(config, capacity)
    drive(first, events)
    drive(second, events)
    assert first.trace.work == second.trace.work


@settings(max_examples=30, deadline=None)
@given(events=actions, capacity=st.integers(60, 300))
def test_traces_survive_their_file(events: list[Any], capacity: int) -> None:
    watch = Watch(SchedulerConfig(max_running=3, max_step_tokens=8, block_tokens=BLOCK, reserve_tokens=1), capacity)
    drive(watch, events)
    read = Trace.from_json(watch.trace.to_json())
    assert read.work == watch.trace.work
    assert replay(read, watch.fresh()).work == watch.trace.work


@settings(max_examples=60, deadline=None)
@given(
    lengths_=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=40, max_size=60),
    tokens=st.integers(4, 30),
)
def test_backlogged_tenants_are_served_alike(lengths_: list[tuple[int, int]], tokens: int) -> None:
    """Service of two tenants who always wait differs by at most twice the larger of one input and one full batch.

    Source: Sheng et al., arXiv 2401.00588, the bound of two backlogged clients, for M tokens in a batch.
    """
    rows, w_in, w_out = 4, 1.0, 2.0
    config = SchedulerConfig(
        max_running=rows, max_step_tokens=tokens, fair=True, input_weight=w_in, output_weight=w_out, prefix_cache=False
    )
    scheduler = Scheduler(config, capacity_bytes=10**6, nbytes=lambda t: t)
    executor = ModelledExecutor(seconds, lengths(lambda request, _: int(request.split("-")[2])))
    tenants: dict[int, str] = {}
    for number, (prompt, length) in enumerate(lengths_):  # "greedy" sends three times as much
        tenant = "modest" if number % 4 == 0 else "greedy"
        request = Request(id=f"{number}-{tenant}-{length}", prompt=range(prompt), max_tokens=10, tenant=tenant)
        assert not isinstance(scheduler.submit(request, 0.0), Refusal)
    service: Counter[str] = Counter()
    bound = 2 * max(w_in * 20, w_out * rows * 30)
    while True:
        waiting = {g.request.tenant for g in scheduler._groups.values() if g.state == "waiting"}
        if len(waiting) < 2:
            break
        work = scheduler.step(0.0)
        tenants |= {start.seq: start.request.split("-")[1] for start in work.starts}
        for start in work.starts:
            service[start.request.split("-")[1]] += w_in * len(scheduler._groups[start.request].request.prompt)
        for row in work.rows:
            service[tenants[row.seq]] += w_out * len(row.sample)
        scheduler.commit(work, executor.run(work))
        assert abs(service["modest"] - service["greedy"]) <= bound
    assert service["modest"] > 0


@pytest.mark.parametrize("fair", [False, True])
def test_low_priority_starts_within_the_bound(fair: bool) -> None:
    """Under an endless stream of urgent requests, one that is not urgent starts once those before its bound are served."""
    config = SchedulerConfig(
        max_running=1, max_step_tokens=8, ageing_s=0.5, fair=fair, prefix_cache=False, max_queue=10**6
    )
    scheduler = Scheduler(config, capacity_bytes=1000, nbytes=lambda t: t)
    executor = ModelledExecutor(lambda *_: 0.1, lengths(lambda *_: 1))
    scheduler.submit(Request(id="low", prompt=[1], max_tokens=1, priority=4), 0.0)
    now, number = 0.0, 0
    while now < 60:
        # One request a step, all that can be served: with strict priorities `low` would never start.
        scheduler.submit(Request(id=f"u{number}", prompt=[1], max_tokens=1), now)
        number += 1
        work = scheduler.step(now)
        if any(start.request == "low" for start in work.starts):
            break
        scheduler.commit(work, executor.run(work))
        now += 0.1
    ahead = 4 * 0.5  # only what came within four steps of ageing may pass it
    assert now <= 2 * ahead + 0.2
