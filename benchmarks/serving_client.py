"""What benchmarks/serving.py stands on: servers as processes, a plain HTTP client of streams, open-loop loads.

Arrivals are drawn before a run begins and kept whatever the server does (open loop); times count from the moment a request was due,
so a client that falls behind hides nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: Seconds in which a request of a benchmark has to be answered; beyond, it counts as hanging.
HANG_S = 180.0


@dataclass(slots=True)
class Job:
    """A request to send `at_s` after the start of a run."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """What came of a request; seconds since it was due.

    Attributes:
        status: of HTTP; 0 = the connection broke or nothing came in time.
        times_s: of every piece of text.
        tokens: new ones, as the server counts them.
        done: the stream came to its end.
    """

    status: int = 0
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    done: bool = False
    retry_after: str = ""
    error: str = ""
    started: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] if self.times_s else float("inf")

    @property
    def tpot_s(self) -> float:
        """Seconds between tokens, mean; 0 with fewer than two."""
        return (self.times_s[-1] - self.times_s[0]) / (self.tokens - 1) if self.tokens > 1 and self.times_s else 0.0


async def _chunks(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while True:
        if not chunked:
            if not (data := await reader.read(1 << 16)):
                return
        else:
            line = await reader.readline()
            if not line:
                raise ConnectionError("the stream broke off")
            if not (size := int(line.split(b";")[0], 16)):
                return
            data = await reader.readexactly(size)
            await reader.readexactly(2)
        yield data


async def head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    line = await reader.readline()
    if not line:
        raise ConnectionError("no answer")
    headers = {}
    while (more := (await reader.readline()).decode("latin-1").strip()) != "":
        name, _, value = more.partition(":")
        headers[name.lower()] = value.strip()
    return int(line.split()[1]), headers


def request_bytes(path: str, body: dict[str, Any] | None = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    start = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    return f"{start}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def completion(job: Job, model: str) -> dict[str, Any]:
    """A streamed completion of exactly `max_tokens` tokens, in words that both servers know."""
    return {
        "model": model, "prompt": job.prompt, "max_tokens": job.max_tokens, "stream": True, "temperature": 0, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    } | job.options  # fmt: skip


async def ask(port: int, job: Job, model: str, due: float, told: Callable[[Answer], None] | None = None) -> Answer:
    """Send a request and read its stream; `told` hears of every piece of text."""
    answer = Answer(started=due)
    writer = None
    try:
        async with asyncio.timeout(HANG_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
            writer.write(request_bytes("/v1/completions", completion(job, model)))
            answer.status, headers = await head(reader)
            answer.retry_after = headers.get("retry-after", "")
            text = b""
            async for data in _chunks(reader, headers.get("transfer-encoding") == "chunked"):
                now = time.monotonic() - due
                text += data
                *events, text = text.split(b"\n\n")
                for event in events:
                    if not event.startswith(b"data: "):
                        continue
                    if event[6:].strip() == b"[DONE]":
                        answer.done = True
                        continue
                    value = json.loads(event[6:])
                    if value.get("error"):
                        answer.error = str(value["error"])[:200]
                    if usage := value.get("usage"):
                        answer.tokens = usage["completion_tokens"]
                    if any(choice.get("text") for choice in value.get("choices", ())):
                        answer.times_s.append(now)
                        if told is not None:
                            told(answer)
            if answer.status != 200:
                answer.error, answer.done = text.decode(errors="replace")[:200], True
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:  # TimeoutError is an OSError
        answer.error = answer.error or f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    return answer


async def play(port: int, jobs: Sequence[Job], model: str) -> list[Answer]:
    """Send every job when it is due, however many are open."""
    begin = time.monotonic() + 0.1

    async def one(job: Job) -> Answer:
        due = begin + job.at_s
        await asyncio.sleep(due - time.monotonic())
        return await ask(port, job, model, due)

    return list(await asyncio.gather(*map(one, jobs)))


def swallow(port: int, jobs: Sequence[Job], model: str, pause_s: float = 0.05) -> list[bytes]:
    """Send all jobs at once and take the streams in gulps, so that the client hardly uses the processor; returns what came."""
    found = []
    for job in jobs:
        sock = socket.create_connection(("127.0.0.1", port), HANG_S)
        sock.sendall(request_bytes("/v1/completions", completion(job, model)))
        sock.setblocking(False)
        found.append((sock, bytearray()))
    waiting, end = list(found), time.monotonic() + HANG_S
    while waiting:
        if time.monotonic() > end:
            raise SystemExit(f"{len(waiting)} streams did not end within {HANG_S:g} s.")
        time.sleep(pause_s)
        for pair in list(waiting):
            sock, data = pair
            try:
                while piece := sock.recv(1 << 16):
                    data += piece
                waiting.remove(pair)
                sock.close()
            except BlockingIOError:
                continue
    texts = [bytes(data) for _, data in found]
    for text in texts:
        if b"[DONE]" not in text:
            raise SystemExit(f"A stream broke: {text[-300:]!r}")
    return texts


async def fetch(port: int, path: str) -> str:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path))
        _, headers = await head(reader)
        return b"".join(
            [data async for data in _chunks(reader, headers.get("transfer-encoding") == "chunked")]
        ).decode()
    finally:
        writer.close()


async def samples(port: int) -> dict[str, float]:
    """Values of /metrics, labels in their names; and, without labels, their sums."""
    found: dict[str, float] = {}
    for line in (await fetch(port, "/metrics")).splitlines():
        if match := re.fullmatch(r"([^\s#{]+)(\{.*\})? (\S+)", line):
            name, labels, value = match.groups()
            found[name] = found.get(name, 0.0) + float(value)
            if labels:
                found[name + labels] = float(value)
    return found


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    """By how much a counter has grown."""
    return after.get(name, 0.0) - before.get(name, 0.0)


def histogram_quantile(before: dict[str, float], after: dict[str, float], name: str, share: float) -> tuple[float, int]:
    """(upper bound of the bucket that holds the quantile, observations) of what came between."""
    buckets = []
    for key in after:
        if key.startswith(name + "_bucket{") and (match := re.search(r'le="([^"]+)"', key)):
            buckets.append((float(match.group(1)), grown(before, after, key)))
    merged: dict[float, float] = {}
    for edge, count in buckets:
        merged[edge] = merged.get(edge, 0.0) + count
    total = merged.get(float("inf"), 0.0)
    return min((edge for edge, count in merged.items() if count >= share * total), default=float("nan")), int(total)


class Texts:
    """Prompts of real text, every one another piece of it."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        from trimtab.runtime.text.builtin import builtin_text

        self._ids = tokenizer.encode(builtin_text())
        self._draw = random.Random(seed)

    def prompt(self, tokens: int) -> list[int]:
        """So many tokens; a first one at random, so that no prefix is shared by chance."""
        start = self._draw.randrange(len(self._ids) - tokens)
        return [self._draw.randrange(300, 40000), *self._ids[start : start + tokens - 1]]


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals."""
    draw, at, times = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        times.append(at)
    return times


def mixed_jobs(texts: Texts, times: Sequence[float], seed: int, longest: int = 1024) -> list[Job]:
    """Chat-like sizes: prompts of 160 tokens and answers of 64 in the median, log-normal."""
    draw = np.random.default_rng(seed)
    prompts = np.clip(draw.lognormal(np.log(160), 0.9, len(times)), 8, longest).astype(int)
    answers = np.clip(draw.lognormal(np.log(64), 0.6, len(times)), 8, 256).astype(int)
    return [Job(at, texts.prompt(int(p)), int(a)) for at, p, a in zip(times, prompts, answers, strict=True)]


class Server:
    """A server process on a port of its own; use as a context."""

    def __init__(self, command: Sequence[str], port_of: Callable[[str], int | None], name: str) -> None:
        self.name, self.command = name, list(command)
        self.log: list[str] = []
        self.port = 0
        self._found = threading.Event()
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, args=(port_of,), daemon=True)
        self._reader.start()
        if not self._found.wait(180) or not self.port:
            self.stop()
            raise SystemExit(f"{name} did not start:\n" + "\n".join(self.log[-20:]))

    def _read(self, port_of: Callable[[str], int | None]) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if len(self.log) < 5000:
                self.log.append(line.rstrip())
            if not self.port and (port := port_of(line)):
                self.port = port
                self._found.set()
        self._found.set()

    def stop(self) -> int:
        """End it and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        code = self.process.wait(10)
        self._reader.join(10)
        if self.process.stderr is not None and not self._reader.is_alive():
            self.process.stderr.close()
        return code

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def trimtab_server(model: str, flags: Sequence[str]) -> Server:
    """`trimtab serve` of this installation."""

    def port(line: str) -> int | None:
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1", line)
        return int(found.group(1)) if found else None

    return Server([sys.executable, "-m", "trimtab.cli.main", "serve", model, "--port", "0", *flags], port, "trimtab")


def llama_server(binary: str, path: str, flags: Sequence[str]) -> Server:
    """llama.cpp's server; ready when it says that it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    ready = re.compile(r"server is listening|llama_server: listening on|all slots are idle")
    command = [binary, "-m", path, "--host", "127.0.0.1", "--port", str(number), "--no-webui", *flags]
    return Server(command, lambda line: number if ready.search(line) else None, "llama.cpp")


# What processes hold.


def children(pid: int) -> list[int]:
    """Processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        found += below + [each for child in below for each in children(child)]
    return found


def rss_bytes(pid: int) -> int:
    """Resident bytes, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def holdings(pid: int) -> dict[str, int]:
    """What a server holds: open files of its front, processes below it, files in shared memory of the machine, resident bytes."""
    below = children(pid)
    try:
        shared = len(os.listdir("/dev/shm"))
    except OSError:
        shared = 0
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "processes": len(below),
        "shared_memory_files": shared,
        "front_rss": rss_bytes(pid),
        "engine_rss": sum(map(rss_bytes, below)),
    }
