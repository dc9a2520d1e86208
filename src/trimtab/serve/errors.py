"""Errors of the HTTP side, in the form OpenAI's clients understand."""

from __future__ import annotations

import math

import msgspec

from trimtab.errors import TrimtabError
from trimtab.serve.types.common import ErrorBody, ErrorReply

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(TrimtabError):
    """A refusal with a status.

    Args:
        status: of HTTP.
        message: one sentence each: what was asked, what is allowed, what to do.
        param: the request field at fault.
        code: a word programs can compare.
        retry_after_s: when a new try may succeed; rounded up to whole seconds in Retry-After.
        retry: False tells clients not to repeat the request by themselves.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s, self.retry = retry_after_s, retry

    def body(self) -> ErrorReply:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return ErrorReply(error=ErrorBody(message=self.message, type=kind, param=self.param, code=self.code))

    def encoded(self) -> bytes:
        """The bytes of `body`."""
        return msgspec.json.encode(self.body())

    def headers(self) -> dict[str, str]:
        """Headers that belong to it."""
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if not self.retry:
            found["x-should-retry"] = "false"  # OpenAI's clients obey it
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, retry_after_s: float = 1.0, code: str = "engine_unavailable") -> ApiError:
    """A 503 that a later try may not meet."""
    return ApiError(503, message, code=code, retry_after_s=retry_after_s)
