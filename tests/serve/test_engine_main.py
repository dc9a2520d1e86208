"""The engine's main over a socket pair: models come and go, requests are held, a drain ends it."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import TEMPLATE, tiny_backend
from tests.serve.engines import write_model
from trimtab.runtime.engine.bounds import bound_bytes
from trimtab.serve import messages as m
from trimtab.serve.channel import BlockingChannel
from trimtab.serve.config import ServeConfig
from trimtab.serve.engine.main import main
from trimtab.serve.engine.memory import plan_memory
from trimtab.serve.engine.models import Models


class Pair:
    """The engine's main in a thread, its channel in our hands."""

    def __init__(self, start: m.Start) -> None:
        ours, theirs = socket.socketpair()
        self.channel = BlockingChannel(ours, m.ToFront)
        self.code: int | None = None
        self._engine = BlockingChannel(theirs)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.said: list[Any] = []
        self.channel.send(start)

    def _run(self) -> None:
        self.code = main(self._engine)
        self._engine.close()

    def until(self, kind: type, name: str = "", seconds: float = 60.0) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for said in self.said:
                if isinstance(said, kind) and name in ("", getattr(said, "id", "")):
                    self.said.remove(said)
                    return said
            self.said += self.channel.receive(0.2)
        raise AssertionError(f"no {kind.__name__} {name} came; {[x for x in self.said if not isinstance(x, m.Stats)]}")

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.channel.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", tiny_backend(), TEMPLATE)


def test_models_come_and_go_and_a_drain_ends_it(folder: Path) -> None:
    name = str(folder)
    pair = Pair(ServeConfig(models=(name,), kv_bytes=32 << 20, threads=1).start())
    ready = pair.until(m.Ready)
    assert [info.id for info in ready.models] == [name] and ready.memory.kv_bytes == 32 << 20
    assert ready.models[0].weight_bytes > 0 and ready.models[0].runs == "native"
    pair.channel.send(m.Load("l1", f"{name}@kivi:bits=4,group=16,residual=32"))
    loaded = pair.until(m.Loaded, "l1").model
    assert loaded.weight_bytes < ready.models[0].weight_bytes / 50  # the matrices are shared
    pair.channel.send(m.Load("l2", f"{name}@nosuch"))
    assert pair.until(m.Refused, "l2").status == 400
    drawn = m.Sampling(max_tokens=900, temperature=0.0, ignore_eos=True)
    pair.channel.send(m.Submit(id="a", model=loaded.id, prompt=(1, 2, 3), sampling=drawn))
    pair.until(m.Admitted, "a")
    pair.channel.send(m.Unload("u1", loaded.id))
    pair.channel.send(m.Submit(id="b", model=loaded.id, prompt=(1, 2, 3), sampling=drawn))
    assert pair.until(m.Refused, "b").status == 404
    pair.channel.send(m.Cancel("a"))
    pair.until(m.Finished, "a")
    assert pair.until(m.Unloaded, "u1").model == loaded.id
    pair.channel.send(m.Unload("u2", name))
    assert pair.until(m.Refused, "u2").status == 400
    pair.channel.send(m.Embed(id="e", model=name, prompt=tuple(range(200)) * 3, pooling="last"))
    assert len(pair.until(m.Embedded, "e").vector) == 4 * 96
    pair.channel.send(m.Submit(id="c", model=name, prompt=(1, 2, 3), sampling=drawn))
    pair.until(m.Admitted, "c")
    pair.channel.send(m.Drain(0.05))
    pair.channel.send(m.Submit(id="d", model=name, prompt=(1, 2, 3), sampling=drawn))
    assert pair.until(m.Refused, "d").status == 503
    assert pair.until(m.Finished, "c").completion_tokens < 900
    stats = pair.until(m.Stopped)
    assert stats.code == 0
    pair.join()
    assert pair.code == 0


def test_the_cache_takes_what_it_may_need_and_half_of_what_is_free_at_most(folder: Path) -> None:
    name = str(folder)
    start = ServeConfig(models=(name,), threads=1, max_sequences=8).start()
    served = [Models(start).load(name)]
    needed = 8 * bound_bytes(served[0].runner.spec)(2048)
    plenty = plan_memory(start, served, 100 * needed)
    assert plenty.kv_bytes == needed and plenty.full_contexts == 8
    little = plan_memory(start, served, needed)
    assert little.kv_bytes == (needed - little.workspace_bytes) // 2
    two = plan_memory(start, served * 2, 100 * needed)
    assert two.kv_bytes == 2 * needed  # as much for every id
    asked = plan_memory(ServeConfig(models=(name,), kv_bytes=12345678).start(), served, needed)
    assert asked.kv_bytes == 12345678


def test_the_loop_counts_its_time_and_that_of_passes(folder: Path) -> None:
    name = str(folder)
    pair = Pair(ServeConfig(models=(name,), kv_bytes=32 << 20, threads=1).start())
    pair.until(m.Ready)
    drawn = m.Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
    began = time.monotonic()
    pair.channel.send(m.Submit(id="a", model=name, prompt=(1, 2, 3), sampling=drawn))
    pair.until(m.Finished, "a")
    pair.channel.send(m.Drain(0.0))
    pair.until(m.Stopped)
    spent = time.monotonic() - began  # a turn goes on after its message has gone out
    stats = [said for said in pair.said if isinstance(said, m.Stats)][-1]
    assert stats.steps == 200
    assert 0 < stats.native_s < stats.pass_s < stats.step_s < stats.busy_s < spent
    tokens = [said for said in pair.said if isinstance(said, m.Tokens)]
    assert began < tokens[0].at_s <= tokens[-1].at_s < began + spent
    pair.join()


def test_a_held_request_costs_no_time(folder: Path) -> None:
    pair = Pair(ServeConfig(models=(str(folder),), kv_bytes=32 << 20, threads=1).start())
    pair.until(m.Ready)
    drawn = m.Sampling(max_tokens=1000, temperature=0.0, ignore_eos=True)
    pair.channel.send(m.Submit(id="a", model=str(folder), prompt=(1, 2, 3), sampling=drawn))
    pair.until(m.Admitted, "a")
    pair.channel.send(m.Pause("a"))
    pair.until(m.Stats)
    before = pair.until(m.Stats)
    began = time.process_time()
    after = pair.until(m.Stats)
    assert after.steps == before.steps and after.paused == 1
    assert time.process_time() - began < 0.5  # of about one second
    pair.channel.send(m.Resume("a"))
    assert pair.until(m.Finished, "a").completion_tokens == 1000
    pair.channel.close()
    pair._thread.join(20)
    assert pair.code == 1  # the front was gone
