"""Streams: their form, readers that leave, readers that are slow, cancellation."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.serve import protocol

ASK = [{"role": "user", "content": "hi"}]


def body_of(order: Any, stream: bool = True, **orders: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": order(**orders)}], "stream": stream}


def test_the_form_of_a_stream(server: Any) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-1] == ""
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2] == "data: [DONE]"
    first = json.loads(events[0][6:])
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in first
    last = json.loads(events[-3][6:])
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")


def test_characters_are_never_cut(server: Any, order: Any) -> None:
    with server.client() as client:
        answer = client.post(
            "/v1/completions", json={"model": "tiny", "prompt": order(say="aé漢🎈"), "stream": True, "max_tokens": 99}
        )
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in answer.text.split("\n\n")[:-2]]
    assert [text for text in texts if text] == ["a", "é", "漢", "🎈"]


def test_a_comment_is_sent_while_nothing_else_is(start: Any, order: Any) -> None:
    server = start(heartbeat_s=0.1)
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body_of(order, queue=0.35))
    assert answer.status_code == 200
    assert answer.text.startswith(": waiting\n\n")
    assert answer.text.count(": waiting") in (2, 3)
    assert answer.text.endswith("data: [DONE]\n\n")


def test_an_error_before_the_first_token_is_a_plain_answer(server: Any, order: Any) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body_of(order, refuse=[503, "Not now.", 4.0]))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "4")
    assert answer.headers["content-type"] == "application/json"


class Raw:
    """A client that says exactly what it wants to say."""

    def __init__(self, server: Any, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        self.socket = socket.socket()
        self.socket.settimeout(60)
        self.socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 4096
        )  # what the system takes for us would hide a slow reader
        self.socket.connect(("127.0.0.1", server.service.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def read_until(self, mark: bytes) -> bytes:
        got = b""
        while mark not in got:
            data = self.socket.recv(4096)
            assert data, got
            got += data
        return got


@pytest.fixture
def connect(server: Any) -> Iterator[Any]:
    opened: list[Raw] = []

    def begin(body: dict[str, Any], at: Any = server) -> Raw:
        opened.append(Raw(at, body))
        return opened[-1]

    yield begin
    for raw in opened:
        raw.socket.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_within_a_second(server: Any, order: Any, connect: Any, stream: bool) -> None:
    before = len(server.messages("Submit"))
    raw = connect(body_of(order, stream, say="x", repeat=4000, delay=0.02))
    if stream:
        raw.read_until(b'"x"')
    server.wait_for(lambda: len(server.messages("Submit")) > before)
    name = server.messages("Submit")[-1]["id"]
    left = time.monotonic()
    raw.socket.close()
    (cancel,) = server.wait_for(lambda: server.messages("Cancel", name))
    assert cancel["reason"] == "disconnect"
    assert cancel["at"] - left < 1.0
    server.wait_for(lambda: server.service.front.engine.open == 0)


def test_a_client_that_leaves_while_it_waits_is_cancelled(server: Any, order: Any, connect: Any) -> None:
    before = len(server.messages("Submit"))
    raw = connect(body_of(order, queue=60))
    server.wait_for(lambda: len(server.messages("Submit")) > before)
    raw.socket.close()
    server.wait_for(lambda: server.messages("Cancel", server.messages("Submit")[-1]["id"]))


def test_cancelling_by_id(server: Any, order: Any) -> None:
    with server.client() as client, server.client() as other:
        with client.stream(
            "POST", "/v1/chat/completions", json=body_of(order, say="x", repeat=4000, delay=0.02)
        ) as answer:
            lines = answer.iter_lines()
            name = json.loads(next(lines)[6:])["id"]
            assert other.post(f"/v1/requests/{name}/cancel").json() == {"id": name, "cancelled": True}
            rest = [line for line in lines if line]
        assert json.loads(rest[-1][6:])["error"]["code"] == "request_cancelled"
        assert server.wait_for(lambda: server.messages("Cancel", name))[0]["reason"] == "request"
        assert other.post(f"/v1/requests/{name}/cancel").status_code == 404


@pytest.fixture
def small_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system holds little for a slow reader, so that little is needed to fill it."""
    monkeypatch.setattr(protocol, "_SEND_BUFFER", 4096)


LONG = {"say": "x" * 10, "repeat": 150, "delay": 0.0001}  # 1500 chunks of about 250 bytes


