"""The loop between the front's messages and the models' steps. One thread; it sleeps on the socket while nothing runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import msgspec

from trimtab.errors import CapacityError, TrimtabError
from trimtab.runtime.engine.generate import Runner
from trimtab.serve.channel import BlockingChannel
from trimtab.serve.engine.cost import StepCost, calibrate
from trimtab.serve.engine.embed import Embedder
from trimtab.serve.engine.lane import Lane
from trimtab.serve.engine.memory import available_bytes, plan_memory
from trimtab.serve.engine.models import Models, Served, hidden_runner
from trimtab.serve.messages import (
    Cancel,
    Drain,
    Embed,
    Load,
    Loaded,
    Message,
    Pause,
    Ready,
    Refused,
    Resume,
    Start,
    Stats,
    Stopped,
    Submit,
    Unload,
    Unloaded,
)
from trimtab.units import format_bytes

#: Seconds between two Stats, and between two looks at requests that are held back.
_STATS_S, _HELD_S = 1.0, 0.1


class Loop:
    """An engine on one connection.

    Args:
        channel: to the front.
        start: settings.
        make: builds a lane of (model, start, kv_bytes, cost, send); tests look inside one.

    Attributes:
        lanes: by model id.
    """

    def __init__(self, channel: BlockingChannel, start: Start, make: Callable[..., Lane] = Lane) -> None:
        self._channel, self._start, self._make = channel, start, make
        self._models = Models(start)
        self.lanes: dict[str, Lane] = {}
        self._asked: dict[str, str] = {}  # another spelling -> id
        self._embedders: dict[str, Embedder] = {}
        self._unloading: dict[str, str] = {}  # id -> name of the Unload
        self._until: float | None = None  # end of the grace while draining
        self._gone = Stats(at_s=0.0)  # counters of lanes that were unloaded
        self._last_stats = 0.0
        self._last_made = 0
        self._turn = 0
        self._busy_s = 0.0

    def load(self) -> Ready:
        """Load the first models, time them, divide the memory.

        Raises:
            TrimtabError: one cannot be loaded, or nothing fits.
        """
        began = time.monotonic()
        served = [self._models.load(asked) for asked in self._start.models]
        memory = plan_memory(self._start, served, available_bytes())
        self._share = memory.kv_bytes // len(served)
        for one in served:
            self._add(one, calibrate(one.runner))
        return Ready(
            models=tuple(one.info for one in served), memory=memory, pid=os.getpid(), load_s=time.monotonic() - began,
            deterministic=self._start.deterministic,
        )  # fmt: skip

    def run(self) -> int:
        """Serve until drained; return the exit code.

        Raises:
            ChannelClosed: the front is gone.
        """
        while True:
            began = time.monotonic()
            busy = any(lane.ready for lane in self.lanes.values()) or any(map(len, self._embedders.values()))
            messages = self._channel.receive(0.0 if busy else self._sleep())
            if not busy:
                began = time.monotonic()
            for message in messages:
                self.handle(message)
            now = time.monotonic()
            if self._next_turn(now):
                self._busy_s += time.monotonic() - began
            self._finish_unloads()
            if now - self._last_stats >= _STATS_S:
                self.send(self.stats(now))
            if self._until is not None and self._drained(now):
                self.send(self.stats(time.monotonic()))
                self.send(Stopped("drained", 0))
                self._channel.drain()
                return 0

    def send(self, message: Message) -> None:
        """To the front."""
        self._channel.send(message)

    def handle(self, message: Message) -> None:
        """Do what one message asks."""
        match message:
            case Submit():
                self._submit(message)
            case Embed():
                self._embed(message)
            case Cancel(id=name, reason=reason):
                for lane in self.lanes.values():
                    lane.cancel(name, "deadline" if reason == "deadline" else "cancelled")
                for embedder in self._embedders.values():
                    embedder.cancel(name)
            case Pause(id=name) | Resume(id=name):
                for lane in self.lanes.values():
                    lane.pause(name, isinstance(message, Pause))
            case Load():
                self._load(message)
            case Unload():
                self._unload(message)
            case Drain(grace_s=grace):
                self._until = time.monotonic() + grace
                for lane in self.lanes.values():
                    lane.drain()
            case _:
                pass  # a second Start

    # Requests.

    def _lane(self, message: Submit | Embed) -> Lane | None:
        lane = self.lanes.get(self._asked.get(message.model, message.model))
        if self._until is not None:
            self.send(Refused(id=message.id, status=503, message="The engine ends and takes no new requests."))
        elif lane is None or lane.model.info.id in self._unloading:
            known = ", ".join(self.lanes)
            said = f"There is no model '{message.model}' here. Known: {known}."
            self.send(Refused(id=message.id, status=404, message=said, param="model"))
        else:
            return lane
        return None

    def _submit(self, message: Submit) -> None:
        if (lane := self._lane(message)) is not None:
            lane.submit(message)

    def _embed(self, message: Embed) -> None:
        lane = self._lane(message)
        if lane is None:
            return
        name = lane.model.info.id
        if name not in self._embedders:
            start = self._start

            def build() -> Runner:
                return hidden_runner(lane.model, start.kv_dtype, start.threads)

            self._embedders[name] = Embedder(build, self.send, start.max_queue)
        self._embedders[name].submit(message, time.monotonic())

    # Steps.

    def _sleep(self) -> float:
        """Seconds until something is due though no message comes."""
        now = time.monotonic()
        due = self._last_stats + _STATS_S - now
        if any(lane.scheduler.busy for lane in self.lanes.values()):
            due = min(due, _HELD_S)
        if self._until is not None:
            due = min(due, self._until - now)
        return max(due, 0.0)

    def _next_turn(self, now: float) -> bool:
        """One step of the lane in line, and one pass of each embedder; lanes that hold requests back are looked at, too.

        Returns:
            Whether anything ran.
        """
        ran = False
        lanes = [lane for lane in self.lanes.values() if lane.scheduler.busy]
        for _ in range(len(lanes)):
            self._turn += 1
            lane = lanes[self._turn % len(lanes)]
            held = lane.stalled
            lane.turn()
            if not held:
                ran = True
                break
        for embedder in self._embedders.values():
            if len(embedder):
                embedder.turn(now)
                ran = True
        return ran

    def _drained(self, now: float) -> bool:
        busy = any(lane.scheduler.busy for lane in self.lanes.values()) or any(map(len, self._embedders.values()))
        if busy and self._until is not None and now >= self._until:
            for lane in self.lanes.values():
                lane.cancel_all()
            for embedder in self._embedders.values():
                embedder.cancel_all()
        return not busy

    # Models come and go.

    def _add(self, served: Served, cost: StepCost) -> None:
        info = served.info
        self.lanes[info.id] = self._make(served, self._start, self._share, cost, self.send)
        if info.asked:
            self._asked[info.asked] = info.id

    def _load(self, message: Load) -> None:
        if self._asked.get(message.model, message.model) in self.lanes:
            info = self.lanes[self._asked.get(message.model, message.model)].model.info
            self.send(Loaded(message.id, info))
            return
        try:
            served = self._models.load(message.model)
            if served.info.id in self.lanes:  # another spelling of it
                self._asked[message.model] = served.info.id
                self.send(Loaded(message.id, served.info))
                return
            if not self._start.kv_bytes and (free := available_bytes()) < self._share // 8:
                raise CapacityError(f"{format_bytes(free)} are free, too little for another cache. Unload an id first.")
            self._add(served, calibrate(served.runner))
        except TrimtabError as error:
            status = 503 if isinstance(error, CapacityError) else 400
            self.send(Refused(id=message.id, status=status, message=str(error), param="model"))
            return
        if self._until is not None:
            self.lanes[served.info.id].drain()
        self.send(Loaded(message.id, served.info))

    def _unload(self, message: Unload) -> None:
        name = self._asked.get(message.model, message.model)
        if name not in self.lanes:
            said = f"There is no model '{message.model}' here. Known: {', '.join(self.lanes)}."
            self.send(Refused(id=message.id, status=404, message=said, param="model"))
        elif len(self.lanes) - len(self._unloading) < 2:
            said = f"{name} is the last model; a server without one answers nothing. Load another first."
            self.send(Refused(id=message.id, status=400, message=said, param="model"))
        elif name in self._unloading:
            self.send(Refused(id=message.id, status=400, message=f"{name} is being unloaded already.", param="model"))
        else:
            self._unloading[name] = message.id

    def _finish_unloads(self) -> None:
        for name, answer in list(self._unloading.items()):
            lane = self.lanes[name]
            if not lane.empty or len(self._embedders.get(name, ())):
                continue
            self._gone = added(self._gone, lane)
            del self.lanes[name], self._unloading[name]
            self._embedders.pop(name, None)
            lane.close()
            self._models.forget(lane.model, [other.model for other in self.lanes.values()])
            self._asked = {asked: known for asked, known in self._asked.items() if known != name}
            self.send(Unloaded(answer, name))

    # Metrics.

    def stats(self, now: float) -> Stats:
        """State and counters of all lanes."""
        total = Stats(at_s=now, **{name: getattr(self._gone, name) for name in _COUNTERS})
        for lane in self.lanes.values():
            total = added(total, lane, gauges=True)
        spent = now - self._last_stats
        rate = max(total.generation_tokens - self._last_made, 0) / spent if self._last_stats and spent > 0 else 0.0
        self._last_stats, self._last_made = now, total.generation_tokens
        return changed(total, at_s=now, tokens_per_s=rate, busy_s=self._busy_s)


_COUNTERS = (
    "prefix_queries", "prefix_hits", "preemptions", "prompt_tokens", "generation_tokens", "cancelled", "steps", "step_s",
    "predicted_step_s", "pass_s", "native_s",
)  # fmt: skip


def changed(stats: Stats, **values: float) -> Stats:
    """A copy with other values."""
    return msgspec.structs.replace(stats, **values)


def added(stats: Stats, lane: Lane, gauges: bool = False) -> Stats:
    """Stats and those of one lane together; `gauges`: what is true now, too."""
    c = lane.scheduler.counters()
    sums = {
        "prefix_queries": c.prefix_query_tokens, "prefix_hits": c.prefix_hit_tokens, "preemptions": c.preemptions,
        "prompt_tokens": c.prefill_tokens, "generation_tokens": lane.generated, "cancelled": lane.cancelled,
        "steps": lane.steps, "step_s": lane.step_s, "predicted_step_s": lane.predicted_s,
        "pass_s": lane.executor.pass_s, "native_s": lane.native_s,
    }  # fmt: skip
    if gauges:
        sums |= {
            "running": c.running, "waiting": c.waiting, "waiting_tokens": c.waiting_tokens, "paused": len(lane.paused),
            "kv_used_bytes": c.kv_bytes, "kv_bytes": c.kv_capacity_bytes,
        }  # fmt: skip
    return changed(stats, **{name: getattr(stats, name) + value for name, value in sums.items()})
