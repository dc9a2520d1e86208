"""Start, death and restart of the engine, drain, signals, exit codes, metrics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab.serve.client import StartFailed

HERE = Path(__file__).parent


def chat(client: Any, content: str = "hi", **fields: Any) -> Any:
    return client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": content}], **fields}
    )


def endless(order: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "user", "content": order(say="x", repeat=4000, delay=0.01)}],
    }


def test_a_killed_engine_is_503_and_comes_back(start: Any, order: Any) -> None:
    server = start()
    engine = server.service.front.engine
    with server.client() as client:
        first = engine.pid
        with client.stream("POST", "/v1/chat/completions", json=endless(order)) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(first, signal.SIGKILL)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["error"]["code"] == "engine_unavailable"
        seen, health = set(), set()
        began = time.monotonic()
        while (answer := chat(client)).status_code != 200:
            seen.add((answer.status_code, answer.json()["error"]["code"]))
            assert int(answer.headers["retry-after"]) >= 1
            health.add(client.get("/health").status_code)
            assert client.get("/health/live").status_code == 200
            assert time.monotonic() - began < 60
            time.sleep(0.02)
        assert seen == {(503, "engine_unavailable")}
        assert health <= {200, 503}  # 200 where it came back between the two questions
        assert engine.pid != first
        assert engine.restarts == 1
        assert "trimtab_engine_restarts_total 1.0" in client.get("/metrics").text


def test_a_request_that_kills_the_engine_is_answered(start: Any, order: Any) -> None:
    server = start()
    with server.client() as client:
        assert chat(client, order(die=True)).status_code == 503
        server.wait_for(lambda: client.get("/health").status_code == 200)
        assert chat(client).status_code == 200


@pytest.mark.slow
def test_an_engine_that_says_nothing_is_replaced(start: Any) -> None:
    server = start(engine_s=1)
    engine = server.service.front.engine
    first = engine.pid
    os.kill(first, signal.SIGSTOP)
    server.wait_for(lambda: engine.pid not in (None, first) and engine.state == "ready")


def test_an_engine_that_cannot_start_tells_why(start: Any) -> None:
    with pytest.raises(StartFailed, match="This model is broken") as caught:
        start(models=("broken",))
    assert caught.value.code == 2


def test_models_come_and_go_and_survive_a_restart(start: Any) -> None:
    server = start()
    with server.client() as client:
        made = client.post("/admin/models", json={"model": "tiny@snapkv"})
        assert (made.status_code, made.json()["techniques"]) == (201, ["snapkv"])
        assert chat(client, model="tiny@snapkv").status_code == 200
        assert client.post("/admin/models", json={"model": "tiny@snapkv"}).status_code == 400
        assert client.post("/admin/models", json={"model": "nothing"}).status_code == 404
        os.kill(server.service.front.engine.pid, signal.SIGKILL)
        server.wait_for(lambda: server.service.front.engine.restarts == 1 and client.get("/health").status_code == 200)
        assert chat(client, model="tiny@snapkv").status_code == 200
        assert client.delete("/admin/models/tiny@snapkv").json() == {
            "id": "tiny@snapkv",
            "deleted": True,
            "object": "model",
        }
        assert chat(client, model="tiny@snapkv").status_code == 404


def test_drain_lets_open_requests_finish_and_refuses_new_ones(start: Any, order: Any) -> None:
    server = start(grace_s=5.0)
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": order(say="x" * 40, delay=0.01)}]}
    with server.client() as client, server.client() as other:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert other.post("/admin/drain").json() == {"draining": True, "open_requests": 1}
            refused = chat(other)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
            assert int(refused.headers["retry-after"]) >= 5
            assert other.get("/health/ready").status_code == 503
            assert other.get("/health/live").status_code == 200
            rest = list(lines)
        assert "data: [DONE]" in rest
    server._thread.join(60)
    assert not server._thread.is_alive()
    assert server.error is None


def test_what_is_open_after_the_grace_time_ends_with_an_error(start: Any, order: Any) -> None:
    server = start(grace_s=0.2)
    body = endless(order)
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.call(server.service.drain)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1][6:])["error"]["code"] == "server_shutting_down"
    assert server.wait_for(lambda: server.messages("Cancel"))[0]["reason"] == "shutdown"


PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from conftest import tiny_backend, TEMPLATE
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.config import ServeConfig
from trimtab.serve.launch import SubprocessLauncher
from trimtab.serve.lifecycle import serve
tokenizer = Tokenizer(tiny_backend(), eos_id=257, chat_template=TEMPLATE)
launcher = SubprocessLauncher("scripted", {{"PYTHONPATH": {here!r} + ":" + ":".join(filter(None, sys.path))}})
sys.exit(serve(ServeConfig(models=({model!r},), port=0, grace_s={grace}), launcher, lambda base: tokenizer))
"""


