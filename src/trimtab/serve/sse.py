"""Server-sent events."""

from __future__ import annotations

import msgspec

from trimtab.serve.errors import ApiError

#: A comment: clients ignore it, proxies and sockets see that the stream lives.
HEARTBEAT = b": waiting\n\n"
_encoder = msgspec.json.Encoder()


def data(value: msgspec.Struct) -> bytes:
    """An event without a name."""
    return b"data: " + _encoder.encode(value) + b"\n\n"


def named(name: str, value: msgspec.Struct) -> bytes:
    """An event with a name."""
    return b"event: " + name.encode() + b"\n" + data(value)


def done() -> bytes:
    """The end, in OpenAI's form."""
    return b"data: [DONE]\n\n"


def error_data(error: ApiError) -> bytes:
    """An error as the last event: OpenAI's clients raise it."""
    return data(error.body())
