"""The scheduler: a state machine that says what each step runs. The time is an argument; so are the bytes."""

from __future__ import annotations

import dataclasses
import heapq
import itertools

from trimtab.errors import SpecError, TrimtabError
from trimtab.sched.admission import Admission
from trimtab.sched.budget import Seconds, StepBudget
from trimtab.sched.config import SchedulerConfig
from trimtab.sched.counters import Counters
from trimtab.sched.group import ENDED, RUNNING, WAITING, Group, Sequence, Tokens
from trimtab.sched.intake import refuse
from trimtab.sched.kv import KVBudget, NBytes
from trimtab.sched.prefix import PrefixIndex
from trimtab.sched.queue import FairShare, WaitingQueue
from trimtab.sched.request import Admitted, Ended, Refusal, Request
from trimtab.sched.throughput import Pace, Throughput
from trimtab.sched.trace import Cancelled, Cleared, Committed, Drained, Paused, Stepped, Submitted, Trace
from trimtab.sched.work import Fork, Load, MarkPrefix, Outcome, Row, Start, StepWork

#: So many prompts at least are on their way together, where there are bytes and sequences for them.
_PROMPTS = 4


@dataclasses.dataclass(slots=True)
class _Draft:
    """A StepWork being written."""

    marks: list[MarkPrefix] = dataclasses.field(default_factory=list)
    forks: list[Fork] = dataclasses.field(default_factory=list)
    free: list[int] = dataclasses.field(default_factory=list)
    preempt: list[int] = dataclasses.field(default_factory=list)
    release: list[int] = dataclasses.field(default_factory=list)
    starts: list[Start] = dataclasses.field(default_factory=list)


