"""Overload and chaos of benchmarks/serving.py: what a server must survive, and what must be left of it afterwards: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from serving_client import (
    Answer,
    Job,
    Server,
    ask,
    children,
    completion,
    fetch,
    head,
    holdings,
    mixed_jobs,
    play,
    poisson,
    request_bytes,
    rss_bytes,
    samples,
    trimtab_server,
)

#: Gauges that are zero when nothing runs. The cache keeps prefixes, so its share is not among them.
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "trimtab_requests_paused")
#: Cache of the server that is overloaded, and the tokens it holds.
KV, KV_TOKENS = "512MiB", 11_700
Row = Callable[[str, str, str, "bool | None"], dict[str, Any]]


async def calm(port: int, seconds: float = 60.0) -> dict[str, float]:
    """Wait until no request is open, then return the gauges."""
    end = time.monotonic() + seconds
    found: dict[str, float] = {}
    while time.monotonic() < end:
        try:
            told = await samples(port)
            found = {name: told[name] for name in GAUGES}
            if not any(found.values()) and told.get("trimtab_engine_up") == 1:
                return found
        except (OSError, ValueError, KeyError):
            pass
        await asyncio.sleep(0.5)
    return found


# Overload.


def overload(bench: Any, row: Row, title: Callable[[str], None]) -> dict[str, Any]:
    """Far more than can be served, for a while."""
    options = bench.options
    rate = options.rate or known_rate(options)
    # A cache of this size is full after the warm-up; memory that grows then has another reason.
    seconds, flags = options.seconds, ["--kv-bytes", KV, *bench.flags()]
    title(f"{options.times:g} times {rate:.2f} requests/s for {seconds:g} s ({' '.join(flags)})")
    times = poisson(options.times * rate, seconds, options.seed + 3)
    jobs = mixed_jobs(bench.texts, times, options.seed + 3)
    with trimtab_server(bench_model(bench), flags) as server:
        answers, memory, gauges = asyncio.run(_overload(server, jobs, bench.texts, bench_model(bench)))
    statuses = Counter(answer.status for answer in answers)
    taken = [a for a in answers if a.status == 200]
    whole = [a for a in taken if a.done and a.tokens]
    told = [a for a in answers if a.status == 429]
    late = [
        a for a in taken if a.error and not a.done
    ]  # a comment had gone out while it waited, so the refusal is an event
    lost = [a for a in answers if not a.status or (a.status == 200 and not a.done and not a.error)]
    tpot = [a.tpot_s for a in whole if a.tokens > 1]
    p90 = float(np.quantile(tpot, 0.9)) if tpot else float("inf")
    settled = [sum(each) for at, *each in memory if at >= seconds / 4]
    flat = max(settled) / min(settled) - 1 if settled else float("inf")
    other = {status: count for status, count in statuses.items() if status not in (200, 429)}
    rows = [
        row(f"{len(answers)} requests: answered {len(whole)}, 429 {len(told)}, others", f"{other or 'none'}", "none", not other),
        row("told in the stream that the wait was too long, after 10 s of comments", f"{len(late)}", "", None),
        row("429 without Retry-After", f"{sum(not a.retry_after for a in told)}", "none", all(a.retry_after for a in told)),
        row("hanging or broken off", f"{len(lost)}", "none", not lost),
        row("resident memory, front and engine, largest over smallest after a quarter", f"{flat:+.1%}", "within 5 %", flat <= 0.05),
        row("TPOT of answered ones, p90", f"{1e3 * p90:.0f} ms", "at most 100 ms", p90 <= 0.1),
        row("gauges afterwards", ", ".join(f"{v:g}" for v in gauges.values()) or "?", "0, 0, 0", bool(gauges) and not any(gauges.values())),
    ]  # fmt: skip
    return {
        "rate": rate, "times": options.times, "seconds": seconds, "flags": flags, "statuses": {str(k): v for k, v in statuses.items()},
        "tpot_p90_s": p90, "rss_growth": flat, "memory": memory, "gauges": gauges, "rows": rows,
        "errors": sorted({a.error for a in answers if a.error and a.status != 429})[:10],
    }  # fmt: skip


async def _overload(
    server: Server, jobs: list[Job], texts: Any, model: str
) -> tuple[list[Answer], list[tuple[float, int, int]], dict]:
    for _ in range(KV_TOKENS * 5 // 4 // 4000):
        await play(server.port, [Job(0.0, texts.prompt(1000), 4) for _ in range(4)], model)
    await play(server.port, [Job(0.0, job.prompt, job.max_tokens) for job in jobs[:16]], model)
    memory: list[tuple[float, int, int]] = []
    begun = time.monotonic()

    async def watch() -> None:
        while True:
            pid = server.process.pid
            memory.append((round(time.monotonic() - begun, 1), rss_bytes(pid), sum(map(rss_bytes, children(pid)))))
            await asyncio.sleep(1.0)

    watching = asyncio.create_task(watch())
    answers = await play(server.port, jobs, model)
    watching.cancel()
    return answers, memory, await calm(server.port)


def known_rate(options: Any) -> float:
    """The goodput measured last."""
    if options.json.exists():
        found = json.loads(options.json.read_text()).get("goodput", {}).get("best", {}).get("ours")
        if found:
            return found
    raise SystemExit("overload needs the sustained rate: run goodput first, or give --rate.")


def bench_model(bench: Any) -> str:
    from serving import MODEL

    return MODEL


# Chaos.


async def _open(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("/v1/completions", body))
    await writer.drain()
    return reader, writer


async def vanish_mid_stream(port: int, bench: Any, draw: random.Random) -> None:
    """Read a few pieces, then reset the connection."""
    body = completion(Job(0, bench.texts.prompt(24), 200), bench_model(bench))
    reader, writer = await _open(port, body)
    status, _ = await head(reader)
    if status == 200:
        await reader.read(draw.randrange(1, 2000))
    writer.transport.abort()


async def vanish_mid_prompt(port: int, bench: Any, draw: random.Random) -> None:
    """Leave while a long prompt runs."""
    body = completion(Job(0, bench.texts.prompt(draw.randrange(500, 3000)), 50), bench_model(bench))
    body["stream"] = draw.random() < 0.5
    if not body["stream"]:
        del body["stream_options"]
    _, writer = await _open(port, body)
    await asyncio.sleep(draw.random())
    writer.transport.abort()


async def slow_reader(port: int, bench: Any, draw: random.Random) -> None:
    """Take a byte now and then, then go."""
    body = completion(Job(0, bench.texts.prompt(24), 400), bench_model(bench))
    reader, writer = await _open(port, body)
    writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
    await asyncio.sleep(2 + 3 * draw.random())
    writer.transport.resume_reading()  # pyright: ignore[reportAttributeAccessIssue]
    await reader.read(100)
    writer.transport.abort()


async def half_open(port: int, bench: Any, draw: random.Random) -> None:
    """Say that nothing more will be sent, and do not read; or send half a request and wait."""
    if draw.random() < 0.5:
        body = completion(Job(0, bench.texts.prompt(24), 100), bench_model(bench))
        _, writer = await _open(port, body)
        writer.write_eof()
    else:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        text = request_bytes("/v1/completions", completion(Job(0, [1, 2, 3], 5), bench_model(bench)))
        writer.write(text[: draw.randrange(1, len(text))])
    await asyncio.sleep(1 + 3 * draw.random())
    writer.close()


async def garbage(port: int, bench: Any, draw: random.Random) -> None:
    """Bytes that are no HTTP, or a body that is no JSON, or fields that mean nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    kind = draw.randrange(3)
    if kind == 0:
        writer.write(draw.randbytes(draw.randrange(1, 5000)))
    elif kind == 1:
        junk = draw.randbytes(200)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 200\r\n\r\n"
            + junk
        )
    else:
        writer.write(
            request_bytes("/v1/completions", {"model": bench_model(bench), "prompt": [10**9], "max_tokens": -5})
        )
    try:
        async with asyncio.timeout(15):
            await reader.read(1000)
    except TimeoutError:
        pass
    finally:
        writer.close()


