"""One model id at work: its scheduler, its executor, and the requests between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import SpecError, TrimtabError
from trimtab.runtime.engine.bounds import bound_bytes, rewindable
from trimtab.runtime.engine.choosing import Nothing, Wish, choose, likeliest, normalizers
from trimtab.runtime.engine.executor import Known, StepExecutor
from trimtab.sched.request import Ended, Refusal, Request
from trimtab.sched.scheduler import Scheduler
from trimtab.sched.trace import Trace
from trimtab.sched.work import Outcome, Start, StepWork
from trimtab.serve.engine import models
from trimtab.serve.engine.choice import Choice, Served
from trimtab.serve.engine.cost import StepCost
from trimtab.serve.engine.limits import answers, check, scheduler_config
from trimtab.serve.messages import (
    Admitted,
    Failed,
    Finished,
    FinishReason,
    Message,
    Piece,
    Refused,
    Submit,
    TokenLogprob,
    Tokens,
)
from trimtab.serve.messages import Start as Settings

#: Why a request ends that never started -> status and sentence.
_GIVEN_BACK = {
    "queue_timeout": (429, "The request waited longer than allowed: too many are ahead of it. Try again later."),
    "aborted": (503, "The server is shutting down and gave the request back. Send it to another."),
}
#: Why one is not taken -> status.
_STATUS = {"draining": 503, "queue_full": 429, "queue_tokens": 429, "queue_seconds": 429, "never_fits": 413}
_ENDING: dict[str, FinishReason] = {"expired": "deadline"}


class Lane:
    """Answers the requests of one model id.

    Args:
        model: what runs.
        start: settings of the engine.
        kv_bytes: of its sequences and prefixes.
        cost: seconds of a step.
        send: takes what goes to the front.
        trace: is told every event of the scheduler; it holds prompts.
        clock: seconds.

    Attributes:
        step_s, predicted_s: of all steps, measured and by `cost`.
    """

    def __init__(
        self,
        model: models.Served,
        start: Settings,
        kv_bytes: int,
        cost: StepCost,
        send: Callable[[Message], None],
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self._send, self._clock, self._cost = model, send, clock, cost
        spec, plain = model.runner.spec, rewindable(model.runner.spec)
        self.scheduler = Scheduler(
            scheduler_config(start, spec, plain=plain),
            capacity_bytes=kv_bytes,
            nbytes=bound_bytes(spec),
            shared_bytes=None if plain else lambda tokens: 0,
            seconds=cost,
            trace=trace,
        )
        self.executor = StepExecutor(model.runner, self._known, fixed=start.deterministic)
        self._served: dict[str, Served] = {}
        self._choices: dict[int, Choice] = {}
        self._ends = model.base.tokenizer.eog_ids if model.base.tokenizer else frozenset()
        self._pieces: list[Piece] = []
        self.paused: set[str] = set()
        self.stalled = False
        self.steps = self.generated = self.cancelled = 0
        self.step_s = self.predicted_s = 0.0
        self._drawn_s = 0.0
        self._native_before_s = self._native_total_s()

    @property
    def native_s(self) -> float:
        """Seconds in native code, of all passes since the lane was made."""
        return self._native_total_s() - self._native_before_s

    def _native_total_s(self) -> float:
        return getattr(self.model.runner, "native_s", 0.0)  # a torch variant has none

    # Requests come and go.

    def __contains__(self, name: str) -> bool:
        return name in self._served

    @property
    def ready(self) -> bool:
        """Whether a turn may have something to do."""
        return self.scheduler.busy and not self.stalled

    @property
    def empty(self) -> bool:
        """Whether no request is left."""
        return not self._served and not self.scheduler.busy

    def submit(self, submit: Submit) -> None:
        """Take a request, or refuse it."""
        now, asked = self._clock(), submit.sampling
        try:
            if submit.id in self._served:
                raise SpecError(f"A request '{submit.id}' is still open. Give every request an id of its own.")
            served = self._take(submit, now)
            request = Request(
                id=submit.id, prompt=submit.prompt, max_tokens=max(asked.max_tokens, 1), n=served.drawn,
                priority=submit.priority, tenant=submit.salt, timeout_s=submit.deadline_s or None,
                reuse=asked.prompt_logprobs is None,
            )  # fmt: skip
        except TrimtabError as error:
            self._send(Refused(id=submit.id, status=400, message=str(error)))
            return
        answer = self.scheduler.submit(request, now)
        if isinstance(answer, Refusal):
            wait = answer.retry_after_s
            self._send(
                Refused(
                    id=submit.id,
                    status=_STATUS.get(answer.reason, 503),
                    message=answer.message,
                    retry_after_s=wait,
                    param="max_tokens" if answer.reason == "never_fits" else None,
                )
            )
            return
        self._served[submit.id] = served
        self.stalled = False

    def cancel(self, name: str, ending: FinishReason = "cancelled") -> None:
        """End a request; the next turn frees what it holds and tells the front."""
        if served := self._served.get(name):
            served.ending = ending
            self.cancelled += 1
            self.scheduler.cancel(name, self._clock())
            self.stalled = False

    def cancel_all(self) -> None:
        """End all requests."""
        for name in list(self._served):
            self.cancel(name)

    def pause(self, name: str, on: bool) -> None:
        """Hold a request's rows back, or let them go on."""
        if name in self._served:
            self.scheduler.pause(name, self._clock(), on)
            (self.paused.add if on else self.paused.discard)(name)
            self.stalled = False

    def drain(self) -> None:
        """Take no new requests."""
        self.scheduler.drain(self._clock())

    def close(self) -> None:
        """Free everything."""
        self.executor.close()

    def _take(self, submit: Submit, now: float) -> Served:
        check(submit, self.model.info)
        served = Served(submit, now)
        served.choices = answers(served, self.model.base, self._ends)
        return served

    def _known(self, name: str) -> Known:
        served = self._served[name]
        prompt, asked = len(served.submit.prompt), served.asked
        return Known(prompt, prompt + asked.max_tokens, asked.prompt_logprobs is not None)

    # A turn.

    def turn(self) -> None:
        """Run one step and tell the front what came of it."""
        scheduler, now = self.scheduler, self._clock()
        work = scheduler.step(now)
        for start in work.starts:
            self._started(start, now)
        for served in {self._choices[seq].served.submit.id: self._choices[seq].served for seq in work.preempt}.values():
            served.preemptions += 1
        outcome = self.run(work)
        ended = scheduler.commit(work, outcome)
        for seq in work.free:
            self._choices.pop(seq, None)
        over = [(each, self._let_go(each)) for each in (*work.ended, *ended)]
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._send(Tokens(tuple(pieces), max(self._drawn_s, now)))
        for each, served in over:
            self._end(each, served)
        for served in [one for one in self._served.values() if one.failed]:
            scheduler.cancel(served.submit.id, now, "failed")
        self.stalled = work.idle and not work.ended

    def run(self, work: StepWork) -> Outcome:
        """Carry out a step, draw tokens, and note what is to be told."""
        if work.idle:
            return Outcome([])
        began = time.perf_counter()
        for fork in work.forks:
            self._choices[fork.seq] = self._served[fork.request].choices[fork.sample]
        ran = self.executor.run(work, self.scheduler.tokens)
        tokens: list[list[int]] = [[] for _ in work.rows]
        finished: dict[int, str] = {}
        wishes: list[Wish] = []
        takers: list[tuple[int, int, Choice]] = []
        for index, row in enumerate(work.rows):
            served = self._choices[row.seq].served
            if index in ran.failed:
                served.failed = f"The model could not run this request: {ran.failed[index]}"
                finished[row.seq] = "error"
                continue
            if (
                served.asked.prompt_logprobs is not None
                and row.first < len(served.submit.prompt)
                and ran.last[index] >= 0
            ):
                self._score_prompt(served, ran.begin[index], ran.logits_RV[ran.first[index] : ran.last[index] + 1])
            if not row.sample:
                continue
            if not served.asked.max_tokens:  # scoring alone
                finished[row.seq] = "scored"
                continue
            for place, seq in enumerate(row.sample):
                choice = served.choices[place] if len(row.sample) > 1 else self._choices[seq]
                self._choices[seq] = choice
                try:
                    allowed = None if choice.matcher is None else choice.matcher.allowed()
                except TrimtabError as error:
                    self._broke(choice, seq, error, finished)
                    continue
                wishes.append(Wish(ran.last[index], choice.chooser, allowed))
                takers.append((index, seq, choice))
        self._draw(ran.logits_RV, wishes, takers, tokens, finished)
        self._drawn_s = self._clock()
        for row, drawn in zip(work.rows, tokens, strict=True):
            if len(drawn) < len(row.sample) and len(row.sample) > 1:  # the first token of all its answers, or of none
                drawn.clear()
                finished |= {seq: finished.get(seq, "error") for seq in row.sample}
        seconds = time.perf_counter() - began
        if work.rows:
            self.steps += 1
            self.step_s += seconds
            self.predicted_s += self._cost(*work.load)
        return Outcome([tuple(drawn) for drawn in tokens], finished, seconds, self.executor.held_bytes)

    def _draw(
        self,
        logits_RV: NDArray[np.float32],
        wishes: list[Wish],
        takers: list[tuple[int, int, Choice]],
        tokens: list[list[int]],
        finished: dict[int, str],
    ) -> None:
        drawn = choose(logits_RV, wishes)
        scored = sorted({wish.row for wish, (_, _, choice) in zip(wishes, takers, strict=True) if choice.wants_scores})
        norms = dict(zip(scored, normalizers(logits_RV[scored]).tolist(), strict=True)) if scored else {}
        for wish, (index, seq, choice), token in zip(wishes, takers, drawn, strict=True):
            if isinstance(token, Nothing):
                self._say(choice, choice.end("stop"))
                finished[seq] = "stop"
                continue
            try:
                if isinstance(token, TrimtabError):
                    raise token
                row_V, entry = logits_RV[wish.row], None
                if choice.wants_scores:
                    top = likeliest(row_V, norms[wish.row], choice.served.asked.logprobs or 0)
                    entry = TokenLogprob(token, float(row_V[token]) - norms[wish.row], top)
                self._say(choice, choice.take(token, entry))
            except TrimtabError as error:
                self._broke(choice, seq, error, finished)
                continue
            self.generated += 1
            tokens[index].append(token)
            if choice.finish is not None:
                finished[seq] = choice.finish

    def _broke(self, choice: Choice, seq: int, error: Exception, finished: dict[int, str]) -> None:
        choice.served.failed = str(error)
        finished[seq] = "error"

    def _say(self, choice: Choice, piece: Piece) -> None:
        if choice.served.chooses:
            choice.pieces.append(piece)
        elif piece.ids or piece.text or piece.finish:
            self._pieces.append(piece)

    def _score_prompt(self, served: Served, begin: int, logits_TV: NDArray[np.float32]) -> None:
        prompt, count = served.submit.prompt, served.asked.prompt_logprobs or 0
        norms = normalizers(logits_TV)
        for place in range(len(logits_TV)):
            at = begin + place + 1
            if at < len(prompt):
                row_V, norm = logits_TV[place], float(norms[place])
                entry = TokenLogprob(prompt[at], float(row_V[prompt[at]]) - norm, likeliest(row_V, norm, count))
                served.prompt_logprobs[at] = entry

    # What the front is told.

    def _started(self, start: Start, now: float) -> None:
        served = self._served[start.request]
        self._choices[start.seq] = served.choices[start.sample]
        if served.queued_s is not None:
            return
        served.queued_s, served.cached_tokens = now - served.arrived_s, start.tokens
        left, reach = len(served.submit.prompt) - start.tokens, served.asked.max_tokens
        prompt = len(served.submit.prompt)
        first = served.queued_s + self._cost(left, left * (start.tokens + prompt) // 2, 0, 0)
        rows = self.scheduler.counters().running_sequences
        each = self._cost(0, 0, max(rows, 1), max(rows, 1) * (prompt + reach // 2))
        self._send(
            Admitted(
                id=start.request,
                queued_s=served.queued_s,
                cached_tokens=start.tokens,
                predicted_first_s=first,
                predicted_s=first + max(reach - 1, 0) * each,
            )
        )

    def _let_go(self, ended: Ended) -> Served | None:
        """Forget a request that has ended, and end its answers."""
        served = self._served.pop(ended.request, None)
        self.paused.discard(ended.request)
        if served is None or served.failed or ended.reason in ("queue_timeout", "aborted"):
            return served
        why = _ENDING.get(ended.reason, served.ending)
        for choice in served.choices:
            if choice.finish is None and served.asked.max_tokens:
                self._say(choice, choice.end(why))
        if served.chooses:
            self._pieces += served.best()
        return served

    def _end(self, ended: Ended, served: Served | None) -> None:
        if served is None:
            return
        name = ended.request
        if served.failed:
            self._send(Failed(name, served.failed))
            return
        if ended.reason in _GIVEN_BACK:
            status, message = _GIVEN_BACK[ended.reason]
            self._send(Refused(id=name, status=status, message=message, retry_after_s=self.scheduler.wait_s))
            return
        prompt = len(served.submit.prompt)
        entries = tuple(served.prompt_logprobs[at] for at in range(1, prompt) if at in served.prompt_logprobs)
        self._send(
            Finished(
                id=name,
                cached_tokens=served.cached_tokens,
                completion_tokens=served.completion_tokens,
                prompt_logprobs=entries,
                preemptions=served.preemptions,
                queued_s=served.queued_s or 0.0,
                at_s=self._clock(),
            )
        )
