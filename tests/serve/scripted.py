"""An engine without a model: it answers what the prompt tells it to, one byte a token.

A prompt may hold orders as JSON between ``[[`` and ``]]``:

    say       the answer (default "Hello, wörld!"); several answers as a list, one for each choice
    repeat    say it so many times
    delay     seconds between tokens
    queue     seconds before it is admitted
    stall     never send a token
    die       kill this process when the request comes
    refuse    [status, message, retry_after_s]
    fail      break with this message
    rude      ignore Pause
"""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import struct
import time
from pathlib import Path

from trimtab.runtime.engine.sampling import StopChecker
from trimtab.serve import messages as m
from trimtab.serve.channel import BlockingChannel, ChannelClosed

_ORDERS = re.compile(r"\[\[(\{.*?\})\]\]", re.DOTALL)
CONTEXT, VOCAB, WIDTH = 4096, 259, 8
END = 257


def orders_of(prompt: tuple[int, ...]) -> dict:
    text = bytes(token for token in prompt if token < 256).decode(errors="replace")
    found = _ORDERS.findall(text)
    return json.loads(found[-1]) if found else {}


class Choice:
    def __init__(self, request: m.Submit, index: int, orders: dict) -> None:
        said = orders.get("say", "Hello, wörld!")
        text = said[index % len(said)] if isinstance(said, list) else said
        self.rest = list((text * orders.get("repeat", 1)).encode())
        self.index, self.count, self.finish = index, 0, None
        self.stop = StopChecker(request.sampling.stop)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, request: m.Submit) -> m.Piece | None:
        drawn = request.sampling
        ids: tuple[int, ...] = ()
        text, finish, stopped_by = "", None, None
        if self.count >= drawn.max_tokens:
            finish = "length"
        elif not self.rest:
            ids, finish = (() if drawn.ignore_eos else (END,)), "stop"
        else:
            token = self.rest.pop(0)
            ids = (token,)
            text = self.stop.push(self.decoder.decode(bytes([token])))
            if self.stop.stopped is not None:
                finish, stopped_by = "stop", self.stop.stopped
        self.count += len(ids)
        if finish is None and self.count >= drawn.max_tokens:
            finish = "length"
        if finish is not None and stopped_by is None:
            text += self.stop.push(self.decoder.decode(b"", True)) + self.stop.finish()
        self.finish = finish
        logprobs = tuple(entry(token, drawn.logprobs) for token in ids) if drawn.logprobs is not None else ()
        return m.Piece(
            id=request.id,
            choice=self.index,
            ids=ids,
            text=text,
            logprobs=logprobs,
            finish=finish,
            stopped_by=stopped_by,
        )


def entry(token: int, top: int) -> m.TokenLogprob:
    return m.TokenLogprob(token, -0.5, tuple(((token + place) % 256, -0.5 - place) for place in range(top)))


class Job:
    def __init__(self, request: m.Submit) -> None:
        self.request, self.orders = request, orders_of(request.prompt)
        self.choices = [Choice(request, index, self.orders) for index in range(request.sampling.n)]
        self.admitted, self.paused = False, False
        self.arrived = time.monotonic()
        self.next_at = self.arrived + self.orders.get("queue", 0.0)


