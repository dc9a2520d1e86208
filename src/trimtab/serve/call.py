"""One HTTP request on its way through the front: who asks, what is known about it, what goes to the access log."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from trimtab.serve.errors import ApiError, bad
from trimtab.serve.keys import Tenant
from trimtab.serve.messages import CancelReason

_access = logging.getLogger("trimtab.serve.access")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}\Z")


class Call:
    """A request.

    Attributes:
        id: `x-request-id` of the client, or a new one; goes back in the answer.
        tenant: whose key it is.
        arrived: `time.monotonic()`.
        log: fields of the access log; holds names and numbers, never text of the client's.
        token_at: engine's time of the token that the next piece of the stream brings; None = it brings none.
        written: told, when that piece has been written, how many seconds later that was.
        leaves: the reason the engine is told when the answer ends early.
    """

    def __init__(self, scope: Scope, tenant: Tenant | None = None) -> None:
        self.scope = scope
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = self.headers.get("x-request-id", "")
        self.id = asked if _REQUEST_ID.match(asked) else f"req-{secrets.token_hex(12)}"
        self.arrived = time.monotonic()
        self.tenant: Tenant = tenant  # type: ignore[assignment]  # set once the key is known
        self.log: dict[str, Any] = {}
        self.token_at: float | None = None
        self.written: Callable[[float], None] = _nobody
        self.leaves: CancelReason = "disconnect"
        self.path_params: dict[str, str] = scope.get("path_params", {})

    def new_id(self, prefix: str) -> str:
        """An id for what this call makes."""
        return f"{prefix}-{secrets.token_hex(14)}"

    def write_log(self, status: int) -> None:
        """One line of JSON."""
        client = self.scope.get("client")
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "client": client[0] if client else None,
            "key": self.tenant.entry.name if self.tenant else None,
            "method": self.scope["method"],
            "path": self.scope["path"][:200],
            "status": status,
            "seconds": round(time.monotonic() - self.arrived, 4),
        }
        _access.info("%s", msgspec.json.encode(line | self.log).decode())


class Budget:
    """Bytes of bodies that are being read at once, over all requests: many long bodies together are refused too."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def take(self, count: int) -> None:
        """Count bytes.

        Raises:
            ApiError: 429, there are too many.
        """
        if self.used + count > self.limit:
            raise ApiError(
                429, "Too many long bodies are being read at once. Try again in a moment.", code="bodies", retry_after_s=1.0
            )  # fmt: skip
        self.used += count


async def read_body(call: Call, receive: Receive, limit: int, seconds: float, budget: Budget) -> bytes:
    """Read a JSON body; its bytes count in `budget` until it is whole, for then it is decoded at once.

    Raises:
        ApiError: 413 too long, 408 too slow, 415 not JSON, 400 empty, 429 too much at once.
        ConnectionError: the client went away.
    """
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A browser may send other types to another site without asking; this one it may not.
        raise ApiError(
            415,
            f"The content type {kind[:80]!r} is not possible. Send application/json.",
            code="unsupported_media_type",
        )
    length = call.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_long(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                piece = message.get("body", b"")
                if len(body) + len(piece) > limit:
                    raise _too_long(limit)
                budget.take(len(piece))
                body += piece
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {seconds:g} s.", code="body_timeout") from None
    finally:
        budget.used -= len(body)
    if not body:
        raise bad("The body is empty. Send one JSON object.", code="invalid_json")
    return bytes(body)


def _nobody(seconds: float) -> None:
    pass


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413, f"The body is longer than {limit} bytes, the most this server takes. Send less.", code="body_too_large"
    )
