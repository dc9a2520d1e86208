"""The HTTP process itself: where it listens, and a server that leaves signals to its owner."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from trimtab.errors import SpecError
from trimtab.serve.config import HttpConfig
from trimtab.serve.protocol import make_protocol

#: Connections that wait to be taken.
_BACKLOG = 256


class HttpServer(uvicorn.Server):
    """Uvicorn without signal handlers of its own, with the limits of `config`."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app, host=config.host, port=config.port, http=make_protocol(config), ws="none", lifespan="off",
                log_config=None, access_log=False, timeout_keep_alive=int(max(config.idle_s, 1)), timeout_graceful_shutdown=2,
                server_header=False, date_header=False, proxy_headers=False, backlog=_BACKLOG,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the owner's."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        SpecError: it is taken, or not this machine's.
    """
    sock = None
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sock = socket.socket(found[0][0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(found[0][4])
        sock.listen(_BACKLOG)  # whoever is told the address may connect at once
    except OSError as error:
        if sock is not None:
            sock.close()
        raise SpecError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error}. Try another --port, or 0 for a free one."
        ) from None
    return sock
