"""Keys, their limits, the queue, sizes, slow and broken clients."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import SpecError
from trimtab.serve.config import ServeConfig
from trimtab.serve.errors import ApiError
from trimtab.serve.keys import KeyEntry, Keys, Tenant, hash_key, new_key, read_keys

ASK = [{"role": "user", "content": "hi"}]


def chat(client: Any, content: str = "hi", key: str | None = None, **fields: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def key_file(folder: Path, *entries: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(
        "\n".join(
            f'[[keys]]\nname = "{name}"\nhash = "{hash_key(name)}"\n{rest}'
            for name, _, rest in (e.partition("|") for e in entries)
        )
    )
    return path


def test_a_key_is_asked_for_and_limits_models(start: Any, tmp_path: Path) -> None:
    path = key_file(tmp_path, "all|", 'one|models = ["tiny"]', "boss|admin = true")
    server = start(api_key_file=path)
    with server.client() as client:
        assert client.get("/health").status_code == 200
        for key, code in ((None, "missing_api_key"), ("wrong", "invalid_api_key")):
            answer = chat(client, key=key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == 401
        assert chat(client, key="all").status_code == 200
        assert chat(client, key="one").status_code == 200
        refused = chat(client, key="one", model="tiny@kivi:bits=4")
        assert refused.status_code == 404
        assert "kivi" not in refused.json()["error"]["message"].partition("Served:")[2]
        listed = client.get("/v1/models", headers={"authorization": "Bearer one"}).json()["data"]
        assert [card["id"] for card in listed] == ["tiny"]
        drained = client.post("/admin/drain", headers={"authorization": "Bearer all"})
        assert (drained.status_code, drained.json()["error"]["code"]) == (403, "not_admin")
        salts = {line["salt"] for line in server.messages("Submit")}
        assert len(salts) == 2  # two keys, no shared prefixes


def test_another_key_cannot_see_cancel_or_forget(start: Any, tmp_path: Path, order: Any) -> None:
    server = start(api_key_file=key_file(tmp_path, "mine|", "yours|"))
    mine, yours = {"authorization": "Bearer mine"}, {"authorization": "Bearer yours"}
    with server.client() as client:
        made = client.post("/v1/responses", json={"model": "tiny", "input": "x"}, headers=mine).json()["id"]
        assert client.get(f"/v1/responses/{made}", headers=yours).status_code == 404
        assert client.delete(f"/v1/responses/{made}", headers=yours).status_code == 404
        assert client.get(f"/v1/responses/{made}", headers=mine).status_code == 200
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": order(say="x", repeat=900, delay=0.01)}],
            "stream": True,
        }
        with client.stream("POST", "/v1/chat/completions", json=body, headers=mine) as answer, server.client() as other:
            lines = answer.iter_lines()  # dropping it would end the stream
            next(lines)
            name = server.messages("Submit")[-1]["id"]
            assert other.post(f"/v1/requests/{name}/cancel", headers=yours).status_code == 404
            assert other.post(f"/v1/requests/{name}/cancel", headers=mine).status_code == 200


def test_limits_of_a_key_on_the_wire(start: Any, tmp_path: Path) -> None:
    server = start(api_key_file=key_file(tmp_path, "few|requests_per_minute = 2", "small|tokens_per_minute = 100"))
    with server.client() as client:
        assert [chat(client, key="few").status_code for _ in range(3)] == [200, 200, 429]
        answer = chat(client, key="few")
        assert 25 <= int(answer.headers["retry-after"]) <= 31
        assert chat(client, key="small").status_code == 400  # what it may use can never be allowed
        assert chat(client, key="small", max_tokens=50).status_code == 200  # 21 and 50 reserved, 21 and 15 used
        assert chat(client, key="small", max_tokens=30).status_code == 200  # only because the rest came back
        assert chat(client, key="small", max_tokens=60).status_code == 429


def test_buckets_of_a_key() -> None:
    now = [0.0]
    tenant = Tenant(
        KeyEntry(name="k", hash="", requests_per_minute=2, tokens_per_minute=100, concurrency=2), clock=lambda: now[0]
    )
    first = tenant.take(40)
    tenant.take(40)
    with pytest.raises(ApiError, match="2 requests of this key are open"):
        tenant.take(1)
    first.end(used=10)
    first.end(used=10)  # once
    with pytest.raises(ApiError, match="requests a minute") as caught:
        tenant.take(1)
    assert caught.value.retry_after_s == 30.0
    now[0] = 30.0
    tenant.take(100).end(used=100)  # 100 - 40 - 40 + 30 returned, and filled up since
    now[0] = 61.0
    with pytest.raises(ApiError, match="tokens a minute"):
        tenant.take(99)


def test_every_entry_is_compared_whether_or_not_one_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    keys = Keys(tuple(KeyEntry(name=str(place), hash=hash_key(f"key{place}")) for place in range(5)))
    compared: list[str] = []
    genuine = hmac.compare_digest
    monkeypatch.setattr("trimtab.serve.keys.hmac.compare_digest", lambda a, b: compared.append(b) or genuine(a, b))
    assert keys.tenant("Bearer key0").entry.name == "0"
    assert len(compared) == 5


def test_a_new_key_opens_and_is_not_in_its_file(tmp_path: Path) -> None:
    key, entry = new_key("ci")
    path = tmp_path / "keys.toml"
    path.write_text(entry)
    assert read_keys(path).tenant(f"Bearer {key}").entry.name == "ci"
    assert key not in entry
    assert hashlib.sha256(key.encode()).hexdigest() in entry


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys"), ("keys = []", "holds no key"), ("[[keys]]\nname = 'a'\nhash = 'plain'", "not sha256"), ("{", "--api-key-file"),
        ("[[keys]]\nname = 'a'\nhash = 'sha256:" + "0" * 64 + "'\nmodel = 1", "unknown field"),
        (2 * ("[[keys]]\nname = 'a'\nhash = 'sha256:" + "0" * 64 + "'\n"), "twice"),
    ],
)  # fmt: skip
def test_key_files_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=words):
        read_keys(path)


def test_settings_that_are_not_possible() -> None:
    with pytest.raises(SpecError, match="lets other machines in"):
        ServeConfig(models=("m",), host="0.0.0.0")
    assert ServeConfig(models=("m",), host="0.0.0.0", allow_anonymous=True)
    for wrong in ({"models": ()}, {"models": ("m", "m")}, {"port": 70000}, {"max_queue": 0}, {"heartbeat_s": 0}):
        with pytest.raises(SpecError):
            ServeConfig(**{"models": ("m",), **wrong})


def test_a_full_queue_answers_429_and_when_to_return(start: Any, order: Any) -> None:
    import concurrent.futures

    server = start(max_queue=2, max_queue_tokens=10_000)
    with server.client() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(chat, client, order(queue=0.6)) for _ in range(2)]
        server.wait_for(lambda: server.service.front.engine.waiting == 2)
        answer = chat(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert all(future.result().status_code == 200 for future in waiting)
        assert chat(client).status_code == 200


def test_many_waiting_tokens_answer_429(start: Any, order: Any) -> None:
    import concurrent.futures

    server = start(max_queue_tokens=200)
    with server.client() as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, client, order(queue=0.4))
        server.wait_for(lambda: server.service.front.engine.waiting == 1)
        assert chat(client, "x" * 200).status_code == 429
        assert waiting.result().status_code == 200
        assert chat(client, "x" * 300).status_code == 200  # alone, it may be longer


def test_a_request_waits_so_long_and_no_longer(start: Any, order: Any) -> None:
    server = start(max_queue_s=0.2)
    with server.client() as client:
        answer = chat(client, order(queue=30))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_timeout")
    server.wait_for(lambda: server.messages("Cancel"))


def test_a_body_that_is_too_long(start: Any) -> None:
    server = start(max_body=2048)
    with server.client() as client:
        assert chat(client, "x" * 3000).status_code == 413

        def pieces() -> Any:  # without a length
            for _ in range(100):
                yield b" " * 1000

        answer = client.post("/v1/chat/completions", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_many_long_bodies_at_once_are_refused(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(max_body=4096)
    monkeypatch.setattr(server.service.front.bodies, "limit", 5000)
    head = HEAD + b"Content-Length: 4000\r\n\r\n" + b" " * 3000
    with Socket(server).socket as first, Socket(server).socket as second:
        first.sendall(head)
        server.wait_for(lambda: server.service.front.bodies.used == 3000)
        second.sendall(head)
        assert b" 429 " in second.recv(65536)
        first.sendall(b" " * 1000)
        assert b" 400 " in first.recv(65536)
    assert server.service.front.bodies.used == 0


def test_a_prompt_that_is_too_long(start: Any) -> None:
    server = start(max_prompt_tokens=50)
    with server.client() as client:
        answer = chat(client, "x" * 100)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_page_of_another_site_cannot_send_a_request(server: Any, content_type: str) -> None:
    with server.client() as client:
        answer = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": content_type})
        assert answer.status_code == 415
        assert client.get("/version", headers={"host": "evil.example"}).status_code == 403
        assert client.options("/v1/chat/completions").status_code == 405
        assert "access-control-allow-origin" not in client.get("/version", headers={"origin": "http://x"}).headers


class Socket:
    def __init__(self, server: Any) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.service.port), timeout=60)

    def ask(self, text: bytes) -> bytes:
        with self.socket:
            self.socket.sendall(text)
            got = b""
            while data := self.socket.recv(65536):
                got += data
            return got


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_clients_that_dawdle_are_sent_away(start: Any) -> None:
    server = start(header_s=0.2, body_s=0.2, idle_s=1)
    begun = time.monotonic()
    for text in (b"", b"GET /health HT", HEAD):
        with contextlib.suppress(ConnectionResetError):
            assert Socket(server).ask(text) == b""
    assert time.monotonic() - begun < 30
    with Socket(server).socket as sock:
        sock.sendall(HEAD + b"Content-Length: 10\r\n\r\n{")
        assert b" 408 " in sock.recv(65536)


def test_headers_that_are_too_long(start: Any) -> None:
    server = start(max_headers=2048)
    assert b" 431 " in Socket(server).ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000 + b"\r\n\r\n")
    assert b" 431 " in Socket(server).ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 5000)  # and no end
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_more_connections_than_allowed_are_closed(start: Any) -> None:
    server = start(max_connections=3)
    held = [Socket(server) for _ in range(3)]
    time.sleep(0.05)
    with pytest.raises(ConnectionError):
        if not Socket(server).ask(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"):
            raise ConnectionError
    for one in held:
        one.socket.close()


def test_head_and_upgrade_requests(server: Any) -> None:
    with server.client() as client:
        answer = client.head("/health")
        assert (answer.status_code, answer.content) == (200, b"")
        assert client.get("/version", headers={"connection": "upgrade", "upgrade": "websocket"}).status_code == 200
        assert (
            client.get("/version", headers={"connection": "upgrade, http2-settings", "upgrade": "h2c"}).status_code
            == 200
        )


def test_what_is_no_http(server: Any) -> None:
    assert b" 400 " in Socket(server).ask(b"\x16\x03\x01 hello\r\n\r\n")


def test_request_ids_go_in_and_out(server: Any) -> None:
    with server.client() as client:
        assert client.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert client.get("/version", headers={"x-request-id": "no spaces"}).headers["x-request-id"].startswith("req-")
        assert client.get("/nowhere").headers["x-request-id"].startswith("req-")


def test_the_log_holds_numbers_and_never_prompts_or_keys(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import json
    import logging

    server = start(api_key_file=key_file(tmp_path, "open-sesame|"))
    with caplog.at_level(logging.DEBUG, "trimtab.serve"), server.client() as client:
        answer = chat(client, "my dear secret", key="open-sesame", user="somebody", unknown="whisper")
        assert answer.status_code == 200
        chat(client, "my dear secret", key="a-wrong-key")
        client.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "my dear secret", "temperature": 9},
            headers={"authorization": "Bearer open-sesame"},
        )
        server.wait_for(lambda: len([r for r in caplog.records if r.name == "trimtab.serve.access"]) == 3)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "trimtab.serve.access"]
    assert {"status", "request_id", "seconds", "path", "method", "key"} <= set(lines[0])
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"], lines[0]["cached_tokens"], lines[0]["model"]) == (
        33,
        15,
        3,
        "tiny",
    )
    for secret in ("secret", "Bearer", "a-wrong-key", "Hello", "somebody", "whisper"):
        assert secret not in caplog.text
    assert lines[0]["key"] == "open-sesame"  # the entry's name; in this test it is the key as well