class Scripted:
    def __init__(self, channel: BlockingChannel) -> None:
        self.channel = channel
        self.jobs: dict[str, Job] = {}
        self.log = os.environ.get("SCRIPTED_LOG")
        self.models: list[str] = []
        self.stats_at = 0.0
        self.generated = 0

    def run(self) -> int:
        while True:
            now = time.monotonic()
            due = min(
                [job.next_at for job in self.jobs.values() if not job.paused and not job.orders.get("stall")]
                + [self.stats_at]
            )
            for message in self.channel.receive(max(due - now, 0.0)):
                self.note(message)
                if isinstance(message, m.Drain):
                    self.channel.send(m.Stopped("drained", 0))
                    self.channel.drain()
                    return 0
                self.take(message)
            self.tick(time.monotonic())

    def note(self, message: m.Message) -> None:
        if self.log:
            with Path(self.log).open("a") as out:
                fields = {
                    name: getattr(message, name) for name in message.__struct_fields__ if name not in ("prompt", "kind")
                }
                if isinstance(message, m.Submit):
                    fields["sampling"] = {
                        name: getattr(message.sampling, name) for name in message.sampling.__struct_fields__
                    }
                    fields["grammar"] = message.grammar and [message.grammar.kind, message.grammar.text]
                out.write(json.dumps({"kind": type(message).__name__, "at": time.monotonic(), **fields}) + "\n")

    def take(self, message: m.Message) -> None:
        send = self.channel.send
        if isinstance(message, m.Start):
            if message.models[0] == "broken":
                send(m.Stopped("This model is broken. Try another.", 2))
                self.channel.drain()
                raise SystemExit(2)
            time.sleep(float(os.environ.get("SCRIPTED_LOAD", "0")))
            self.models = list(message.models)
            memory = m.MemoryPlan(
                weight_bytes=1 << 20,
                kv_bytes=1 << 20,
                kv_bytes_per_token=64,
                kv_tokens=1 << 14,
                max_sequences=8,
                full_contexts=4.0,
            )
            send(m.Ready(models=tuple(map(self.info, self.models)), memory=memory, pid=os.getpid()))
        elif isinstance(message, m.Submit | m.Embed):
            self.submit(message)
        elif isinstance(message, m.Cancel):
            if job := self.jobs.pop(message.id, None):
                finished = sum(choice.count for choice in job.choices)
                pieces = tuple(
                    m.Piece(id=message.id, choice=c.index, finish="cancelled") for c in job.choices if c.finish is None
                )
                send(m.Tokens(pieces, time.monotonic()))
                send(m.Finished(id=message.id, completion_tokens=finished, at_s=time.monotonic()))
        elif isinstance(message, m.Pause | m.Resume):
            if (job := self.jobs.get(message.id)) and not job.orders.get("rude"):
                job.paused = isinstance(message, m.Pause)
        elif isinstance(message, m.Load):
            if "nothing" in message.model:
                send(m.Refused(id=message.id, status=404, message="There is no such model."))
            else:
                self.models.append(message.model)
                send(m.Loaded(message.id, self.info(message.model)))
        elif isinstance(message, m.Unload):
            self.models.remove(message.model)
            send(m.Unloaded(message.id, message.model))

    def info(self, name: str) -> m.ModelInfo:
        base, _, techniques = name.partition("@")
        return m.ModelInfo(
            id=name, base=base, techniques=tuple(filter(None, techniques.split("+"))), context=CONTEXT, vocab_size=VOCAB, hidden_size=WIDTH,
            spec_hash="0123456789abcdef",
        )  # fmt: skip

    def submit(self, request: m.Submit | m.Embed) -> None:
        orders, send = orders_of(request.prompt), self.channel.send
        if orders.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif refused := orders.get("refuse"):
            send(m.Refused(id=request.id, status=refused[0], message=refused[1], retry_after_s=refused[2]))
        elif failed := orders.get("fail"):
            send(m.Failed(request.id, failed))
        elif isinstance(request, m.Embed):
            numbers = [float(len(request.prompt)), *[0.0] * (WIDTH - 2), 1.0]
            length = sum(x * x for x in numbers) ** 0.5
            send(
                m.Embedded(
                    id=request.id,
                    vector=struct.pack(f"<{WIDTH}f", *(x / length for x in numbers)),
                    at_s=time.monotonic(),
                )
            )
        else:
            self.jobs[request.id] = Job(request)

    def tick(self, now: float) -> None:
        pieces: list[m.Piece] = []
        ended: list[Job] = []
        for job in self.jobs.values():
            if job.next_at > now or job.paused or (job.admitted and job.orders.get("stall")):
                continue
            if not job.admitted:
                job.admitted = True
                self.channel.send(
                    m.Admitted(
                        id=job.request.id,
                        queued_s=now - job.arrived,
                        cached_tokens=3,
                        predicted_first_s=0.01,
                        predicted_s=0.1,
                    )
                )
                if job.orders.get("stall"):
                    continue
            many = 1 if job.orders.get("delay") else 64  # without a delay, several tokens a step
            late = job.request.deadline_s and now - job.arrived > job.request.deadline_s
            if late:
                for choice in job.choices:
                    choice.finish = "deadline"
                    pieces.append(m.Piece(id=job.request.id, choice=choice.index, finish="deadline"))
            for _ in range(many):
                pieces += [choice.step(job.request) for choice in job.choices if choice.finish is None]
            job.next_at = now + job.orders.get("delay", 0.0)
            if all(choice.finish for choice in job.choices):
                ended.append(job)
        if pieces:
            self.generated += sum(len(piece.ids) for piece in pieces)
            self.channel.send(m.Tokens(tuple(pieces), time.monotonic()))
        for job in ended:
            del self.jobs[job.request.id]
            drawn = job.request.sampling
            prompt = (
                tuple(entry(token, drawn.prompt_logprobs) for token in job.request.prompt[1:])
                if drawn.prompt_logprobs is not None
                else ()
            )
            count = sum(choice.count for choice in job.choices) * drawn.best_of // drawn.n
            self.channel.send(
                m.Finished(
                    id=job.request.id,
                    cached_tokens=3,
                    completion_tokens=count,
                    prompt_logprobs=prompt,
                    at_s=time.monotonic(),
                )
            )
        if now >= self.stats_at:
            self.stats_at = now + 0.2
            self.channel.send(
                m.Stats(
                    at_s=now,
                    running=len(self.jobs),
                    kv_used_bytes=len(self.jobs),
                    kv_bytes=100,
                    generation_tokens=self.generated,
                )
            )


def main(channel: BlockingChannel) -> int:
    try:
        return Scripted(channel).run()
    except ChannelClosed:
        return 0