def test_a_slow_reader_pauses_its_request_and_resumes_it(
    start: Any, order: Any, connect: Any, small_sockets: None
) -> None:
    server = start(stream_buffer=32 << 10)
    raw = connect(body_of(order, **LONG), server)
    (paused,) = server.wait_for(lambda: server.messages("Pause"))
    time.sleep(0.05)  # the engine has stopped by then
    (stream,) = server.service.front.engine._streams.values()
    assert 16 << 10 <= stream.size < 64 << 10
    assert not server.messages("Resume")
    raw.read_until(b"data: [DONE]")
    assert server.messages("Resume", paused["id"])
    assert not server.messages("Cancel")


def test_a_reader_that_takes_nothing_is_dropped(start: Any, order: Any, connect: Any, small_sockets: None) -> None:
    server = start(stream_buffer=32 << 10, slow_reader_s=0.3)
    raw = connect(body_of(order, **LONG), server)
    server.wait_for(lambda: server.messages("Pause"))
    (cancel,) = server.wait_for(lambda: server.messages("Cancel"))
    assert cancel["reason"] == "slow_reader"
    server.wait_for(lambda: server.service.front.engine.open == 0)
    got = b""
    while data := raw.socket.recv(1 << 20):
        got += data
    assert not got.endswith(b"0\r\n\r\n")  # the client can tell that this is not the end


def test_an_engine_that_ignores_pause_loses_the_stream_with_bounded_memory(
    start: Any, order: Any, connect: Any, small_sockets: None
) -> None:
    server = start(stream_buffer=16 << 10)
    raw = connect(body_of(order, **LONG, rude=True), server)
    (cancel,) = server.wait_for(lambda: server.messages("Cancel"))
    assert cancel["reason"] == "slow_reader"
    raw.read_until(b'"code":"slow_reader"')


@pytest.mark.slow
def test_many_slow_readers_take_bounded_memory(start: Any, order: Any, connect: Any, small_sockets: None) -> None:
    """32 readers that take nothing: each holds at most its buffer, whatever the engine could send."""
    server = start(stream_buffer=32 << 10, max_queue=64)
    for _ in range(32):
        connect(body_of(order, **LONG), server)
    server.wait_for(lambda: len(server.messages("Pause")) == 32, 30)
    sizes = [stream.size for stream in server.service.front.engine._streams.values()]
    assert len(sizes) == 32
    assert max(sizes) <= 64 << 10


def test_the_engine_keeps_the_deadline(start: Any, order: Any) -> None:
    server = start(request_s=0.2)
    with server.client() as client:
        whole = client.post("/v1/chat/completions", json=body_of(order, False, say="x", repeat=4000, delay=0.01))
        streamed = client.post("/v1/chat/completions", json=body_of(order, say="x", repeat=4000, delay=0.01))
    assert (whole.status_code, whole.headers["x-should-retry"]) == (504, "false")
    assert '"code":"deadline_exceeded"' in streamed.text.split("\n\n")[-2]
    assert not server.messages("Cancel")


@pytest.mark.slow
def test_an_engine_that_forgets_the_deadline_is_told(start: Any, order: Any) -> None:
    server = start(request_s=0.2)
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body_of(order, False, stall=True))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    assert server.wait_for(lambda: server.messages("Cancel"))[0]["reason"] == "deadline"


@pytest.mark.slow
def test_nothing_is_left_after_clients_and_engines_that_misbehave(start: Any, order: Any) -> None:
    """300 clients that leave at any moment, an engine killed twice: every count is back at zero, memory too."""
    server = start(stream_buffer=16 << 10, max_queue=64, slow_reader_s=1.0)
    front, dice = server.service.front, random.Random(7)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = 0
    for place in range(300):
        orders = {
            "say": "x" * 10,
            "repeat": dice.choice([1, 20, 200]),
            "delay": dice.choice([0, 0.001]),
            "queue": dice.choice([0, 0, 0.05]),
        }
        raw = Raw(server, body_of(order, dice.random() < 0.7, **orders))
        for _ in range(dice.choice([0, 0, 1, 5])):
            raw.socket.settimeout(0.05)
            with contextlib.suppress(TimeoutError, ConnectionError):
                raw.socket.recv(dice.choice([10, 1000]))
        raw.socket.close()
        if place in (100, 200) and front.engine.pid:
            os.kill(front.engine.pid, signal.SIGKILL)
        if place == 50:
            before = resident()
    server.wait_for(lambda: front.engine.state == "ready" and front.calls == 0)
    server.wait_for(lambda: front.engine.open == 0 and front.engine.waiting == 0)
    assert (front.open, front.bodies.used, front.keys.anonymous._open) == ({}, 0, 0)
    assert front.engine.restarts in (1, 2)
    assert resident() - before < 32 << 20
    with server.client() as client:
        assert client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK}).status_code == 200
