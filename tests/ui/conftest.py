"""The explorer in a thread of the tests' process, and a browser where one is installed."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

pytest.importorskip("starlette")

from trimtab.serve.config import HttpConfig
from trimtab.ui.explorer.desk import Desk
from trimtab.ui.explorer.handlers import Explorer
from trimtab.ui.explorer.host import Host
from trimtab.ui.explorer.measuring import Measuring

#: Stands in for the measuring process: two steps, then waits to be ended or, told to, ends by itself.
SLOW = 'import sys,time; sys.stdin.read(); print(\'{"label":"rounds","done":1,"total":2}\', flush=True); time.sleep(60)'
FAILS = "import sys; sys.stdin.read(); print('the model melted', file=sys.stderr); sys.exit(2)"


class HostThread:
    """Starts with its making; ends by `stop`."""

    def __init__(self, *, paths: bool = True, measuring: str = SLOW, **settings: Any) -> None:
        config = HttpConfig(**{"port": 0, **settings})
        self.host = Host(config, Explorer(Desk(paths=paths), Measuring((sys.executable, "-c", measuring))))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(60), "the explorer did not start"

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await self.host.run(self._ready.set)

        asyncio.run(main())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.host.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def stop(self) -> None:
        assert self._loop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self.host.stop)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the explorer did not end"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty ledger and no calibration, whatever this user has."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("home")
    patch.setenv("TRIMTAB_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def explorer(home: Path) -> Iterator[HostThread]:
    """An explorer that tests share."""
    running = HostThread()
    yield running
    running.stop()


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., HostThread]]:
    """Start an explorer with settings of its own."""
    started: list[HostThread] = []

    def begin(**settings: Any) -> HostThread:
        started.append(HostThread(**settings))
        return started[-1]

    yield begin
    for running in started:
        running.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium of the system."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
