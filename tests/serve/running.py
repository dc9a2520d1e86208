"""A server in a thread of the tests' process; its engine is a process of its own, as it is for users."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from trimtab.runtime.text.tokenizer import Tokenizer
from trimtab.serve.config import ServeConfig
from trimtab.serve.launch import SubprocessLauncher
from trimtab.serve.lifecycle import Service


class ServerThread:
    """Starts with its making; ends by `stop`."""

    def __init__(
        self, config: ServeConfig, launcher: SubprocessLauncher, tokenizer_of: Callable[[str], Tokenizer]
    ) -> None:
        self.service = Service(config, launcher, tokenizer_of)
        self.error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(60), "the server did not start"
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            asyncio.run(self.service.run(lambda _: self._ready.set()))
        except BaseException as error:
            self.error = error
        self._ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.service.port}"

    def call(self, work: Callable[[], Any]) -> None:
        """Do something in the server's loop."""
        loop = self.service._loop
        assert loop is not None
        loop.call_soon_threadsafe(work)

    def stop(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.call(self.service.drain)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not end"
