"""Length-prefixed msgpack frames over a stream socket: an asyncio end and a blocking end, both with bounded buffers.

A frame is a 4-byte big-endian length and that many bytes of msgpack, one message.
"""

from __future__ import annotations

import asyncio
import select
import socket
import time
from typing import Any, Generic, TypeVar

import msgspec

from trimtab.errors import TrimtabError
from trimtab.serve.messages import Message, ToEngine, ToFront

#: Longest body in bytes. A prompt of a million tokens takes five.
MAX_FRAME = 64 << 20
#: Bytes that may wait to be sent before a sender is held up or refused.
MAX_PENDING = 128 << 20
_CHUNK = 1 << 18

M = TypeVar("M")


class ChannelClosed(TrimtabError):
    """The other side is gone, or sent what is no frame."""


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Return the frame of a message.

    Raises:
        TrimtabError: the message is longer than `MAX_FRAME`.
    """
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise TrimtabError(f"A {type(message).__name__} of {len(body)} bytes exceeds a frame's {MAX_FRAME}.")
    return len(body).to_bytes(4, "big") + body


class Frames(Generic[M]):
    """Cuts a stream of bytes into messages, however the stream was cut before.

    Args:
        kind: the union of messages this side understands: `ToEngine` or `ToFront`.
    """

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[M]:
        """Take bytes, return the messages that are now whole.

        Raises:
            ChannelClosed: a frame too long, or bytes that are no message.
        """
        self._buffer += data
        found: list[M] = []
        start = 0
        while len(self._buffer) - start >= 4:
            length = int.from_bytes(self._buffer[start : start + 4], "big")
            if length > MAX_FRAME:
                raise ChannelClosed(f"A frame of {length} bytes was announced; at most {MAX_FRAME} are allowed.")
            if len(self._buffer) - start - 4 < length:
                break
            body = self._buffer[start + 4 : start + 4 + length]
            try:
                found.append(self._decoder.decode(body))
            except msgspec.MsgspecError as error:
                raise ChannelClosed(f"A frame holds no message: {error}.") from None
            start += 4 + length
        del self._buffer[:start]
        return found


class BlockingChannel:
    """The engine's end.

    Args:
        sock: one end of a connected pair; owned from now on.

    Attributes:
        pending: bytes not yet taken by the socket.
    """

    def __init__(self, sock: socket.socket, kind: Any = ToEngine) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames: Frames[Any] = Frames(kind)
        self._ready: list[Any] = []
        self._out = bytearray()
        self._closed = ""

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._out)

    def fileno(self) -> int:
        """For select."""
        return self._sock.fileno()

    def send(self, message: Message, timeout_s: float = 30.0) -> None:
        """Queue a message and send what the socket takes; waits only while more than `MAX_PENDING` bytes are queued.

        Raises:
            ChannelClosed: the other side is gone, or took nothing for `timeout_s`.
        """
        self._out += encode(message)
        self.flush()
        deadline = time.monotonic() + timeout_s
        while len(self._out) > MAX_PENDING:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([], [self._sock], [], left)[1]:
                raise ChannelClosed(f"The other side took nothing for {timeout_s:g} s.")
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            ChannelClosed: the other side is gone.
        """
        try:
            while self._out:
                with memoryview(self._out) as view:
                    sent = self._sock.send(view[:_CHUNK])
                del self._out[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed(f"The other side is gone: {error}.") from None

    def drain(self, timeout_s: float = 5.0) -> bool:
        """Send everything; False if `timeout_s` was not enough."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.flush()
            left = deadline - time.monotonic()
            if not self._out:
                return True
            if left <= 0:
                return False
            select.select([], [self._sock], [], left)

    def receive(self, timeout_s: float | None = 0.0) -> list[Any]:
        """Return the messages that are here, in order; wait up to `timeout_s` for the first (None = for ever).

        What was sent before the other side went is returned first. Sends what is pending while it waits.

        Raises:
            ChannelClosed: the other side is gone and nothing is left.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._read()
            if self._ready:
                found, self._ready = self._ready, []
                return found
            if self._closed:
                raise ChannelClosed(self._closed)
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            _, writable, _ = select.select([self._sock], [self._sock] if self._out else [], [], left)
            if writable:
                self.flush()

    def close(self) -> None:
        """Close the socket; what is pending is lost."""
        self._sock.close()

    def _read(self) -> None:
        try:
            while not self._closed:
                data = self._sock.recv(_CHUNK)
                if not data:
                    self._closed = "The other side has closed the connection."
                self._ready += self._frames.feed(data)
        except BlockingIOError:
            return
        except (OSError, ChannelClosed) as error:
            self._closed = f"The connection broke: {error}"


class AsyncChannel:
    """The front's end; make it with `open`. One task may receive at a time; any may send."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any) -> None:
        self._reader, self._writer = reader, writer
        self._frames: Frames[Any] = Frames(kind)

    @classmethod
    async def open(cls, sock: socket.socket, kind: Any = ToFront) -> AsyncChannel:
        """Take over one end of a connected pair."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=_CHUNK)
        return cls(reader, writer, kind)

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent."""
        return self._writer.transport.get_write_buffer_size()

    def send(self, message: Message) -> None:
        """Queue a message.

        Raises:
            ChannelClosed: the other side is gone, or has left more than `MAX_PENDING` bytes unread.
        """
        if self._writer.is_closing():
            raise ChannelClosed("The other side is gone.")
        if self.pending > MAX_PENDING:
            raise ChannelClosed(f"The other side has left {self.pending} bytes unread.")
        self._writer.write(encode(message))

    async def receive(self) -> list[Any]:
        """Return the next messages, at least one.

        Raises:
            ChannelClosed: the other side is gone.
        """
        while True:
            try:
                data = await self._reader.read(_CHUNK)
            except OSError as error:
                raise ChannelClosed(f"The other side is gone: {error}.") from None
            if not data:
                raise ChannelClosed("The other side has closed the connection.")
            if found := self._frames.feed(data):
                return found

    async def close(self) -> None:
        """Close the socket."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return