class Program:
    """A server as a process of its own."""

    def __init__(self, model: str = "tiny", grace: float = 5.0, load: float = 0.0) -> None:
        program = PROGRAM.format(here=str(HERE), model=model, grace=grace)
        environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "SCRIPTED_LOAD": str(load)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self.port = 0

    def wait_ready(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line):
                self.port = int(found.group(1))
                return
        raise AssertionError("".join(self.lines))

    def engine(self) -> int:
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True)
        return int(found.stdout.split()[0])


@pytest.fixture
def program() -> Iterator[Any]:
    begun: list[Program] = []

    def begin(**options: Any) -> Program:
        begun.append(Program(**options))
        return begun[-1]

    yield begin
    for one in begun:
        one.process.kill()
        one.process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(found: Any) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_sigterm_drains_and_ends_with_0(program: Any) -> None:
    import httpx2 as httpx

    server = program()
    server.wait_ready()
    engine = server.engine()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", verify=False) as client:
        assert chat(client).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, err
    assert out == ""  # standard output is for data
    assert '"status":200' in err
    eventually(lambda: gone(engine))


def test_a_second_sigterm_ends_at_once(program: Any, order: Any) -> None:
    import httpx2 as httpx

    server = program(grace=60)
    server.wait_ready()
    engine = server.engine()
    body = endless(order)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{server.port}", verify=False) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # dropping it would end the stream
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.process.poll() is None
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 1
        assert time.monotonic() - begun < 30  # of a grace time of 60
    eventually(lambda: gone(engine))


def test_a_killed_server_leaves_no_engine_behind(program: Any) -> None:
    server = program()
    server.wait_ready()
    engine = server.engine()
    os.kill(engine, signal.SIGSTOP)  # it cannot end by itself: the system must see to it
    try:
        server.process.kill()
        eventually(lambda: gone(engine))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)


@pytest.mark.slow
def test_sigterm_while_the_engine_loads_ends_with_0(program: Any) -> None:
    server = program(load=60.0)
    eventually(lambda: subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True).stdout)
    engine = server.engine()
    server.process.send_signal(signal.SIGTERM)
    _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, err
    eventually(lambda: gone(engine))


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_exit_code_2(program: Any) -> None:
    server = program(model="broken")
    _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 2
    assert err.strip().endswith("trimtab: This model is broken. Try another.")


def test_metrics_have_vllms_names_and_predictions_beside_measurements(start: Any) -> None:
    server = start()
    with server.client() as client:
        chat(client)
        chat(client, temperature=9)
        time.sleep(0.25)  # the engine's next statistics
        text = client.get("/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    assert samples[f"vllm:time_to_first_token_seconds_count{{{label}}}"] == "1.0"
    assert samples[f"vllm:e2e_request_latency_seconds_count{{{label}}}"] == "1.0"
    assert samples[f"vllm:generation_tokens_total{{{label}}}"] == "15.0"
    assert samples[f"vllm:prompt_tokens_total{{{label}}}"] == "21.0"
    assert samples[f'vllm:request_success_total{{finished_reason="stop",{label}}}'] == "1.0"
    assert samples[f"vllm:num_requests_running{{{label}}}"] == "0.0"
    assert samples[f"vllm:kv_cache_usage_perc{{{label}}}"] == "0.0"
    assert f"trimtab_stream_delay_seconds_count{{{label}}}" not in samples or (
        samples[f"trimtab_stream_delay_seconds_count{{{label}}}"] == "0.0"  # neither answer was a stream
    )
    for what in ("first_token", "request"):
        assert samples[f'trimtab_predicted_seconds_count{{{label},quantity="{what}"}}'] == "1.0"
    assert samples[f'trimtab_predicted_seconds_sum{{{label},quantity="request"}}'] == "0.1"
    assert samples[f'trimtab_measured_seconds_count{{{label},quantity="first_token"}}'] == "1.0"
    assert samples['trimtab_requests_rejected_total{code="invalid_value",status="400"}'] == "1.0"


def test_the_delay_of_every_written_token_is_metered(start: Any, order: Any) -> None:
    server = start()
    with server.client() as client:
        began = time.monotonic()
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": order(say="abcdefgh", delay=0.02)}],
            "stream": True,
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.read().endswith(b"[DONE]\n\n")
        took = time.monotonic() - began
        text = client.get("/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'model_name="tiny"'
    assert samples[f"trimtab_stream_delay_seconds_count{{{label}}}"] == "9.0"  # eight letters and the end token
    assert 0 < float(samples[f"trimtab_stream_delay_seconds_sum{{{label}}}"]) < took
    bounds = [line for line in samples if line.startswith("trimtab_stream_delay_seconds_bucket")]
    assert any('le="0.005"' in line for line in bounds)
