"""`trimtab ui`: the explorer alone, without an engine, until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable

from trimtab.serve.app import build_app
from trimtab.serve.config import HttpConfig, is_loopback
from trimtab.serve.front import HttpFront
from trimtab.serve.http import HttpServer, listen
from trimtab.serve.keys import read_keys
from trimtab.serve.lifecycle import logging_to_stderr
from trimtab.serve.metrics import Metrics
from trimtab.serve.routes import ROUTES, Route
from trimtab.ui.explorer.desk import Desk
from trimtab.ui.explorer.handlers import Explorer, assets, routes_of

#: What the explorer shares with a server of models.
_SHARED = tuple(route for route in ROUTES if route.path == "/openapi.json")


def explorer_for(config: HttpConfig) -> Explorer:
    """The explorer of a server: paths may be named only where nobody else can ask."""
    return Explorer(Desk(paths=is_loopback(config.host) and config.api_key_file is None))


def table(explorer: Explorer) -> tuple[Route, ...]:
    """All endpoints of `trimtab ui`."""
    return (*routes_of(explorer), *_SHARED)


class Host:
    """A running explorer.

    Args:
        config: settings.
        explorer: default: one that `config` allows.

    Attributes:
        port: where it listens, once it does.
    """

    def __init__(self, config: HttpConfig, explorer: Explorer | None = None) -> None:
        assets()
        self.config, self.explorer = config, explorer or explorer_for(config)
        self.front = HttpFront(config, read_keys(config.api_key_file), Metrics(None))
        self.server = HttpServer(build_app(self.front, table=table(self.explorer)), config)
        self.port = 0

    @property
    def url(self) -> str:
        """Of the page."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}/ui/"

    async def run(self, started: Callable[[], None] | None = None) -> None:
        """Serve until `stop`; a measurement that still runs ends with it.

        Raises:
            SpecError: the address is taken.
        """
        sock = listen(self.config.host, self.config.port)
        self.port = sock.getsockname()[1]
        if started is not None:
            started()
        try:
            await self.server.serve(sockets=[sock])
        finally:
            await self.explorer.measuring.cancel()

    def stop(self) -> None:
        """End."""
        self.server.should_exit = True


def serve_explorer(config: HttpConfig, opened: Callable[[str], None] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Args:
        config: settings.
        opened: called with the address once it listens.

    Raises:
        SpecError: settings that are not possible, or the address is taken.
    """

    async def main() -> None:
        host = Host(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, host.stop)

        def started() -> None:
            print(f"Trimtab explorer at {host.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
            if opened is not None:
                opened(host.url)

        await host.run(started)

    with logging_to_stderr():
        logging.getLogger("trimtab.serve.access").setLevel(logging.WARNING)  # one user, who sees the page
        asyncio.run(main())
    return 0
