"""The real front and the real engine, a tiny model between them, OpenAI's own client before them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import TEMPLATE, tiny_backend
from tests.serve.engines import write_model
from tests.serve.running import ServerThread
from trimtab.runtime.weights.load import read_tokenizer
from trimtab.serve.config import ServeConfig
from trimtab.serve.launch import SubprocessLauncher

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")


class Running(ServerThread):
    """A server over the real engine."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        config = ServeConfig(
            models=(self.name, f"{self.name}@kivi:bits=4,group=16,residual=32"), port=0, grace_s=2.0, threads=1, kv_bytes=64 << 20, step_tokens=256,
        )  # fmt: skip
        launcher = SubprocessLauncher(environment={"PYTHONPATH": ":".join(filter(None, sys.path))})
        super().__init__(config, launcher, lambda base: read_tokenizer(Path(base)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_backend(), TEMPLATE)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    server = Running(folder)
    yield server
    server.stop()


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_chat_completion_and_embedding_come_from_the_model(running: Running, client: Any) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    for model in (running.name, f"{running.name}@kivi:bits=4,group=16,residual=32"):
        whole = client.chat.completions.create(model=model, messages=asked, max_tokens=12, temperature=0, seed=1)
        stream = client.chat.completions.create(
            model=model,
            messages=asked,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 0
    made = client.completions.create(
        model=running.name, prompt="abc", max_tokens=6, n=2, best_of=2, logprobs=2, echo=True, temperature=0.8, seed=3
    )
    assert len(made.choices) == 2 and all(choice.text.startswith("abc") for choice in made.choices)
    assert len(made.choices[0].logprobs.token_logprobs) >= 4
    scored = client.completions.create(model=running.name, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].text == "abc"
    vectors = client.embeddings.create(model=running.name, input=["one", "two"], encoding_format="float").data
    assert len(vectors[0].embedding) == 96 and abs(sum(v * v for v in vectors[0].embedding) - 1) < 1e-5
    assert vectors[0].embedding != vectors[1].embedding


def test_a_schema_is_kept_through_the_whole_server(running: Running, client: Any) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=running.name, messages=[{"role": "user", "content": "x"}], max_tokens=200, temperature=1.0, seed=2,
        response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": schema, "strict": True}},
        logit_bias={str(token): -100 for token in (9, 10, 13, 32)},
    )  # fmt: skip
    assert set(json.loads(answer.choices[0].message.content)) == {"ok"}


def test_an_engine_that_was_killed_is_started_again(running: Running, client: Any) -> None:
    engine = running.service.front.engine
    first = engine.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            made = client.completions.create(model=running.name, prompt="abc", max_tokens=3, temperature=0)
            break
        except openai.APIError:
            time.sleep(0.5)
    else:
        raise AssertionError("it did not come back")
    assert engine.pid != first and engine.restarts == 1 and made.usage.completion_tokens > 0
    with httpx.Client(base_url=running.url) as http:
        assert http.get("/health").status_code == 200
