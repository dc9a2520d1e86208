"""Vectors of texts: the last norm's outputs, pooled, at unit length."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from trimtab.errors import TrimtabError
from trimtab.runtime.cache.store import Seq
from trimtab.runtime.engine.executor import FAULTS
from trimtab.runtime.engine.generate import Runner
from trimtab.runtime.step import Step
from trimtab.serve.messages import Embed, Embedded, Failed, Finished, Message, Refused

#: Tokens of one pass, so that answers do not wait for long.
CHUNK = 256


class _Job:
    def __init__(self, request: Embed, now: float) -> None:
        self.request, self.done = request, 0
        self.until = now + request.deadline_s if request.deadline_s else float("inf")
        self.seq: Seq | None = None
        self.total = np.zeros(0, np.float64)


class Embedder:
    """Makes vectors one text after the other, one pass a turn.

    Args:
        build: makes the runner whose logits are hidden states, when the first request comes.
        send: takes what goes to the front.
        most: texts that may wait.
    """

    def __init__(self, build: Callable[[], Runner], send: Callable[[Message], None], most: int) -> None:
        self._build, self._send, self._most = build, send, most
        self._runner: Runner | None = None
        self._jobs: deque[_Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def submit(self, request: Embed, now: float) -> None:
        """Take a request; it is answered later, or refused now."""
        try:
            if self._runner is None:
                self._runner = self._build()
                self._store = self._runner.open_store()
        except TrimtabError as error:
            self._send(Refused(id=request.id, status=400, message=str(error), param="model"))
            return
        context = self._runner.spec.max_position_embeddings
        if not 0 < len(request.prompt) <= context:
            self._send(
                Refused(
                    id=request.id,
                    status=400,
                    param="input",
                    message=f"The text has {len(request.prompt)} tokens. Allowed: 1..{context}. Shorten it.",
                )
            )
        elif len(self._jobs) >= self._most:
            self._send(
                Refused(
                    id=request.id,
                    status=429,
                    message=f"{len(self._jobs)} texts wait already, the most allowed.",
                    retry_after_s=1.0,
                )
            )
        else:
            self._jobs.append(_Job(request, now))

    def cancel(self, name: str) -> bool:
        """End a request; False = there is none of this id."""
        for job in self._jobs:
            if job.request.id == name:
                self._drop(job)
                self._send(Finished(id=name, at_s=time.monotonic()))
                return True
        return False

    def cancel_all(self) -> None:
        """End all."""
        for job in list(self._jobs):
            self.cancel(job.request.id)

    def turn(self, now: float) -> None:
        """Run one pass of the text in line."""
        job = self._jobs[0]
        if now >= job.until:
            self._drop(job)
            self._send(Refused(id=job.request.id, status=503, message="The text was not embedded before its deadline."))
            return
        try:
            self._pass(job)
        except FAULTS as error:
            self._drop(job)
            self._send(Failed(job.request.id, f"The text could not be embedded: {error}"))

    def _pass(self, job: _Job) -> None:
        assert self._runner is not None
        prompt, mean = job.request.prompt, job.request.pooling == "mean"
        if job.seq is None:
            job.seq = self._store.open()
            job.total = np.zeros(self._runner.spec.vocab_size)
        count = min(CHUNK, len(prompt) - job.done)
        last = job.done + count == len(prompt)
        step = Step.of([count], [job.done], [job.seq], None, [len(prompt)], [last])
        wanted = np.arange(0 if mean else count - 1, count, dtype=np.int64)
        ids = np.array(prompt[job.done : job.done + count], np.int64)
        hidden_TD = self._runner.forward(ids, step, self._store, wanted)
        job.done += count
        if mean or last:
            job.total += hidden_TD.sum(axis=0, dtype=np.float64)
        if not last:
            return
        length = float(np.linalg.norm(job.total))
        if not np.isfinite(length) or length == 0:
            raise TrimtabError("the vector has no length. The model's numbers broke on it.")
        self._drop(job)
        vector = (job.total / length).astype("<f4").tobytes()
        self._send(Embedded(id=job.request.id, vector=vector, at_s=time.monotonic()))

    def _drop(self, job: _Job) -> None:
        self._jobs.remove(job)
        if job.seq is not None:
            self._store.free(job.seq)
