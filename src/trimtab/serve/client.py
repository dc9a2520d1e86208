"""The front's side of the engine process: start it, watch it, start it again, route what it says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from trimtab.errors import TrimtabError
from trimtab.serve.channel import AsyncChannel, ChannelClosed
from trimtab.serve.config import ServeConfig
from trimtab.serve.errors import ApiError, unavailable
from trimtab.serve.launch import Launcher, Process
from trimtab.serve.messages import (
    PROTOCOL,
    Admitted,
    Cancel,
    CancelReason,
    Drain,
    Embed,
    Embedded,
    Failed,
    Finished,
    Load,
    Loaded,
    Message,
    ModelInfo,
    Ready,
    Refused,
    Stats,
    Stopped,
    Submit,
    ToFront,
    Tokens,
    Unload,
    Unloaded,
)
from trimtab.serve.stream import Stream

_log = logging.getLogger("trimtab.serve")
State = Literal["starting", "ready", "restarting", "draining", "stopped"]
#: Seconds before the first and before any later restart; each failure doubles it.
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0


class StartFailed(TrimtabError):
    """The engine could not load; `code` is the exit code that fits."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Engine:
    """An engine process that is kept alive.

    Attributes:
        state: ``ready`` is the only one that takes requests.
        ready: what the engine said when it had loaded.
        stats: the newest.
        restarts: since the start of the server.
        cancelled: requests cancelled, by reason.
        models: by id, also by the spelling they were asked for.
    """

    def __init__(self, launcher: Launcher, config: ServeConfig) -> None:
        self._launcher, self._config = launcher, config
        self.state: State = "starting"
        self.ready: Ready | None = None
        self.stats = Stats(at_s=0.0)
        self.before = Stats(at_s=0.0)  # counters of engines that are gone
        self.restarts = 0
        self.cancelled: dict[str, int] = {}
        self.models: dict[str, ModelInfo] = {}
        self._added: list[str] = []
        self._streams: dict[str, Stream] = {}
        self._waiting: dict[str, int] = {}
        self._admitted: deque[float] = deque(maxlen=32)
        self._answers: dict[str, asyncio.Future[Loaded | Unloaded]] = {}
        self._names = itertools.count()
        self._channel: AsyncChannel | None = None
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._failed: StartFailed | None = None
        self._stopped: Stopped | None = None
        self._changed = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Of the engine process, while there is one."""
        return self._process.pid if self._process else None

    @property
    def waiting(self) -> int:
        """Requests the engine has not yet begun."""
        return len(self._waiting)

    @property
    def open(self) -> int:
        """Requests the engine has not yet ended."""
        return len(self._streams)

    async def start(self) -> Ready:
        """Start the process and wait until it has loaded.

        Raises:
            StartFailed: it could not.
        """
        self._task = asyncio.create_task(self._supervise())
        while self.ready is None and self._failed is None:
            self._changed.clear()
            await self._changed.wait()
        if self._failed is not None:
            raise self._failed
        assert self.ready is not None
        return self.ready

    def check(self) -> None:
        """Refuse while no request can be taken.

        Raises:
            ApiError: 503 with Retry-After.
        """
        if self.state == "draining":
            raise unavailable(
                "The server is shutting down and takes no new requests.", self._config.grace_s + 1, "server_draining"
            )
        if self.state != "ready":
            raise unavailable("The engine is being started; try again in a moment.", 2.0)

    def submit(self, requests: Sequence[Submit | Embed]) -> Stream:
        """Send requests that belong together.

        Raises:
            ApiError: 503 while there is no engine, 429 where too much waits already.
        """
        self.check()
        config, tokens = self._config, sum(len(request.prompt) for request in requests)
        waiting_tokens = sum(self._waiting.values())
        if len(self._waiting) + len(requests) > config.max_queue and self._waiting:
            raise self._full(f"{len(self._waiting)} requests wait, of {config.max_queue} allowed")
        if waiting_tokens + tokens > config.max_queue_tokens and self._waiting:
            raise self._full(f"{waiting_tokens} prompt tokens wait, of {config.max_queue_tokens} allowed")
        stream = Stream(
            requests, self._tell, buffer=config.stream_buffer, max_queue_s=config.max_queue_s,
            request_s=config.request_s + 1.0,  # the engine keeps the deadline; this is for an engine that does not
        )  # fmt: skip
        for request in requests:
            self._streams[request.id] = stream
            self._waiting[request.id] = len(request.prompt)
            self._tell(request)
        return stream

    def close(self, stream: Stream, reason: CancelReason) -> None:
        """Forget a stream; what has not ended is cancelled."""
        stream.cancel(reason)
        for name in stream.ids:
            self._forget(name)

    async def change(self, kind: type[Load] | type[Unload], model: str) -> Loaded | Unloaded:
        """Load or unload a model id.

        Raises:
            ApiError: 503 while there is no engine, or what the engine answers.
        """
        self.check()
        name = f"{kind.__name__.lower()}-{next(self._names)}"
        self._answers[name] = future = asyncio.get_running_loop().create_future()
        self._tell(kind(name, model))
        try:
            return await asyncio.wait_for(future, self._config.start_s)
        except TimeoutError:
            raise unavailable(f"The engine did not answer within {self._config.start_s:g} s.") from None
        finally:
            self._answers.pop(name, None)

    async def drain(self, grace_s: float) -> None:
        """Let open requests finish, end the rest after `grace_s`, and wait until the process is gone."""
        if self.state in ("draining", "stopped"):
            return
        was_ready = self.state == "ready"
        self.state = "draining"
        try:
            async with asyncio.timeout(grace_s):
                while self._streams and was_ready:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._fail_all(
                unavailable("The server shut down before the answer was done.", code="server_shutting_down"), "shutdown"
            )
        self._tell(Drain(0.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0 if was_ready else 0.0):
                while self._channel is not None:
                    self._changed.clear()
                    await self._changed.wait()
        await self.stop()

    async def stop(self) -> None:
        """Kill the process, if it is still there, and end."""
        self.state = "stopped"
        self.kill()
        process = self._process
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if process is not None:
            await process.wait()
        self._fail_all(unavailable("The server has stopped.", code="server_shutting_down"))
        if self.ready is None and self._failed is None:
            self._failed = StartFailed("Stopped before the engine had loaded.", 0)
            self._changed.set()

    def kill(self) -> None:
        """Kill the process now."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _full(self, what: str) -> ApiError:
        times = self._admitted
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 1.0
        wait = min(max(len(self._waiting) / rate, 1.0), 3600.0)
        return ApiError(
            429, f"The queue is full: {what}. Try again in {wait:.0f} s.", code="queue_full", retry_after_s=wait
        )

    def _tell(self, message: Message) -> None:
        """Send; a channel that is gone is noticed by the task that receives."""
        if isinstance(message, Cancel):
            self.cancelled[message.reason] = self.cancelled.get(message.reason, 0) + 1
        if self._channel is not None:
            with contextlib.suppress(ChannelClosed):
                self._channel.send(message)

    def _forget(self, name: str) -> None:
        self._streams.pop(name, None)
        self._waiting.pop(name, None)
        self._changed.set()

    def _fail_all(self, error: ApiError, reason: CancelReason | None = None) -> None:
        for stream in set(self._streams.values()):
            stream.fail(error, reason)
        self._streams.clear()
        self._waiting.clear()
        for future in self._answers.values():
            if not future.done():
                future.set_exception(error)
        self._answers.clear()
        self._changed.set()

    async def _supervise(self) -> None:
        wait = _FIRST_WAIT
        while self.state != "stopped":
            began = time.monotonic()
            why = await self._session()
            self._fail_all(unavailable("The engine stopped while it worked on this; it is being started again."))
            if self.ready is None:
                code = self._stopped.code if self._stopped else 1
                self._failed = StartFailed(
                    self._stopped.reason if self._stopped else f"The engine ended: {why}", code or 1
                )
                self._changed.set()
                return
            if self.state in ("draining", "stopped"):
                return
            self.state = "restarting"
            self.restarts += 1
            wait = _FIRST_WAIT if time.monotonic() - began > 60 else min(2 * wait, _LONGEST_WAIT)
            _log.error("the engine ended (%s); starting it again in %.1f s", why, wait)
            await asyncio.sleep(wait)

    async def _session(self) -> str:
        """One life of an engine; returns why it ended."""
        self._stopped, loaded = None, False
        sock, self._process = await self._launcher.launch()
        channel = await AsyncChannel.open(sock, ToFront)
        why = ""
        try:
            start = self._config.start()
            channel.send(msgspec.structs.replace(start, models=(*start.models, *self._added)))
            self._channel = channel
            while True:
                limit = self._config.engine_s if loaded else self._config.start_s
                for message in await asyncio.wait_for(channel.receive(), limit):
                    loaded = loaded or isinstance(message, Ready)
                    self._handle(message)
        except ChannelClosed as error:
            why = str(error)
        except TimeoutError:
            why = "it said nothing for too long"
        finally:
            self._channel = None
            self.kill()
            await channel.close()
        code = await self._process.wait()
        self._process = None
        self._changed.set()
        return self._stopped.reason if self._stopped else f"{why} exit code {code}"

    def _handle(self, message: Message) -> None:
        now = time.monotonic()
        match message:
            case Tokens():
                for piece in message.pieces:
                    self._admit(piece.id, now)
                    if stream := self._streams.get(piece.id):
                        stream.push(piece, message.at_s)
            case Stats():
                self.stats = message
            case Ready():
                if message.protocol != PROTOCOL:
                    raise ChannelClosed(f"the engine speaks protocol {message.protocol}, this server {PROTOCOL}")
                self.before = _added(self.before, self.stats)
                self.stats = Stats(at_s=0.0)
                self.ready, self.models = message, {}
                for info in message.models:
                    self._know(info)
                self.state = "ready" if self.state in ("starting", "restarting") else self.state
                self._changed.set()
            case Admitted():
                self._admit(message.id, now)
                if stream := self._streams.get(message.id):
                    stream.push(message, now)
            case Loaded() | Unloaded():
                self._model_changed(message)
            case Refused() if message.id in self._answers:
                future = self._answers.pop(message.id)
                if not future.done():
                    future.set_exception(ApiError(message.status, message.message, param="model"))
            case Stopped():
                self._stopped = message
            case Finished() | Embedded() | Refused() | Failed():
                if stream := self._streams.get(message.id):
                    stream.push(message, now)
                self._forget(message.id)

    def _admit(self, name: str, now: float) -> None:
        if self._waiting.pop(name, None) is not None:
            self._admitted.append(now)

    def _know(self, info: ModelInfo) -> None:
        self.models[info.id] = info
        if info.asked:
            self.models[info.asked] = info

    def _model_changed(self, message: Loaded | Unloaded) -> None:
        if isinstance(message, Loaded):
            self._know(message.model)
            self._added.append(message.model.id)
        else:
            self.models = {name: info for name, info in self.models.items() if info.id != message.model}
            self._added = [name for name in self._added if name != message.model]
        if (future := self._answers.get(message.id)) and not future.done():
            future.set_result(message)


_COUNTERS = (
    "prefix_queries", "prefix_hits", "preemptions", "prompt_tokens", "generation_tokens", "cancelled", "steps", "step_s",
    "predicted_step_s", "energy_j", "busy_s", "pass_s", "native_s",
)  # fmt: skip


def _added(first: Stats, second: Stats) -> Stats:
    """Counters of both."""
    return Stats(at_s=second.at_s, **{name: getattr(first, name) + getattr(second, name) for name in _COUNTERS})
