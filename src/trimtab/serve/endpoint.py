"""What every request goes through: key, body, handler, answer, errors, log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from trimtab.errors import SpecError
from trimtab.serve.call import Call, read_body
from trimtab.serve.config import is_loopback
from trimtab.serve.decode import decode
from trimtab.serve.errors import ApiError
from trimtab.serve.front import Answer, Events, HttpFront, Json, Plain
from trimtab.serve.routes import Route
from trimtab.serve.sse import HEARTBEAT

_log = logging.getLogger("trimtab.serve")
#: Status in the log of a request whose client went before the answer; nobody received it.
CLIENT_GONE = 499


class Endpoint:
    """An ASGI application for one route."""

    def __init__(self, front: HttpFront, route: Route) -> None:
        self._front, self._route = front, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        call = Call(scope)
        answer = _Sender(call, send)
        self._front.calls += 1
        try:
            await self._answer(call, receive, answer)
        except ConnectionError:  # the client went
            answer.status = answer.status or CLIENT_GONE
            call.log["gone"] = True
        except ApiError as error:
            await self._refuse(call, answer, error)
        except SpecError as error:
            await self._refuse(call, answer, ApiError(400, str(error)))
        except Exception:
            _log.exception("request %s broke", call.id)
            await self._refuse(call, answer, _broke(call))
        finally:
            self._front.calls -= 1
            self._front.metrics.http.labels(self._route.path, str(answer.status)).inc()
            call.write_log(answer.status)

    async def _answer(self, call: Call, receive: Receive, answer: _Sender) -> None:
        front, route = self._front, self._route
        _check_host(front, call)
        if route.access == "open":
            call.tenant = front.keys.anonymous
        else:
            call.tenant = front.keys.tenant(call.headers.get("authorization"))
            if route.access == "admin" and not call.tenant.entry.admin:
                raise ApiError(
                    403, "This API key may not administrate. Use one whose entry says admin = true.", code="not_admin"
                )
        arguments: list[Any] = []
        if route.request is not None:
            if route.access == "key" and route.engine:
                front.check()  # before the body is read
            body = await read_body(call, receive, front.config.max_body, front.config.body_s, front.bodies)
            arguments.append(decode(body, route.request))
        assert route.handler is not None
        if route.request is None:
            result = await route.handler(front, call)
        else:
            result = await _unless_gone(route.handler(front, call, *arguments), receive)
        await self._send(call, receive, answer, result)

    async def _send(self, call: Call, receive: Receive, answer: _Sender, result: Answer) -> None:
        if isinstance(result, Json):
            await answer.whole(result.status, msgspec.json.encode(result.value), "application/json")
        elif isinstance(result, Plain):
            await answer.whole(result.status, result.body, result.content_type, result.headers)
        else:
            await _unless_gone(self._stream(call, answer, result), receive)

    async def _refuse(self, call: Call, answer: _Sender, error: ApiError) -> None:
        self._front.metrics.rejected.labels(str(error.status), error.code or "").inc()
        call.log["code"] = error.code
        if answer.started:
            answer.abort()
            return
        with contextlib.suppress(ConnectionError):
            await answer.whole(error.status, error.encoded(), "application/json", error.headers())

    async def _stream(self, call: Call, answer: _Sender, result: Events) -> None:
        """Send events as they come; comments while none come; the reader may not stand still for long."""
        beating = asyncio.create_task(self._beat(call, answer))
        try:
            # Leaving closes the generator, which tells the engine, also when this task is cancelled.
            with _Patience(call, answer, self._front.config.slow_reader_s):
                async with contextlib.aclosing(result.parts) as parts:
                    async for part in parts:
                        await self._push(call, answer, part)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as raised:
            if not answer.started:
                raise
            error = raised
            if not isinstance(error, ApiError):
                _log.exception("request %s broke", call.id)
                error = _broke(call)
            call.log["code"] = error.code
            self._front.metrics.rejected.labels(str(error.status), error.code or "").inc()
            with _Patience(call, answer, self._front.config.slow_reader_s):
                await self._push(call, answer, result.failed(error))
        finally:
            beating.cancel()
        await answer.finish()

    async def _beat(self, call: Call, answer: _Sender) -> None:
        """Send a comment whenever nothing else was sent for a while."""
        seconds = self._front.config.heartbeat_s
        while True:
            await asyncio.sleep(answer.last + seconds - time.monotonic())
            if time.monotonic() - answer.last >= seconds and not answer.busy:
                with contextlib.suppress(ConnectionError):
                    await self._push(call, answer, HEARTBEAT)
            elif answer.busy:
                await asyncio.sleep(seconds)

    async def _push(self, call: Call, answer: _Sender, part: bytes) -> None:
        await answer.part(part)
        if (at_s := call.token_at) is not None:
            call.token_at = None
            call.written(time.monotonic() - at_s)


class _Patience:
    """Drops a stream whose reader takes nothing for `seconds`: one timer for all its pieces. A context."""

    def __init__(self, call: Call, answer: _Sender, seconds: float) -> None:
        self._call, self._answer, self._seconds = call, answer, seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(self._seconds, self._look)

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        # A piece that begins to wait now is looked at before its time is over, and then exactly when it is.
        left = self._seconds
        if self._answer.busy:
            left -= time.monotonic() - self._answer.begun
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        self._call.log["code"] = self._call.leaves = "slow_reader"
        self._answer.abort()


_EVENT_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class _Sender:
    """The answer to one request.

    Attributes:
        status: sent, or 0.
        started: whether headers have gone out.
        last: when something was sent, or the request came.
        begun: when the piece that is being sent began.
        busy: a piece is being sent: its reader has yet to take what came before.
    """

    def __init__(self, call: Call, send: Send) -> None:
        self._call, self._raw = call, send
        self.status, self.started = 0, False
        self.last, self.busy, self.begun = call.arrived, False, call.arrived
        self._turn = asyncio.Lock()

    async def whole(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        """An answer in one piece."""
        found = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        await self._start(status, found)
        await self._send({"type": "http.response.body", "body": b"" if self._call.scope["method"] == "HEAD" else body})

    async def part(self, data: bytes) -> None:
        """A piece of a stream."""
        async with self._turn:
            self.busy, self.begun = True, time.monotonic()
            if not self.started:
                await self._start(200, _EVENT_HEADERS)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self.busy, self.last = False, time.monotonic()

    async def finish(self) -> None:
        """The end of a stream."""
        if self.started:
            await self._send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """Close the connection without another byte: the client sees that the answer is not whole."""
        end: Callable[[], None] | None = self._call.scope.get("trimtab.abort")
        if end is not None:
            end()

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.status, self.started = status, True
        found = {"x-request-id": self._call.id, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in found.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _send(self, message: Message) -> None:
        try:
            await self._raw(message)
        except OSError as error:
            raise ConnectionError from error


def _broke(call: Call) -> ApiError:
    return ApiError(500, f"Something broke in the server; its log names {call.id}.", code="internal_error")


async def _unless_gone(work: Awaitable[Any], receive: Receive) -> Any:
    """Do `work`; cancel it when the client goes.

    Raises:
        ConnectionError: the client went first.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([doing, watching], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ConnectionError
    finally:
        for task in (doing, watching):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_host(front: HttpFront, call: Call) -> None:
    """Without keys, answer only to names of this machine: a web page that points its own name here gets nothing.

    Raises:
        ApiError: 403.
    """
    if front.keys.required or front.config.allow_anonymous:
        return
    host = call.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name and not is_loopback(name):
        raise ApiError(
            403,
            "Without API keys this server answers to localhost only; the Host header names another.",
            code="wrong_host",
        )