FAULTS = (vanish_mid_stream, vanish_mid_prompt, slow_reader, half_open, garbage)


def chaos(bench: Any, row: Row, title: Callable[[str], None]) -> dict[str, Any]:
    """Faults of clients and deaths of the engine beside honest requests, then a look at what is left."""
    options = bench.options
    title(
        f"{options.faults} faults and {options.kills} kills of the engine in {options.minutes:g} minutes ({' '.join(bench.flags())})"
    )
    with trimtab_server(bench_model(bench), bench.flags()) as server:
        found = asyncio.run(_chaos(server, bench))
        below = children(server.process.pid)
    code = server.process.returncode
    left = [pid for pid in below if os.path.exists(f"/proc/{pid}")]
    before, after = found["before"], found["after"]
    rows = [
        row(f"faults done, by kind {found['faults']}", str(sum(found["faults"].values())), str(options.faults),
            sum(found["faults"].values()) == options.faults),
        row(f"engine restarts counted, of {found['kills']} kills", f"{found['restarts']:.0f}", str(options.kills),
            found["restarts"] == found["kills"] == options.kills),
        row("honest requests beside: whole, with an error told, hanging",
            f"{found['whole']}, {found['told']}, {found['hanging']}", "none hanging", not found["hanging"] and found["whole"] > 0),
        row("open files of the front, before and after", f"{before['fds']}, {after['fds']}", "equal", after["fds"] <= before["fds"]),
        row("processes below it", f"{before['processes']}, {after['processes']}", "equal", after["processes"] == before["processes"]),
        row("files in shared memory", f"{before['shared_memory_files']}, {after['shared_memory_files']}", "equal",
            after["shared_memory_files"] <= before["shared_memory_files"]),
        row("gauges", ", ".join(f"{v:g}" for v in found["gauges"].values()) or "?", "0, 0, 0",
            bool(found["gauges"]) and not any(found["gauges"].values())),
        row("answers afterwards as before, greedy", "yes" if found["same"] else "no", "yes", found["same"]),
        row("exit code, processes left after SIGTERM", f"{code}, {len(left)}", "0, 0", code == 0 and not left),
    ]  # fmt: skip
    return found | {"rows": rows}