class Scheduler:
    """Decides what every step runs.

    Calls alternate: `step`, the executor, `commit`; `submit`, `cancel` and `drain` may come at any time, from one thread.

    Args:
        config: limits.
        capacity_bytes: of keys and values: sequences and kept prefixes never have more promised together.
        nbytes: bytes of one sequence of so many tokens: exact or an upper bound, never falling.
        shared_bytes: of a prefix of whole blocks, what sequences that continue it share for good; None = all of it.
        seconds: cost function; needed with `target_step_s`.
        tokens_per_s: predicted throughput, for waits before steps have been measured; None = not known.
        trace: is told every event.

    Attributes:
        index: the kept prefixes.

    Raises:
        SpecError: a bad capacity, or a target without a cost function.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        capacity_bytes: int,
        nbytes: NBytes,
        shared_bytes: NBytes | None = None,
        seconds: Seconds | None = None,
        tokens_per_s: float | None = None,
        trace: Trace | None = None,
    ) -> None:
        if not (config.target_step_s is None and config.answer_step_s is None) and seconds is None:
            raise SpecError(
                f"target_step_s={config.target_step_s} answer_step_s={config.answer_step_s} needs to know what a step takes. Hand in "
                "seconds(n_prefill, prefill_context, n_decode, context_sum), or leave the target out."
            )
        self.config, self.trace = config, trace
        self.kv = KVBudget(capacity_bytes, nbytes, shared_bytes)
        self.index = PrefixIndex(self.kv, config.block_tokens, config.rewindable)
        self._admission = Admission(config, self.kv, self.index)
        self._seconds, self._rate = seconds, Throughput(tokens_per_s)
        self._queue = WaitingQueue(FairShare() if config.fair else None)
        self._counters = Counters(kv_capacity_bytes=capacity_bytes)
        self._groups: dict[str, Group] = {}
        self._running: dict[int, Group] = {}  # by order of arrival number; kept in the order they started
        self._seqs: dict[int, Sequence] = {}
        self._slots = 0
        self._orders, self._ids, self._steps = itertools.count(), itertools.count(), itertools.count()
        self._timers: list[tuple[float, int, str, str]] = []
        self._ended: list[Ended] = []  # to be told with the next step
        self._prompts_done: list[Group] = []
        self._finished: list[Sequence] = []
        self._leaving: list[Group] = []  # ended, their bytes still promised
        self._cleared: list[int] = []
        self._in_flight: StepWork | None = None
        self._now = 0.0
        self._pace = Pace()
        self._draining = False

    # Requests come and go.

    def submit(self, request: Request, now: float) -> Admitted | Refusal:
        """Let a request into the queue, or say why not.

        Raises:
            SpecError: a request of this id has not ended yet.
        """
        if request.id in self._groups:
            raise SpecError(f"A request id='{request.id}' has not ended yet. Give every request an id of its own.")
        if self.trace is not None:
            self.trace.add(now, Submitted(request))
        refusal = refuse(request, self.config, self.kv, self._queue, self._rate, self._draining)
        if refusal is not None:
            self._counters.rejected[refusal.reason] += 1
            return refusal
        ahead, wait = len(self._queue), self.wait_s
        deadline = None if request.timeout_s is None else now + request.timeout_s
        key = now + request.priority * self.config.ageing_s
        order = next(self._orders)
        group = self._groups[request.id] = Group(request, key, order, self._ids)
        self._seqs |= {seq.id: seq for seq in group.samples}
        self._queue.push(group)
        if deadline is not None:
            heapq.heappush(self._timers, (deadline, order, request.id, "expired"))
        if self.config.max_queue_s is not None:
            heapq.heappush(self._timers, (now + self.config.max_queue_s, order, request.id, "queue_timeout"))
        self._counters.admitted += 1
        return Admitted(request.id, ahead, wait)

    def cancel(self, request: str, now: float, reason: str = "cancelled") -> bool:
        """End a request wherever it is; the next step frees what it holds. False = there is none of this id."""
        if self.trace is not None:
            self.trace.add(now, Cancelled(request, reason))
        group = self._groups.get(request)
        if group is None:
            return False
        self._abort(group, reason)
        return True

    def pause(self, request: str, now: float, on: bool = True) -> bool:
        """Give a request no rows until `pause(..., on=False)`; what it holds stays, and may be preempted. False = no such id."""
        if self.trace is not None:
            self.trace.add(now, Paused(request, on))
        group = self._groups.get(request)
        if group is None:
            return False
        group.paused = on
        return True

    def drain(self, now: float, *, drop_waiting: bool = False) -> None:
        """Take no new requests; finish those that run and, unless dropped, those that wait."""
        if self.trace is not None:
            self.trace.add(now, Drained(drop_waiting))
        self._draining = True
        if drop_waiting:
            for group in self._queue.fresh_groups():
                self._abort(group, "aborted")

    def clear_prefixes(self, now: float) -> None:
        """Let go of every kept prefix that no running request uses; the next step releases the marks."""
        if self.trace is not None:
            self.trace.add(now, Cleared())
        self._cleared += self.index.clear()

    @property
    def wait_s(self) -> float | None:
        """Estimated seconds until all that wait have been served; None before a throughput is known."""
        return self._rate.wait(self._queue)

    @property
    def drained(self) -> bool:
        """Whether it takes no requests, has none, and nothing is left to free."""
        return self._draining and not self.busy

    @property
    def busy(self) -> bool:
        """Whether a step would have something to say."""
        return bool(self._groups or self._leaving or self._finished or self._ended or self._cleared)

    def counters(self) -> Counters:
        """A copy of the counters, gauges as of now."""
        return dataclasses.replace(
            self._counters,
            running=len(self._running),
            running_sequences=self._slots,
            waiting=len(self._queue),
            waiting_tokens=self._queue.prompt_tokens,
            kv_bytes=self.kv.used,
            prefix_bytes=self.index.bytes,
            prefix_query_tokens=self._admission.query_tokens,
            prefix_hit_tokens=self._admission.hit_tokens,
            rejected=self._counters.rejected.copy(),
            aborted=self._counters.aborted.copy(),
        )

    def tokens(self, row: Row) -> Tokens[int]:
        """The token ids of a row of the step in flight."""
        seq = self._seqs[row.seq]
        return seq.group.tokens(seq, row.first, row.count)

    # A step.

    def step(self, now: float) -> StepWork:
        """Say what to run next. The work may be `idle`; it is committed all the same.

        Raises:
            TrimtabError: the step before has not been committed.
        """
        if self._in_flight is not None:
            raise TrimtabError("The step before has not been committed. Call commit(work, outcome) first.")
        self._now, draft = now, _Draft(release=self._cleared)
        self._cleared = []
        while self._timers and self._timers[0][0] <= now:
            self._time_out(*heapq.heappop(self._timers)[1:])
        self._settle(draft)
        if not self._grow(draft):  # whoever was sent back must not come in again at once
            self._admit(draft)
        rows, load = self._rows()
        ended, self._ended = self._ended, []
        work = StepWork(
            number=next(self._steps),
            marks=tuple(draft.marks),
            forks=tuple(draft.forks),
            free=tuple(draft.free),
            preempt=tuple(draft.preempt),
            release=tuple(draft.release),
            starts=tuple(draft.starts),
            rows=tuple(rows),
            load=load,
            ended=tuple(ended),
        )
        self._in_flight = work
        if self.trace is not None:
            self.trace.add(now, Stepped(work))
        return work

    def commit(self, work: StepWork, outcome: Outcome) -> tuple[Ended, ...]:
        """Take note of what came of a step; returns the requests that have finished with it.

        Raises:
            TrimtabError: this is not the work of the last step.
            SpecError: the outcome does not have what the rows asked for; nothing has been noted then.
        """
        if work is not self._in_flight:
            raise TrimtabError("This work is not that of the last step. Commit each step once, before the next.")
        self._check(work, outcome)
        if self.trace is not None:
            self.trace.add(self._now, Committed(outcome))
        self._in_flight = None
        touched: dict[int, Group] = {}
        seqs, finished, fair = self._seqs, outcome.finished, self._queue.fair
        for row, tokens in zip(work.rows, outcome.tokens, strict=True):
            seq = seqs[row.seq]
            group = seq.group
            if group.state is not RUNNING:  # cancelled meanwhile
                continue
            seq.computed = done = row.first + row.count
            if row.first < group.prompt and self._admission.markable(group, done):
                self._prompts_done.append(group)
            if row.seq in finished and not group.forked and len(tokens) < max(len(row.sample), 1):
                for other in group.unfinished:  # a prompt that failed
                    self._finish(other, finished[row.seq], touched)
                continue
            for id, token in zip(row.sample, tokens, strict=False):
                drawn = seqs[id]
                drawn.generated.append(token)
                drawn.total += 1
                if id not in finished and len(drawn.generated) >= group.request.max_tokens:
                    self._finish(drawn, "length", touched)
            if fair is not None and tokens:
                fair.charge(group.request.tenant, self.config.output_weight * len(tokens))
        for id, reason in finished.items():
            if seqs[id].group.state is RUNNING:
                self._finish(seqs[id], reason, touched)
        self._note(work, outcome)
        return tuple(self._end(group) for group in touched.values() if not group.unfinished)

    # What a step consists of.

    def _settle(self, draft: _Draft) -> None:
        """Keep prefixes, fork samples, and free what has ended."""
        for group in self._prompts_done:
            if group.state is RUNNING:
                self._add_mark(draft, self._admission.mark_prompt(group))
                self._fork(group, draft)
        for seq in self._finished:
            if seq.group.state is RUNNING:  # others of its request go on
                draft.free.append(seq.id)
                seq.freed = True
                self._slots -= 1
                self._admission.drop_sample(seq)
        for group in self._leaving:
            if group.started:
                if group.reason == "finished":
                    self._add_mark(draft, self._admission.mark_answer(group))
                draft.free.extend(seq.id for seq in group.samples if not seq.freed)
            self._let_go(group)
            for seq in group.samples:
                del self._seqs[seq.id]
        self._prompts_done, self._finished, self._leaving = [], [], []

    def _add_mark(self, draft: _Draft, mark: MarkPrefix | None) -> None:
        if mark is not None:
            draft.marks.append(mark)

    def _grow(self, draft: _Draft) -> bool:
        """Promise more bytes to answers that have used up theirs; returns whether a request was sent back for that."""
        sent_back = False
        for group in list(self._running.values()):
            for seq in group.running:
                while group.state is RUNNING and seq.total > seq.reach:
                    if self._admission.grow(seq, draft.release):
                        continue
                    victims = (g for g in self._running.values() if not self._admission.protected(g))
                    self._preempt(max(victims, key=lambda g: (g.key, g.order)), draft)
                    sent_back = True
                if group.state is not RUNNING:
                    break
        return sent_back

    def _admit(self, draft: _Draft) -> None:
        """Start requests in the order of the queue while bytes, sequences and tokens of the step are left.

        A long prompt counts as a part of a step only, so that short ones behind it start while it runs.
        """
        config = self.config
        if not len(self._queue) or self._slots >= config.max_running:
            return
        most = max(config.max_step_tokens // _PROMPTS, 1)
        left = config.max_step_tokens - sum(
            min(group.goal(seq) - seq.computed, most) for group in self._running.values() for seq in group.running
        )
        # The first that does not fit ends it: were others let past, it could wait for ever.
        while left > 0 and (group := self._queue.peek()) is not None:
            if self._slots + len(group.unfinished) > config.max_running or self._too_slow_with(group):
                return
            if not self._start(group, draft):
                return
            left -= min(group.goal(group.running[0]) - group.running[0].computed, most)

    def _too_slow_with(self, group: Group) -> bool:
        """Whether answers would come slower than they may, with one request more."""
        limit = self.config.answer_step_s
        if limit is None or self._seconds is None or not self._running:
            return False
        context = sum(seq.total for other in self._running.values() for seq in other.running)
        new = len(group.unfinished)
        return self._pace.answers * self._seconds(0, 0, self._slots + new, context + new * group.prompt) > limit

    def _start(self, group: Group, draft: _Draft) -> bool:
        if not self._admission.start(group, draft.release):
            return False
        self._queue.pop(group)
        if not group.started and self._queue.fair is not None:
            self._queue.fair.charge(group.request.tenant, self.config.input_weight * group.prompt)
        group.state, group.started = RUNNING, True
        first = group.unfinished[0]
        first.held, group.running = True, [first]
        self._slots += group.slots
        self._running[group.order] = group
        mark = None if group.span is None else group.span.mark
        draft.starts.append(Start(first.id, group.request.id, first.sample, mark, group.base, first.reach))
        return True

    def _rows(self) -> tuple[list[Row], Load]:
        """A token for every answer, then prompts while the budget lasts.

        A short prompt is done in a few steps whatever it came behind, and a long one takes twice as long at most.
        """
        config = self.config
        rows: list[Row] = []
        prompts: list[Sequence] = []
        context = 0
        for group in self._running.values():
            if group.paused:
                continue
            plain, prompt = group.forked, group.prompt
            for seq in group.running:
                done = seq.computed
                if plain and done >= prompt and seq.total - done == 1:
                    rows.append(Row(seq.id, done, 1, seq.only))
                    context += done + 1
                else:
                    prompts.append(seq)
        target = None if config.target_step_s is None else config.target_step_s / self._pace.prompts
        budget = StepBudget(config.max_step_tokens, target, self._seconds, config.min_prefill_tokens)
        budget.decode, budget.context = len(rows), context
        left = [seq.group.goal(seq) - seq.computed for seq in prompts]
        for index, most in budget.shares(prompts[0].computed if prompts else 0, left):
            seq = prompts[index]
            group, first = seq.group, seq.computed
            goal = group.goal(seq)
            count = self._admission.row_tokens(group, first, budget.take_prompt(first, most))
            if count:
                budget.spend(first, count)
                rows.append(Row(seq.id, first, count, self._samples(group, seq) if first + count == goal else ()))
        return rows, Load(budget.prefill, budget.prefill_context, budget.decode, budget.context)

    def _samples(self, group: Group, seq: Sequence) -> tuple[int, ...]:
        """Who gets a token after all that is known has been run: nobody where a prompt is only run again to be forked."""
        if group.forked:
            return seq.only
        return () if seq.generated else tuple(each.id for each in group.samples)

    # Ways out.

    def _fork(self, group: Group, draft: _Draft) -> None:
        first = group.running[0]
        if group.forked or first.computed < group.prompt:
            return
        group.forked = True
        for seq in group.unfinished:
            if seq is not first:
                seq.computed, seq.held = group.prompt, True
                draft.forks.append(Fork(seq.id, first.id, group.request.id, seq.sample, group.prompt, seq.reach))
        group.running = [seq for seq in group.samples if seq.held and not seq.finish]

    def _finish(self, seq: Sequence, reason: str, touched: dict[int, Group]) -> None:
        if seq.finish:
            return
        group = seq.group
        seq.finish = reason
        if group.forked:
            group.running.remove(seq)
        self._finished.append(seq)
        touched[group.order] = group

    def _preempt(self, group: Group, draft: _Draft) -> None:
        draft.preempt.extend(seq.id for seq in group.samples if seq.held)
        self._let_go(group)
        group.preemptions += 1
        self._counters.preemptions += 1
        group.state = WAITING
        self._queue.push(group)

    def _let_go(self, group: Group) -> None:
        self._slots -= group.slots
        self._running.pop(group.order, None)
        self._admission.let_go(group)

    def _abort(self, group: Group, reason: str) -> None:
        """End a request that has not finished."""
        waiting = group.state is WAITING
        self._ended.append(self._end(group, reason))
        if waiting:
            self._queue.discard(group)

    def _end(self, group: Group, reason: str = "finished") -> Ended:
        group.state, group.reason = ENDED, reason
        self._leaving.append(group)
        del self._groups[group.request.id]
        output = group.output_tokens
        if reason == "finished":
            self._counters.finished += 1
            self._rate.answered(output, group.request.max_tokens * group.request.n)
        else:
            self._counters.aborted[reason] += 1
        return Ended(group.request.id, reason, tuple(seq.finish for seq in group.samples), output)

    def _time_out(self, order: int, request: str, reason: str) -> None:
        group = self._groups.get(request)
        if group is None or group.order != order or (reason == "queue_timeout" and group.started):
            return
        self._abort(group, reason)

    # What came of a step.

    def _check(self, work: StepWork, outcome: Outcome) -> None:
        if len(outcome.tokens) != len(work.rows):
            raise SpecError(
                f"An outcome of {len(outcome.tokens)} rows for a step of {len(work.rows)}. Give the tokens of each row, in order; "
                "() for one without logits."
            )
        for row, tokens in zip(work.rows, outcome.tokens, strict=True):
            if len(tokens) != len(row.sample) and row.seq not in outcome.finished:
                raise SpecError(
                    f"{len(tokens)} tokens for the row of sequence {row.seq}, which asked for {len(row.sample)}. Give one for "
                    "each sequence of its `sample`, or name the sequence in `finished`."
                )
        for id in outcome.finished:
            if id not in self._seqs:
                raise SpecError(
                    f"Sequence {id} has finished, but none of that id is known. Name sequences of this step's rows."
                )

    def _note(self, work: StepWork, outcome: Outcome) -> None:
        counters = self._counters
        counters.prefill_tokens += work.load.n_prefill
        counters.decode_tokens += work.load.n_decode
        self._rate.ran(work.tokens, outcome.seconds)
        if self._seconds is not None and work.rows:
            self._pace.ran(work.load, outcome.seconds, self._seconds(*work.load))
        if outcome.held_bytes is not None:
            counters.kv_held_bytes = outcome.held_bytes
            counters.overruns += outcome.held_bytes > self.kv.used
