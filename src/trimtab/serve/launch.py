"""How an engine process is started."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from typing import Protocol


class Process(Protocol):
    """A running engine."""

    @property
    def pid(self) -> int:
        """Of the operating system."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        ...


class Launcher(Protocol):
    """Starts engines."""

    async def launch(self) -> tuple[socket.socket, Process]:
        """Start one; return our end of its socket and the process."""
        ...


class SubprocessLauncher:
    """Starts ``module.main(channel)`` in a process that ends with this one (see `trimtab.serve.child`).

    Args:
        module: with ``main(channel: BlockingChannel) -> int``.
        environment: added to this process's.
    """

    def __init__(self, module: str = "trimtab.serve.engine.main", environment: Mapping[str, str] | None = None) -> None:
        self._module, self._environment = module, dict(environment or {})

    async def launch(self) -> tuple[socket.socket, Process]:
        """Start it; its standard output goes to our standard error, so that ours stays for data."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "trimtab.serve.child", str(os.getpid()), str(theirs.fileno()), self._module,
                    pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=sys.__stderr__,
                    env=os.environ | self._environment,
                )  # fmt: skip
            except BaseException:
                ours.close()
                raise
        return ours, process
