"""The HTTP/1.1 protocol with what uvicorn leaves open: limits on headers and connections, and peers that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from trimtab.serve.config import HttpConfig
from trimtab.serve.errors import ApiError

#: Bytes the system may hold for a reader that is slow; with uvicorn's own 64 KiB it bounds a connection's memory.
_SEND_BUFFER = 256 << 10
#: A peer that answers nothing at all is gone after about this many seconds.
_DEAD_PEER_S = 60


def make_protocol(config: HttpConfig) -> type[HttpToolsProtocol]:
    """A protocol class with the limits of `config`."""

    class Protocol(HttpToolsProtocol):
        """See the module."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._header_timer: asyncio.TimerHandle | None = None
            self._header_bytes = 0
            self._in_headers = True

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > config.max_connections:
                transport.abort()
                return
            _watch_peer(transport)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_headers:
                self._header_bytes += len(data)
            super().data_received(data)
            if self._in_headers and self._header_bytes > config.max_headers:
                self._refuse_headers()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers = True
            self.scope["trimtab.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]
            if self._header_timer is None:
                self._await_headers()

        def on_headers_complete(self) -> None:
            self._stop_timer()
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            self._in_headers, self._header_bytes = False, 0
            if size > config.max_headers:
                self._refuse_headers()
                raise ValueError("headers too long")
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            """Uvicorn's answer to what is no HTTP; not after an answer of ours."""
            if not self.transport.is_closing():
                super().send_400_response(msg)

        def _await_headers(self) -> None:
            self._header_timer = self.loop.call_later(config.header_s, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse_headers(self) -> None:
            if self.transport.is_closing():
                return
            body = ApiError(
                431, f"The headers are longer than {config.max_headers} bytes. Send less.", code="headers_too_large"
            ).encoded()
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return Protocol


def _watch_peer(transport: asyncio.Transport) -> None:
    """Let the system notice a peer that is gone without a word, and hold little for one that is slow."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [
        (socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", None), _DEAD_PEER_S // 2),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), 10),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), 3),
        # a peer that keeps a window of zero is alive: the slow reader's limit is for that one
    ]
    for level, name, value in options:
        if name is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(level, name, value)
