"""What the engine says about one HTTP request, on its way to a reader that may be slow."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from trimtab.serve.errors import ApiError
from trimtab.serve.messages import (
    Admitted,
    Cancel,
    CancelReason,
    Embed,
    Embedded,
    Failed,
    Finished,
    Message,
    Pause,
    Piece,
    Refused,
    Resume,
    Submit,
)

Event = Admitted | Piece | Finished | Embedded | Refused | Failed
#: Bytes an event counts for beside its text: the Python objects around it.
_OVERHEAD = 200


class Stream:
    """Events of the engine requests that belong to one HTTP request, in order.

    The buffer is bounded: from half of `buffer` bytes on the engine is told to pause these requests, and to go on when an
    eighth is left. An engine that sends on regardless past twice `buffer` loses the stream.

    Args:
        requests: what was submitted; event indices are places in it.
        send: to the engine; must not raise.
        buffer: bytes.
        max_queue_s: longest wait for the first sign that a request left the queue.
        request_s: longest time for everything.
    """

    def __init__(
        self,
        requests: Sequence[Submit | Embed],
        send: Callable[[Message], None],
        *,
        buffer: int,
        max_queue_s: float,
        request_s: float,
    ) -> None:
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._open = dict.fromkeys(self._places)
        self._queued = dict.fromkeys(self._places)
        self._send, self._buffer = send, buffer
        self._events: deque[tuple[int, Event, float, int]] = deque()
        self._size, self._paused = 0, False
        self._wake = asyncio.Event()
        self._failure: ApiError | None = None
        started = time.monotonic()
        self._admit_by, self._end_by = started + max_queue_s, started + request_s
        self._max_queue_s, self._request_s = max_queue_s, request_s

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the engine's requests."""
        return tuple(self._places)

    @property
    def size(self) -> int:
        """Bytes waiting for the reader."""
        return self._size

    def push(self, event: Event, at_s: float) -> None:
        """Take an event from the engine."""
        if event.id not in self._open or self._failure is not None:
            return
        self._queued.pop(event.id, None)
        if isinstance(event, Finished | Embedded | Refused | Failed):
            del self._open[event.id]
        size = _OVERHEAD + (len(event.text) + 32 * len(event.ids) if isinstance(event, Piece) else 0)
        self._events.append((self._places[event.id], event, at_s, size))
        self._size += size
        if self._size > 2 * self._buffer:
            self.fail(
                ApiError(499, "The reader took nothing for too long, so its stream was dropped.", code="slow_reader"),
                "slow_reader",
            )
        elif self._size > self._buffer // 2 and not self._paused:
            self._paused = True
            self._tell(Pause)
        self._wake.set()

    def fail(self, error: ApiError, reason: CancelReason | None = None) -> None:
        """End with an error now; what waits is dropped. `reason` also cancels in the engine."""
        if self._failure is None:
            self._failure = error
            self._events.clear()
            self._size = 0
            if reason is not None:
                self.cancel(reason)
            self._wake.set()

    def cancel(self, reason: CancelReason) -> None:
        """Tell the engine to end what is still open; later events are ignored."""
        for name in self._open:
            self._send(Cancel(name, reason))
        self._open.clear()

    async def events(self) -> AsyncGenerator[tuple[int, Event, float], None]:
        """Yield (place, event, engine time) until every request has ended.

        Raises:
            ApiError: a request was refused or failed, waited too long, or the engine went.
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None  # one for many waits: a stream waits once for every token
        due = 0.0
        try:
            while True:
                while self._events:
                    yield self._next()
                if self._failure is not None:
                    raise self._failure
                if not self._open:
                    return
                self._wake.clear()
                by = min(self._admit_by, self._end_by) if self._queued else self._end_by
                if timer is None or due <= time.monotonic() or by < due:
                    if timer is not None:
                        timer.cancel()
                    due = by
                    timer = loop.call_later(max(by - time.monotonic(), 0.0), self._wake.set)
                await self._wake.wait()
                if not self._events and self._failure is None and time.monotonic() >= by:
                    self._late()
        finally:
            if timer is not None:
                timer.cancel()

    def _next(self) -> tuple[int, Event, float]:
        place, event, at_s, size = self._events.popleft()
        self._size -= size
        if self._paused and self._size <= self._buffer // 8:
            self._paused = False
            self._tell(Resume)
        if isinstance(event, Refused):
            self.cancel("request")
            raise _refusal(event)
        if isinstance(event, Failed):
            self.cancel("request")
            raise ApiError(500, event.message, code="engine_error")
        return place, event, at_s

    def _late(self) -> None:
        now = time.monotonic()
        if now >= self._end_by:
            self.cancel("deadline")
            raise deadline_error(self._request_s)
        if self._queued and now >= self._admit_by:
            self.cancel("deadline")
            raise ApiError(
                429, f"The request waited {self._max_queue_s:g} s and the queue is still full. Try again later.",
                code="queue_timeout", retry_after_s=self._max_queue_s,
            )  # fmt: skip

    def _tell(self, kind: type[Pause] | type[Resume]) -> None:
        for name in self._open:
            self._send(kind(name))


def deadline_error(seconds: float) -> ApiError:
    """The answer to a request that took longer than it may."""
    return ApiError(
        504, f"The request was not done after {seconds:g} s, the longest time allowed. Ask for fewer tokens.",
        code="deadline_exceeded", retry=False,
    )  # fmt: skip


def _refusal(refused: Refused) -> ApiError:
    wait = refused.retry_after_s
    if wait is None and refused.status in (429, 503):
        wait = 1.0
    codes = {429: "queue_full", 503: "engine_unavailable", 404: "model_not_found", 413: "request_too_large"}
    return ApiError(
        refused.status, refused.message, param=refused.param, code=codes.get(refused.status), retry_after_s=wait
    )
