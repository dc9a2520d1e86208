"""A server over a scripted engine, in this process's threads; the engine is a process of its own, as it is for users."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("starlette")

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tests.serve.running import ServerThread
from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.config import ServeConfig
from trimtab.serve.launch import SubprocessLauncher
from trimtab.serve.texts import _byte_alphabet

HERE = Path(__file__).parent
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_backend() -> Backend:
    """One token for each byte, its value as its id, and two control tokens."""
    vocab = {char: byte for char, byte in _byte_alphabet().items()}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return backend


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_backend(), eos_id=257, chat_template=TEMPLATE)


class Running(ServerThread):
    """A server over the scripted engine, and what that engine received."""

    def __init__(self, tokenizer: Tokenizer, log: Path, environment: dict[str, str], **settings: Any) -> None:
        self.log = log
        config = ServeConfig(**{"models": ("tiny", "tiny@kivi:bits=4"), "port": 0, "grace_s": 2.0, **settings})
        path = f"{HERE}:{':'.join(filter(None, sys.path))}"
        launcher = SubprocessLauncher("scripted", {"PYTHONPATH": path, "SCRIPTED_LOG": str(log), **environment})
        super().__init__(config, launcher, lambda base: tokenizer)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)  # reading certificates takes 0.1 s

    def messages(self, kind: str, name: str = "") -> list[dict[str, Any]]:
        """What the engine received of one kind, about one request."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [
            line for line in map(json.loads, lines) if line["kind"] == kind and (not name or line.get("id") == name)
        ]

    def wait_for(self, found: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Poll until something is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := found():
                return value
            time.sleep(0.01)
        raise AssertionError("it did not happen in time")


@pytest.fixture(scope="session")
def server(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that tests share; nothing they do may end it."""
    running = Running(tiny_tokenizer, tmp_path_factory.mktemp("serve") / "log", {}, grace_s=0.1)
    yield running
    running.stop()


@pytest.fixture
def start(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a server with settings of its own."""
    started: list[Running] = []

    def begin(environment: dict[str, str] | None = None, **settings: Any) -> Running:
        started.append(Running(tiny_tokenizer, tmp_path / f"log{len(started)}", environment or {}, **settings))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


def order(**orders: Any) -> str:
    """A prompt that tells the scripted engine what to do."""
    return f"[[{json.dumps(orders)}]]"


@pytest.fixture(name="order")
def order_fixture() -> Callable[..., str]:
    return order