async def _chaos(server: Server, bench: Any) -> dict[str, Any]:
    options, port, model = bench.options, server.port, bench_model(bench)
    draw = random.Random(options.seed)
    probe = Job(0.0, bench.texts.prompt(40), 24)

    async def text_of() -> list[int]:
        body = completion(probe, model) | {"stream": False, "logprobs": 0}
        del body["stream_options"]
        reader, writer = await _open(port, body)
        status, headers = await head(reader)
        value = json.loads(await reader.readexactly(int(headers["content-length"])))
        writer.close()
        return value["choices"][0]["text"] if status == 200 else [status]

    said = await text_of()
    await calm(port)
    await asyncio.sleep(0.5)
    before = holdings(server.process.pid)
    seconds = 60 * options.minutes
    begun = time.monotonic()
    done: Counter[str] = Counter()

    async def fault(at: float, kind: Callable[..., Any], seed: int) -> None:
        await asyncio.sleep(max(begun + at - time.monotonic(), 0))
        try:
            async with asyncio.timeout(120):
                await kind(port, bench, random.Random(seed))
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # the server may close on it, and the engine may be dead
        done[kind.__name__] += 1

    kills = 0

    async def kill() -> None:
        nonlocal kills
        for each in range(options.kills):
            await asyncio.sleep(max(begun + seconds * (each + 0.5) / options.kills - time.monotonic(), 0))
            while True:  # one that has loaded; a server whose engine cannot even start gives up
                up = (await samples(port)).get("trimtab_engine_up") == 1
                below = children(server.process.pid)
                if up and below:
                    break
                await asyncio.sleep(0.2)
            os.kill(below[0], signal.SIGKILL)
            kills += 1

    honest: list[Answer] = []

    async def normal(at: float) -> None:
        await asyncio.sleep(max(begun + at - time.monotonic(), 0))
        honest.append(await ask(port, Job(0, bench.texts.prompt(64), 32), model, time.monotonic()))

    faults = [fault(seconds * draw.random(), FAULTS[i % len(FAULTS)], i) for i in range(options.faults)]
    await asyncio.gather(*faults, kill(), *map(normal, poisson(0.3, seconds, options.seed)))
    gauges = await calm(port, 120)
    await asyncio.sleep(2.0)
    same = await text_of() == said
    end = time.monotonic() + 75  # idle connections are closed within a minute
    while True:
        after = holdings(server.process.pid)
        if after["fds"] <= before["fds"] or time.monotonic() > end:
            break
        await asyncio.sleep(1.0)
    restarts = (await samples(port)).get("trimtab_engine_restarts_total", -1.0)
    await fetch(port, "/health")
    return {
        "minutes": options.minutes, "faults": dict(done), "kills": kills, "restarts": restarts, "before": before, "after": after,
        "gauges": gauges, "same": same, "whole": sum(a.status == 200 and a.done and not a.error for a in honest),
        "told": sum(bool(a.error) or a.status >= 400 for a in honest),
        "hanging": sum("Timeout" in a.error for a in honest),
    }  # fmt: skip
